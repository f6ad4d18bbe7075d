"""Foreign folders, made by the libraries they come from, to bases; and out again, bit for bit."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rad_jax import checkpoint, lora, prompts
from rad_jax.errors import UserError
from rad_jax.interop import exported, formats, sources, tables
from rad_jax.interop.convert import convert
from rad_jax.interop.export import export
from rad_jax.models.bert import Bert, BertConfig
from rad_jax.models.llama import Llama, LlamaConfig
from rad_jax.models.vit import Vit, VitConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
}  # fmt: skip
DINOV2 = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 4, "image_size": 28, "patch_size": 7,
    "layer_norm_eps": 1e-6,
}  # fmt: skip


def randomised(model, dtype="float32", seed=0):
    """Values everywhere, norms, gains and mask tokens included, so that nothing can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 0.5 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(getattr(torch, dtype)).eval()


def make_llama(folder, dtype="float32", **changes):
    model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})), dtype)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def make_llava(folder):
    vision, text = transformers.Dinov2Config(**DINOV2), transformers.LlamaConfig(**LLAMA)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=511,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    model = randomised(transformers.LlavaForConditionalGeneration(config), "float16")
    model.save_pretrained(folder)
    return model


SAVED = "transformers save_pretrained"


def opened(*paths: Path) -> list[sources.Source]:
    return [sources.open_source(path) for path in paths]


def variables(base: Path):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float32), checkpoint.load_run(base).variables)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_llama_in_and_out(tmp_path, tokenizer_path, parity, dtype, container):
    model = make_llama(tmp_path / "hf", dtype)
    if container == "bin":  # as Vicuna's: a derived buffer is in the file
        state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        for file in (tmp_path / "hf").glob("*.safetensors*"):
            file.unlink()
        torch.save(state, tmp_path / "hf/pytorch_model.bin")
    done = convert(tmp_path / "hf", "hf_llama", tmp_path / "base", tokenizer=tokenizer_path)
    assert done["dropped"] == (["model.layers.0.self_attn.rotary_emb.inv_freq"] if container == "bin" else [])
    run = checkpoint.load_run(tmp_path / "base")
    assert run.tokenizer_file.read_bytes() == tokenizer_path.read_bytes()
    out = tmp_path / "out"
    if dtype == "bfloat16":
        with pytest.raises(UserError, match=r"bfloat16 does not run on a V100: export with --dtype=float16"):
            export(exported.from_run(run), "hf", out, "keep")
        assert not out.exists() and not (tmp_path / "out.partial").exists()
        return
    export(exported.from_run(run), "hf", out, "keep")
    given = sources.open_source(tmp_path / "hf").renamed(lambda n: None if "inv_freq" in n else n)
    what = f"hf_llama, {dtype}, {container}: in and out"
    parity.tensors(what, "torch file" if container == "bin" else SAVED, sources.open_source(out), given)
    again, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(20)[None]
    theirs = again.float()(ids).logits.detach().numpy()
    ours = Llama(LlamaConfig(**run.config["model"]["llm"])).apply(
        {"params": variables(tmp_path / "base")["params"]["llm"]}, ids.numpy()
    )
    assert np.abs(ours - theirs).max() <= 1e-4  # logits of size 10, in float32


@pytest.mark.parity
def test_tied_llama_stays_tied(tmp_path, parity):
    make_llama(tmp_path / "hf", tie_word_embeddings=True)
    convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    export(exported.from_run(checkpoint.load_run(tmp_path / "base")), "hf", tmp_path / "out", "keep")
    assert "lm_head.weight" not in sources.open_source(tmp_path / "out")
    parity.tensors("hf_llama, tied: in and out", SAVED, *opened(tmp_path / "out", tmp_path / "hf"))


