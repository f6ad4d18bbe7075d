"""Export as a user does it: the folder appears when PyTorch and JAX agree, and not otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.errors import UserError
from rad_jax.interop import bundle
from rad_jax.interop.export import export

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


def exported(example, out, **changes):
    return export(example.exported(**changes), "hf", out, "float32", studies=example.studies, max_new_tokens=8)


def test_the_record_says_what_was_compared(plain_example, tmp_path):
    result = exported(plain_example, tmp_path / "new/bundle")
    record = json.loads((tmp_path / "new/bundle/receipt.json").read_text())
    result = result["differences"]
    assert record["differences"] == result and result["text_equal"] and result["max_abs_logit_diff"] <= 1e-4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bundle"]
    with pytest.raises(UserError, match="exists already"):
        exported(plain_example, tmp_path / "new/bundle")


def test_greatest_outputs_are_those_of_pytorch(plain_example, tmp_path):
    model = plain_example.exported()
    record = export(model, "hf", tmp_path / "out", "float16", studies=plain_example.studies[:1], max_new_tokens=1)
    theirs = record["differences"]["max_abs_activation"]
    tower, decoder = ([value for name, value in theirs.items() if part in name] for part in ("vision", "language"))
    used = model.config.vision.blocks_used
    ours = record["max_abs_outputs"]
    assert list(ours) == [f"vision.blocks.{i}" for i in range(used)] + [f"llm.layers.{i}" for i in range(len(decoder))]
    # The weights PyTorch has are rounded to float16, and the adapters merged.
    np.testing.assert_allclose(list(ours.values()), tower[:used] + decoder, rtol=5e-3)


def test_numbers_beyond_float16_are_refused(plain_example, tmp_path):
    params = plain_example.variables["params"]
    loud = jax.tree.map(lambda leaf: leaf * 1e3, params["projector"])
    variables = {**plain_example.variables, "params": {**params, "projector": loud}}
    with pytest.raises(UserError, match=r"the output of llm\.layers\.0 reaches .* beyond float16"):
        export(plain_example.exported(variables=variables), "hf", tmp_path / "out", "float16")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_bundle_that_differs(plain_example, tmp_path, monkeypatch):
    correct = bundle.with_rows

    def damaged(llm, rows):
        tree = correct(llm, rows)
        return {**tree, "norm": {"scale": np.asarray(tree["norm"]["scale"]) * 1.01}}

    monkeypatch.setattr(bundle, "with_rows", damaged)
    with pytest.raises(UserError, match="do not agree on it: max_abs_logit_diff"):
        exported(plain_example, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


DAMAGING = """
import sys
from rad_jax import errors
from rad_jax.interop import bundle
correct = bundle.with_rows
bundle.with_rows = lambda llm, rows: {**correct(llm, rows), "norm": {"scale": llm["norm"]["scale"] * 1.01}}
from launch import export
errors.run(export.main)
"""


@pytest.mark.slow
def test_command(plain_example, tmp_path):
    """`launch.export` on a run and a corpus on disk, and its exit status on a bundle that is not the model."""
    run, corpus = make_run(plain_example, tmp_path), make_corpus(tmp_path)
    flags = [f"--checkpoint={run}", f"--data={corpus}", "--dtype=float32", "--studies=2", "--max_new_tokens=8"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def call(*command):
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)

    good = call("-m", "launch.export", *flags, f"--out={tmp_path / 'good'}")
    assert good.returncode == 0, good.stderr
    assert "PyTorch and JAX agree on 2 studies" in good.stdout
    record = json.loads((tmp_path / "good/receipt.json").read_text())
    assert record["sources"]["run"]["step"] == 5

    bad = call("-c", DAMAGING, *flags, f"--out={tmp_path / 'bad'}")
    assert bad.returncode == 2
    last = bad.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "PyTorch and JAX do not agree" in last
    assert not (tmp_path / "bad").exists()


def test_a_projector_of_one_matrix_goes_nowhere(plain_example, tmp_path):
    from rad_jax import checkpoint
    from rad_jax.interop import exported

    run = checkpoint.load_run(make_run(plain_example, tmp_path))
    run.config["model"]["projector"] = "linear"
    with pytest.raises(UserError, match="its projector is linear"):
        exported.from_run(run)


def make_run(example, tmp_path):
    """A workdir whose one checkpoint holds all variables."""
    import dataclasses

    from rad_jax.checkpoint import Checkpointer, open_workdir
    from rad_jax.state import TrainState

    model = {"vision": dataclasses.asdict(example.config.vision), "llm": dataclasses.asdict(example.config.llm)}
    model["lora"] = dataclasses.asdict(example.config.lora)
    workdir = tmp_path / "run"
    corpus = {"dataset": "phantom", "fingerprint": "none"}
    open_workdir(workdir, {"task": "generative", "model": model}, corpus, example.tokenizer, [])
    checkpoints = Checkpointer(workdir, keep=1)
    state = TrainState(
        step=jnp.int32(5), rng=jnp.zeros(2, jnp.uint32), trainable=example.variables, opt_state={"x": np.ones(1)}
    )
    checkpoints.save(state, {"batches": {}, "fingerprint": "none"})
    checkpoints.close()
    return workdir


def make_corpus(tmp_path):
    from data import packing

    arguments = packing.Arguments(
        dataset="phantom", source=None, image_size=28, studies=40, seed=0, tokenizer=None, vocab_size=512
    )
    packing.pack(arguments, tmp_path / "corpus", 1)
    return tmp_path / "corpus"
