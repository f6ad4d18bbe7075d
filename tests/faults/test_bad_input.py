"""What a user can get wrong ends in one sentence, exit status 2, and nothing lost: the real commands, in processes of their own."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rad_jax import errors, guards, images, metrics
from rad_jax.checkpoint import load_run
from rad_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LM = "--config=configs/phantom.py:lm"


def command(name, *arguments):
    """Runs a command as a user does, on one CPU device."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", f"launch.{name}", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def fails(sentence, name, *arguments):
    """The command ends with status 2 and `sentence` within one line of error, and no traceback."""
    done = command(name, *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert sentence in lines[0]


def written_config(training, folder, stage, **changes):
    """A config file with a small experiment."""
    file, record = folder / "config.py", training.config(stage, **changes).to_dict()
    file.write_text(f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({record!r})\n")
    return file


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("configs/nonsense.py: no such file or folder", ["--config=configs/nonsense.py", "--data=x", "--workdir=y"]),
        ("choose lm, stage1, stage2, stage3", ["--config=configs/phantom.py:nonsense", "--data=x", "--workdir=y"]),
        ("choose cpu-1, cpu-8", ["--config=configs/stage3.py:abacus", "--data=x", "--workdir=y"]),
        ("--data is missing", [LM, "--workdir=y"]),
        ("--config is missing", ["--data=x", "--workdir=y"]),
        ("nosuch", [LM, "--data=x", "--workdir=y", "--config.nosuch=1"]),
        ("--config.steps=many", [LM, "--data=x", "--workdir=y", "--config.steps=many"]),
        ("--nosuch is unknown", [LM, "--data=x", "--workdir=y", "--nosuch=1"]),
    ],
)
def test_flags(sentence, arguments):
    fails(sentence, "train", *arguments)


def test_config_file_with_a_mistake(tmp_path):
    (tmp_path / "config.py").write_text("def get_config():\n    return 1 / 0\n")
    fails("ZeroDivisionError: division by zero", "train", f"--config={tmp_path}/config.py", "--data=x", "--workdir=y")


def test_help():
    done = command("train", "--help")
    assert done.returncode == 0
    assert "--workdir" in done.stdout
    assert done.stderr == ""


def test_no_corpus(tmp_path):
    fails("no packed corpus here", "train", LM, f"--data={tmp_path}", f"--workdir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_corpus_of_another_format_version(tiny_corpus, tmp_path):
    shutil.copytree(tiny_corpus, tmp_path / "corpus")
    manifest = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps({**manifest, "format_version": 99}))
    fails(
        "format_version 99 but this rad_jax reads",
        "train",
        LM,
        f"--data={tmp_path}/corpus",
        f"--workdir={tmp_path}/run",
    )
    assert not (tmp_path / "run").exists()


def test_images_of_another_size(tiny_corpus, tmp_path):
    config = "--config=configs/phantom.py:stage1"
    fails("pack it again with --image_size=112", "train", config, f"--data={tiny_corpus}", f"--workdir={tmp_path}/run")


