"""The command around ahead-of-time compilation: what it refuses, how it says that a program is too large, and its search."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags
from ml_collections import config_flags

from configs import common, stage1, stage3
from launch import compile as command
from rad_jax import aot, chips
from rad_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "launch.compile", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--topology is missing"),
        (("--topology=v5e-17",), "error: there is no v5e-17: v5e has slices of 1, 4, 8"),
        (("--topology=v5e-64", "--config.batch_size=96"), "error: 96 rows cannot be shared by 64 devices in 1 turns"),
        (("--topology=v5e-4",), "error: configs/hardware.py has no machine v5e-4"),
        (("--topology=v5e-16", "--search_rows=one"), "--search_rows and --search_mesh take numbers"),
        (("--topology=v5e-16", "--search_rows=1", "--hlo=x"), "--hlo does not go with the --search_ flags"),
        (("--topology=v5e-16", "--search_mesh=1x16x1", "--save=x"), "--save does not go with the --search_ flags"),
        (
            ("--topology=v5e-16", "--search_remat=full", "--generate_rows=8"),
            "--generate_rows does not go with the --search_",
        ),
    ],
)
def test_one_sentence_and_status_2(arguments, message):
    done = run("--config=configs/stage3.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def parsed(monkeypatch, config, *overrides):
    """What --config and its flags make, as launch.train gets it, and what the flags set."""
    holder = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=holder)
    given = ["launch", f"--config={ROOT}/configs/{config}", *(f"--config.{override}" for override in overrides)]
    monkeypatch.setattr(sys, "argv", given)  # where config_flags looks
    holder(given)
    return holder.config, config_flags.get_override_values(holder["config"])


@pytest.mark.parametrize(
    ("file", "machine", "overrides", "batch", "turns", "steps"),
    [
        ("stage3.py", "v5e-16", (), 64, 2, 18752),
        ("stage3.py", "v5e-16", ("batch_size=128",), 128, 4, 9376),
        ("stage3.py", "v5e-16", ("batch_size=128", "num_micro=2", "steps=50"), 128, 2, 50),
        ("stage3.py", "v5e-16", ("mesh.data=4", "mesh.fsdp=2", "mesh.tensor=2"), 64, 4, 18752),
        ("stage3.py", "v5e-256", ("model.llm.remat=full",), 512, 1, 2344),
        ("stage3.py", "v5e-256", ("batch_size=256",), 256, 1, 4688),
        ("stage3.py", "v5e-64x2", ("batch_size=1024",), 1024, 4, 1172),
        ("stage2.py", "v5p-8", ("batch_size=512",), 512, 32, 782),
        ("stage1.py", "v5e-16", ("batch_size=16384",), 16384, 32, 1362),
    ],
)
def test_what_is_compiled_is_what_is_trained(monkeypatch, file, machine, overrides, batch, turns, steps):
    """A larger batch takes more turns and fewer steps, unless they are given; a flag wins over the machine in both commands."""
    trained, _ = parsed(monkeypatch, f"{file}:{machine}", *overrides)
    name, _, slices = machine.partition("x")
    config, set_flags = parsed(monkeypatch, file, *overrides)
    compiled = command.fitted(config, set_flags, name, int(slices or 1))
    assert compiled.to_dict() == trained.to_dict()
    assert (trained.batch_size, trained.num_micro, trained.steps) == (batch, turns, steps)


def given(monkeypatch, **values):
    """Flags of the command as if given: SLICES=2."""
    for name, value in values.items():
        monkeypatch.setattr(command, f"_{name}", SimpleNamespace(value=value, name=name.lower()))


def test_an_experiment_that_names_no_machine(monkeypatch):
    """Read from a command's flags, and locked by them."""
    config, set_flags = parsed(monkeypatch, "phantom.py:stage3", "batch_size=32")
    config = command.fitted(config, set_flags, "v5e-8", 2)
    assert config.mesh.to_dict() == {"data": 2, "fsdp": 8, "tensor": 1}
    assert (config.model.vision.attention, config.model.llm.remat, config.num_micro) == ("splash", "minimal", 2)
    assert config.is_locked


