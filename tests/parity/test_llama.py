"""The decoder against transformers: grouped queries, padding, rotary positions and their scaling, cache, greedy generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.generate import decode_step
from rad_jax.interop import foreign_configs, hf_llama, tables
from rad_jax.models.llama import Llama, LlamaConfig, RopeScaling
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


# Of the four frequencies of a head of 8 channels, "llama3" keeps one, blends one and lowers two.
SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rotary_positions(kind, parity, randomised, state):
    config = dataclasses.replace(CONFIG, rope_scaling=SCALINGS[kind], rope_theta=1e4, max_positions=512)
    written = foreign_configs.hf_text_config(config)
    model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**written)))
    assert foreign_configs.llama(written) == config
    assert foreign_configs.llama(model.config.to_dict()) == config  # `rope_parameters` since transformers 5
    tokens = np.random.default_rng(0).integers(3, 96, (2, 200)).astype(np.int32)
    theirs = model(torch.from_numpy(tokens).long()).logits.detach()
    params = tables.load(hf_llama.table(config), state(model))
    ours = Llama(config).apply({"params": params}, tokens)
    parity.forward(f"Llama, rotary scaling {kind}, 200 positions", AGAINST, ours, theirs)
    unscaled = Llama(dataclasses.replace(config, rope_scaling=None)).apply({"params": params}, tokens)
    assert np.abs(unscaled - theirs.numpy()).max() > 0.1


def test_mistral(parity, randomised, on_disk):
    theirs = transformers.MistralConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=72,
        rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=64, sliding_window=24,
    )  # fmt: skip
    model = randomised(transformers.MistralForCausalLM(theirs))
    config = foreign_configs.llama(theirs.to_dict())
    assert config == dataclasses.replace(CONFIG, rope_theta=1e6, max_positions=24)
    tokens = np.random.default_rng(0).integers(3, 96, (2, config.max_positions)).astype(np.int32)
    logits = model(torch.from_numpy(tokens).long()).logits.detach()
    ours = Llama(config).apply({"params": tables.load(hf_llama.table(config), on_disk(model))}, tokens)
    parity.forward("Mistral, GQA, a row as long as its window", "transformers MistralForCausalLM", ours, logits)


def test_tied_embeddings(parity, randomised, on_disk):
    theirs = transformers.LlamaConfig(**foreign_configs.hf_text_config(CONFIG) | {"tie_word_embeddings": True})
    model = randomised(transformers.LlamaForCausalLM(theirs))
    assert foreign_configs.tied(theirs.to_dict())
    tensors = on_disk(model)
    assert "lm_head.weight" not in tensors
    params = tables.load(hf_llama.table(CONFIG, tied=True), tensors)
    logits = model(torch.from_numpy(TOKENS).long()).logits.detach()
    parity.forward("Llama, GQA, tied head", AGAINST, Llama(CONFIG).apply({"params": params}, TOKENS), logits)


def greedy(params, tokens, lengths, new):
    """New ids [B, new], and the logits [B, new, V] they were taken from, through prefill and cache."""
    model = Llava(LlavaConfig(CONFIG))
    variables = {"params": {"llm": params}}
    logits, positions, cache = model.apply(variables, tokens, lengths, None, method="prefill")
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, new), (0, 0))), cache)
    extend = jax.jit(functools.partial(decode_step, model, variables, room=new))
    seen = [logits]
    for step in range(new - 1):
        logits, cache = extend(jnp.argmax(logits, -1).astype(jnp.int32), step, positions, cache)
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
