"""The whole model against transformers' LLaVA with a Dinov2, CLIP or SigLIP tower: logits among words and image, gradients of stages 2 and 3."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.interop import foreign_configs, hf_clip_vision, hf_llava, peft_lora, tables
from rad_jax.lora import LoraSpec
from rad_jax.models.llama import LlamaConfig
from rad_jax.models.llava import Llava, LlavaConfig
from rad_jax.models.vit import VitConfig
from rad_jax.prompts import IMAGE_ID

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

AGAINST = "transformers LLaVA"
IMAGE = 95  # transformers' placeholder must be a row of the table
VISION = VitConfig(
    image_size=28, patch_size=7, width=24, depth=3, heads=4, mlp_dim=96, layer_scale=True, feature_layer=-2
)
CONFIG = LlavaConfig(
    LlamaConfig(vocab_size=96, width=32, depth=2, heads=4, kv_heads=2, mlp_dim=48),
    VISION,
)
SPEC = LoraSpec(rank=4, alpha=2.0)
PATCHES = VISION.patches
# Two rows with the image at different places, the second one padded; labels at the last words of each.
TOKENS = np.array([[1, 7, IMAGE_ID, 9, 10, 11, 12, 13], [1, IMAGE_ID, 20, 21, 22, 23, 0, 0]], np.int32)
LENGTHS = np.array([8, 6], np.int32)
# Places in TOKENS whose logits are compared, words on both sides of the image.
PREDICTING = np.array([[1, 4, 5, 6], [0, 2, 3, 4]], np.int32)
TARGETS = np.array([[8, 11, 12, 13], [8, 21, 22, 23]], np.int32)
IMAGES = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)


@pytest.fixture
def model(randomised):
    vision = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=4, image_size=28, patch_size=7
    )
    text = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    return randomised(
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=vision, text_config=text, image_token_index=IMAGE, projector_hidden_act="gelu",
                vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
            )
        )
    )  # fmt: skip


def expanded(row, length):
    """transformers' ids: the placeholder once per patch."""
    return [i for token in row[:length] for i in ([IMAGE] * PATCHES if token == IMAGE_ID else [int(token)])]


def their_logits(model):
    """Logits at PREDICTING, [B, U, V], row by row so that no padding is needed."""
    rows = []
    for row, length, places, image in zip(TOKENS, LENGTHS, PREDICTING, IMAGES, strict=True):
        pixels = torch.from_numpy(image.transpose(2, 0, 1)[None].copy())
        logits = model(input_ids=torch.tensor([expanded(row, length)]), pixel_values=pixels).logits[0]
        rows.append(logits[places + (PATCHES - 1) * (places > list(row).index(IMAGE_ID))])
    return torch.stack(rows)


def their_loss(logits):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(TARGETS).long().flatten())


def value_and_grads(config, trainable, frozen, merge):
    """Logits and gradients of the mean cross-entropy with respect to `trainable`."""

    def loss(trainable):
        logits = Llava(config).apply(merge(trainable, frozen), TOKENS, LENGTHS, IMAGES, PREDICTING)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), TARGETS[..., None], axis=-1)
        return -chosen.mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    return logits, grads


def test_logits_and_projector_gradients(model, parity, on_disk):
    params = jax.tree.map(jnp.asarray, tables.load(hf_llava.table(CONFIG), on_disk(model)))
    theirs = their_logits(model)
    their_loss(theirs).backward()
    ours, grads = value_and_grads(
        CONFIG, params["projector"], params, lambda projector, rest: {"params": {**rest, "projector": projector}}
    )
    parity.forward("LLaVA, logits of words", AGAINST, ours, theirs.detach())
    theirs_grads = tables.load(hf_llava.table(CONFIG), on_disk(model, gradients=True))["projector"]
    parity.gradients("LLaVA stage 2, gradients of the projector", AGAINST, grads, theirs_grads)


def test_projector_of_one_matrix(model, parity, on_disk):
    params = dict(tables.load(hf_llava.table(CONFIG), on_disk(model)))
    model.model.multi_modal_projector = torch.nn.Linear(VISION.width, CONFIG.llm.width)
    one = model.model.multi_modal_projector
    params["projector"] = {"fc1": {"kernel": one.weight.detach().numpy().T, "bias": one.bias.detach().numpy()}}
    config = dataclasses.replace(CONFIG, projector="linear")
    ours = Llava(config).apply({"params": params}, TOKENS, LENGTHS, IMAGES, PREDICTING)
    parity.forward(
        "LLaVA with a linear projector, logits", f"{AGAINST}, torch Linear", ours, their_logits(model).detach()
    )