@pytest.mark.parametrize(
    ("stage", "mesh", "rows", "message"),
    [
        (stage3, (2, 8, 1), 24, "--generate_rows=24 cannot be shared by 16 devices along data and fsdp"),
        (stage3, (2, 1, 8), 64, "--config.mesh.tensor=8 does not divide the 12 heads of config.model.vision"),
        (stage3, (1, 1, 16), 64, "--config.mesh.tensor=16 does not divide the 12 heads of config.model.vision"),
        (stage1, (1, 16, 1), 64, "--generate_rows needs a config that can write"),
        (stage1, (1, 2, 8), None, "--config.mesh.tensor=8 does not divide the 12 heads of config.model.vision"),
    ],
)
def test_meshes_that_cannot_be(stage, mesh, rows, message):
    """Said before anything is compiled."""
    config, place = stage.get_config("v5e-16"), chips.find("v5e-16")
    config.mesh = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    with pytest.raises(UserError, match=message):
        aot.compile_generation(config, place, 1, rows, 8) if rows else aot.compile_training(config, place)


def test_heads_of_the_cache_are_whole_whatever_the_kernel():
    config = stage3.get_config("cpu-1")
    config.model.llm.kv_heads, config.mesh.tensor = 4, 8
    aot.check_heads(config)
    with pytest.raises(UserError, match="tensor=8 does not divide the 4 heads"):
        aot.check_heads(config, generates=True)


def searching(monkeypatch, **lists):
    given(monkeypatch, **{name: lists.get(name.lower(), []) for name in ("ROWS", "REMAT", "MESH", "DTYPE")})
    config = stage3.get_config("v5e-16")
    config.batch_size = 64
    return config


def test_combinations_share_the_batch_and_keep_it(monkeypatch):
    config = searching(monkeypatch, rows=["1", "2", "3"], remat=["full", "minimal"], mesh=["1x16x1", "16x1x1"])
    found = command.combinations(config)
    assert len(found) == 8  # three rows on each of 16 devices are not a part of 64
    assert {setting["frozen_dtype"] for setting in found} == {"bfloat16"}
    for setting in found:
        tried = command.varied(config, setting)
        devices = tried.mesh.data * tried.mesh.fsdp
        assert tried.num_micro * devices * setting["rows"] == tried.batch_size == 64
        assert tried.model.llm.remat == setting["remat"]
    assert config.mesh.to_dict() == {"data": 1, "fsdp": 16, "tensor": 1}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"rows": ["3"]}, "0 combinations share 64 rows evenly"),
        ({"rows": ["1", "2", "4"], "remat": list("abcdefghi")}, "27 combinations share 64 rows"),
        ({"mesh": ["16x1"]}, "--search_mesh takes data x fsdp x tensor"),
    ],
)
def test_searches_that_cannot_be(monkeypatch, lists, message):
    config = searching(monkeypatch, **lists)
    with pytest.raises(UserError, match=message):
        command.combinations(config)


def test_what_no_other_row_beats():
    def row(gib, speed):
        setting = {"mesh": (1, 16, 1), "remat": "full", "frozen_dtype": "int8", "rows": 2}
        fits = {"peak_hbm_bytes": gib * 2**30, "tokens_per_s_per_chip": speed, "lora_mfu": 0.5, "predicted_step_s": 1.0}
        return {"setting": setting, **(fits if speed else {"needed_bytes": gib * 2**30})}

    refused = {"setting": row(1, 1)["setting"], "error": "ValueError: no"}
    rows = [row(4, 100), row(8, 200), row(9, 150), row(8, 120), row(20, 0), refused]
    command.mark(rows)
    assert [row["best"] for row in rows] == [True, True, False, False, False, False]
    lines = command.table(rows).splitlines()
    assert [line[0] for line in lines[1:]] == ["*", "*", " ", " ", " ", " "]
    assert "does not fit" in lines[-2] and lines[-1].endswith("cannot be compiled: ValueError: no")


