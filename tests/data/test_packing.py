"""Packing: whole or not at all, the same command twice does nothing, other arguments are refused."""

import dataclasses
import errno
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import PIL
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data import packing, records, shards
from data.packing import Arguments, pack
from data.phantom import builder as phantom
from data.phantom.parser import parse
from rad_jax import prompts
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = Arguments(dataset="phantom", source=None, image_size=32, studies=20, seed=0, tokenizer=None, vocab_size=512)


def run(*flags, **environment):
    command = [sys.executable, "-m", "launch.pack", *flags]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "deep" / "corpus"
    manifest, packed = pack(SMALL, out, workers=2, progress=False)
    assert packed
    return out, manifest


def test_what_a_corpus_holds(corpus):
    out, manifest = corpus
    assert sorted(p.name for p in out.iterdir()) == [
        "corpus.json",
        "index",
        "phantom",
        "shards.json",
        "skipped.csv",
        "tokenizer.json",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["corpus"]
    assert json.loads((out / "corpus.json").read_text()) == manifest
    assert manifest["format_version"] == 1 and manifest["builder_dir"] == "phantom/1.0.0"
    assert manifest["splits"] == {"train": 17, "validation": 1, "test": 2}
    size = manifest["summary"].pop("bytes")
    assert size == sum(path.stat().st_size for path in (out / manifest["builder_dir"]).iterdir())
    equal = {"in the same split": 0, "in two splits": 0}
    assert manifest["summary"] == {
        "read": 20,
        "written": 20,
        "skipped": {},
        "counts": {},
        "duplicate_images": equal,
        "near_duplicates": equal,
        "views": {"PA": 14, "AP": 6},
        "patients": {"train": 10, "validation": 1, "test": 2},
    }
    manifest["summary"]["bytes"] = size
    assert (out / "skipped.csv").read_text().strip() == "id,image,reason,detail"
    tokenizer = prompts.load_tokenizer(out / manifest["tokenizer"])
    assert tokenizer.vocab_size <= 512


def test_records_read_back_without_tensorflow(corpus):
    out, manifest = corpus
    builder = tfds.builder_from_directory(out / manifest["builder_dir"])
    for split, count in manifest["splits"].items():
        rows = list(builder.as_data_source(split))
        assert len(rows) == count
        for row in rows:
            assert row["image"].shape == (32, 32, 1) and row["frontal"] is True
            truth = json.loads(row["annotations"])
            (text,) = json.loads(row["texts"])
            said = parse(text["findings"])
            assert said == [(f["finding"], f["side"], f["size"], f["place"]) for f in truth]
            assert all(len(f["box"]) == 4 for f in truth)
    assert "tensorflow" not in sys.modules


def test_the_index_of_every_selection(corpus):
    out, manifest = corpus
    assert set(manifest["selections"]) == {"all", "frontal", "pairs"}
    for name, selection in manifest["selections"].items():
        assert selection["question"] == "indication"
        for split, index in selection["splits"].items():
            path = out / "index" / f"{name}-{split}.npy"
            assert hashlib.sha256(path.read_bytes()).hexdigest() == index["sha256"]
            rows = np.load(path)
            assert rows.dtype == np.int32 and rows.tolist() == [[k, 0] for k in range(index["rows"])]
            assert index["rows"] == manifest["splits"][split]
    assert {"jpg", "libjpeg_turbo", "zlib", "pydicom"} <= set(manifest["provenance"]["decoders"])
    assert manifest["provenance"]["pillow"] == PIL.__version__


def test_packing_again_does_nothing(corpus):
    out, manifest = corpus
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again, packed = pack(SMALL, out, workers=1, progress=False)
    assert not packed and again == manifest
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.parametrize("change", [{"image_size": 48}, {"studies": 30}, {"seed": 1}, {"vocab_size": 600}])
def test_other_arguments_are_refused(corpus, change):
    out, _ = corpus
    with pytest.raises(UserError, match=f"other arguments .*{next(iter(change))}"):
        pack(dataclasses.replace(SMALL, **change), out, workers=1, progress=False)


def test_the_same_corpus_whatever_the_number_of_workers(corpus, tmp_path):
    manifest, _ = pack(SMALL, tmp_path / "c", workers=1, progress=False)
    assert manifest["fingerprint"] == corpus[1]["fingerprint"]
    other, _ = pack(dataclasses.replace(SMALL, seed=1), tmp_path / "d", workers=1, progress=False)
    assert other["fingerprint"] != manifest["fingerprint"]


def test_a_given_tokenizer_is_copied(corpus, tmp_path):
    given = corpus[0] / "tokenizer.json"
    small = dataclasses.replace(SMALL, tokenizer=str(given))
    manifest, _ = pack(small, tmp_path / "c", workers=1, progress=False)
    assert (tmp_path / "c" / manifest["tokenizer"]).read_bytes() == given.read_bytes()
    with pytest.raises(UserError, match="nowhere"):
        pack(dataclasses.replace(SMALL, tokenizer="nowhere.json"), tmp_path / "d", workers=1, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "folder"}, "needs --source"),
        ({"source": "x"}, "takes no --source"),
        ({"dataset": "other"}, "unknown data set"),
        ({"image_size": 1}, "--image_size=1 is too small"),
        ({"studies": 2}, "--studies=2 is too small"),
        ({"vocab_size": 10}, "--vocab_size=10 is too small"),
    ],
)
def test_wrong_arguments(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        pack(dataclasses.replace(SMALL, **change), tmp_path / "c", workers=1, progress=False)


def test_a_folder_that_is_no_corpus_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is no corpus"):
        pack(SMALL, tmp_path, workers=1, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert pack(SMALL, tmp_path / "empty", workers=1, progress=False)[1]


def test_a_corpus_of_another_format_or_a_damaged_manifest_is_refused(tmp_path, corpus):
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(corpus[1] | {"format_version": 99}))
    with pytest.raises(UserError, match="format_version 99"):
        pack(SMALL, tmp_path, workers=1, progress=False)
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        pack(SMALL, tmp_path, workers=1, progress=False)


def test_a_killed_pack_leaves_nothing_half_written(tmp_path):
    out = tmp_path / "corpus"
    flags = ["--dataset=phantom", "--image_size=112", f"--out={out}", "--workers=1"]
    command = [sys.executable, "-m", "launch.pack", "--studies=5000", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    staging = tmp_path / ".corpus.packing"
    try:
        deadline = time.monotonic() + 60
        while not list(staging.glob("shards/*.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        # A second pack of the same folder is told to wait.
        with pytest.raises(UserError, match="another pack"):
            pack(SMALL, out, workers=1, progress=False)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists() and staging.exists()
    # The next pack cleans up, even with other arguments, and finishes.
    assert pack(SMALL, out, workers=1, progress=False)[1]
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_the_same_command_goes_on_after_a_kill(tmp_path):
    """What was finished when the process was killed is never made again, and the corpus is as if nothing had happened."""
    out = tmp_path / "corpus"
    arguments = dataclasses.replace(SMALL, studies=300, image_size=64)
    flags = ["--dataset=phantom", "--image_size=64", "--studies=300", "--vocab_size=512", f"--out={out}", "--workers=1"]
    process = subprocess.Popen([sys.executable, "-m", "launch.pack", *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    shards_of = tmp_path / ".corpus.packing" / "shards"
    try:
        deadline = time.monotonic() + 120
        while len(list(shards_of.glob("*.json"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    # A shard keeps its file when it gets its final name, so that the file's number and time tell whether it was written again.
    kept = [receipt.with_suffix(".array_record").stat() for receipt in shards_of.glob("*.json")]
    again = run(*flags)
    assert again.returncode == 0, again.stderr
    found = [path.stat() for path in out.glob("phantom/1.0.0/*.array_record*")]
    assert 2 <= len(kept) < len(found)
    assert {(of.st_ino, of.st_mtime_ns) for of in kept} <= {(of.st_ino, of.st_mtime_ns) for of in found}
    whole, _ = pack(arguments, tmp_path / "whole", workers=1, progress=False)
    assert json.loads((out / "corpus.json").read_text()) == whole
    names = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(
        p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()
    )
    assert [name for name in names if (out / name).read_bytes() != (tmp_path / "whole" / name).read_bytes()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "whole"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, **kwargs):
        raise RuntimeError("Failed to finalize: write() failed: No space left on device; writing x")

    monkeypatch.setattr(packing.CorpusBuilder, "download_and_prepare", full)
    with pytest.raises(OSError, match="No space left") as raised:
        pack(SMALL, tmp_path / "c", workers=1, progress=False)
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path):
    flags = ["--dataset=phantom", "--image_size=32", "--studies=10", f"--out={tmp_path / 'c'}", "--workers=1"]
    first = run(*flags, PHANTOM_SEED="4")
    assert first.returncode == 0, first.stderr
    assert "read 10, written 10 (8 train, 1 validation, 1 test), skipped 0" in first.stdout
    assert "packing: 100%" in first.stderr and "phantom-4-" not in first.stdout + first.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "c/phantom/1.0.0").iterdir())
    lines = first.stdout.splitlines()
    assert f"  {size / 1e4:.1f} kB for each film; 697,000 films would take {697e3 * size / 1e10:.0f} GB" in lines
    pairs = f"  {size / 10:,.0f} bytes for each of the 10 pairs of the largest selection, all"
    assert f"{pairs}; 697,000 such pairs would take {697e3 * size / 1e10:.0f} GB" in lines
    again = run(*flags, PHANTOM_SEED="4")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    refused = run(*flags, PHANTOM_SEED="5")
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ") and "seed 4 instead of 5" in refused.stderr
    assert "Traceback" not in refused.stderr
    wrong = run(*flags, PHANTOM_SEED="many")
    assert wrong.returncode == 2 and "PHANTOM_SEED='many'" in wrong.stderr


def test_help_teaches_with_an_example():
    shown = run("--help").stdout
    assert "python -m launch.pack --dataset=folder --source=" in shown and "PHANTOM_SEED" in shown


# ------------------------------------------------------------------------------------------------------------------------------- shards


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes phantom records; the job `fatal` ends the process, as the system does that runs out of memory, until `healed` exists."""

    folder: Path
    fatal: int

    def __call__(self, job):
        if job == self.fatal and not (self.folder / "healed").exists():
            (self.folder / f"died-{os.getpid()}").touch()
            if len(list(self.folder.glob("died-*"))) >= 2:
                (self.folder / "healed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return shards.Skip(str(job), "x", "missing image") if job % 10 == 9 else phantom.make((job, 0), 0, 16)


def tasks(folder, fatal=-1, each=5, count=20):
    make = Maker(folder, fatal)
    return [
        shards.Task("train", folder / f"{n}.array_record", range(n * each, (n + 1) * each), make, records.serialise)
        for n in range(count // each)
    ]


def test_a_killed_worker_loses_nothing(tmp_path):
    receipts = shards.run(tasks(tmp_path, fatal=12), 2, False, 1.0)
    assert [receipt.records for receipt in receipts] == [5, 4, 5, 4]
    assert len(list(tmp_path.glob("died-*"))) == 2 and not list(tmp_path.glob("*.part"))
    other = tmp_path / "other"
    other.mkdir()
    assert shards.run(tasks(other), 1, False, 1.0) == receipts  # the same bytes as without the accident


def test_a_worker_that_dies_every_time_is_named_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RESTARTS", 0)
    todo = tasks(tmp_path, fatal=12)
    with pytest.raises(shards.Stopped, match="killed 1 times"):
        shards.run([*todo[:2], todo[2]], 1 + 1, False, 1.0)
    assert not todo[2].path.exists()


def test_finished_shards_are_left_alone_and_damaged_ones_made_again(tmp_path):
    todo = tasks(tmp_path)
    first = shards.run(todo, 1, False, 1.0)
    before = {task.path: task.path.stat().st_mtime_ns for task in todo}
    assert shards.run(todo, 1, False, 1.0) == first
    assert {task.path: task.path.stat().st_mtime_ns for task in todo} == before
    data = bytearray(todo[1].path.read_bytes())
    data[len(data) // 2] ^= 1
    todo[1].path.write_bytes(data)
    todo[2].receipt.unlink()
    assert shards.run(todo, 1, False, 1.0) == first
    assert [task.path.stat().st_mtime_ns == before[task.path] for task in todo] == [True, False, False, True]
    # A receipt of other inputs is none.
    assert shards.finished(dataclasses.replace(todo[0], jobs=range(4))) is None


def test_a_limit_for_damaged_inputs(tmp_path, monkeypatch):
    """A share of all inputs, of at least 100; those count too that were known to be missing before a task was made."""
    told = r"{} inputs cannot be used, more than --bad_rows={} allows; the first is {}, missing image: mend them"
    shards.run(tasks(tmp_path), 1, False, 0.02)  # two of twenty
    for _ in range(2):  # what is finished is looked at too, and what lacks an input is then no longer finished
        with pytest.raises(shards.Stopped, match=told.format("2 of 20", r"0\.01", "x")):
            shards.run(tasks(tmp_path), 1, False, 0.01)
        assert [task.receipt.exists() for task in tasks(tmp_path)] == [True, False, True, False]
    shards.run(tasks(tmp_path), 1, False, 0.02)
    gone = [shards.Skip(str(number), f"gone{number}", "missing image") for number in range(4)]
    chosen = [shards.Skip("y", "y", "empty findings")] * 100
    shards.run(tasks(tmp_path), 1, False, 0.06, gone + chosen)
    with pytest.raises(UserError, match=told.format("6 of 24", r"0\.05", "gone0")):
        shards.run(tasks(tmp_path), 1, False, 0.05, chosen + gone)
    # Nothing is written where the inputs that are missing are too many alone.
    with pytest.raises(UserError, match=told.format("4 of 24", r"0\.01", "gone0")):
        shards.run(tasks(tmp_path / "new"), 1, False, 0.01, gone)
    monkeypatch.setitem(sys.modules, "apache_beam", types.ModuleType("apache_beam"))  # with which nothing can be begun
    with pytest.raises(UserError, match=told.format("4 of 24", r"0\.01", "gone0")):
        shards.run_on_beam(tasks(tmp_path / "new"), None, None, 0.01, gone)
    shards.check_broken(tasks(tmp_path, each=1000, count=20_000), {}, 0.05, gone * 250)
    with pytest.raises(UserError, match=told.format("1056 of 21056", r"0\.05", "gone0")):
        shards.check_broken(tasks(tmp_path, each=1000, count=20_000), {}, 0.05, gone * 264)


def test_what_bounds_the_bad_rows_where_nobody_does(tmp_path):
    """The commands, the functions below them, and a run of a training agree; a corpus of which most is missing is refused as a whole."""
    from rad_jax.train import Beside

    # Both commands in one process would define the flag twice.
    texts = ((ROOT / "launch" / name).read_text() for name in ("pack.py", "train.py"))
    given = {float(value) for text in texts for value in re.findall(r'"bad_rows",\s+([\d.]+),', text)}
    signatures = (inspect.signature(of).parameters["bad_rows"] for of in (pack, records.CorpusBuilder.__init__))
    assert given | {Beside().bad_rows} | {of.default for of in signatures} == {shards.BAD_ROWS} == {0.05}
    rows = ["image,findings", "a.png,Clear.", *(f"{number}.png,Clear." for number in range(6))]
    (tmp_path / "reports.csv").write_text("\n".join(rows) + "\n")
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    mine = dataclasses.replace(SMALL, dataset="folder", source=str(tmp_path), image_size=16)
    with pytest.raises(
        UserError,
        match=r"6 of 7 inputs cannot be used, more than --bad_rows=0\.05 allows; the first is 0\.png, missing",
    ):
        pack(mine, tmp_path / "c", workers=1, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "reports.csv"]
    manifest, _ = pack(mine, tmp_path / "c", workers=1, progress=False, bad_rows=1.0)
    assert manifest["summary"]["written"] == 1 and manifest["summary"]["skipped"] == {"missing image": 6}


def test_films_that_are_mended_are_packed(tmp_path):
    """Too many damaged films: the shard without one stays, and the other is written when they are whole."""
    rows = ["image,findings,split", *(f"{number}.png,Clear.,train" for number in range(70))]
    (tmp_path / "reports.csv").write_text("\n".join(rows) + "\n")
    for number in range(70):
        Image.new("L", (16, 16), number).save(tmp_path / f"{number}.png")
    mine = dataclasses.replace(SMALL, dataset="folder", source=str(tmp_path / "reports.csv"), image_size=16)
    whole, _ = pack(mine, tmp_path / "whole", workers=1, progress=False)
    films = Corpus.open(tmp_path / "whole").source("train")
    damaged = {(tmp_path / f"{films[number]['id']}.png"): b"" for number in range(64, 70)}  # the second shard's
    for path in damaged:
        damaged[path] = path.read_bytes()
        path.write_bytes(damaged[path][:40])
    with pytest.raises(shards.Stopped, match="6 of 70 inputs cannot be used"):
        pack(mine, tmp_path / "c", workers=1, progress=False)
    (kept,) = (tmp_path / ".c.packing/shards").glob("*.json")
    number = kept.with_suffix(".array_record").stat().st_ino
    for path, data in damaged.items():
        path.write_bytes(data)
    manifest, _ = pack(mine, tmp_path / "c", workers=1, progress=False)
    assert manifest["fingerprint"] == whole["fingerprint"] and manifest["summary"] == whole["summary"]
    assert number in {path.stat().st_ino for path in (tmp_path / "c/folder/1.0.0").iterdir()}
    assert not (tmp_path / ".c.packing").exists()


@pytest.mark.parametrize(
    ("count", "number", "longest"), [(1, 1, 1), (64, 1, 64), (65, 2, 64), (4600, 64, 72), (377_110, 369, 1024)]
)
def test_sizes_of_shards(count, number, longest):
    plan = shards.plan(count)
    assert len(plan) == number and max(part.stop - part.start for part in plan) == longest
    assert plan[0].start == 0 and plan[-1].stop == count
    assert all(a.stop == b.start for a, b in itertools.pairwise(plan))


def test_a_pack_that_was_stopped_goes_on(tmp_path, monkeypatch):
    many = dataclasses.replace(SMALL, studies=300, image_size=16)
    whole, _ = pack(many, tmp_path / "whole", workers=1, progress=False)
    written: list[Path] = []
    write = shards.write

    def stopping(task):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(task.path)
        return write(task)

    monkeypatch.setattr(shards, "write", stopping)
    with pytest.raises(OSError, match="No space"):
        pack(many, tmp_path / "c", workers=1, progress=False)
    left = tmp_path / ".c.packing" / "shards"
    assert len(list(left.glob("*.array_record"))) == 3 and not (tmp_path / "c").exists()

    def counting(task):
        written.append(task.path)
        return write(task)

    monkeypatch.setattr(shards, "write", counting)
    manifest, packed = pack(many, tmp_path / "c", workers=1, progress=False)
    assert packed and len(written) == len(set(written))  # no shard was written twice
    assert manifest["fingerprint"] == whole["fingerprint"]
    assert (tmp_path / "c/shards.json").read_bytes() == (tmp_path / "whole/shards.json").read_bytes()
    known = json.loads((tmp_path / "c/shards.json").read_text())
    for name, shard in known.items():
        data = (tmp_path / "c" / manifest["builder_dir"] / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "whole"]


def test_beam_is_asked_for_by_name(tmp_path):
    if importlib.util.find_spec("apache_beam"):
        pytest.skip("Apache Beam is installed")
    with pytest.raises(UserError, match="--beam_pipeline_options needs Apache Beam"):
        pack(SMALL, tmp_path / "c", workers=1, progress=False, beam=["--runner=DirectRunner"])
    assert not list(tmp_path.iterdir())


def test_beam_writes_the_same_corpus(tmp_path):
    pytest.importorskip(
        "apache_beam", reason="Apache Beam wants an older protobuf than jax: it has an environment of its own"
    )
    here, _ = pack(SMALL, tmp_path / "here", workers=1, progress=False)
    beam = ["--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    there, _ = pack(SMALL, tmp_path / "there", workers=1, progress=False, beam=beam)
    assert there["fingerprint"] == here["fingerprint"] and there["summary"] == here["summary"]