# OpenAI CLIP's (LLaVA-1.5) and SigLIP's, whose first token is a patch.
TOWERS = {
    "CLIP": dataclasses.replace(
        VISION, layer_scale=False, pre_norm=True, patch_bias=False, activation="quick_gelu", eps=1e-5
    ),
    "SigLIP": dataclasses.replace(
        VISION,
        layer_scale=False,
        class_token=False,
        activation="gelu_tanh",
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.5,) * 3,
    ),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_other_families(kind, parity, randomised, on_disk):
    config = dataclasses.replace(CONFIG, vision=TOWERS[kind])
    vision = transformers.AutoConfig.for_model(**foreign_configs.hf_vision_config(TOWERS[kind]))
    text = transformers.LlamaConfig(**foreign_configs.hf_text_config(CONFIG.llm))
    model = randomised(
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=vision, text_config=text, image_token_index=IMAGE, projector_hidden_act="gelu",
                vision_feature_layer=-2, vision_feature_select_strategy="default" if kind == "CLIP" else "full",
                tie_word_embeddings=False,
            )
        )
    )  # fmt: skip
    reader = foreign_configs.clip_vision if kind == "CLIP" else foreign_configs.siglip_vision
    assert reader(vision.to_dict()) == dataclasses.replace(TOWERS[kind], feature_layer=None)
    tensors = on_disk(model)
    level = hf_clip_vision.level(n.removeprefix("vision_tower.") for n in tensors if n.startswith("vision_tower."))
    params = tables.load(hf_llava.table(config, level), tensors)
    ours = Llava(config).apply({"params": params}, TOKENS, LENGTHS, IMAGES, PREDICTING)
    parity.forward(f"LLaVA with a {kind} tower, logits of words", AGAINST, ours, their_logits(model).detach())


def test_projector_and_lora_gradients(model, parity, randomised, on_disk):
    peft = pytest.importorskip("peft")
    params = jax.tree.map(jnp.asarray, tables.load(hf_llava.table(CONFIG), on_disk(model)))
    lora_config = peft.LoraConfig(
        r=4, lora_alpha=2.0, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", lora_dropout=0.0
    )
    adapted = peft.get_peft_model(model, lora_config)
    rng = torch.Generator().manual_seed(3)
    pairs = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for parameter in pairs.values():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter.shape[1] ** 0.5)
    projector = {n: p.requires_grad_() for n, p in adapted.named_parameters() if "multi_modal_projector" in n}
    config = dataclasses.replace(CONFIG, lora=SPEC)
    mapping = peft_lora.table(CONFIG.llm, SPEC)

    def adapters(read):
        names = {n.replace(".default", "").replace("language_model.", ""): read(p) for n, p in pairs.items()}
        return tables.load(mapping, names)

    theirs = their_logits(adapted)
    their_loss(theirs).backward()
    trainable = {"projector": params["projector"], "lora": adapters(lambda p: p.detach().numpy().copy())}

    def merged(trainable, frozen):
        return {"params": {**frozen, "projector": trainable["projector"]}, "lora": {"llm": trainable["lora"]}}

    ours, grads = value_and_grads(config, jax.tree.map(jnp.asarray, trainable), params, merged)
    parity.forward("LLaVA with LoRA, logits of words", f"{AGAINST} + peft", ours, theirs.detach())
    linear = {n.split("multi_modal_projector.")[1]: p.grad.numpy() for n, p in projector.items()}
    theirs_grads = {
        "projector": {
            ours_name: {"kernel": linear[f"{name}.weight"].T, "bias": linear[f"{name}.bias"]}
            for ours_name, name in (("fc1", "linear_1"), ("fc2", "linear_2"))
        },
        "lora": adapters(lambda p: p.grad.numpy()),
    }
    parity.gradients("LLaVA stage 3, gradients of projector and LoRA", f"{AGAINST} + peft", grads, theirs_grads)
