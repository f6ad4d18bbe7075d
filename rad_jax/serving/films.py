"""Films that clients send, decoded outside of this process (`decoder`)."""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import hashlib
import io
import os
import queue
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rad_jax.errors import UserError
from rad_jax.serving import decoder
from rad_jax.serving.errors import ApiError
from rad_jax.serving.plan import DECODERS

SECONDS = 60.0  # for one film
LIFE = 250  # films that a process decodes before another takes its place: the DICOM codecs lose some 25 kB on each damaged one
WAITING = 64  # films that may wait for a process
BASE64 = 2**20  # characters that are decoded at once, a multiple of four
PREVIEW = 2048  # pixels of a preview's long side
MESSAGES = {
    "not_for_clinical_use": "Not for clinical use: research only.",
    "view_lateral": "The film says it is lateral; the model was trained on frontal films.",
    "view_unknown": "The film does not say its view; the model was trained on frontal films (AP or PA).",
    "not_a_radiograph": "The DICOM does not say that it is a radiograph (Modality CR or DX).",
    "dicom_equalised": "Grey values were made as MIMIC-CXR-JPG makes them: spread and histogram-equalised; the DICOM's window was not used.",
    "dicom_windowed": "Grey values were made with the DICOM's own window.",
    "cut_off": "The text reached the greatest length and is not complete.",
}


@dataclasses.dataclass(frozen=True)
class Film:
    """uint8 [Y, X] and their hash, what the file is, and what to warn of: codes of MESSAGES."""

    pixels: np.ndarray
    sha256: str
    kind: str
    view: str
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Preview:
    """A 16-bit grey PNG, the hash of all of the film's pixels, its own (Y, X), and the values that its window shows black and white."""

    png: bytes
    sha256: str
    shape: tuple[int, int]
    window: tuple[int, int]


