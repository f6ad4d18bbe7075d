"""The mapping tables: nothing changes on the way in and out again, and nothing is left out unseen."""

import dataclasses

import numpy as np
import pytest

from rad_jax.errors import UserError
from rad_jax.interop import (
    hf_bert,
    hf_clip_vision,
    hf_dinov2,
    hf_llama,
    hf_llava,
    hf_siglip_vision,
    llama2c,
    open_clip,
    openai_clip,
    peft_lora,
    tables,
    timm_vit,
)  # fmt: skip
from rad_jax.lora import LoraSpec
from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import ClipConfig
from rad_jax.models.llama import LlamaConfig
from rad_jax.models.llava import LlavaConfig
from rad_jax.models.vit import VitConfig

VIT = VitConfig(image_size=8, patch_size=4, width=12, depth=3, heads=3, mlp_dim=20)
SCALED = dataclasses.replace(VIT, layer_scale=True)
FEATURES = dataclasses.replace(VIT, feature_layer=-2)
OPENAI = dataclasses.replace(VIT, pre_norm=True, patch_bias=False)
SIGLIP = dataclasses.replace(VIT, class_token=False)
BERT = BertConfig(vocab_size=7, width=12, depth=2, heads=3, mlp_dim=10, max_positions=5)
LLAMA = LlamaConfig(vocab_size=9, width=24, depth=2, heads=4, kv_heads=2, mlp_dim=10)

TABLES = {
    "timm": timm_vit.table(SCALED),
    "timm features": timm_vit.table(FEATURES),
    "dinov2": hf_dinov2.table(VIT),
    "dinov2 LayerScale": hf_dinov2.table(SCALED),
    "timm without class token": timm_vit.table(SIGLIP),
    "CLIP vision": hf_clip_vision.table(OPENAI),
    "CLIP vision without level": hf_clip_vision.table(OPENAI, level=""),
    "CLIP vision features": hf_clip_vision.table(dataclasses.replace(OPENAI, feature_layer=-2)),
    "SigLIP vision": hf_siglip_vision.table(SIGLIP),
    "OpenAI CLIP": openai_clip.table(OPENAI),
    "BERT": hf_bert.table(BERT),
    "open_clip": open_clip.table(ClipConfig(SCALED, BERT, 6)),
    "Llama": hf_llama.table(LLAMA),
    "Llama, tied": hf_llama.table(LLAMA, tied=True),
    "LLaVA": hf_llava.table(LlavaConfig(LLAMA, SCALED)),
    "LLaVA with CLIP": hf_llava.table(LlavaConfig(LLAMA, OPENAI)),
    "LLaVA with SigLIP, tied": hf_llava.table(LlavaConfig(LLAMA, SIGLIP), level="", tied=True),
    "Meta": llama2c.table(LLAMA),
    "LoRA": peft_lora.table(LLAMA, LoraSpec(2, 4.0)),
    "LoRA on two": peft_lora.table(LLAMA, LoraSpec(2, 4.0, targets=("o", "down"))),
}


def foreign(table: tables.Table) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in table.shapes().items()}
    for name in made:  # what the tower does not have: no LayerScale, no mask token
        if "mask_token" in name:
            made[name][:] = 0
        if "lambda1" in name and table is TABLES["dinov2"]:
            made[name][:] = 1
    return made


@pytest.mark.parametrize("name", TABLES)
def test_in_and_out_again_is_the_same_bit_for_bit(name):
    table = TABLES[name]
    tensors = foreign(table)
    tree = tables.load(table, tensors)
    back = dict(tables.store(table, tree))
    assert list(back) == list(table.shapes())
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    again = tables.flatten(tables.load(table, back))
    for path, leaf in tables.flatten(tree).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", TABLES)
def test_every_foreign_tensor_reaches_the_tree(name):
    """No two foreign tensors share a place and none is dropped: as many numbers inside as outside, fillers apart.

    A tied embedding is inside twice.
    """
    table = TABLES[name]
    outside = int(sum(np.prod(e.shape) * (e.layers or 1) for e in table.entries if e.leaves))
    outside += LLAMA.vocab_size * LLAMA.width * ("tied" in name)
    inside = sum(leaf.size for leaf in tables.flatten(tables.load(table, foreign(table))).values())
    assert inside == outside


def test_missing_and_unknown_names_are_listed():
    table = TABLES["Llama"]
    tensors = foreign(table)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.self_attn.q_proj.weight"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        tables.load(table, tensors)
    message = str(error.value)
    assert "LlamaForCausalLM" in message
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "unknown: model.layers.7.self_attn.q_proj.weight" in message


def test_all_misshapen_tensors_are_listed():
    table = TABLES["BERT"]
    tensors = foreign(table)
    tensors["embeddings.LayerNorm.bias"] = np.zeros(3, np.float32)
    tensors["encoder.layer.1.output.dense.weight"] = np.zeros((10, 12), np.float32)
    with pytest.raises(UserError) as error:
        tables.load(table, tensors)
    assert "embeddings.LayerNorm.bias (3,) instead of (12,)" in str(error.value)
    assert "encoder.layer.1.output.dense.weight (10, 12) instead of (12, 10)" in str(error.value)


