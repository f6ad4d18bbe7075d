"""Set-up before any test module imports jax, the fixture for real test data, a small training, and the table of parity."""

import contextlib
import dataclasses
import http.server
import json
import os
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Eight fake CPU devices, so that meshes can be tested anywhere. Without a mesh everything still runs on the first one.
DEVICES = "--xla_force_host_platform_device_count"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
# No test may reach a network: a model hub is asked for nothing, not even for its own absence.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real radiographs, reports, trained weights and golden values beside the checkout."""
    if not REAL.is_dir():
        pytest.skip(f"no real test data: {REAL} does not exist")
    return REAL


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed phantom of 24 studies, 32 pixels and 512 pieces."""
    from data import packing

    out = tmp_path_factory.mktemp("tiny") / "corpus"
    arguments = packing.Arguments(
        dataset="phantom", source=None, image_size=32, studies=24, seed=0, tokenizer=None, vocab_size=512
    )
    packing.pack(arguments, out, workers=1, progress=False)
    return out


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compares a text with tests/goldens/NAME; UPDATE_GOLDENS=1 writes it instead, to be looked at and committed."""

    def compare(name: str, text: str) -> None:
        file = Path(__file__).parent / "goldens" / name
        if os.environ.get("UPDATE_GOLDENS"):
            file.write_text(text, encoding="utf-8")
        again = f"if this change is meant: UPDATE_GOLDENS=1 python -m pytest {os.environ['PYTEST_CURRENT_TEST'].split('::')[0]}"
        found = file.read_text(encoding="utf-8") if file.exists() else ""
        assert text.splitlines() == found.splitlines(), again

    return compare