def test_a_search_goes_on_after_an_error(monkeypatch, tmp_path, capsys):
    """What is found is in the file after each program, and the row of one that fails says why."""
    config = searching(monkeypatch, rows=["1", "2", "4"])
    file = tmp_path / "found.json"
    given(monkeypatch, SLICES=1, TEXT_TOKENS=None, JSON=file)
    monkeypatch.setattr(aot, "devices", lambda place, slices: [])
    figures = {"lora_mfu": 0.5, "peak_hbm_bytes": 2**30, "tokens_per_s_per_chip": 10.0, "predicted_step_s": 1.0}
    outcomes = [figures, RuntimeError("INTERNAL: Mosaic failed\nand a long dump"), aot.DoesNotFit(2e10, 1e10)]
    written = []

    def compile_training(config, place, slices):
        written.append(len(json.loads(file.read_text())) if file.exists() else 0)
        found = outcomes[len(written) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(aot, "compile_training", compile_training)
    monkeypatch.setattr(aot, "report", lambda program, text_tokens: program)
    assert command.search(chips.find("v5e-16"), config) == 0
    assert written == [0, 1, 2]
    found = json.loads(file.read_text())
    assert [row.get("error") for row in found] == [None, "RuntimeError: INTERNAL: Mosaic failed", None]
    assert [row["best"] for row in found] == [True, False, False] and found[2]["needed_bytes"] == 2e10
    assert "cannot be compiled: RuntimeError: INTERNAL: Mosaic failed" in capsys.readouterr().out
    written.clear()
    outcomes[:] = [ValueError("no")] * 3
    assert command.search(chips.find("v5e-16"), config) == 1


def test_advice_names_what_can_still_be_done():
    config = stage3.get_config("v5e-16")
    config.model.llm.remat = "minimal"
    text = aot.advice(config)
    assert "remat=full" in text and "frozen_dtype=int8" in text
    config.model.llm.remat, config.frozen_dtype = "full", "int8"
    config.num_micro = config.batch_size // 16
    assert aot.advice(config) == "What helps: a larger slice (--topology)."


def test_advice_for_generation_is_another():
    """No rematerialisation, turns or 8-bit weights: generation has none of them."""
    config = stage3.get_config("v5e-16")
    config.mesh = {"data": 8, "fsdp": 1, "tensor": 2}
    assert aot.generation_advice(config, 40, 256) == (
        "What helps: fewer images at once (--generate_rows=16); each copy's heads and cache on more chips (--config.mesh.data=4 "
        "--config.mesh.fsdp=1 --config.mesh.tensor=4); shorter texts (--max_new_tokens=128); a larger slice (--topology)."
    )
    config.mesh = {"data": 4, "fsdp": 1, "tensor": 4}  # the image tower's 12 heads go no further
    assert aot.generation_advice(config, 4, 1) == "What helps: a larger slice (--topology)."


@pytest.mark.slow
def test_search(monkeypatch, tmp_path, capsys):
    """A small step on eight chips: half of the rows at once take less memory, and all of them less time."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    searching(monkeypatch, rows=["1", "2"])
    given(monkeypatch, SLICES=1, TEXT_TOKENS=None, JSON=tmp_path / "found.json")
    model = {
        "vision": {"image_size": 98, "patch_size": 14, "width": 64, "depth": 2, "heads": 2, "mlp_dim": 256},
        "llm": {
            "vocab_size": 512,
            "width": 256,
            "depth": 2,
            "heads": 2,
            "kv_heads": 2,
            "mlp_dim": 512,
            "remat": "full",
        },
    }
    data = {"template": "plain", "text_length": 65, "target_length": 32}
    config = common.experiment("generative", model, ("params/projector/.*",), data, steps=10, batch_size=16)
    config.mesh.fsdp = 8
    assert command.search(chips.find("v5e-8"), config) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["setting"]["rows"], row["num_micro"]) for row in found] == [(1, 2), (2, 1)]
    assert found[0]["peak_hbm_bytes"] < found[1]["peak_hbm_bytes"]
    assert found[0]["predicted_step_s"] > found[1]["predicted_step_s"]
    assert capsys.readouterr().out.count("* 1x8x1") == 2


@pytest.mark.slow
def test_too_large_a_program_is_status_3(monkeypatch, capsys):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    given(monkeypatch, SLICES=1, GENERATE_ROWS=None, MAX_NEW_TOKENS=256)
    llm = {"vocab_size": 512, "width": 1024, "depth": 16, "heads": 8, "kv_heads": 8, "mlp_dim": 4096}
    data = {"template": "text", "text_length": 128, "target_length": 32}
    config = common.experiment("generative", {"llm": llm}, ("params/llm/.*",), data, steps=10, batch_size=4096)
    config.mesh.data = 8
    assert command.single(chips.find("v5e-8"), config) == 3
    text = capsys.readouterr().out
    assert "GiB too many" in text and "remat=full" in text and "--config.mesh.fsdp=8" in text


# What the file must have; it has more.
KEYS = {
    *("topology", "chips", "mesh", "sequence_length", "global_batch", "remat", "frozen_params", "trainable_params"),
    *("peak_hbm_bytes", "hbm_bytes", "flops_formula", "flops_compiled", "collectives", "predicted_step_s", "compile_s"),
    *("tokens_per_s_per_chip", "lora_mfu", "mfu_6n", "hardware_utilization"),
}

# Two layers whose heads of 128 channels see rows of 1,792: 1,744 words, and 49 patches in place of one.
SMALL = """
from configs import common


def get_config():
    vision = {"image_size": 98, "patch_size": 14, "width": 64, "depth": 3, "heads": 2, "mlp_dim": 256, "attention": "xla", "feature_layer": -2}
    llm = {"vocab_size": 512, "width": 256, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_dim": 512, "dtype": "bfloat16"}
    lora = {"rank": 64, "alpha": 128.0, "dropout": 0.05, "targets": ("q", "k", "v", "o", "gate", "up", "down")}
    data = {"template": "v1", "text_length": 1744, "target_length": 256, "mean_text_length": 848}
    model, trainable = {"vision": vision, "llm": llm, "lora": lora}, ("params/projector/.*", "lora/.*")
    config = common.experiment("generative", model, trainable, data, steps=90, batch_size=32)
    config.frozen_dtype = "bfloat16"
    return config
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The command, once: a folder with the figures, the scheduled program and the executable, and what was printed."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    here = tmp_path_factory.mktemp("compiled")
    (here / "small.py").write_text(SMALL)
    files = (f"--{name}={here}/{name}" for name in ("json", "hlo", "save"))
    # XLA's attention in the tower: the referee has no time for a kernel of its shape.
    chosen = ("--topology=v5e-8", "--slices=2", "--config.model.vision.attention=xla")
    done = run(f"--config={here}/small.py", *chosen, *files, timeout=1200)
    assert done.returncode == 0, done.stderr
    return here, json.loads((here / "json").read_text()), done.stdout


@pytest.mark.slow
def test_what_the_command_tells(compiled):
    here, found, page = compiled
    assert found.keys() >= KEYS
    assert (found["topology"], found["slices"], found["chips"]) == ("v5e-8", 2, 16)
    assert found["mesh"] == {"data": 2, "fsdp": 8, "tensor": 1}
    assert (found["global_batch"], found["num_micro"], found["remat"]) == (32, 2, "minimal")
    assert (found["sequence_length"], found["real_tokens"]) == (1744 + 48, 848 + 48)
    assert found["flops_compiled"] == pytest.approx(found["flops_formula"], rel=0.05)
    assert found["trainable_params"] * 12 == pytest.approx(found["checkpoint_bytes"], rel=1e-3)
    assert 0 < found["memory"]["arguments"] < found["peak_hbm_bytes"] < found["hbm_bytes"] == 15.75 * 2**30
    assert found["predicted_step_s"] == pytest.approx(
        sum(found["schedule"][f"{k}_s"] for k in ("matmul", "other", "kernels", "exposed"))
    )
    assert found["chip_hours"] == pytest.approx(90 * found["predicted_step_s"] * 16 / 3600)
    kinds = {(row["kind"], row["axes"]) for row in found["collectives"]}
    assert {("all-gather", "fsdp"), ("all-reduce", "slices")} <= kinds
    assert {axes for _, axes in kinds} == {"fsdp", "slices"}  # weights are gathered inside a slice alone
    assert all(row["bytes"] > 0 and row["number"] > 0 for row in found["collectives"])
    assert 0 < found["lora_mfu"] < min(found["lora_mfu_full_rows"], found["mfu_6n"])
    assert (
        max(found["lora_mfu_full_rows"], found["mfu_6n"]) < found["hardware_utilization"] < 1
    )  # of a model so small, LoRA is much
    assert "16 chips, mesh data 2 x fsdp 8 x tensor 1; 32 rows in 2 turns" in page
    assert (here / "hlo").read_text().startswith("HloModule jit_step")
    assert pickle.loads((here / "save").read_bytes())[0]


@pytest.mark.slow
def test_compute_time_is_that_of_another_reader(compiled):
    """An independent reading of the same scheduled program, with its own table of the kernels' cycles."""
    here, found, _ = compiled
    folder = ROOT.parent / "shared" / "aot"
    if not (folder / "hlo_time.py").exists():
        pytest.skip(f"the other reader is not here: {folder}/hlo_time.py")
    spec = importlib.util.spec_from_file_location("hlo_time", folder / "hlo_time.py")
    assert spec is not None and spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    kernels = json.loads((folder / "kernel_cycles.json").read_text())["TPU v5 lite|splash|1792|896|896|896|0"]
    estimate = reader.Est((here / "hlo").read_text(), "TPU v5 lite", kernels=kernels)
    theirs, ours = estimate.run(estimate.entry), found["schedule"]
    assert not ours["unknown_kernels"] and theirs["n_pallas"] and not theirs.get("pallas_unknown")
    assert theirs["compute"] == pytest.approx(ours["matmul_s"] + ours["other_s"] + ours["kernels_s"], rel=0.03)
    assert theirs["cat:pallas"] == pytest.approx(ours["kernels_s"], rel=0.03)
    assert theirs["cat:matmul"] == pytest.approx(ours["matmul_s"], rel=0.03)
    assert theirs["flops"] == pytest.approx(found["flops_compiled"], rel=0.03)