def test_a_tree_that_does_not_fit_is_refused_before_anything_is_written():
    table = TABLES["Llama"]
    tree = tables.load(table, foreign(table))
    del tree["norm"]
    tree["head"]["bias"] = np.zeros(9)
    tree["embed"]["embedding"] = np.zeros((8, 24))
    with pytest.raises(UserError) as error:
        next(tables.store(table, tree))
    for part in ("missing: norm/scale", "unknown: head/bias", "embed/embedding (8, 24) instead of (9, 24)"):
        assert part in str(error.value)


def test_blocks_after_the_features_may_be_there_but_not_in_a_whole_tower():
    whole = foreign(timm_vit.table(VIT))
    tree = tables.load(timm_vit.table(FEATURES), whole)
    assert tree["blocks"]["norm1"]["scale"].shape == (2, 12) and "norm" not in tree
    short = dataclasses.replace(VIT, depth=2)
    with pytest.raises(UserError, match=r"unknown: blocks\.2\.norm1\.weight"):
        tables.load(timm_vit.table(short), whole)


def test_layer_scale_is_not_dropped_silently():
    tensors = foreign(TABLES["dinov2 LayerScale"])
    with pytest.raises(UserError, match="lambda1 is not 1 everywhere"):
        tables.load(TABLES["dinov2"], tensors)


def test_towers_are_refused_by_tables_that_cannot_hold_them():
    for config in (OPENAI, SIGLIP):
        with pytest.raises(UserError, match="cannot be a Dinov2Model"):
            hf_dinov2.table(config)
    for config in (VIT, SIGLIP, dataclasses.replace(OPENAI, layer_scale=True)):
        with pytest.raises(UserError, match="can be a CLIPVisionModel"):
            hf_clip_vision.table(config)
        with pytest.raises(UserError, match="has OpenAI's layout"):
            openai_clip.table(config)
    for config in (VIT, OPENAI):
        with pytest.raises(UserError, match="can be a SiglipVisionModel"):
            hf_siglip_vision.table(config)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        (
            "CLIP vision",
            ("text_model.final_layer_norm.bias", "visual_projection.weight", "text_projection.weight", "logit_scale"),
        ),
        ("SigLIP vision", ("vision_model.head.probe", "text_model.head.weight", "logit_scale", "logit_bias")),
        (
            "OpenAI CLIP",
            (
                "visual.proj",
                "transformer.resblocks.0.ln_1.weight",
                "positional_embedding",
                "text_projection",
                "logit_scale",
            ),
        ),
    ],
)
def test_the_rest_of_a_two_tower_model_is_left_out(name, others):
    table = TABLES[name]
    tensors = foreign(table)
    alone = tables.flatten(tables.load(table, tensors))
    within = tables.flatten(tables.load(table, tensors | {other: np.zeros(3, np.float32) for other in others}))
    assert within.keys() == alone.keys()
    with pytest.raises(UserError, match=r"unknown: vision_model\.extra"):
        tables.load(table, tensors | {"vision_model.extra": np.zeros(3, np.float32)})


def test_the_level_of_the_clip_tower_is_found():
    assert hf_clip_vision.level(["vision_model.embeddings.class_embedding"]) == "vision_model."
    assert hf_clip_vision.level(["embeddings.class_embedding"]) == ""


def test_a_tied_head_is_the_embedding_transposed_and_must_stay_it():
    table = TABLES["Llama, tied"]
    tensors = foreign(table)
    assert "lm_head.weight" not in tensors
    # A file that stores it all the same is read as transformers reads it.
    tree = tables.load(table, tensors | {"lm_head.weight": np.zeros((9, 24), np.float32)})
    np.testing.assert_array_equal(tree["head"]["kernel"], tensors["model.embed_tokens.weight"].T)
    tree["head"] = {"kernel": tree["head"]["kernel"] + 1}
    with pytest.raises(UserError, match="no longer the embedding"):
        list(tables.store(table, tree))


def test_meta_rotary_pairs_become_halves():
    table = TABLES["Meta"]
    tensors = foreign(table)
    query = tensors["layers.0.attention.wq.weight"]  # rows: 4 heads of 6 channels
    kernel = tables.load(table, tensors)["layers"]["attn"]["q"]["kernel"][0]  # [D, N, H]
    np.testing.assert_array_equal(kernel[:, 1, :], query[6:12][[0, 2, 4, 1, 3, 5]].T)


def test_a_damaged_llama2c_file_is_refused(tmp_path):
    (tmp_path / "short.bin").write_bytes(b"\0" * 12)
    (tmp_path / "wrong.bin").write_bytes(np.array([8, 8, 1, 2, 2, 16, 4, 0], "<i4").tobytes())
    for name, reason in (("short.bin", "too short"), ("wrong.bin", "does not fit its header")):
        with pytest.raises(UserError, match=reason):
            llama2c.read(tmp_path / name)
