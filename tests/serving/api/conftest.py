"""The real server and the real engine on a loopback port, over a model that writes what it was told to."""

import dataclasses
import io
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

import torch
import uvicorn
from PIL import Image

from rad_jax import prompts
from rad_jax.serving.app import Connection, Server, Settings, create_app
from rad_jax.serving.engine import Engine, EngineInfo

SIZE, PATCHES = 28, 4
INFO = EngineInfo("scripted", "0.1.0", "ab" * 32, "cpu", "float32", "float32", 2, 2048, SIZE)
SENTENCE = "the lungs are clear, no pleural effusion or pneumothorax, heart size is normal. "


def said(film: np.ndarray | None) -> str:
    """What the scripted model writes of a film uint8 [Y, X]: the brighter, the longer."""
    return "no film." if film is None else (SENTENCE * (int(film.mean()) // 64 + 1)).strip()


class ScriptedModel:
    """A model for `Engine` that writes `said`. `go` holds it before each step while it is not set; `seconds` is what a step takes."""

    def __init__(self, tokenizer: prompts.Tokenizer, slots: int, seconds: float):
        self.slots, self.max_tokens = slots, INFO.max_tokens
        self.go = threading.Event()
        self.go.set()
        self.endless = self.broken = False
        self._tokenizer, self._seconds = tokenizer, seconds
        self._rows: dict[int, list[int]] = {}

    def prefill(self, asked: Sequence[Any], slot: int) -> tuple[Any, list[np.ndarray | None]]:
        for place, prompt in enumerate(asked, slot):
            self._rows[place] = [*self._tokenizer.encode(said(prompt.film)), self._tokenizer.eos_id]
        return self._next(slot, len(asked), [prompt.attention for prompt in asked])

    def step(self, rows: Sequence[Any]) -> tuple[Any, list[np.ndarray | None]]:
        time.sleep(self._seconds)
        self.go.wait(30)
        if self.broken:
            raise RuntimeError("PATIENT^NAME in the message of a crash")
        return self._next(0, len(rows), [row.look_from is not None for row in rows])

    def move(self, source: int, target: int, length: int) -> None:
        self._rows[target] = self._rows[source]

    def _next(self, first: int, count: int, attention: list[bool]) -> tuple[Any, list[np.ndarray | None]]:
        logits = torch.zeros(count, self._tokenizer.vocab_size)
        for i in range(count):
            ids = self._rows[first + i]
            logits[i, ids[0] if self.endless else ids.pop(0)] = 1
        look = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
        return logits, [look if wanted else None for wanted in attention]


@dataclasses.dataclass
class Served:
    """A server in a thread of this process."""

    url: str
    port: int
    engine: Engine
    model: ScriptedModel
    app: Any
    stop: Callable[[], None]

    def client(self, **changes: Any) -> Any:
        import openai

        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **changes})

    def idle(self) -> bool:
        """Whether, within ten seconds, no request is in the engine."""
        return until(lambda: not (self.engine.stats()["running"] or self.engine.stats()["queued"]))


def until(true: Callable[[], Any], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true())


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> prompts.Tokenizer:
    out = tmp_path_factory.mktemp("scripted") / "tokenizer.json"
    return prompts.train_tokenizer([(None, SENTENCE)] * 20, 512, out)


@pytest.fixture
def scripted(small_tokenizer: prompts.Tokenizer) -> Iterator[Callable[..., tuple[Engine, ScriptedModel]]]:
    """Makes engines over scripted models; all are closed at the end of the test."""
    made: list[tuple[Engine, ScriptedModel]] = []

    def make(slots: int = 2, queue: int = 64, seconds: float = 0.0) -> tuple[Engine, ScriptedModel]:
        model = ScriptedModel(small_tokenizer, slots, seconds)
        info = dataclasses.replace(INFO, slots=slots)
        open_ = [False] * small_tokenizer.vocab_size
        ends = frozenset([small_tokenizer.eos_id])
        made.append((Engine(model, small_tokenizer, open_, ends, info, PATCHES, queue, 4096), model))
        return made[-1]

    yield make
    for engine, model in made:
        model.go.set()
        engine.close(drain=False)


@pytest.fixture
def serve(scripted: Callable[..., tuple[Engine, ScriptedModel]]) -> Iterator[Callable[..., Served]]:
    """Starts servers; `make` are arguments of `scripted`, the others of `Settings`."""
    stops: list[Callable[[], None]] = []

    def start(make: dict[str, Any] | None = None, **settings: Any) -> Served:
        engine, model = scripted(**(make or {}))
        app = create_app(engine, Settings(**settings))
        served = start_server(app, engine, model)
        stops.append(served.stop)
        return served

    yield start
    for stop in stops:
        stop()


def start_server(app: Any, engine: Engine, model: Any) -> Served:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(app, loop="asyncio", http=Connection, ws="none", log_config=None, access_log=False)
    server = Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert until(lambda: server.started)

    def stop() -> None:
        if model is not None:
            model.go.set()
            model.endless = False
        server.should_exit = True
        thread.join(30)

    return Served(f"http://127.0.0.1:{port}", port, engine, model, app, stop)


@pytest.fixture
def plain(serve: Callable[..., Served]) -> Served:
    return serve()


def grey(value: int = 100, shape: tuple[int, int] = (40, 30)) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def dicom(pixels: np.ndarray | None = None, **tags: Any) -> bytes:
    """A frontal CR of 12 bits; `tags` are other elements."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

    pixels = (np.arange(40 * 30).reshape(40, 30) * 3).astype(np.uint16) if pixels is None else pixels
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3"
    dataset.Modality, dataset.ViewPosition = "CR", "PA"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def made() -> types.SimpleNamespace:
    """The functions above: modules of tests cannot import each other."""
    return types.SimpleNamespace(grey=grey, png=png, dicom=dicom, said=said, until=until)
