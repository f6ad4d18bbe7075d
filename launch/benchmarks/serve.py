"""Eight requests at once, or one: the serving engine beside transformers' generate, on the same exported bundle of random weights.

The requests have films of their own, reasons of eight lengths, and texts of the lengths that eight findings sections have. transformers is
used as its users do: the eight padded on the left in one batch, which runs until its longest text is done, or one after the other. Its
prompts are tokenised and its pixels prepared beforehand; ours are not. On a CPU both compute in float32, on a card in float16.
"""

import dataclasses
import functools
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarks import pairs
from rad_jax.errors import UserError
from rad_jax.models.llama import LlamaConfig
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import VitConfig
from rad_jax.prompts import question

# Eighths of the lengths of 1,653 findings sections of Open-i in Llama's tokens (mean 60).
TEXT_LENGTHS = (53, 27, 101, 38, 67, 46, 79, 59)
REASON_WORDS = (4, 12, 7, 20, 2, 15, 9, 5)
SKIPPED = "tower's last block; the head on the prompt; rows whose text has ended; the Python of generate() and of every module"
TOWER = VitConfig(224, 14, width=192, depth=12, heads=3, mlp_dim=768, layer_scale=True, feature_layer=-2)
SIZES = {
    "demo": LlavaConfig(
        LlamaConfig(1024, width=128, depth=4, heads=4, kv_heads=4, mlp_dim=384, max_positions=512),
        VitConfig(112, 16, width=192, depth=3, heads=6, mlp_dim=576, layer_scale=True, feature_layer=-2),
    ),
    "mid": LlavaConfig(
        LlamaConfig(2000, width=256, depth=4, heads=4, kv_heads=4, mlp_dim=688, max_positions=1024), TOWER
    ),
    "large": LlavaConfig(
        LlamaConfig(2000, width=512, depth=8, heads=8, kv_heads=8, mlp_dim=1376, max_positions=1024), TOWER
    ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A bundle, what is asked of it (a film uint8 [Y, X], a question and the number of tokens to write, each), and "cpu" or "cuda"."""

    bundle: Path
    requests: Sequence[tuple[np.ndarray, str, int]]
    device: str


def requests(size: int, words: Sequence[str], rng: np.random.Generator) -> list[tuple[np.ndarray, str, int]]:
    """Eight films of noise, squares of this size, and reasons made of these words."""
    return [
        (rng.integers(0, 256, (size, size), dtype=np.uint8), question(" ".join(rng.choice(words, reason))), length)
        for reason, length in zip(REASON_WORDS, TEXT_LENGTHS, strict=True)
    ]


def of_bundle(folder: Path, device: str) -> Problem:
    """Requests to a bundle that is there."""
    from rad_jax.serving.bundle import read

    words = [
        "cough",
        "fever",
        "dyspnea",
        "pain",
        "trauma",
        "line",
        "placement",
        "pneumonia",
        "effusion",
        "edema",
        "follow",
        "up",
        "chest",
    ]
    return Problem(folder, requests(read(folder).tower.image_size, words, np.random.default_rng(0)), device)


def problem(folder: Path, config: LlavaConfig, device: str) -> Problem:
    """Writes a bundle of random weights and thinks of requests.

    The row of the head for the end of sequence is zero and so never the largest: texts end where they are told to, on both sides.
    """
    from rad_jax.interop import hf_llava, tables
    from rad_jax.interop.export import export
    from rad_jax.interop.exported import Exported
    from rad_jax.prompts import train_tokenizer

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnoprstuvw"), rng.integers(3, 9))) for _ in range(600)]
    texts = [(None, " ".join(rng.choice(words, 12))) for _ in range(400)]
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(texts, config.llm.vocab_size, folder / "tokenizer.json")

    def drawn(name: str, shape: Sequence[int]) -> np.ndarray:
        if len(shape) == 1:
            return (0.1 * rng.standard_normal(shape) + (name.endswith("weight"))).astype(np.float32)
        # Words larger than what the layers add, so that a text does not end in one word over and over.
        fan_in = 0.1 if "embed_tokens" in name else np.prod(shape[1:])
        return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    assert config.vision is not None
    whole = dataclasses.replace(config, vision=dataclasses.replace(config.vision, feature_layer=None))
    table = hf_llava.table(whole)
    tensors = {name: drawn(name, shape) for name, shape in table.shapes().items()}
    tensors["language_model.lm_head.weight"][tokenizer.eos_id] = 0
    model = Exported({"params": tables.load(table, tensors)}, config, folder / "tokenizer.json", {"run": "benchmark"})
    export(model, "hf", folder / "bundle", "float32")
    return Problem(folder / "bundle", requests(config.vision.image_size, words, rng), device)


# Of a run: for each request its tokens and the seconds until its first one.
Written = list[tuple[list[int], float]]


def ours(problem: Problem, threads: int) -> Callable[[int], Written]:
    """The engine: so many of the requests, all submitted at once."""
    import torch

    from rad_jax.serving import loading
    from rad_jax.serving.engine import Broken, Piece, Request, Told

    torch.set_num_threads(threads)
    engine = loading.load(problem.bundle, device=problem.device, say=lambda _: None)

    def write(count: int) -> Written:
        began, ended = time.perf_counter(), queue.SimpleQueue[Broken | None]()
        written: list[tuple[list[int], list[float]]] = [([], []) for _ in range(count)]

        def tell(place: int, found: Told) -> None:
            if isinstance(found, Piece):
                written[place][0].append(found.token)
                written[place][1].append(time.perf_counter() - began)
            else:
                ended.put(found)

        for place, (film, text, length) in enumerate(problem.requests[:count]):
            engine.submit(Request(film, text, length), functools.partial(tell, place))
        for _ in range(count):
            if (failure := ended.get()) is not None:
                raise failure
        return [(tokens, seconds[0]) for tokens, seconds in written]

    return write


def theirs(problem: Problem, threads: int, batch: int) -> Callable[[int], Written]:
    """transformers' generate, so many rows at once: the requests in batches of `batch`, one batch after the other."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration, StoppingCriteria, logging

    from rad_jax.images import normalise

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.float16 if problem.device == "cuda" else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(problem.bundle, dtype=dtype, local_files_only=True)
    model.eval().to(problem.device)
    processor = AutoProcessor.from_pretrained(problem.bundle, local_files_only=True, backend="pil")
    way, ends = processor.image_processor, model.generation_config.eos_token_id

    class First(StoppingCriteria):
        """Is called after every token; stops nothing."""

        at = 0.0

        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            if not self.at:
                ids[:, -1].tolist()  # a card has the token only then
                self.at = time.perf_counter()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def inputs(rows: Sequence[tuple[np.ndarray, str, int]]) -> dict[str, Any]:
        texts = []
        for _, text, _ in rows:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            turns = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(turns, add_generation_prompt=True))
        films = np.stack([film for film, _, _ in rows])
        given = processor(
            images=[np.repeat(film[..., None], 3, -1) for film in films],
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        pixels = normalise(films, np, way.image_mean, way.image_std).transpose(0, 3, 1, 2)
        given["pixel_values"] = torch.from_numpy(np.ascontiguousarray(pixels)).to(dtype)
        return {name: tensor.to(problem.device) for name, tensor in given.items()}

    prepared: dict[int, list[tuple[dict[str, Any], list[int]]]] = {}

    def prepare(count: int) -> list[tuple[dict[str, Any], list[int]]]:
        groups = [problem.requests[i : min(i + batch, count)] for i in range(0, count, batch)]
        return [(inputs(group), [length for _, _, length in group]) for group in groups]

    @torch.inference_mode()
    def write(count: int) -> Written:
        if count not in prepared:  # in a run that does not count
            prepared[count] = prepare(count)
        written: Written = []
        began = time.perf_counter()
        for given, lengths in prepared[count]:
            first = First()
            ids = model.generate(**given, max_new_tokens=max(lengths), stopping_criteria=[first])
            new = ids[:, given["input_ids"].shape[1] :].tolist()
            written += [(upto(row[:length], ends), first.at - began) for row, length in zip(new, lengths, strict=True)]
        return written

    return write


def upto(tokens: list[int], end: int | list[int]) -> list[int]:
    """The first tokens, with the one that ends the text if there is one."""
    ends = [end] if isinstance(end, int) else end
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


def run(
    rounds: int,
    threads: int,
    device: str = "cpu",
    bundle: Path | None = None,
    sizes: Mapping[str, LlavaConfig] = SIZES,
) -> list[dict[str, Any]]:
    """The rows of all sizes, or of a bundle that is there.

    Raises:
        UserError: the sides write different tokens in float32.
    """
    if bundle is not None:
        return compare(bundle.name, of_bundle(bundle, device), rounds, threads)
    rows = []
    for name, config in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(name, problem(Path(folder) / name, config, device), rounds, threads)
    return rows


def compare(name: str, problem: Problem, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one size: eight requests against a batch of eight and against one by one, and a single request."""
    exact = problem.device == "cpu"  # in float16 sums of another order round to other numbers
    sides = {
        "ours": pairs.Side("ours", threads, ours, problem, threads),
        "batch of 8": pairs.Side("batch of 8", threads, theirs, problem, threads, 8),
        "one by one": pairs.Side("one by one", threads, theirs, problem, threads, 1),
    }
    try:
        pairs.alternate(sides, 1, (8,))
        eight = pairs.alternate(sides, rounds, (8,))
        single = {side: sides[side] for side in ("ours", "one by one")}
        pairs.alternate(single, 1, (1,))
        one = pairs.alternate(single, rounds, (1,))
    finally:
        for side in sides.values():
            side.stop()
    return [
        _row(f"{name}, 8 requests, batch of 8", {s: eight[s] for s in ("ours", "batch of 8")}, exact),
        _row(f"{name}, 8 requests, one by one", {s: eight[s] for s in ("ours", "one by one")}, exact),
        _row(f"{name}, 1 request", one, exact),
    ]


def _row(name: str, runs: Mapping[str, Sequence[pairs.Run]], exact: bool) -> dict[str, Any]:
    tokens = {side: [[ids for ids, _ in run.result] for run in done] for side, done in runs.items()}
    expected = tokens["ours"][0]
    if exact and any(found != expected for done in tokens.values() for found in done):
        raise UserError(f"{name}: ours and transformers write different tokens, so their times cannot be compared.")
    row = pairs.row(name, runs, SKIPPED)
    for side, key in (("ours", "ours"), (row["peer"], "peer")):
        row[f"{key}_tokens_per_s"] = sum(map(len, tokens[side][0])) / row[f"{key}_s"]
        waited = [statistics.fmean(first for _, first in run.result) for run in runs[side]]
        row[f"{key}_first_token_s"] = statistics.median(waited)
    count = sum(map(len, expected))
    equal = sum(map(_same, expected, tokens[row["peer"]][0]))
    told = f"all {count}" if equal == count else f"up to a text's first other one {equal} of {count}"
    row["equality"] = (
        f"{told} tokens equal; {row['ours_tokens_per_s']:.0f} tokens/s, theirs {row['peer_tokens_per_s']:.0f}; first token after "
        f"{row['ours_first_token_s']:.3f} s, theirs {row['peer_first_token_s']:.3f} s, means over the requests"
    )
    return row


def _same(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