@pytest.mark.parity
def test_llava_in_and_out(tmp_path, parity):
    make_llava(tmp_path / "hf")
    done = convert(tmp_path / "hf", "hf_llava", tmp_path / "base")
    assert done["carried"] == 1  # the mask token
    run = checkpoint.load_run(tmp_path / "base")
    assert run.config["model"]["vision"]["feature_layer"] == -2
    export(exported.from_run(run), "hf", tmp_path / "out", "keep")
    parity.tensors("hf_llava: in and out", SAVED, *opened(tmp_path / "out", tmp_path / "hf"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (
        config["image_token_index"] == 511 and config["text_config"]["vocab_size"] == 512
    )  # it has its row: none is added
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_tokenizer_that_does_not_know_the_models_image_row(tmp_path, tokenizer_path):
    """The row of `<image>` stays where the model has it, and none is added."""
    from rad_jax.interop import hf_tokenizer

    pieces = prompts.load_tokenizer(tokenizer_path).vocab_size
    built = hf_tokenizer.build(tokenizer_path, pieces + 64, pieces + 3)
    assert (built.image_id, built.pad_id, built.size) == (pieces + 3, pieces + 4, pieces + 5)
    with pytest.raises(UserError, match="<image> would get the id"):
        hf_tokenizer.build(tokenizer_path, pieces + 64, pieces - 5)


def make_towers():
    """BiomedCLIP-CXR's tensors at a small size, by open_clip's names."""
    from rad_jax.interop import open_clip
    from rad_jax.models.clip import ClipConfig

    vision = VitConfig(image_size=28, patch_size=7, width=64, depth=3, heads=1, mlp_dim=128, layer_scale=True)
    clip = ClipConfig(vision, BertConfig(vocab_size=60, width=64, depth=2, heads=1, mlp_dim=48, max_positions=32), 16)
    rng = np.random.default_rng(0)
    tensors = {
        name: torch.from_numpy(np.asarray(0.2 * rng.normal(size=shape), np.float32))
        for name, shape in open_clip.table(clip).shapes().items()
    }
    tensors["text.transformer.pooler.dense.weight"] = torch.randn(64, 64)
    tensors["text.transformer.pooler.dense.bias"] = torch.randn(64)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "vit_base_patch14_dinov2.lvd142m", "timm_pool": "", "timm_proj": "linear", "image_size": 28},
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract", "proj": "mlp",
            "pooler_type": "cls_last_hidden_state_pooler", "context_length": 32,
        },
    }  # fmt: skip
    return tensors, config


def make_training_checkpoint(folder, tensors, config, name="biomedclipcxr_518"):
    folder.mkdir(exist_ok=True)
    state = {f"module.{key}": tensor for key, tensor in tensors.items()}
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors.values()]
    optimizer = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()},
        folder / f"{name}_checkpoint.pt",
    )
    (folder / f"{name}.json").write_text(json.dumps(config))


@pytest.mark.parity
def test_open_clip_training_checkpoint_in_and_out(tmp_path, parity):
    tensors, config = make_towers()
    make_training_checkpoint(tmp_path / "clip", tensors, config)
    done = convert(tmp_path / "clip/biomedclipcxr_518_checkpoint.pt", "open_clip", tmp_path / "base")
    assert done["carried"] == 2  # BERT's pooler
    run = checkpoint.load_run(tmp_path / "base")
    assert run.config["task"] == "contrastive" and run.config["model"]["vision"]["layer_scale"]
    export(exported.from_run(run), "open_clip", tmp_path / "out", "keep")
    given = sources.open_source(tmp_path / "clip/biomedclipcxr_518_checkpoint.pt").renamed(
        lambda n: n.removeprefix("module.")
    )
    parity.tensors("open_clip: in and out", "torch file", sources.open_source(tmp_path / "out"), given)
    assert json.loads((tmp_path / "out/open_clip_config.json").read_text())["model_cfg"] == config


def test_a_tower_that_should_have_layer_scale(tmp_path):
    tensors, config = make_towers()
    tensors = {name: tensor for name, tensor in tensors.items() if ".ls" not in name}
    make_training_checkpoint(tmp_path / "clip", tensors, config)
    with pytest.raises(UserError, match="tower without LayerScale keys"):
        convert(tmp_path / "clip/biomedclipcxr_518_checkpoint.pt", "open_clip", tmp_path / "base")
    assert not (tmp_path / "base").exists() and not (tmp_path / "base.partial").exists()


def make_adapter(folder, llama, rank=4, targets=("q_proj", "down_proj")):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        llama,
        peft.LoraConfig(r=rank, lora_alpha=8, lora_dropout=0.1, target_modules=list(targets), task_type="CAUSAL_LM"),
    )
    with torch.no_grad():  # the model underneath stays what it is
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(folder)
    return model.eval()


