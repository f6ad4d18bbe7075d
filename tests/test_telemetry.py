"""Rates, utilisation by both accountings, memory, recompiles, profiles, and who else gets the rows."""

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from configs import stage3
from rad_jax import chips, flops, metrics, tasks, telemetry, train
from rad_jax.errors import UserError


def test_utilisation_is_that_of_the_compile_report():
    """The same formulas as `aot.report`: needed FLOPs of real tokens over peak, for stage 3 on v5e."""
    config = stage3.get_config("v5e-64")
    model = tasks.model_config(config)
    rows, seconds = 640, 25.0
    text, targets = rows * 182, rows * 90
    counts = {"rows": rows, "tokens": text + rows * model.image_tokens, "text": text, "targets": targets}
    found = telemetry.Utilisation(config, model, "TPU v5 lite", 64).row(counts, seconds)
    lengths = flops.Lengths(182, 90, config.data.text_length, config.data.target_length)
    work = flops.total(flops.training(model, config.trainable, lengths, config.batch_size, config.num_micro))
    per_chip = rows / seconds / 64
    assert found["lora_mfu"] == pytest.approx(work.needed * per_chip / chips.CHIPS["v5e"].peak)
    assert found["mfu_6n"] == pytest.approx(work.trained * per_chip / chips.CHIPS["v5e"].peak)
    assert found["tokens_per_s_per_chip"] == pytest.approx((182 + model.image_tokens) * per_chip)
    # By hand: 4 FLOPs for each of Vicuna-7B's 6.476e9 weights in layers, and a tenth more for adapters, attention, head and tower.
    least = 4 * 6.476e9 * (182 + 1369) * per_chip / 1.97e14
    assert least < found["lora_mfu"] < 1.15 * least
    assert 1.3 < found["mfu_6n"] / found["lora_mfu"] < 1.5


def test_device_without_a_known_peak_has_rates_alone():
    config = stage3.get_config("v5e-64")
    counts = {"rows": 8, "tokens": 800, "text": 400, "targets": 100}
    found = telemetry.Utilisation(config, tasks.model_config(config), "cpu", 2).row(counts, 4.0)
    assert found == {"tokens_per_s_per_chip": 100.0}


def test_every_machine_we_name_has_a_peak():
    assert {chip.kind for chip in chips.CHIPS.values()} <= telemetry.PEAKS.keys()
    assert telemetry.PEAKS["NVIDIA H100 80GB HBM3"] > telemetry.PEAKS["NVIDIA A100-SXM4-80GB"]


def test_memory_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    stats = [{"peak_bytes_in_use": 3 * chips.GIB}, {"peak_bytes_in_use": 5 * chips.GIB}]
    monkeypatch.setattr(telemetry.jax, "local_devices", lambda: [Device(each) for each in stats])
    assert telemetry.hbm_peak() == 5.0
    monkeypatch.setattr(telemetry.jax, "local_devices", lambda: [Device(None)])
    assert telemetry.hbm_peak() is None


def test_compiles_are_counted():
    before = telemetry.compiles()
    double = jax.jit(lambda x: x * 2)
    double(jnp.ones(3)), double(jnp.zeros(3))
    first = telemetry.compiles() - before
    double(jnp.ones(4))
    assert first >= 1  # what makes the arguments is compiled too
    assert telemetry.compiles() - before > first


@pytest.mark.parametrize(("text", "steps"), [(None, None), ("", None), ("10:12", (10, 12)), ("3:3", (3, 3))])
def test_steps_to_profile(text, steps):
    assert telemetry.steps_to_profile(text) == steps


@pytest.mark.parametrize("text", ["10", "12:10", "a:b", "0:3", "-1:3"])
def test_steps_that_cannot_be_profiled(text):
    with pytest.raises(UserError, match=f"--profile={text} cannot be read: give the first and the last step"):
        telemetry.steps_to_profile(text)


def test_profile_of_some_steps(tmp_path):
    profile = telemetry.Profile(tmp_path, (2, 3))
    for step in range(1, 5):
        profile.before(step)
        numbers = jnp.sum(jnp.ones(8) * step)
        assert ((tmp_path / "profile").exists()) == (step > 3) or step in (2, 3)
        profile.after(step, numbers)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    profile.close()  # nothing is left to end


def test_rows_go_to_tensorboard_and_wandb(tmp_path, monkeypatch):
    """As their clients are called; that they are not needed is tested beside the guards."""
    said: list[Any] = []
    ids: list[str] = []

    class Writer:
        def __init__(self, folder):
            said.append(("folder", folder))

        def add_scalar(self, name, value, step):
            said.append((name, value, step))

        def flush(self):
            pass

    class Run:
        def log(self, row, step):
            said.append(("wandb", row, step))

    def init(project, resume, **more):
        said.append(("init", project, resume))
        ids.append(more["id"])
        return Run()

    board, client = types.ModuleType("tensorboardX"), types.ModuleType("wandb")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    client.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "wandb", client)
    row = {"step": 5, "loss": 1.5}
    metrics.tensorboard(tmp_path)(row)
    metrics.wandb(tmp_path, "films")(row)
    assert said == [
        ("folder", str(tmp_path / "tensorboard")),
        ("loss", 1.5, 5),
        ("init", "films", "allow"),
        ("wandb", row, 5),
    ]
    # Started again it is the same run there; a run of the same name elsewhere is another one.
    other = tmp_path / "other" / tmp_path.name
    other.mkdir(parents=True)
    for workdir in (tmp_path, other):
        metrics.wandb(workdir, "films")
    assert ids[0] == ids[1] != ids[2]
    assert (tmp_path / "wandb_id").read_text() == f"{ids[0]}\n"


def test_writer_that_cannot_be_reached_is_said_once_and_dropped(training, tmp_path, monkeypatch, capsys):
    """At its start, as without a login, or in the middle, as without a network: the run goes on and all rows are in metrics.jsonl."""
    sent = []

    class Run:
        def log(self, row, step):
            if step == 3:
                raise ConnectionError("no route to host")
            sent.append(step)

    def no_login(**_):
        raise RuntimeError("api_key not configured\n  log in first")

    client = types.ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", client)
    client.init = no_login  # type: ignore[attr-defined]
    silent = metrics.wandb(tmp_path, "films")
    said = "note: Weights & Biases gets no rows (api_key not configured log in first); training goes on"
    assert said in capsys.readouterr().err
    client.init = lambda **_: Run()  # type: ignore[attr-defined]
    writers = [silent, metrics.wandb(tmp_path, "films"), sent.append]
    training.run(training.config("lm"), tmp_path / "run", beside=train.Beside(writers=writers))
    assert [row["step"] for row in metrics.read(tmp_path / "run")] == [1, 2, 3, 4]
    assert [row if isinstance(row, int) else row["step"] for row in sent] == [1, 1, 2, 2, 3, 4]
    err = capsys.readouterr().err
    assert err.count("Weights & Biases gets no rows (no route to host); training goes on") == 1
