"""Adapters against peft: outputs, gradients of A and B, and the merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.interop import hf_llama, peft_lora, tables
from rad_jax.lora import TARGETS, LoraSpec, merge
from rad_jax.models.llama import Llama, LlamaConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = LlamaConfig(vocab_size=48, width=32, depth=2, heads=4, kv_heads=2, mlp_dim=40)
TOKENS = np.random.default_rng(0).integers(3, 48, (2, 9)).astype(np.int32)


@pytest.mark.parametrize("targets", [("q", "v"), ("k", "o"), ("gate", "up", "down"), TARGETS], ids=" ".join)
def test_subset_of_targets(targets, parity, randomised, state):
    peft = pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=40, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )
    )  # fmt: skip
    # A dropout rate that must not matter: neither side draws one.
    spec = LoraSpec(rank=4, alpha=2.0, dropout=0.5, targets=targets)
    config = peft.LoraConfig(r=4, lora_alpha=2.0, lora_dropout=0.5, target_modules=[f"{t}_proj" for t in targets])
    model = randomised(peft.get_peft_model(base, config))
    table = hf_llama.table(CONFIG)
    names = {n.removeprefix("base_model.model.").replace(".base_layer", ""): x for n, x in state(model).items()}
    params = jax.tree.map(jnp.asarray, tables.load(table, {n: x for n, x in names.items() if "lora_" not in n}))

    def adapters(gradients):
        found = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
        return {n: (p.grad if gradients else p.detach()).numpy().copy() for n, p in found.items()}

    lora = jax.tree.map(jnp.asarray, tables.load(peft_lora.table(CONFIG, spec), adapters(False)))
    theirs = model(torch.from_numpy(TOKENS).long()).logits
    probe = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.from_numpy(probe)).sum().backward()

    def loss(lora):
        logits = Llama(CONFIG, spec).apply({"params": params, "lora": lora}, TOKENS)
        return (logits * probe).sum(), logits

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(lora)
    name = f"LoRA on {' '.join(targets)}"
    parity.forward(name, "peft", ours, theirs.detach())
    theirs_grads = tables.load(peft_lora.table(CONFIG, spec), adapters(True))
    parity.gradients(f"{name}, gradients of A and B", "peft", grads, theirs_grads)

    merged = {path: np.asarray(x) for path, x in tables.flatten(merge(params, lora, spec)).items()}
    peft_merged = tables.flatten(tables.load(table, state(model.merge_and_unload())))
    worst = max(np.abs(merged[path] - peft_merged[path]).max() for path in merged)
    base_weights = tables.flatten(params)
    changed = {path.split("/")[-2] for path in merged if np.abs(merged[path] - base_weights[path]).max() > 0.01}
    assert changed == set(targets)
    parity.forward(f"{name}, merged weights", "peft", worst, 0.0)