@dataclasses.dataclass(frozen=True)
class Training:
    """What `launch.train` does, in this process, on the tiny corpus, with a model of width 32."""

    corpus: Path

    def config(self, stage: str, **changes: Any) -> Any:
        """An experiment for stage lm, 1, 2 or 3; `changes` are its top-level settings."""
        from configs import common

        vision = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 2, "mlp_dim": 64}
        seen = {**vision, "feature_layer": -2}
        text = {"vocab_size": 512, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64, "max_positions": 64}
        llm = {"vocab_size": 512, "width": 32, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_dim": 64}
        lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ("q", "k", "v", "o", "gate", "up", "down")}
        stages: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str, int, int]] = {
            "lm": ("generative", {"llm": llm}, ("params/llm/.*",), "text", 64, 63),
            "stage1": (
                "contrastive",
                {"vision": vision, "text": text, "embed_dim": 16, "loss": "softmax"},
                (".*",),
                "clip",
                64,
                0,
            ),
            "stage2": ("generative", {"vision": seen, "llm": llm}, ("params/projector/.*",), "plain", 64, 62),
            "stage3": (
                *("generative", {"vision": seen, "llm": llm, "lora": lora}),
                *(("params/projector/.*", "lora/.*"), "v1", 160, 64),
            ),
        }
        task, model, trainable, template, length, targets = stages[stage]
        data = {"template": template, "text_length": length, "target_length": targets}
        config = common.experiment(task, model, trainable, data, steps=4, batch_size=8)
        config.update({"log_every": 1, "checkpoint_every": 2, "checkpoint_minutes": 0.0, **changes})
        return config

    def batches(self, config: Any) -> Any:
        """The endless iterator of an experiment."""
        from rad_jax.corpus import Corpus
        from rad_jax.input_pipeline import train_iterator

        return train_iterator(
            Corpus.open(self.corpus),
            config.data.split,
            template=config.data.template,
            batch_size=config.batch_size,
            text_length=config.data.text_length,
            target_length=config.data.target_length,
            image_size=32,
            seed=config.seed,
            selection=config.data.selection,
        )

    def batch(self, config: Any, rows: int = 8, seed: int = 0, blank: tuple[int, ...] = ()) -> dict[str, Any]:
        """A batch of random images and words of many lengths; the `blank` rows count for nothing."""
        import numpy as np

        from rad_jax.prompts import IMAGE_ID

        rng = np.random.default_rng(seed)
        width, targets = 12, 5
        length = rng.integers(7, width + 1, rows, dtype=np.int32)
        weight = np.ones(rows, np.float32)
        weight[list(blank)] = 0
        batch: dict[str, Any] = {
            "length": length,
            "weight": weight,
            "tokens": rng.integers(3, 512, (rows, width), dtype=np.int32),
        }
        batch["tokens"][np.arange(width) >= length[:, None]] = 0
        if "vision" in config.model:
            batch["image"] = rng.integers(0, 256, (rows, 32, 32), dtype=np.uint8)
        if config.task == "generative":
            if "vision" in config.model:
                batch["tokens"][np.arange(rows), rng.integers(0, 4, rows)] = IMAGE_ID
            last = length[:, None] - 1 - rng.integers(1, targets + 1, (rows, 1))
            batch["target_positions"] = np.minimum(last + np.arange(targets, dtype=np.int32), length[:, None] - 2)
            real = last + np.arange(targets) < length[:, None] - 1
            batch["targets"] = np.take_along_axis(batch["tokens"], batch["target_positions"] + 1, axis=1)
            batch["target_weights"] = (real * weight[:, None]).astype(np.float32)
        return batch

    def variables(self, config: Any, seed: int = 0) -> Any:
        """Every variable of an experiment as numpy, all of them random, norms, biases and adapters too."""
        import flax.linen as nn
        import jax
        import numpy as np

        from rad_jax import tasks

        rng = np.random.default_rng(seed)
        shapes = nn.unbox(jax.eval_shape(tasks.make_task(config).init, jax.random.key(0)))

        def draw(path: Any, leaf: Any) -> Any:
            fan_in = leaf.size // (leaf.shape[0] * leaf.shape[-1]) if leaf.ndim > 2 else 100
            values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
            return np.asarray(values + (path[-1].key in ("scale", "logit_scale")), np.float32)

        return jax.tree_util.tree_map_with_path(draw, shapes)

    def mesh(self, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Any:
        """A mesh over the first so many devices."""
        import jax
        import numpy as np
        from jax.sharding import AxisType, Mesh

        from rad_jax.sharding import AXES

        shape = (data, fsdp, tensor)
        # On a CPU there are as many as are asked for: too few of them is an error.
        if jax.default_backend() != "cpu" and jax.device_count() < data * fsdp * tensor:
            pytest.skip(
                f"needs {data * fsdp * tensor} {jax.default_backend()} devices, and there are {jax.device_count()}"
            )
        devices = np.asarray(jax.devices()[: data * fsdp * tensor]).reshape(shape)
        return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def run(
        self,
        config: Any,
        workdir: Path,
        bases: tuple[Path, ...] = (),
        *,
        stop: int | None = None,
        mesh: Any = None,
        beside: Any = None,
    ) -> None:
        """Trains; with `stop`, as if killed after that many batches."""
        from rad_jax import checkpoint, state, tasks, train
        from rad_jax.corpus import Corpus

        data = Corpus.open(self.corpus).identity(config.data.split, config.data.selection)
        runs = [checkpoint.load_run(path) for path in bases]
        checkpoint.open_workdir(workdir, config.to_dict(), data, self.corpus / "tokenizer.json", runs)
        base = state.join(*(run.variables for run in runs))
        batches: Any = self.batches(config)
        if stop is not None:
            batches = Interrupted(batches, stop)
        task = tasks.make_task(config)
        # Of rows so short many hold no word that is learned.
        beside = beside or train.Beside(bad_rows=1.0)
        train.run(config, task, base, batches, data["fingerprint"], workdir, mesh or self.mesh(), beside)


class Interrupted:
    """An iterator that raises KeyboardInterrupt after some batches."""

    def __init__(self, batches: Any, left: int):
        self._batches, self._left = batches, left

    def __next__(self) -> Any:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return next(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


@pytest.fixture(scope="session")
def training(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    import jax

    # Runs compile the same few steps again and again; nearly all of their time would go there.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Training(tiny_corpus)


@pytest.fixture(scope="session")
def chain(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four finished runs lm, stage1, stage2 and stage3, each on the ones before."""
    folder = tmp_path_factory.mktemp("chain")
    training.run(training.config("lm"), folder / "lm")
    training.run(training.config("stage1"), folder / "stage1")
    training.run(training.config("stage2"), folder / "stage2", (folder / "lm", folder / "stage1"))
    training.run(training.config("stage3"), folder / "stage3", (folder / "stage2",))
    return folder


FORWARD = 1e-5  # float32 rounding of two different summation orders, at activations of size 1 to 10
GRADIENT = 1e-4  # the same through the backward pass, relative
DISTRIBUTIONS = {
    "open_clip": "open_clip_torch"
}  # the other libraries are installed under the name they are imported by


class Parity:
    """Compares, and keeps a row for the table that is printed at the end of the run."""

    def __init__(self, node: pytest.Item):
        self._node = node

    def forward(self, what: str, against: str, ours: Any, theirs: Any, tolerance: float = FORWARD) -> None:
        """Largest absolute difference, over arrays of the same shape."""
        import numpy as np

        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        absolute = float(np.abs(ours - theirs).max())
        greatest = float(np.abs(theirs).max())
        self._row(what, against, 1, absolute, absolute / greatest if greatest else 0.0, tolerance, "absolute")

    def gradients(self, what: str, against: str, ours: Any, theirs: Any, tolerance: float = GRADIENT) -> None:
        """Largest difference of each leaf relative to its largest entry, or to a hundredth of the largest gradient anywhere.

        The floor is for gradients that are zero but for rounding, such as the key bias's (a softmax does not see a constant).
        """
        import numpy as np

        from rad_jax.interop.tables import flatten

        mine, other = flatten(ours), flatten(theirs)
        assert mine.keys() == other.keys()
        floor = 1e-2 * max(np.abs(g).max() for g in other.values())
        assert floor > 0
        apart = {path: np.abs(mine[path] - g).max() for path, g in other.items()}
        relative = max(apart[path] / max(np.abs(g).max(), floor) for path, g in other.items())
        self._row(what, against, len(other), float(max(apart.values())), float(relative), tolerance, "relative")

    def equal(self, what: str, against: str, ours: Any, theirs: Any) -> None:
        """Equal lists of ids."""
        different = float(list(ours) != list(theirs))
        self._row(what, against, 1, different, different, 0.0, "ids equal")

    def tensors(self, what: str, against: str, ours: Any, theirs: Any) -> None:
        """The same tensors by name, bit for bit, dtypes included; NaN would not be told from NaN by value."""
        import numpy as np

        assert set(ours) == set(theirs)
        for name in theirs:
            a, b = np.asarray(ours[name]), np.asarray(theirs[name])
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes(), name
        self._row(what, against, len(theirs), 0.0, 0.0, 0.0, "bits equal")

    def _row(
        self, what: str, against: str, tensors: int, absolute: float, relative: float, tolerance: float, kind: str
    ) -> None:
        row = [what, versioned(against), tensors, absolute, relative, tolerance, kind]
        self._node.user_properties.append(("parity", row))
        judged = relative if kind == "relative" else absolute
        assert judged <= tolerance, f"{what} against {against}: {judged:.2e} is over {tolerance:.0e} ({kind})"


def versioned(against: str) -> str:
    """The libraries in a text, each with its version."""
    from importlib.metadata import PackageNotFoundError, version

    words = []
    for word in against.split(" "):
        words.append(word)
        if word in ("timm", "transformers", "open_clip", "peft", "torch"):
            with contextlib.suppress(PackageNotFoundError):
                words.append(version(DISTRIBUTIONS.get(word, word)))
    return " ".join(words)


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    return Parity(request.node)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "parity"]
    if not rows:
        return
    terminalreporter.section("parity")
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    terminalreporter.line(
        f"{'what':{widths[0]}}  {'against':{widths[1]}}  tensors  max abs  max rel  tolerance  of what is judged"
    )
    for what, against, tensors, absolute, relative, tolerance, kind in rows:
        verdict = "" if (relative if kind == "relative" else absolute) <= tolerance else "  OVER"
        terminalreporter.line(
            f"{what:{widths[0]}}  {against:{widths[1]}}  {tensors:7d}  {absolute:7.1e}  {relative:7.1e}  {tolerance:9.0e}  {kind}{verdict}"
        )


class ChatServer:
    """A chat endpoint on this machine that answers with `answer(body)`, except where `faults` (by number of the request, from 0) say otherwise.

    A fault is a name: busy busy_ms error slow drip truncated disconnect garbage not_json filtered azure_filtered cut_off refusal empty
    redirect unauthorised missing quota no_schema no_temperature new_limit; or a function of the handler.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], str]):
        self.answer = answer
        self.faults: dict[int, Any] = {}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._lock, outer = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    outer._respond(self, outer.faults.get(number), body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def send(
        self, handler: Any, status: int, value: Any, headers: dict[str, str] | None = None, short: int = 0
    ) -> None:
        """A response; `short` bytes fewer than it announces."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(data[: len(data) - short])

    def reply(self, text: Any, finish: str = "stop", **more: Any) -> dict[str, Any]:
        """A whole answer, charged with 10 tokens asked and 5 answered."""
        message = {"role": "assistant", "content": text, **more}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}

    def _respond(self, handler: Any, fault: Any, body: dict[str, Any]) -> None:
        def complain(name: str, code: str) -> dict[str, Any]:
            return {
                "error": {"message": f"Unsupported parameter: '{name}' is not supported", "code": code, "type": "x"}
            }

        secret = {"error": {"message": "SECRET report text", "code": "x", "type": "server_error"}}
        quota = {"error": {"message": "SECRET", "code": "insufficient_quota"}}
        filtered = {"error": {"message": "SECRET", "code": "content_filter"}}
        simple: dict[str, tuple[Any, ...]] = {
            "busy": (429, secret, {"Retry-After": "0.2"}),
            "busy_ms": (429, secret, {"retry-after-ms": "150"}),
            "busy_long": (429, secret, {"Retry-After": "4000"}),
            "error": (500, secret),
            "truncated": (200, self.reply("half of it"), None, 20),
            "garbage": (200, b"\x00\xff<html>"),
            "not_json": (200, b'{"choices": []}'),
            "filtered": (200, self.reply("SECRET", "content_filter")),
            "azure_filtered": (400, filtered),
            "cut_off": (200, self.reply('{"half', "length")),
            "refusal": (200, self.reply(None, refusal="SECRET")),
            "empty": (200, self.reply(" ")),
            "redirect": (307, b"", {"Location": "http://192.0.2.1/v1"}),
            "unauthorised": (401, secret),
            "missing": (404, secret),
            "quota": (429, quota),
            "no_schema": (400, complain("response_format", "unsupported_parameter")),
            "no_temperature": (400, complain("temperature", "unsupported_value")),
            "new_limit": (400, complain("max_tokens", "unsupported_parameter")),
            "no_top_p": (422, {"detail": [{"loc": ["body", "top_p"], "msg": "Extra inputs are not permitted"}]}),
            "too_large": (
                400,
                {
                    "error": {
                        "message": "max_tokens is too large: at most 10 are supported",
                        "param": "max_tokens",
                        "code": "invalid_value",
                    }
                },
            ),
            "bad_request": (400, {"error": {"message": "SECRET", "code": "context_length_exceeded"}}),
        }
        if callable(fault):
            fault(handler)
        elif fault == "slow":
            time.sleep(1.5)
        elif fault == "drip":  # a byte now and then: no single read is late
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            for _ in range(30):
                handler.wfile.write(b" ")
                time.sleep(0.05)
        elif fault == "disconnect":
            handler.connection.close()
        elif fault == "no_http":
            handler.wfile.write(b"SSH-2.0-garbage\r\n")
        elif fault:
            self.send(handler, *simple[fault])
        else:
            self.send(handler, 200, self.reply(self.answer(body)))


@pytest.fixture(scope="session")
def client_options() -> Callable[..., Any]:
    """What the flags of a command that asks a language model say (`rad_jax.chat.command`), with the command's own."""

    def options(**own: Any) -> Any:
        unset = ("key_variable", "attested_by", "cache", "max_cost", "requests_per_minute", "tokens_per_minute")
        values = {
            **dict.fromkeys((*unset, "prompt", "limit")),
            "model": "m",
            "temperature": 0.0,
            "top_p": 1.0,
            "max_tokens": 100,
            "concurrency": 4,
            "timeout_s": 60.0,
            "max_failures": 20,
            "dry_run": False,
            "prices": ["0", "0"],
        }
        return types.SimpleNamespace(**values | own)

    return options


@pytest.fixture
def chat_server() -> Iterator[Callable[[Callable[[dict[str, Any]], str]], ChatServer]]:
    """Starts chat endpoints; all are stopped at the end of the test."""
    servers: list[ChatServer] = []

    def start(answer: Callable[[dict[str, Any]], str]) -> ChatServer:
        servers.append(ChatServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
