"""The exported bundle: PyTorch makes the same of it, and a bundle that is not the model is refused."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rad_jax import prompts
from rad_jax.errors import UserError
from rad_jax.interop import bundle, hf_tokenizer, receipt, shards, tables, verify

pytest.importorskip("torch")
pytest.importorskip("transformers")
from rad_jax.serving import reference


def written(folder, example, dtype="float32", **changes):
    folder.mkdir()
    exported = example.exported(**changes)
    hashes = bundle.write(folder, exported, dtype, lambda size: None)
    receipt.write(folder, format_version=1, sources=exported.sources, files=hashes)
    return folder


def verified(folder, example):
    return verify.verify(folder, example.exported(), example.studies, max_new_tokens=8)


def test_pytorch_equals_jax_in_float32(tmp_path, example):
    """Adapters apart in JAX, merged in the bundle; the tower with and without LayerScale."""
    result = verified(written(tmp_path / "bundle", example), example)
    # Random logits reach 10 here; float32 keeps about 1e-6 of that through a few layers summed in another order.
    assert result["max_abs_logit_diff"] <= 1e-4 and result["max_abs_feature_diff"] <= 1e-5
    assert result["max_abs_pixel_diff"] <= 1e-5
    assert result["token_ids_equal"] and result["text_equal"] and result["studies"] == 3
    verify.check(result, tmp_path / "bundle")


def test_pytorch_equals_jax_with_towers_of_other_families(tmp_path, other_example):
    folder = written(tmp_path / "bundle", other_example)
    result = verified(folder, other_example)
    verify.check(result, folder)
    assert result["max_abs_logit_diff"] <= 1e-4 and result["max_abs_feature_diff"] <= 1e-5
    assert result["max_abs_pixel_diff"] <= 1e-5
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["image_mean"] == list(other_example.config.vision.pixel_mean)


def test_float16_is_compared_with_rounded_weights(tmp_path, plain_example):
    result = verified(written(tmp_path / "bundle", plain_example, dtype="float16"), plain_example)
    verify.check(result, tmp_path / "bundle")
    assert result["max_abs_logit_diff"] <= 1e-4


def test_files_and_settings(tmp_path, example):
    folder = written(tmp_path / "bundle", example)
    config = json.loads((folder / "config.json").read_text())
    assert config["image_token_index"] == 512 and config["text_config"]["pad_token_id"] == 513
    assert config["text_config"]["vocab_size"] == 576
    assert config["vision_config"]["num_hidden_layers"] == 3 and config["vision_feature_layer"] == -2
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(512, 576)) and generation["do_sample"] is False
    record = json.loads((folder / "receipt.json").read_text())
    assert record["format_version"] == 1 and record["sources"] == {"run": "test"}
    assert set(record["files"]) == {path.name for path in folder.iterdir()} - {"receipt.json"}
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    gains = [x for name, x in tensors.items() if "lambda1" in name]
    assert len(gains) == 6
    if not example.config.vision.layer_scale:
        assert all((x == 1).all() for x in gains)
    last = tensors["vision_tower.encoder.layer.2.norm1.weight"]
    np.testing.assert_array_equal(last, example.variables["params"]["vision"]["blocks"]["norm1"]["scale"][2])
    assert not tensors["language_model.lm_head.weight"][512:].any()


def test_a_tower_that_ends_at_its_features_needs_the_rest(tmp_path, plain_example):
    params = plain_example.variables["params"]
    whole = params["vision"]
    flat = {p: x[:2] if p.startswith("blocks/") else x for p, x in tables.flatten(whole).items() if p[:5] != "norm/"}
    short = {**plain_example.variables, "params": {**params, "vision": tables.unflatten(flat)}}
    with pytest.raises(UserError, match="ends at block 2 of 3"):
        written(tmp_path / "none", plain_example, variables=short)


def test_several_shards_load_as_one(tmp_path, plain_example, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    folder = written(tmp_path / "bundle", plain_example)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    monkeypatch.undo()
    one = reference.load(written(tmp_path / "one", plain_example)).model.state_dict()
    several = reference.load(folder).model.state_dict()
    assert several.keys() == one.keys() and all(np.array_equal(several[name], one[name]) for name in one)


def rewrite_tensors(folder, change, honest=True):
    """Applies `change` to the tensors; `honest` also renews the recorded hash, so that only a comparison can find it."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    if honest:
        record = json.loads((folder / "receipt.json").read_text())
        record["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        (folder / "receipt.json").write_text(json.dumps(record))


def transpose_query(tensors):
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def swap_norms(tensors):
    a, b = (f"vision_tower.encoder.layer.0.norm{i}.weight" for i in (1, 2))
    tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize("change", [transpose_query, swap_norms])
def test_wrong_weights_are_found(tmp_path, plain_example, change):
    folder = written(tmp_path / "bundle", plain_example)
    rewrite_tensors(folder, change)
    with pytest.raises(UserError, match=r"do not agree.*max_abs_logit_diff"):
        verify.check(verified(folder, plain_example), folder)


def test_a_nan_is_a_difference():
    result = {"max_abs_pixel_diff": 0.0, "max_abs_feature_diff": 0.0, "max_abs_logit_diff": float("nan")}
    with pytest.raises(UserError, match="max_abs_logit_diff"):
        verify.check({**result, "token_ids_equal": True, "text_equal": True, "max_abs_activation": {}}, Path("bundle"))


def test_an_activation_beyond_float16_is_refused():
    good: dict[str, Any] = dict.fromkeys(("max_abs_pixel_diff", "max_abs_feature_diff", "max_abs_logit_diff"), 0.0)
    good |= {"token_ids_equal": True, "text_equal": True, "max_abs_activation": {"layers.0": 65504.0}}
    verify.check(good, Path("bundle"))
    with pytest.raises(UserError, match=r"layers\.1 reaches 70000, beyond float16"):
        verify.check({**good, "max_abs_activation": {"layers.1": 7e4}}, Path("bundle"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("vision_tower.encoder.layer.0.mlp.fc1.bias"), "missing .*layer.0.mlp.fc1.bias"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "unexpected extra"),
        (
            lambda t: t.update({"multi_modal_projector.linear_1.bias": np.zeros(3, np.float32)}),
            "misshapen .*linear_1.bias",
        ),
    ],
)
def test_weights_that_do_not_fill_the_model_are_refused(tmp_path, plain_example, change, message):
    folder = written(tmp_path / "bundle", plain_example)
    rewrite_tensors(folder, change)
    # The index names the tensors of the file; without it transformers reads what is there.
    record = json.loads((folder / "receipt.json").read_text())
    record["files"] = {}
    (folder / "receipt.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        reference.load(folder)


def test_changed_and_missing_files_are_refused(tmp_path, plain_example):
    folder = written(tmp_path / "bundle", plain_example)
    rewrite_tensors(folder, swap_norms, honest=False)
    with pytest.raises(UserError, match="its hash differs"):
        reference.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"(tokenizer\.json is missing|hash differs)"):
        reference.load(folder)
    with pytest.raises(UserError, match="is not an exported bundle"):
        reference.load(tmp_path)


