"""Sends mutated films to a running server and prints what came back and how its memory grew.

    python tests/serving/fuzz.py http://127.0.0.1:8000 PID --count=5000 [--dicoms=FOLDER]

They go to /v1/findings, to /v1/film, and as data: URLs to /v1/chat/completions. Every answer must be a 200 or a 400 within its time; PID is the
server's process, whose own memory is read from /proc, and its children's: the decoders'. As many films again are sent before, to warm a server
up that has just been started; growth is counted from there. Exit status 1 on any other answer, or on growth above 5 % of the server, or of all
of them.
"""

import argparse
import base64
import collections
import concurrent.futures
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import numpy as np
from PIL import Image

GROWTH = 0.05


def seeds(folder: Path | None) -> list[bytes]:
    """Whole films: pictures drawn here, DICOMs of `folder`, or one made here."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (64, 48), np.uint8))
    made = []
    for kind, image in (
        ("PNG", picture),
        ("JPEG", picture),
        ("PNG", picture.convert("P")),
        ("JPEG", picture.convert("RGB")),
    ):
        buffer = io.BytesIO()
        image.save(buffer, format=kind)
        made.append(buffer.getvalue())
    deep = io.BytesIO()
    Image.fromarray(rng.integers(0, 65536, (64, 48), np.uint16)).save(deep, format="PNG")
    files = sorted(folder.glob("*.dcm"), key=lambda path: path.stat().st_size)[:12] if folder else []
    return [*made, deep.getvalue(), small_dicom(rng), *(path.read_bytes() for path in files)]


def small_dicom(rng: np.random.Generator) -> bytes:
    import pydicom
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3"
    dataset.Modality, dataset.ViewPosition = "CR", "PA"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 64, 48, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.WindowCenter, dataset.WindowWidth = "2000", "3000"
    dataset.PixelData = rng.integers(0, 4096, (64, 48), np.uint16).tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def mutants(whole: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Films with bits turned, bytes of extreme values, parts cut out, doubled, or of another film; mostly near the header."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        data = bytearray(whole[rng.integers(len(whole))])
        for _ in range(rng.integers(1, 6)):
            reach = min(len(data), 700) if rng.random() < 0.7 else len(data)
            at, length = int(rng.integers(reach)), int(rng.integers(1, 40))
            match rng.integers(5):
                case 0:
                    data[at] ^= 1 << rng.integers(8)
                case 1:
                    data[at : at + 4] = (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f")[rng.integers(3)]
                case 2:
                    del data[at : at + length]
                case 3:
                    data[at:at] = data[at : at + length]
                case 4:
                    other = whole[rng.integers(len(whole))]
                    data[at : at + length] = other[at : at + length]
            if not data:
                data = bytearray(b"\0")
        yield bytes(data)


def resident(pid: int) -> dict[int, int]:
    """Bytes of anonymous memory by process: the server's and its children's."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    family = [pid, *(int(child) for children in lists for child in children)]
    found = {}
    for one in family:
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
        except OSError:  # it has ended in between
            continue
        if "RssAnon" in lines:
            found[one] = int(lines["RssAnon"].split()[0]) * 1024
    return found


def grown(before: dict[int, int], now: dict[int, int], pid: int) -> tuple[float, float]:
    """Growth of the server, and of the server with its children, some of which may be new."""
    return now[pid] / before[pid] - 1, sum(now.values()) / sum(before.values()) - 1


def send(url: str, films: list[bytes], workers: int) -> collections.Counter[str]:
    """Counts answers by route and status; "lost" where there was none."""

    def ask(client: httpx.Client, route: str, data: bytes) -> httpx.Response:
        if route == "chat":
            image = {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
            parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "What is there?"}]
            body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 2}
            return client.post("/v1/chat/completions", json=body)
        fields = {"max_new_tokens": "2"} if route == "findings" else {}
        return client.post(f"/v1/{route}", files={"file": data}, data=fields)

    def one(numbered: tuple[int, bytes]) -> str:
        number, data = numbered
        route = ("film", "findings", "chat")[number % 3]
        for _ in range(100):
            try:
                answer = ask(client, route, data)
            except httpx.TransportError as error:
                return f"{route} lost ({type(error).__name__})"
            if answer.status_code != 429:
                return f"{route} {answer.status_code}"
            time.sleep(0.1)
        return f"{route} always 429"

    with httpx.Client(base_url=url, timeout=120) as client, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        model = client.get("/v1/models").json()["data"][0]["id"]
        return collections.Counter(pool.map(one, enumerate(films)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("pid", type=int)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--dicoms", type=Path, help="Folder of whole DICOMs to start from.")
    given = parser.parse_args()
    films = list(mutants(seeds(given.dicoms), 2 * given.count, given.seed))
    fifth = -(-given.count // 5)
    total = send(given.url, films[: given.count], given.workers)
    before = resident(given.pid)
    print(f"warmed up: server {before[given.pid] / 1e6:.1f} MB, with children {sum(before.values()) / 1e6:.1f} MB")
    for start in range(given.count, len(films), fifth):
        total += send(given.url, films[start : start + fifth], given.workers)
        now = resident(given.pid)
        print(
            f"{sum(total.values())} films: server {now[given.pid] / 1e6:.1f} MB, with children {sum(now.values()) / 1e6:.1f} MB",
            flush=True,
        )
    alone, together = grown(before, now, given.pid)
    print(
        f"{dict(sorted(total.items()))}; after warming up the server grew by {alone:.1%}, with its children by {together:.1%}"
    )
    bad = [kind for kind in total if kind.split()[1] not in ("200", "400")]
    return int(bool(bad) or max(alone, together) > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