class Films:
    """Decodes films in `workers` processes, which are started again when they die."""

    def __init__(self, workers: int = DECODERS):
        self._pool = ThreadPoolExecutor(workers, "films")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker())
        self._workers, self._waiting = workers, 0
        self._free = asyncio.Semaphore(workers)

    def busy(self) -> int:
        """How many processes have a film."""
        return self._workers - self._idle.qsize()

    def start(self) -> None:
        """Starts the processes, which the first films would else wait for."""
        workers = [self._idle.get() for _ in range(self._workers)]
        for worker in workers:
            worker.start()
            self._idle.put(worker)

    def decode(self, data: bytes, dicom: str) -> Film:
        """Decodes, in this thread.

        Raises:
            UserError: it is no film, or one over the limits.
        """
        told, raw = self._ask(data, "film", dicom)
        pixels = np.frombuffer(raw, np.uint8).reshape(told["shape"])
        return Film(pixels, hashed(pixels), told["kind"], told["view"], tuple(warned(told, dicom)))

    def preview(self, data: bytes) -> Preview:
        """A film for a viewer, in this thread; raises as `decode`."""
        from PIL import Image

        told, raw = self._ask(data, "deep", "window")
        pixels = np.frombuffer(raw, np.uint16).reshape(told["shape"])
        film = Image.fromarray(pixels)
        film.thumbnail((PREVIEW, PREVIEW), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        film.save(buffer, format="PNG", compress_level=1)
        return Preview(buffer.getvalue(), hashed(pixels), tuple(told["shape"]), tuple(told["window"]))

    async def run(self, work: Any, *arguments: Any) -> Any:
        """Awaits `decode` or `preview`; raises ApiError too, when too many wait. One that is cancelled while it waits is never begun."""
        if self._waiting >= WAITING:
            raise ApiError(429, "too many films are waiting to be read: try again.", code="busy", retry_after=1)
        self._waiting += 1
        loop = asyncio.get_running_loop()
        try:
            await (
                self._free.acquire()
            )  # here it waits, and not in the pool's queue, which would hold what nobody asks for any more
            future = self._pool.submit(work, *arguments)
            future.add_done_callback(lambda _: self._release(loop))  # a thread cannot be called off
            return await asyncio.wrap_future(future)
        finally:
            self._waiting -= 1

    def _release(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(self._free.release)

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        for _ in range(self._workers):
            self._idle.get().close()
        self._workers = 0

    def _ask(self, data: bytes, what: str, dicom: str) -> tuple[dict[str, Any], bytes]:
        worker = self._idle.get()
        try:
            told, raw = worker.ask({"what": what, "dicom": dicom}, data)
        finally:
            self._idle.put(worker)
        if "error" in told:
            raise UserError(f"{told['error']}.")
        return told, raw


class _Worker:
    """One process of `decoder`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._decoded = 0

    def ask(self, head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        process = self.start()
        assert process.stdin and process.stdout
        late = threading.Timer(SECONDS, process.kill)
        late.daemon = True
        late.start()
        try:
            decoder.send(process.stdin, head, data)
            answer = decoder.receive(process.stdout)
        except (OSError, ValueError):  # it died while it was written to, or amid its answer
            answer = None
        finally:
            late.cancel()
        if answer is None or len(answer[1]) != np.prod(answer[0].get("shape", [0])) * (1 + (head["what"] == "deep")):
            self.close()
            raise UserError(f"{decoder.NAME}: cannot be decoded (its codec failed, or took too long).")
        self._decoded += 1
        if self._decoded >= LIFE:
            self.close()
            self.start()  # it is ready before the next film, or nearly
        return answer

    def start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process, self._decoded = start(), 0
        return self._process

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None


def start() -> subprocess.Popen[bytes]:
    """A process with nothing of this one's environment, whose codecs' complaints, which may quote the film, go nowhere."""
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-m", "rad_jax.serving.decoder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for the server, which lets what it has begun end; a decoder ends with its stdin
        env={
            "PATH": os.defpath,
            "PYTHONPATH": root,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            # glibc keeps what a large film took, for a next one that may never come: here it goes back as the film is done.
            "MALLOC_MMAP_THRESHOLD_": "262144",
            "MALLOC_TRIM_THRESHOLD_": "262144",
            "MALLOC_ARENA_MAX": "1",
        },
    )


def hashed(pixels: np.ndarray) -> str:
    """SHA-256 of uint8 or uint16 [Y, X], its shape and rows."""
    digest = hashlib.sha256(f"{pixels.shape[0]}x{pixels.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def warned(told: dict[str, Any], dicom: str) -> list[str]:
    """Codes of what a film's header gives reason to warn of."""
    codes = ["not_for_clinical_use"]
    if told["view"] != "frontal":
        codes.append(f"view_{told['view']}")
    if not told["radiograph"]:
        codes.append("not_a_radiograph")
    if told["kind"] == "dicom":
        codes.append("dicom_windowed" if dicom == "window" else "dicom_equalised")
    return codes


def from_url(url: str) -> bytes:
    """Contents of a `data:` URL.

    Raises:
        ApiError: another kind of URL, or damaged base64.
    """
    if not re.match(r"data:[\w.+-]+/[\w.+-]+;base64,", url[:200]):
        raise ApiError(
            400,
            "image_url must be a data: URL in base64 (data:image/png;base64,...): this server opens no address and no file.",
            code="invalid_image_url",
            param="messages",
        )
    text = url.partition(",")[2]
    try:
        # In parts: a thread that decodes 50 MB at once would hold up all others.
        parts = [text[at : at + BASE64] for at in range(0, len(text), BASE64)]
        if any(part.endswith("=") for part in parts[:-1]):
            raise ValueError("it goes on after its end")
        return b"".join(base64.b64decode(part, validate=True) for part in parts)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "the image's base64 is damaged.", code="invalid_image_url", param="messages") from error


def seen(shape: tuple[int, int], size: int) -> list[float]:
    """The square [x0, y0, x1, y1] of a film (Y, X) that the model sees, in pixels of the film: `images.resize_short` and `centre_crop`."""
    short = min(shape)
    scaled = [size if side == short else int(size * side / short) for side in shape]
    top, left = (round((side - size) / 2) for side in scaled)
    down, across = shape[0] / scaled[0], shape[1] / scaled[1]
    return [round(v, 2) for v in (left * across, top * down, (left + size) * across, (top + size) * down)]
