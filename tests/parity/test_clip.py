"""The contrastive model against open_clip: a timm trunk and a Hugging Face BERT, built from a folder that holds a config alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.contrastive import contrastive_loss
from rad_jax.interop import open_clip as mapping
from rad_jax.interop import tables
from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import Clip, ClipConfig
from rad_jax.models.vit import VitConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

# timm's `test_vit`: width 64, depth 6, 2 heads, mlp 3 times as wide, patches of 16, images of 160.
CONFIG = ClipConfig(
    VitConfig(image_size=160, patch_size=16, width=64, depth=6, heads=2, mlp_dim=192),
    BertConfig(vocab_size=64, width=32, depth=2, heads=4, mlp_dim=64, max_positions=16),
    embed_dim=24,
)


@pytest.fixture(params=["softmax", "sigmoid"])
def kind(request):
    return request.param


@pytest.fixture
def model(tmp_path, randomised, kind):
    open_clip = pytest.importorskip("open_clip")
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ).save_pretrained(tmp_path)  # fmt: skip
    vision = {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 160,
    }
    text = {
        "hf_model_name": str(tmp_path),
        "hf_model_pretrained": False,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
    }
    bias = -10.0 if kind == "sigmoid" else None
    return randomised(open_clip.model.CustomTextCLIP(24, vision, text, init_logit_bias=bias))


def test_embeddings_scale_and_contrastive_gradients(model, kind, parity, state):
    from open_clip.loss import ClipLoss, SigLipLoss

    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 160, 160, 3)).astype(np.float32)
    tokens = rng.integers(1, 64, (4, 10)).astype(np.int32)
    lengths = np.array([10, 6, 3, 9], np.int32)
    tokens[np.arange(10) >= lengths[:, None]] = 0  # open_clip makes its mask from the pad id
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    image, text, *numbers = model(pixels, torch.from_numpy(tokens).long())
    peer = ClipLoss() if kind == "softmax" else SigLipLoss()
    peer(image, text, *numbers).backward()
    config = dataclasses.replace(CONFIG, loss=kind)
    table = mapping.table(config)

    def loss(p):
        images_at, texts_at, scale, bias = Clip(config).apply({"params": p}, images, tokens, lengths)
        total, (pairs, _) = contrastive_loss(images_at, texts_at, scale, bias, jnp.ones(4), kind=kind)
        return total / pairs, (images_at, texts_at, scale)

    params = jax.tree.map(jnp.asarray, tables.load(table, state(model)))
    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    parity.forward("CLIP image embedding", "open_clip CustomTextCLIP", ours[0], image.detach())
    parity.forward("CLIP text embedding", "open_clip CustomTextCLIP", ours[1], text.detach())
    # The scale is about 17: float32 holds it to 1e-6.
    parity.forward("CLIP temperature", "open_clip CustomTextCLIP", ours[2], numbers[0].detach())
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    name = f"CLIP contrastive gradients, {kind}"
    parity.gradients(name, "open_clip CustomTextCLIP", grads, tables.load(table, theirs))
