"""What peft, open_clip and transformers make of the formats that hold a part of a model, and what is found when one is not the model."""

import json

import numpy as np
import pytest

from rad_jax import checkpoint
from rad_jax.errors import UserError
from rad_jax.interop import exported, layouts, receipt, sources, verify, verify_parts
from rad_jax.interop.convert import convert
from rad_jax.interop.export import export

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
open_clip = pytest.importorskip("open_clip")

LLAMA = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
}  # fmt: skip
WIDTH = 192  # of timm's vit_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_path):
    """LLaVA-Rad's layout from a small open_clip model, a small Llama and an adapter, converted."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    llama.save_pretrained(folder / "vicuna")
    rad = folder / "llava-rad"
    targets = ["q_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(
        llama, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(rad, safe_serialization=False)
    tensors = {"0.weight": (32, WIDTH), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    prefix = "base_model.model.model.mm_projector."
    torch.save({prefix + n: torch.randn(*shape) for n, shape in tensors.items()}, rad / "non_lora_trainables.bin")
    bert = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    bert.save_pretrained(folder / "bert")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 224},
        "text_cfg": {
            "hf_model_name": str(folder / "bert"), "hf_model_pretrained": False, "hf_proj_type": "mlp", "context_length": 64,
            "hf_pooler_type": "cls_last_hidden_state_pooler",
        },
    }  # fmt: skip
    towers = open_clip.model.CustomTextCLIP(**config)
    state = {f"module.{name}": tensor for name, tensor in towers.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, rad / f"{layouts.TOWER}_checkpoint.pt")
    (rad / f"{layouts.TOWER}.json").write_text(json.dumps(config))
    fields = {
        "model_type": "llava", "mm_vision_tower": "biomedclip_cxr_518", "mm_vision_tower_config": f"{layouts.TOWER}.json",
        "mm_vision_tower_checkpoint": f"{layouts.TOWER}_checkpoint.pt", "mm_vision_select_layer": -2, "mm_hidden_size": WIDTH,
        "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False,
    }  # fmt: skip
    (rad / "config.json").write_text(json.dumps(LLAMA | fields))
    convert(folder / "vicuna", "hf_llama", folder / "base", tokenizer=tokenizer_path)
    base = checkpoint.load_run(folder / "base")
    convert(rad, "llava_rad", folder / "rad", bases=[base], tokenizer=tokenizer_path)
    return exported.from_run(checkpoint.load_run(folder / "rad")), exported.from_run(base)


def verified(folder, model, format, dtype):
    export(model, format, folder, dtype)
    result = verify_parts.verify(folder, model, format, dtype, 8)
    verify.check(result, folder)
    return result


@pytest.mark.parametrize("dtype", ["keep", "float16"])
@pytest.mark.parametrize(
    ("format", "found"),
    [
        ("peft", {"max_abs_logit_diff", "text_equal"}),
        ("open_clip", {"max_abs_feature_diff"}),
        ("llava", {"max_abs_logit_diff", "text_equal", "max_abs_feature_diff"}),
    ],
)
def test_a_part(tmp_path, model, format, found, dtype):
    result = verified(tmp_path / "out", model[0], format, dtype)
    assert found <= set(result)
    assert all(result[key] <= 2e-5 for key in found if key != "text_equal")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("format", ["hf", "hf_adapter"])
def test_a_language_model_alone(tmp_path, model, format, dtype):
    import dataclasses

    whole = model[0]
    parts = {"params": {"llm": whole.variables["params"]["llm"]}, "lora": whole.variables["lora"]}
    alone = dataclasses.replace(
        whole, variables=parts, config=dataclasses.replace(whole.config, vision=None), configs={}
    )
    assert verified(tmp_path / "out", alone, format, dtype)["max_abs_logit_diff"] <= 2e-5


def test_the_tokenizer_of_a_language_model_alone(tmp_path, model, tokenizer_path):
    """transformers reads a row as training had it: with the leading BOS."""
    from rad_jax.prompts import load_tokenizer

    export(model[1], "hf", tmp_path / "out", "keep")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tokenizer_path)
    text = "the heart size is normal. no pleural effusion"
    assert theirs(text).input_ids == [ours.bos_id, *ours.encode(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


@pytest.mark.parametrize(
    ("format", "file"), [("peft", "adapter_model.safetensors"), ("open_clip", "open_clip_model.safetensors")]
)
def test_wrong_weights_are_found(tmp_path, model, format, file):
    from safetensors.numpy import save_file

    folder = tmp_path / "out"
    export(model[0], format, folder, "keep")
    source = sources.open_source(folder / file)
    tensors = {name: np.array(source[name]) for name in source}
    name = next(n for n in tensors if n.endswith(("q_proj.lora_B.weight", "trunk.blocks.0.norm1.weight")))
    tensors[name] = tensors[name] + np.float32(0.1)
    save_file(tensors, folder / file)
    with pytest.raises(UserError, match="do not agree on it"):
        verify.check(verify_parts.verify(folder, model[0], format, "keep", 8), folder)


def test_an_adapter_that_lacks_a_layer(tmp_path, model):
    from safetensors.numpy import save_file

    folder = tmp_path / "out"
    export(model[0], "peft", folder, "keep")
    source = sources.open_source(folder / "adapter_model.safetensors")
    save_file({n: np.array(source[n]) for n in source if "layers.1" not in n}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="peft fills other adapters than are stored"):
        verify_parts.verify(folder, model[0], "peft", "keep", 8)
    assert receipt.NAME in {path.name for path in folder.iterdir()}