def test_another_format_version_is_refused(tmp_path, plain_example):
    folder = written(tmp_path / "bundle", plain_example)
    record = json.loads((folder / "receipt.json").read_text())
    (folder / "receipt.json").write_text(json.dumps({**record, "format_version": 2}))
    with pytest.raises(UserError, match="format_version 2"):
        reference.load(folder)


def test_what_cannot_be_exported(tmp_path, plain_example):
    config = plain_example.config
    openai = dataclasses.replace(config, vision=dataclasses.replace(config.vision, pre_norm=True))
    for number, (changes, message) in enumerate(
        [
            ({"config": None}, "towers alone are no language model"),
            ({"config": openai}, "can be a CLIPVisionModel"),
            ({"variables": {"params": plain_example.variables["params"]}}, "checkpoint has none"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            written(tmp_path / str(number), plain_example, **changes)
    params = plain_example.variables["params"]
    params = {
        **params,
        "projector": {**params["projector"], "fc1": {"kernel": np.full((24, 32), 1e5), "bias": np.zeros(32)}},
    }
    with pytest.raises(UserError, match="not finite in float16: export with --dtype=float32"):
        written(
            tmp_path / "large", plain_example, dtype="float16", variables={**plain_example.variables, "params": params}
        )


def test_chat_template_is_the_conversation_of_training(tmp_path, plain_example):
    import jinja2

    template = jinja2.Environment().from_string(bundle.CHAT_TEMPLATE)
    image, words = {"type": "image"}, {"type": "text", "text": "What?"}
    turns = [
        {"role": "user", "content": [words, image]},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "More?"},
    ]
    text = template.render(messages=turns, add_generation_prompt=True, eos_token="</s>")
    assert text == f"{prompts.SYSTEM} USER: <image>\nWhat? ASSISTANT: This.</s>USER: More? ASSISTANT:"
    other = [{"role": "system", "content": "Be brief."}, turns[2]]
    assert template.render(messages=other, eos_token="</s>") == "Be brief. USER: More? "


def test_the_real_llama_tokenizer_keeps_its_ids(tmp_path, real):
    """tokenizer.json made from SentencePiece's file gives the ids of the golden conversations, through transformers."""
    path = real / "tokenizer/llama2_tokenizer.model"
    golden = real / "tokenizer/golden_plain_v1.json"
    from transformers import AutoTokenizer

    made = hf_tokenizer.build(path, 32000)
    assert (made.image_id, made.pad_id, made.size) == (32000, 32001, 32002)
    (tmp_path / "tokenizer.json").write_text(made.text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(made.settings(4096)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    cases = json.loads(golden.read_text())["cases"]
    assert len(cases) == 20
    for case in cases:
        expected = [made.image_id if i == prompts.IMAGE_ID else i for i in case["input_ids"]]
        assert tokenizer(case["text"])["input_ids"] == expected, case["text"]
    ours = prompts.load_tokenizer(path)
    for text in ("No pneumothorax.", "Größe 3,5 cm – 安定", "a  b\n\n c", "1/2-inch \t tab"):
        ids = ours.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids) == text


def test_a_tokenizer_of_another_model_is_refused(tokenizer_path, tmp_path):
    size = prompts.load_tokenizer(tokenizer_path).vocab_size
    with pytest.raises(UserError, match=f"has {size} tokens but the model has {size - 1} rows"):
        hf_tokenizer.build(tokenizer_path, size - 1)
    shutil.copyfile(tokenizer_path, tmp_path / "tokenizer.json")
    smaller = hf_tokenizer.build(tmp_path / "tokenizer.json", 520)
    assert (smaller.image_id, smaller.pad_id) == (520, 521)  # behind the last row, though the pieces end before


def test_the_torch_side_imports_no_jax():
    import subprocess
    import sys

    code = "import sys, rad_jax.serving.reference as r; assert 'jax' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
