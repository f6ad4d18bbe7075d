"""Films to batches, and films to shards: ours beside a PyTorch DataLoader over image files (the suite `input`).

The films are drawn: smooth shapes and fine noise, so that they compress as real ones do (about 1.5 MB as JPEG at quality 95).
"""

import csv
import functools
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import records, shards
from data.packing import Arguments, pack
from launch.benchmarks import pairs
from rad_jax import images
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError
from rad_jax.input_pipeline import train_iterator
from rad_jax.prompts import load_tokenizer

HEIGHT, WIDTH, QUALITY, SIZE = 3056, 2544, 95, 518
FILMS, COPIES, BATCH, LENGTH = 24, 32, 16, 320
RAW_ITEMS, SMALL_ITEMS, OUR_ITEMS, TRANSFORMS = 64, 256, 512, 12  # images of one run
FLOORS = {"raw_films": 15.0, "same_images": 1.5, "transform_only": 2.0, "film_to_square": None, "packing": 1.5}
# Template and crop of each stage's batches.
STAGES = {"stage 1": ("clip", "random"), "stage 2": ("plain", "centre"), "stage 3": ("v1", "centre")}
THOUSAND = 1000  # rows are seconds for so many images
SKIPPED = {
    "raw_films": "reading, decoding and scaling the whole film, which packing did once; three equal channels and float32, which the device makes",
    "same_images": "scaling to the size that they have; three equal channels and float32, which the device makes",
    "transform_only": "two of three equal channels; float32, which the device makes",
    "film_to_square": "as transform_only",
    "packing": "as transform_only; but ours also encodes the PNG, hashes and writes it, once, where theirs reads the films in every epoch",
}
_ON_CORES = "import os, runpy, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])]); sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"


class Program:
    """The peer: a program over a folder of images, started anew for each run, that prints its own time as a line of JSON."""

    def __init__(self, peer: Path, folder: Path, tokenizer: Path, texts: Path, items: int, threads: int):
        self._command = [sys.executable, "-c", _ON_CORES, str(threads), str(peer), str(folder)]
        self._command += [f"--tokenizer={tokenizer}", f"--texts={texts}", f"--workers={threads}"]
        self._command += [f"--batch={BATCH}", f"--items={items}", f"--length={LENGTH}", f"--size={SIZE}"]

    def run(self) -> pairs.Run:
        """Seconds for a thousand images.

        Raises:
            UserError: it failed.
        """
        ended = subprocess.run(self._command, capture_output=True, text=True)
        try:
            found = json.loads(ended.stdout.splitlines()[-1])
            made = pairs.Run(THOUSAND / found["images_per_s"], found["cpu_ms_per_image"], None)
        except (LookupError, ValueError) as error:
            raise UserError(f"the peer failed: {' '.join(ended.stderr.strip().splitlines()[-1:])}") from error
        time.sleep(pairs.PAUSE)
        return made


class Packing:
    """Our packing: one shard for each process of a pool that is started before; needs `warm` runs for its imports."""

    def __init__(self, pool: ProcessPoolExecutor, films: Sequence[records.Film], folder: Path, workers: int):
        self._pool, self._films, self._folder, self._workers = pool, films, folder, workers

    def run(self) -> pairs.Run:
        """Seconds for a thousand films."""
        self._folder.mkdir()
        make = functools.partial(records.make, size=SIZE)
        tasks = [
            shards.Task("train", self._folder / f"{n}.array_record", list(self._films), make, records.serialise)
            for n in range(self._workers)
        ]
        began = time.perf_counter()
        cpu = sum(self._pool.map(cpu_of_writing, tasks))
        wall = time.perf_counter() - began
        shutil.rmtree(self._folder)
        scale = THOUSAND / (len(self._films) * self._workers)
        return pairs.Run(wall * scale, cpu * scale, None)


def cpu_of_writing(task: shards.Task) -> float:
    """Writes a shard; returns the CPU seconds of this process."""
    before = time.process_time()
    if shards.write(task).skipped:
        raise UserError("a film of the benchmark could not be read.")
    return time.process_time() - before


