"""The decoder against transformers: grouped queries, padding, rotary positions, cache, greedy generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.interop import hf_llama, tables
from rad_jax.models.llama import Llama, LlamaConfig
from rad_jax.models.llava import Llava, LlavaConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = LlamaConfig(vocab_size=96, width=32, depth=3, heads=4, kv_heads=2, mlp_dim=72, eps=1e-5)
LENGTHS = np.array([12, 7, 1], np.int32)
TOKENS = np.random.default_rng(0).integers(3, 96, (3, 12)).astype(np.int32)
AGAINST = "transformers LlamaForCausalLM"


@pytest.fixture
def model(randomised):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=72,
        rms_norm_eps=1e-5, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return randomised(transformers.LlamaForCausalLM(config))


@pytest.fixture
def params(model, state):
    return jax.tree.map(jnp.asarray, tables.load(hf_llama.table(CONFIG), state(model)))


def test_logits_and_gradients_of_padded_rows(model, params, parity, state):
    real = np.arange(12) < LENGTHS[:, None]
    probe = np.random.default_rng(1).normal(size=(3, 12, 96)).astype(np.float32) * real[:, :, None]
    theirs = model(torch.from_numpy(TOKENS).long(), attention_mask=torch.from_numpy(real).long()).logits
    (theirs * torch.from_numpy(probe)).sum().backward()

    def loss(p):
        logits = Llama(CONFIG).apply({"params": p}, TOKENS, LENGTHS)
        return (logits * probe).sum(), logits

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    parity.forward("Llama, GQA, padded rows", AGAINST, ours[real], theirs.detach().numpy()[real])
    theirs_grads = tables.load(hf_llama.table(CONFIG), state(model, gradients=True))
    parity.gradients("Llama, gradients", AGAINST, grads, theirs_grads)


def greedy(params, tokens, lengths, new):
    """New ids [B, new], and the logits [B, new, V] they were taken from, through prefill and cache."""
    model = Llava(LlavaConfig(CONFIG))
    variables = {"params": {"llm": params}}
    logits, positions, cache = model.apply(variables, tokens, lengths, None, method="prefill")
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, new), (0, 0), (0, 0))), cache)
    extend = jax.jit(lambda *arguments: model.apply(variables, *arguments, method="extend"))
    seen = [logits]
    for step in range(new - 1):
        logits, cache = extend(jnp.argmax(logits, -1).astype(jnp.int32), positions + step, cache)
        seen.append(logits)
    cached = jnp.stack(seen, axis=1)
    return np.asarray(jnp.argmax(cached, -1)), cached


def test_cache_equals_full_forward_and_greedy_generation(model, params, parity):
    new = 16
    ids, cached = greedy(params, TOKENS, LENGTHS, new)
    differences, generated = [], []
    for row, length in enumerate(LENGTHS):
        prompt = TOKENS[row : row + 1, :length]
        whole = np.concatenate([prompt, ids[row : row + 1, :-1]], axis=1)
        full = Llama(CONFIG).apply({"params": params}, whole)[0, length - 1 :]
        differences.append(np.abs(full - cached[row]).max())
        theirs = model.generate(torch.from_numpy(prompt).long(), max_new_tokens=new, do_sample=False)
        generated.append(theirs[0, length:].numpy())
    parity.forward("Llama, cached decoding of ragged rows", "own full forward", max(differences), 0.0)
    parity.equal("Llama, 3 x 16 greedy ids", AGAINST, ids.ravel(), np.concatenate(generated))