def make_llava_rad(folder, llama):
    """The layout of microsoft/llava-rad: four weight files, torch's all but the adapter's."""
    make_adapter(folder, llama)
    adapter = sources.open_source(folder / "adapter_model.safetensors")
    torch.save({n: torch.from_numpy(np.array(t)).half() for n, t in adapter.items()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    prefix = "base_model.model.model.mm_projector."
    shapes = {"0.weight": (32, 64), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    torch.save(
        {prefix + n: 0.2 * torch.randn(*shape).half() for n, shape in shapes.items()},
        folder / "non_lora_trainables.bin",
    )
    make_training_checkpoint(folder, *make_towers())
    config = {
        **LLAMA, "model_type": "llava", "mm_vision_tower": "biomedclip_cxr_518", "mm_vision_tower_config": "x/biomedclipcxr_518.json",
        "mm_vision_tower_checkpoint": "biomedclipcxr_518_checkpoint.pt", "mm_vision_select_layer": -2, "mm_hidden_size": 64,
        "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parity
def test_llava_rad_in_and_out(tmp_path, tokenizer_path, parity):
    llama = make_llama(tmp_path / "vicuna")
    make_llava_rad(tmp_path / "llava-rad", llama)
    convert(tmp_path / "vicuna", "hf_llama", tmp_path / "bases/vicuna", tokenizer=tokenizer_path)
    vicuna = checkpoint.load_run(tmp_path / "bases/vicuna")
    convert(tmp_path / "llava-rad", "llava_rad", tmp_path / "bases/rad", bases=[vicuna], tokenizer=tokenizer_path)
    model = exported.from_run(checkpoint.load_run(tmp_path / "bases/rad"))
    assert model.config is not None and model.config.vision is not None and model.config.lora is not None
    assert model.config.vision.feature_layer == -2 and model.config.lora.rank == 4 and model.config.lora.scale == 2.0
    export(model, "llava", tmp_path / "out", "keep")
    for file in ("adapter_model.bin", "non_lora_trainables.bin", "biomedclipcxr_518_checkpoint.pt"):
        files = opened(tmp_path / "out" / file, tmp_path / "llava-rad" / file)
        parity.tensors(f"llava_rad, {file}: in and out", "torch file", *files)
    for file in ("adapter_model.bin", "non_lora_trainables.bin", "biomedclipcxr_518_checkpoint.pt"):
        torch.load(tmp_path / "out" / file, weights_only=True)
    # The same, merged, is what PyTorch makes of it.
    rng = np.random.default_rng(0)
    studies = [(rng.integers(0, 256, (28, 28), dtype=np.uint8), "cough")]
    result = export(model, "hf", tmp_path / "bundle", "float32", studies=studies, max_new_tokens=4)
    assert result["differences"]["max_abs_logit_diff"] <= 1e-3
    # A base that changed under it is refused.
    record = json.loads((tmp_path / "bases/vicuna/config.json").read_text())
    record["weights"]["weights.safetensors"]["sha256"] = "0" * 64
    (tmp_path / "bases/vicuna/config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="has changed since"):
        checkpoint.load_run(tmp_path / "bases/rad")


@pytest.mark.parity
def test_a_projector_alone(tmp_path, parity):
    make_llama(tmp_path / "vicuna")
    convert(tmp_path / "vicuna", "hf_llama", tmp_path / "base")
    tensors = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    given = {f"model.mm_projector.{n}": torch.randn(*shape) for n, shape in tensors.items()}
    torch.save(given, tmp_path / "mm_projector.bin")
    vicuna = checkpoint.load_run(tmp_path / "base")
    convert(tmp_path / "mm_projector.bin", "llava_rad", tmp_path / "projector", bases=[vicuna])
    found = checkpoint.load_run(tmp_path / "projector").variables["params"]
    assert set(found) == {"llm", "projector"}
    np.testing.assert_array_equal(found["projector"]["fc1"]["kernel"], given["model.mm_projector.0.weight"].numpy().T)
    export(exported.from_run(checkpoint.load_run(tmp_path / "projector")), "llava", tmp_path / "out", "keep")
    files = opened(tmp_path / "out/mm_projector.bin", tmp_path / "mm_projector.bin")
    parity.tensors("llava_rad, mm_projector.bin: in and out", "torch file", *files)
    with pytest.raises(UserError, match="holds no language model of its own: give the base"):
        convert(tmp_path / "mm_projector.bin", "llava_rad", tmp_path / "none")


@pytest.mark.parity
def test_peft_adapter_in_and_out(tmp_path, parity):
    peft = pytest.importorskip("peft")
    llama = make_llama(tmp_path / "hf")
    model = make_adapter(tmp_path / "adapter", llama)
    convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    run = checkpoint.load_run(tmp_path / "base")
    convert(tmp_path / "adapter", "peft", tmp_path / "adapted", bases=[run])
    adapted = exported.from_run(checkpoint.load_run(tmp_path / "adapted"))
    export(adapted, "peft", tmp_path / "out", "keep")
    parity.tensors("peft: in and out", "peft save_pretrained", *opened(tmp_path / "out", tmp_path / "adapter"))
    ids = torch.arange(20)[None]
    theirs = model(ids).logits.detach()
    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    assert torch.equal(again(ids).logits, theirs)
    tree = variables(tmp_path / "adapted")
    assert adapted.config is not None
    ours = Llama(adapted.config.llm, adapted.config.lora).apply(
        {"params": tree["params"]["llm"], "lora": tree["lora"]["llm"]}, ids.numpy()
    )
    assert np.abs(ours - theirs.numpy()).max() <= 1e-4
    # Merged by us, tensor by tensor, against peft's own merging.
    export(adapted, "hf", tmp_path / "merged", "float32")
    merged = model.merge_and_unload().state_dict()
    for name, tensor in sources.open_source(tmp_path / "merged").items():
        assert np.abs(tensor - merged[name].numpy()).max() <= 1e-6, name


def test_an_adapter_on_the_wrong_base_or_of_another_rank(tmp_path):
    llama = make_llama(tmp_path / "hf")
    make_adapter(tmp_path / "adapter", llama)
    for name, changes, message in (
        ("wide", {"hidden_size": 64}, "an adapter for a model of width 32, but the base has width 64"),
        ("deep", {"num_hidden_layers": 4}, "an adapter for 3 layers, but the base has 4"),
    ):
        make_llama(tmp_path / name, **changes)
        convert(tmp_path / name, "hf_llama", tmp_path / f"base_{name}")
        with pytest.raises(UserError, match=message):
            convert(
                tmp_path / "adapter", "peft", tmp_path / "none", bases=[checkpoint.load_run(tmp_path / f"base_{name}")]
            )
    convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(UserError, match=r"the tensors have rank 4, adapter_config\.json says r=8"):
        convert(tmp_path / "adapter", "peft", tmp_path / "none", bases=[checkpoint.load_run(tmp_path / "base")])
    assert not list(tmp_path.glob("none*"))


def test_target_modules_as_a_pattern(tmp_path):
    config = {"r": 4, "lora_alpha": 8, "target_modules": r".*language_model.*\.(q|down)_proj"}
    assert formats.lora_spec(tmp_path, config).targets == ("q", "down")
    assert formats.lora_spec(tmp_path, {**config, "target_modules": "all-linear"}).targets == lora.TARGETS
    with pytest.raises(UserError, match="names none of q_proj"):
        formats.lora_spec(tmp_path, {**config, "target_modules": r".*vision.*"})
    with pytest.raises(UserError, match="use_dora = True; plain LoRA"):
        formats.lora_spec(tmp_path, {**config, "use_dora": True})


def tower(base, config_changes=()):
    config = checkpoint.load_run(base).config["model"]["vision"]
    return VitConfig(**{**config, **dict(config_changes)})


def images(size=28):
    return np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)


def pixels_of(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@pytest.mark.parity
def test_merged_adapters_have_no_dtype_to_keep(tmp_path, parity):
    llama = make_llama(tmp_path / "hf")
    make_adapter(tmp_path / "adapter", llama)
    convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    convert(tmp_path / "adapter", "peft", tmp_path / "adapted", bases=[checkpoint.load_run(tmp_path / "base")])
    model = exported.from_run(checkpoint.load_run(tmp_path / "adapted"))
    with pytest.raises(UserError, match="merged adapters have no dtype of their own to keep"):
        export(model, "hf", tmp_path / "out", "keep")
    # Apart, they have: weights and adapters as they came.
    export(model, "hf_adapter", tmp_path / "out", "keep")
    for folder, given in (("out/adapter", "adapter"), ("out", "hf")):
        parity.tensors(f"hf_adapter, {folder}", SAVED, *opened(tmp_path / folder, tmp_path / given))


def test_llava_rad_without_its_tower(tmp_path):
    llama = make_llama(tmp_path / "vicuna")
    make_llava_rad(tmp_path / "llava-rad", llama)
    (tmp_path / "llava-rad/biomedclipcxr_518_checkpoint.pt").unlink()
    convert(tmp_path / "vicuna", "hf_llama", tmp_path / "base")
    with pytest.raises(UserError, match=r"lacks biomedclipcxr_518_checkpoint\.pt, the image tower"):
        convert(tmp_path / "llava-rad", "llava_rad", tmp_path / "out", bases=[checkpoint.load_run(tmp_path / "base")])


def test_a_merged_llava(tmp_path):
    """LLaVA-1.5's own layout: the projector among the language model's tensors."""
    llama = make_llama(tmp_path / "llava")
    state = dict(llama.state_dict())
    for file in (tmp_path / "llava").glob("*.safetensors*"):
        file.unlink()
    shapes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    state |= {f"model.mm_projector.{name}": torch.randn(*shape) for name, shape in shapes.items()}
    state["model.vision_tower.vision_tower.x"] = torch.ones(2)
    torch.save(state, tmp_path / "llava/pytorch_model.bin")
    config = json.loads((tmp_path / "llava/config.json").read_text())
    more = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    (tmp_path / "llava/config.json").write_text(json.dumps(config | more))
    done = convert(tmp_path / "llava", "llava_rad", tmp_path / "base")
    assert done["carried"] == 1 and set(checkpoint.load_run(tmp_path / "base").variables["params"]) == {
        "llm",
        "projector",
    }


@pytest.mark.parametrize("format", ["dinov2", "siglip", "clip"])
def test_towers(tmp_path, format):
    size = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    if format == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2))
    elif format == "siglip":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**size, intermediate_size=48))
    else:
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size, intermediate_size=48))
    randomised(model).save_pretrained(tmp_path / "hf")
    done = convert(tmp_path / "hf", format, tmp_path / "base")
    assert (done["carried"] > 0) == (format != "clip")  # the mask token, SigLIP's pooling head
    hidden = model(pixels_of(images()), output_hidden_states=True).hidden_states[-2].detach().numpy()
    config = tower(tmp_path / "base", {"feature_layer": -2})
    tree = variables(tmp_path / "base")["params"]["vision"]
    ours = Vit(config).apply({"params": jax.tree.map(lambda x: x, _cut(tree, config))}, images())
    assert np.abs(ours - hidden).max() <= 1e-4
    assert config.pixel_mean == {"dinov2": (0.485, 0.456, 0.406), "siglip": (0.5, 0.5, 0.5)}.get(
        format, config.pixel_mean
    )