def reading(corpus: Path, template: str, crop: str, threads: int) -> Callable[[int], int]:
    """Our side: batches of a packed corpus, a function of the number of images."""
    opened = Corpus.open(corpus)

    def run(items: int) -> int:
        options: dict[str, Any] = {"batch_size": BATCH, "text_length": LENGTH, "target_length": LENGTH // 2}
        options |= {"image_size": SIZE, "seed": 0, "selection": "frontal", "num_threads": threads, "crop": crop}
        batches = train_iterator(opened, "train", template=template, **options)
        return sum(int(next(batches)["weight"].sum()) for _ in range(items // BATCH))

    return run


def our_transform(films: Sequence[Path], decoded: bool) -> Callable[[int], int]:
    """To the square that goes to the device, on one core, from decoded films or from their files."""
    loaded = [images.load_grey(path) for path in films[:TRANSFORMS]] if decoded else []

    def run(count: int) -> int:
        for number in range(count):
            small = images.resize_short(loaded[number], SIZE) if decoded else images.load_short(films[number], SIZE)[0]
            images.centre_crop(small, SIZE)
        return count

    return run


def peer_transform(peer: Path, films: Sequence[Path], decoded: bool) -> Callable[[int], int]:
    """The peer's own function, to normalised float32, on one core, from decoded films or from their files."""
    import torch

    torch.set_num_threads(1)
    transform = load(peer).transform
    loaded = [Image.open(path) for path in films[:TRANSFORMS]] if decoded else []
    for image in loaded:
        image.load()

    def run(count: int) -> int:
        for number in range(count):
            transform(loaded[number] if decoded else Image.open(films[number]), SIZE)
        return count

    return run


def load(peer: Path) -> Any:
    """The peer as a module."""
    spec = importlib.util.spec_from_file_location("peer", peer)
    if spec is None or spec.loader is None:
        raise UserError(f"{peer}: is no Python program.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(number: int) -> bytes:
    """A film as JPEG."""
    rng = np.random.default_rng(number)
    shapes = Image.fromarray(rng.integers(20, 230, (16, 13), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 1.9, (HEIGHT, WIDTH)).astype(np.float32)
    film = np.clip(np.asarray(shapes, np.float32) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(film).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def prepare(folder: Path, tokenizer: Path, peer: Path, count: int) -> None:
    """Draws the films, packs them, and writes the stored images beside; refuses sides that would not see the same.

    `corpus` has every film COPIES times: Grain's shuffle of a few rows is slow, as it never is on a real corpus.
    """
    from data.phantom.study import study
    from rad_jax.interop import hf_tokenizer

    raw, small = folder / "raw", folder / "small"
    raw.mkdir(parents=True)
    small.mkdir()
    texts = [study(0, patient, 0, 64).report.findings for patient in range(count)]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    vocabulary = hf_tokenizer.build(tokenizer, load_tokenizer(tokenizer).vocab_size).text
    (folder / "tokenizer.json").write_text(vocabulary)
    with (raw / "reports.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "findings", "split"])
        for number, text in enumerate(texts):
            (raw / f"{number:03d}.jpg").write_bytes(draw(number))
            writer.writerow([f"{number:03d}.jpg", text, "train"])
    once = folder / "once"
    pack_folder(raw, once, folder / "tokenizer.json")
    source = Corpus.open(once).source("train", "frontal")
    for number in range(len(source)):
        row = source[number]
        (small / f"{row['id']}.png").write_bytes(row["image"])
    check(folder, source, load(peer))
    with (small / "reports.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "findings", "split"])
        writer.writerows(
            [f"{copy}-{n}", f"{n:03d}.png", text, "train"] for copy in range(COPIES) for n, text in enumerate(texts)
        )
    pack_folder(small, folder / "corpus", folder / "tokenizer.json")
    if Corpus.open(folder / "corpus").source("train", "frontal")[0]["image"] not in {
        p.read_bytes() for p in small.glob("*.png")
    }:
        raise UserError("the copies of the benchmark's films differ from them.")


def pack_folder(source: Path, out: Path, tokenizer: Path) -> None:
    arguments = Arguments("folder", str(source), SIZE, studies=10, seed=0, tokenizer=str(tokenizer), vocab_size=512)
    pack(arguments, out, workers=1, progress=False)


def check(folder: Path, source: Any, peer: Any) -> None:
    """Raises UserError unless pixels and token ids are the peer's, bit for bit, for every film from the raw file and from the stored image."""
    from tokenizers import Tokenizer

    ours, theirs = load_tokenizer(folder / "tokenizer.json"), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for number in range(len(source)):
        row = source[number]
        raw = folder / "raw" / f"{row['id']}.jpg"
        square = images.centre_crop(images.decode_png(row["image"]), SIZE)
        seen = images.normalise(square)
        for path in (raw, folder / "small" / f"{row['id']}.png"):
            if not np.array_equal(peer.transform(Image.open(path), SIZE).permute(1, 2, 0).numpy(), seen):
                raise UserError(f"{path.name}: the two sides make different pixels, so their times cannot be compared.")
        if not np.array_equal(images.centre_crop(images.load_short(raw, SIZE)[0], SIZE), square):
            raise UserError(f"{raw.name}: ours makes other pixels of the film than of the shard.")
        if theirs.encode(row["findings"]).ids != [ours.bos_id, *ours.encode(row["findings"])]:
            raise UserError("the two sides make different tokens of a text, so their times cannot be compared.")


def run(
    folder: Path, rounds: int, threads: int, peer: Path, tokenizer: Path
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of the suite, and CPU seconds for an image of each stage's batches; works in `folder`, and removes it again.

    Raises:
        UserError: no peer or tokenizer, the folder is there already, or the sides differ.
    """
    for path, flag in ((peer, "peer"), (tokenizer, "tokenizer")):
        if not path.is_file():
            raise UserError(f"{path}: not there: name another file with --{flag}.")
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or give another --dir.")
    try:
        print(f"drawing and packing {FILMS} films ...", flush=True)
        prepare(folder, tokenizer, peer, FILMS)
        return measure(folder, folder / "corpus", rounds, threads, peer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(
    folder: Path, corpus: Path, rounds: int, threads: int, peer: Path
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows and the CPU seconds of `run`, from a folder that `prepare` made."""
    raw = sorted((folder / "raw").glob("*.jpg"))
    program = functools.partial(
        Program, peer, tokenizer=folder / "tokenizer.json", texts=folder / "texts.txt", threads=threads
    )
    theirs = {"raw": program(folder / "raw", items=RAW_ITEMS), "small": program(folder / "small", items=SMALL_ITEMS)}
    runs: dict[str, dict[str, list[pairs.Run]]] = {}
    side = pairs.Side("ours", threads, reading, corpus, *STAGES["stage 3"], threads)
    try:
        runs["raw_films"] = alternate(Batches(side), theirs["raw"], rounds)
        runs["same_images"] = alternate(Batches(side), theirs["small"], rounds)
    finally:
        side.stop()
    runs["transform_only"] = transforms(raw, peer, rounds, decoded=True)
    runs["film_to_square"] = transforms(raw, peer, rounds, decoded=False)
    films = [records.Film(path, path.stem, path.stem, path.stem, "PA", True, [records.text("Clear.")]) for path in raw]
    with shards.pool(threads) as pool:
        packing = Packing(pool, films, folder / "packing", threads)
        packing.run()
        runs["packing"] = alternate(packing, theirs["raw"], rounds)
    rows = [row(name, found, raw, corpus) for name, found in runs.items()]
    return rows, {stage: stage_cpu(corpus, *how, threads, rounds) for stage, how in STAGES.items()}


def transforms(raw: Sequence[Path], peer: Path, rounds: int, decoded: bool) -> dict[str, list[pairs.Run]]:
    """Both transforms in turn, seconds for a thousand images."""
    sides = {
        "ours": pairs.Side("ours", 1, our_transform, raw, decoded),
        "peer": pairs.Side("peer", 1, peer_transform, peer, raw, decoded),
    }
    try:
        pairs.alternate(sides, 1, (1,))
        found = pairs.alternate(sides, rounds, (TRANSFORMS,))
    finally:
        for side in sides.values():
            side.stop()
    return {name: [per_thousand(run, TRANSFORMS) for run in done] for name, done in found.items()}


class Batches:
    """Our reading as a side of `alternate`."""

    def __init__(self, side: pairs.Side):
        self._side = side
        side.run(BATCH * 4)

    def run(self) -> pairs.Run:
        """Seconds for a thousand images."""
        made = self._side.run(OUR_ITEMS)
        if made.result != OUR_ITEMS:
            raise UserError("rows of the benchmark's corpus could not be read.")
        return per_thousand(made, OUR_ITEMS)


def alternate(ours: Any, peer: Any, rounds: int) -> dict[str, list[pairs.Run]]:
    """Runs of both in turn."""
    return pairs.alternate({"ours": ours, "peer": peer}, rounds, ())


def per_thousand(made: pairs.Run, items: int) -> pairs.Run:
    return pairs.Run(made.wall_s * THOUSAND / items, made.cpu_s * THOUSAND / items, made.result)


def stage_cpu(corpus: Path, template: str, crop: str, threads: int, rounds: int) -> float:
    """CPU seconds for an image of a stage's batches, the least of the rounds: what else runs on the machine only adds."""
    side = pairs.Side(template, threads, reading, corpus, template, crop, threads)
    try:
        side.run(BATCH * 4)
        return min(side.run(OUR_ITEMS).cpu_s for _ in range(rounds)) / OUR_ITEMS
    finally:
        side.stop()


def row(name: str, runs: Mapping[str, Sequence[pairs.Run]], raw: Sequence[Path], corpus: Path) -> dict[str, Any]:
    """A line of the table, seconds for a thousand images, with CPU seconds for one image and the floor."""
    made = pairs.row(name, runs, SKIPPED[name])
    size = sum(path.stat().st_size for path in raw) / len(raw)
    stored = Corpus.open(corpus).meta["summary"]["bytes"] / (len(raw) * COPIES)
    made |= {f"{side}_cpu_s_per_image": made[f"{side}_cpu_s"] / THOUSAND for side in ("ours", "peer")}
    made |= {f"{side}_images_per_s": THOUSAND / made[f"{side}_s"] for side in ("ours", "peer")}
    made |= {
        "floor": FLOORS[name],
        "images": THOUSAND,
        "raw_bytes": size,
        "stored_bytes": stored,
        "png_level": images.PNG_LEVEL,
    }
    made["equality"] = (
        f"pixels and token ids equal, bit for bit; {made['ours_images_per_s']:.0f} images/s, theirs {made['peer_images_per_s']:.1f}; "
        f"CPU ms an image {made['ours_cpu_s']:.2f}, theirs {made['peer_cpu_s']:.2f}"
    ) + (f"; floor {FLOORS[name]:g}" if FLOORS[name] else "")
    if name == "packing":
        made["equality"] += (
            f"; PNG level {images.PNG_LEVEL} with runs only, {stored / 1e3:.0f} kB an image of {size / 1e6:.2f} MB"
        )
    return made
