"""What is not a whole, unchanged bundle of a model that the engine runs is refused with a reason."""

import hashlib
import json
import re
import shutil
import threading
from typing import Any

import pytest

from rad_jax.errors import UserError
from rad_jax.serving import loading, plan
from rad_jax.serving.bundle import read
from tests.serving import on_card

WEIGHTS = ("float32", "float16", "int8", "nf4")


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle of one's own, and a way to change a JSON file of it so that its hash still holds."""
    folder = tmp_path / "copy"
    shutil.copytree(bundle()[1], folder)

    def change(name, edit):
        contents = json.loads((folder / name).read_text())
        edit(contents)
        (folder / name).write_text(json.dumps(contents))
        rehash(folder, name)

    return folder, change


def rehash(folder, name):
    record = json.loads((folder / "receipt.json").read_text())
    record["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "receipt.json").write_text(json.dumps(record))


def refused(folder, message):
    with pytest.raises(UserError, match=message):
        loading.load(folder, device="cpu", say=lambda _: None)


def test_no_bundle(tmp_path):
    refused(tmp_path / "none", r"receipt\.json is missing")


def test_files_that_changed_or_are_missing(copy):
    folder, _ = copy
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(folder, "its hash differs")
    weights.unlink()
    refused(folder, "is missing")


def test_files_that_do_not_belong(copy):
    folder, _ = copy
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, r"pytorch_model\.bin is not part of the bundle")


def test_another_format_version(copy):
    folder, _ = copy
    record = json.loads((folder / "receipt.json").read_text())
    (folder / "receipt.json").write_text(json.dumps(record | {"format_version": 99}))
    refused(folder, "format_version 99")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(model_type="qwen2"), "model_type = 'qwen2'"),
        (lambda c: c["text_config"].update(attention_bias=True), "attention_bias = True"),
        (lambda c: c["vision_config"].update(model_type="timm_wrapper"), "model_type = 'timm_wrapper'"),
        (lambda c: c["vision_config"].update(hidden_act="relu"), "hidden_act = 'relu'"),
        (lambda c: c["text_config"].update(rope_scaling={"rope_type": "yarn"}), "rope_type = 'yarn'"),
        (lambda c: c.pop("text_config"), "not those of an exported bundle"),
        (lambda c: c["text_config"].update(num_hidden_layers=3), "tensors are missing"),
        (lambda c: c["text_config"].update(num_hidden_layers=1), "not of the model that config.json names"),
        (lambda c: c["text_config"].update(intermediate_size=64), "not of the model that config.json names"),
    ],
)
def test_models_that_are_not_served(edit, message, copy):
    folder, change = copy
    change("config.json", edit)
    refused(folder, message)


def test_arguments_that_cannot_be(bundle):
    folder = bundle()[1]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"device": "tpu"}, "device 'tpu'"),
        ({"weights": "int3"}, "weights 'int3'"),
        ({"slots": 0}, "slots must be"),
        ({"dtype": "float16"}, "float16.* is not for cpu"),
        ({"slots": 10**9}, "use --slots="),
    )
    for arguments, message in cases:
        given: dict[str, Any] = {"device": "cpu", "say": lambda _: None} | arguments
        with pytest.raises(UserError, match=message):
            loading.load(folder, **given)


def test_what_is_said_before_and_after_loading(bundle):
    said: list[str] = []
    engine = loading.load(bundle()[1], device="cpu", slots=2, say=said.append)
    engine.close()
    assert said[0].startswith("memory plan, this CPU, float32: needs ") and "2 slots" in said[0]
    assert said[1].startswith("ready after ") and "GiB resident" in said[1]
    info = engine.info
    assert (info.device, info.dtype, info.weights, info.slots) == ("this CPU", "float32", "float32", 2)
    assert info.bundle_sha256 == hashlib.sha256((bundle()[1] / "receipt.json").read_bytes()).hexdigest()
    assert info.image_size == 28 and info.max_tokens == 256 and info.template == "v1"


def test_loading_leaves_no_thread(bundle):
    """Its helpers would keep those of the engine's thread from waiting awake."""
    loading.load(bundle()[1], say=lambda _: None).close()
    assert "loading" not in {thread.name for thread in threading.enumerate()}
    assert loading.alone(lambda: threading.current_thread().name) == "loading"

    def fail():
        raise UserError("too little")

    with pytest.raises(UserError, match="too little"):
        loading.alone(fail)


def test_numbers_that_are_told_of_a_card(bundle, capsys):
    """On a CPU: beside transformers in float32 ours are off by rounding alone, and the coarser the weights, the more."""
    on_card.numbers(read(bundle("wide")[1]), plan.this_cpu())
    told = dict(re.findall(r"^(.+): logits off by (\S+) of their spread", capsys.readouterr().out, re.MULTILINE))
    theirs, *ours = (float(told[name]) for name in ("transformers, float16", *(f"ours, {kind}" for kind in WEIGHTS)))
    assert ours[0] < 1e-5 < ours[1] < ours[2] < ours[3]  # float32 has 24 bits, of which sums take a few
    assert ours[1] < 2 * theirs


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_float16_bundles_run_in_bfloat16(kind, bundle, engine):
    from rad_jax.serving.engine import Request

    example, folder = bundle(kind, "float16")
    assert read(folder).dtype == "float16"
    ours = engine(kind, "float16", dtype="bfloat16")
    image, _ = example.studies[0]
    assert len(list(ours.submit(Request(image, "heart?", 9)))) > 0
    assert ours.info.weights == "bfloat16"