def _cut(tree, config):
    return {**tree, "blocks": jax.tree.map(lambda x: x[: config.blocks_used], tree["blocks"])}


def test_bert(tmp_path):
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    model = randomised(transformers.BertModel(config))
    model.save_pretrained(tmp_path / "hf")
    assert convert(tmp_path / "hf", "bert", tmp_path / "base")["carried"] == 2  # the pooler
    ids = np.arange(10, dtype=np.int32)[None]
    theirs = model(torch.from_numpy(ids).long()).last_hidden_state.detach().numpy()
    shape = BertConfig(**checkpoint.load_run(tmp_path / "base").config["model"]["text"])
    ours = Bert(shape).apply({"params": variables(tmp_path / "base")["params"]["text"]}, ids, np.array([10]))
    assert np.abs(ours - theirs).max() <= 1e-4


def test_trained_meta_weights(tmp_path, real):
    convert(real / "weights/stories260K.bin", "meta", tmp_path / "base")
    golden = json.loads((real / "weights/stories260K_golden.json").read_text())
    run = checkpoint.load_run(tmp_path / "base")
    logits = Llama(LlamaConfig(**run.config["model"]["llm"])).apply(
        {"params": variables(tmp_path / "base")["params"]["llm"]}, np.array([golden["greedy_ids"][:-1]])
    )
    assert np.argmax(logits[0], axis=-1).tolist() == golden["greedy_ids"][1:]