def test_tokenizer_larger_than_the_model(tiny_corpus, tmp_path):
    small = "--config.model.llm.vocab_size=100"
    fails("the config's vocab_size is 100", "train", LM, small, f"--data={tiny_corpus}", f"--workdir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_empty_training_split(tiny_corpus, tmp_path):
    """All films of a folder are for testing; its tokenizer is given, since none can be trained."""
    rng = np.random.default_rng(0)
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(images.encode_png(rng.integers(0, 256, (40, 40), dtype=np.uint8)))
    (tmp_path / "films.csv").write_text("image,findings,split\n0.png,Clear.,test\n1.png,Clear.,test\n")
    given = ["--dataset=folder", f"--source={tmp_path}", f"--tokenizer={tiny_corpus}/tokenizer.json", "--image_size=32"]
    packed = command("pack", *given, f"--out={tmp_path}/corpus", "--workers=1")
    assert packed.returncode == 0, packed.stderr
    fails("split 'train' has no records", "train", LM, f"--data={tmp_path}/corpus", f"--workdir={tmp_path}/run")


def test_missing_column(tmp_path):
    (tmp_path / "films.csv").write_text("image,report\n0.png,Clear.\n")
    fails("findings", "pack", "--dataset=folder", f"--source={tmp_path}", f"--out={tmp_path}/corpus")
    assert sorted(os.listdir(tmp_path)) == ["films.csv"]


def test_workdir_below_a_file(tiny_corpus, tmp_path):
    (tmp_path / "file").write_text("")
    fails("file, not a folder", "train", LM, f"--data={tiny_corpus}", f"--workdir={tmp_path}/file/run")
    fails("file, not a folder", "train", LM, f"--data={tiny_corpus}", f"--workdir={tmp_path}/file")


def test_workdir_of_another_config(tiny_corpus, chain, tmp_path):
    shutil.copytree(chain / "lm", tmp_path / "lm")
    before = load_run(tmp_path / "lm").sha256
    fails("belongs to another run", "train", LM, f"--data={tiny_corpus}", f"--workdir={tmp_path}/lm")
    assert load_run(tmp_path / "lm").sha256 == before


def test_base_that_is_no_run(tiny_corpus, tmp_path):
    arguments = [f"--data={tiny_corpus}", f"--workdir={tmp_path}/run", f"--base={tmp_path}"]
    fails("is neither a run of launch.train nor a base of launch.convert", "train", LM, *arguments)


def test_more_devices_than_there_are(tiny_corpus, tmp_path):
    arguments = [f"--data={tiny_corpus}", f"--workdir={tmp_path}/run", "--config.mesh.data=3"]
    fails("needs 3 devices but 1 cpu devices are here", "train", LM, *arguments)


@pytest.mark.parametrize(
    ("sentence", "arguments"),
    [
        ("give either --data (and --out) or --image", []),
        ("--out is missing", ["--data={corpus}"]),
        ("broken.png", ["--image={here}/broken.png"]),
        ("missing.png: cannot be read", ["--image={here}/missing.png"]),
        ("no split 'nosuch'", ["--data={corpus}", "--split=nosuch", "--out={here}/out.jsonl"]),
    ],
)
def test_generate(sentence, arguments, tiny_corpus, chain, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not quite")
    places = {"corpus": tiny_corpus, "here": tmp_path}
    fails(sentence, "generate", f"--checkpoint={chain}/stage3", *(text.format(**places) for text in arguments))
    assert not (tmp_path / "out.jsonl").exists()


def test_generate_with_a_run_that_cannot_write(chain, tiny_corpus, tmp_path):
    arguments = [f"--data={tiny_corpus}", f"--out={tmp_path}/out.jsonl"]
    fails("cannot write findings of an image", "generate", f"--checkpoint={chain}/stage1", *arguments)


def test_second_job_on_one_workdir(training, tmp_path):
    workdir, config = tmp_path / "lm", written_config(training, tmp_path, "lm", steps=8)
    arguments = [f"--config={config}", f"--data={training.corpus}", f"--workdir={workdir}"]
    workdir.mkdir()
    with guards.lock(workdir):
        fails(f"{workdir} is in use by process {os.getpid()} on", "train", *arguments)
    assert not (workdir / "checkpoints").exists()


def test_workdir_that_cannot_be_written(tiny_corpus, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", place]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root, with the right to mount, can make a read-only disk")
    try:
        fails(
            "the file system is read-only: choose another folder",
            "train",
            LM,
            f"--data={tiny_corpus}",
            f"--workdir={place}/run",
        )
    finally:
        subprocess.run(["umount", place], check=True)


def test_workdir_on_a_read_only_disk(training, tmp_path, monkeypatch):
    """The same without the right to mount: the system's answer is played."""

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        training.run(training.config("lm"), tmp_path / "run")
    sentence = f"{tmp_path}/run: the file system is read-only: choose another folder."
    assert errors.describe_disk_error(caught.value) == sentence


def test_no_room_for_the_second_checkpoint(training, tmp_path, monkeypatch):
    """The same without a disk that is small: the run keeps its checkpoint, and goes on from it when there is room again."""
    usage, asked = shutil.disk_usage, []

    def full(folder):
        asked.append(folder)
        return usage(folder)._replace(free=10**9 if len(asked) == 1 else 10)

    config, run = training.config("lm", steps=6), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", full)
        with pytest.raises(OSError, match="No space") as caught:
            training.run(config, run)
    sentence = "the disk is full: free some space and run the same command again."
    assert errors.describe_disk_error(caught.value) == f"{run}/checkpoints: {sentence}"
    assert load_run(run).step == 2
    training.run(config, run)
    assert [row["step"] for row in metrics.read(run)] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of three megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", place]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root, with the right to mount, can make a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_full_disk_while_saving(training, small_disk, tmp_path):
    """The run keeps its checkpoint, and goes on from it when there is room again."""
    config = written_config(training, tmp_path, "lm", steps=6)
    run = small_disk / "run"
    arguments = [f"--config={config}", f"--data={training.corpus}", f"--workdir={run}"]
    # A checkpoint takes 0.7 MB, and asks for one more to be free: the first fits, the second does not.
    (small_disk / "other").write_bytes(bytes(1_100_000))
    fails("the disk is full: free some space and run the same command again", "train", *arguments)
    assert load_run(run).step == 2
    (small_disk / "other").unlink()
    done = command("train", *arguments)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stdout
    assert load_run(run).step == 6
    assert [row["step"] for row in metrics.read(run)] == [1, 2, 3, 4, 5, 6]


def test_full_disk_while_logging(training, tmp_path, monkeypatch):
    """/dev/full takes nothing."""
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(metrics, "_opened", lambda _: full)
        with pytest.raises(OSError, match="No space left") as caught:
            training.run(training.config("lm"), tmp_path / "run")
        with contextlib.suppress(OSError):  # what is left in the buffer
            full.close()
    assert "the disk is full" in (errors.describe_disk_error(caught.value) or "")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: the disk is full"),
        (
            ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"),
            "writing failed: the disk is full",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a"),
            "/a: permission denied: choose a folder you may write to.",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: the file system is read-only"),
        (OSError(errno.EIO, "Input/output error", "/a"), "/a: Input/output error"),
        (OSError("something else"), "something else"),
    ],
)
def test_sentences_for_disks(error, sentence):
    assert (errors.describe_disk_error(error) or "").startswith(sentence)


def test_sentence_for_a_disk_behind_another_error():
    error = RuntimeError("saving failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/a")
    assert (errors.describe_disk_error(error) or "").startswith("/a: the disk is full")


def test_a_library_that_is_not_installed():
    missing = ModuleNotFoundError("No module named 'open_clip'", name="open_clip.factory")
    assert "open_clip is not installed" in (errors.describe_missing_library(missing) or "")
    assert "pip install open_clip_torch" in (errors.describe_missing_library(missing) or "")
    assert errors.describe_missing_library(ModuleNotFoundError(name="rad_jax.typo")) is None
    assert errors.describe_missing_library(ImportError("cannot import name 'x'", name="jax")) is None


def test_our_own_mistakes_are_no_user_errors():
    assert errors.describe_disk_error(ValueError("shapes (2,) and (3,) differ")) is None


@pytest.mark.parametrize("found", [None, 0, 2, "1"])
def test_other_format_versions(found):
    with pytest.raises(
        UserError, match=f"corpus.json has format_version {found!r} but this rad_jax reads version 1: make it again"
    ):
        errors.check_format(found, "corpus.json")
    errors.check_format(1, "corpus.json")