def test_position_table_for_another_image_size(tmp_path):
    timm = pytest.importorskip("timm")
    model = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2))
    randomised(model).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", "dinov2", tmp_path / "base", image_size=42)
    assert tower(tmp_path / "base").image_size == 42
    ours = np.asarray(checkpoint.load_run(tmp_path / "base").variables["params"]["vision"]["pos_embed"])
    theirs = timm.layers.resample_abs_pos_embed(
        model.embeddings.position_embeddings.detach(),
        (6, 6),
        num_prefix_tokens=1,
        interpolation="bicubic",
        antialias=True,
    )
    assert np.abs(ours - theirs.numpy()).max() <= 1e-5
    with pytest.raises(UserError, match="not a multiple of the tower's patches of 7"):
        convert(tmp_path / "hf", "dinov2", tmp_path / "other", image_size=40)


def test_missing_unknown_and_misshapen_tensors_are_listed(tmp_path):
    from safetensors.numpy import load_file, save_file

    make_llama(tmp_path / "hf")
    merged: dict[str, np.ndarray] = {}
    for file in sorted((tmp_path / "hf").glob("*.safetensors")):
        merged |= load_file(file)
        file.unlink()
    (tmp_path / "hf/model.safetensors.index.json").unlink()
    del merged["model.norm.weight"]
    merged["extra.weight"] = np.ones(3, np.float32)
    merged["lm_head.weight"] = np.ones((4, 4), np.float32)
    save_file(merged, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError) as error:
        convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    for part in ("missing: model.norm.weight", "unknown: extra.weight", "lm_head.weight (4, 4) instead of (512, 32)"):
        assert part in str(error.value)
    assert not list(tmp_path.glob("base*"))


def test_a_shard_cut_short_and_one_that_is_missing(tmp_path):
    make_llama(tmp_path / "hf")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1000])
    with pytest.raises(UserError, match="truncated"):
        convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    shard.unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of the \d+ files.*{shard.name}"):
        convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    assert not list(tmp_path.glob("base*"))


def test_another_models_tokenizer(tmp_path, tokenizer_path):
    make_llama(tmp_path / "hf", vocab_size=300)
    pieces = prompts.load_tokenizer(tokenizer_path).vocab_size
    with pytest.raises(UserError, match=f"has {pieces} pieces but the model has 300 rows"):
        convert(tmp_path / "hf", "hf_llama", tmp_path / "base", tokenizer=tokenizer_path)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    import shutil

    make_llama(tmp_path / "hf")
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(UserError, match=r"0\.0 GB free but the base needs"):
        convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    assert not list(tmp_path.glob("base*"))


def test_a_base_that_was_copied_in_part(tmp_path):
    make_llama(tmp_path / "hf")
    convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    file = tmp_path / "base/weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"bytes instead of \d+: copy the base again"):
        checkpoint.load_run(tmp_path / "base")


def test_bfloat16_values_beyond_float16_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    make_llama(tmp_path / "hf", "bfloat16")
    file = next(f for f in (tmp_path / "hf").glob("*.safetensors") if "model.norm.weight" in load_file(f))
    tensors = load_file(file)
    tensors["model.norm.weight"] = np.full(32, 1e6, ml_dtypes.bfloat16)
    save_file(tensors, file)
    convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that are not finite in float16"):
        export(exported.from_run(checkpoint.load_run(tmp_path / "base")), "hf", tmp_path / "out", "float16")
    assert not list(tmp_path.glob("out*"))


def test_a_base_on_a_mesh_is_the_base(tmp_path):
    """Each device's part is read by itself, and what is put together is what was converted."""
    from jax.sharding import NamedSharding, PartitionSpec

    from rad_jax import sharding

    make_llama(tmp_path / "hf", "float16")
    convert(tmp_path / "hf", "hf_llama", tmp_path / "base")
    leaf = checkpoint.load_run(tmp_path / "base").variables["params"]["llm"]["layers"]["mlp"]["up"]["kernel"]
    mesh = sharding.make_mesh(1, jax.device_count() // 2, 2) if jax.device_count() > 1 else sharding.make_mesh(1, 1, 1)
    placed = sharding.place(leaf, jnp.bfloat16, NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")))
    assert placed.dtype == jnp.bfloat16 and placed.shape == leaf.shape == (3, 32, 48)
    np.testing.assert_array_equal(np.asarray(placed), np.asarray(leaf).astype(ml_dtypes.bfloat16))


def test_tables_read_in_order(tmp_path):
    """`pieces` foretells what `read` gives."""
    make_llama(tmp_path / "hf")
    opened = formats.FORMATS["hf_llama"](tmp_path / "hf", ())
    ((table, tensors),) = opened.parts
    pieces = tables.pieces(table, {name: tensor.dtype for name, tensor in tensors.items()})
    for piece, value in zip(pieces, tables.read(table, tensors), strict=True):
        assert (piece.shape, piece.dtype) == (value.shape, value.dtype)
