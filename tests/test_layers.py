"""What parity with peft cannot show of adapters: it has no dropout, and one adapter at a time."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax.lora import LoraSpec
from rad_jax.models.attention import attend_cached
from rad_jax.models.layers import Dense, dropped, together
from rad_jax.models.llama import Llama, LlamaConfig


@pytest.mark.parametrize("shape", [(2, 64, 256), (2, 37, 8, 64)])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_rate_and_mean(shape, rate):
    """As many zeros as were asked for, to 1/256 of rate and five standard deviations of chance; entries that share a word are independent."""
    zeros, growth = dropped(jnp.ones(shape, jnp.bfloat16), rate, jax.random.key(3))
    assert zeros.shape == shape and zeros.dtype == jnp.bfloat16
    zero = np.asarray(zeros, np.float32) == 0
    asked, chance = round(rate * 256) / 256, np.sqrt(rate * (1 - rate) / zero.size)
    assert abs(asked - rate) <= 1 / 512
    assert abs(zero.mean() - asked) < 5 * chance
    assert growth == pytest.approx(1 / (1 - asked))
    quarter = -(-shape[1] // 4)
    first, second = zero[:, : shape[1] - quarter], zero[:, quarter:]
    both = np.sqrt(asked**2 / first.size)
    assert abs((first & second).mean() - asked**2) < 5 * both


def test_no_dropout_at_rate_zero():
    zeros, growth = dropped(jnp.ones((1, 5, 3)), 0.0, jax.random.key(0))
    assert growth == 1 and bool((zeros == 1).all())


class Two(nn.Module):
    """An adapted and a plain map of one input, together or one after the other."""

    joined: bool
    flat: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, key=None):
        spec = LoraSpec(4, 8.0, self.dropout)
        maps = [
            Dense((3, 5), ("embed", "heads", "head_dim"), lora=spec, flat_adapter=self.flat, name="a"),
            Dense((7,), ("embed", "mlp"), name="b"),
            Dense((6,), ("embed", "mlp"), lora=spec, flat_adapter=self.flat, name="c"),
        ]
        return together(maps, x, key) if self.joined else [layer(x) for layer in maps]


@pytest.mark.parametrize("flat", [True, False])
def test_together_is_each_alone(flat):
    """Float32 products in another order: 1e-6 of values near 1."""
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    variables = Two(False).init(jax.random.key(1), x)
    drawn = jax.random.normal(jax.random.key(2), (1000,))
    variables = jax.tree.map(lambda leaf: jnp.resize(drawn, leaf.shape) / 8, variables)  # B is zero at first
    joined, alone = (Two(j, flat).apply(variables, x) for j in (True, False))
    for one, other in zip(joined, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_shared_mask_reaches_every_adapter():
    """With all of the input dropped that a mask drops, what is left of each adapter is that of the masked input, grown."""
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    variables = Two(False).init(jax.random.key(1), x)
    variables = jax.tree.map(lambda leaf: jnp.ones_like(leaf) / 8, variables)
    key = jax.random.key(5)
    plain = {"params": variables["params"], "lora": jax.tree.map(jnp.zeros_like, variables["lora"])}
    masked, growth = dropped(x, 0.5, key)
    found = Two(True, dropout=0.5).apply(variables, x, key)
    base = Two(True).apply(plain, x)
    low = (masked.sum(-1) / 8 * growth)[..., None]
    for i, rank in ((0, 4), (2, 4)):
        adapter = low * rank / 8 * 2
        wanted = np.asarray(base[i]) + np.broadcast_to(adapter[..., None] if i == 0 else adapter, base[i].shape)
        np.testing.assert_allclose(found[i], wanted, rtol=0, atol=1e-5)


def test_the_way_of_a_tpu_gives_the_same():
    """Padding to the kernel's blocks, RoPE by a product and adapters by axes: logits, and gradients of adapters, of the real tokens.

    Float32 products in another order: 2e-5 of the largest entry.
    """
    ways: tuple[dict[str, Any], ...] = ({}, {"attention": "splash_interpret", "rope": "matmul", "flat_adapters": False})
    shape: dict[str, Any] = {"vocab_size": 64, "width": 256, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_dim": 96}
    tokens = jax.random.randint(jax.random.key(0), (2, 37), 0, 64)
    lengths = jnp.array([37, 20])
    real = (jnp.arange(37) < lengths[:, None])[..., None]
    variables = nn.unbox(Llama(LlamaConfig(**shape), LoraSpec(4, 8.0)).init(jax.random.key(1), tokens, lengths))
    drawn = jax.random.normal(jax.random.key(2), (1000,))
    lora = jax.tree.map(lambda leaf: jnp.resize(drawn, leaf.shape) / 16, variables["lora"])

    def found(way):
        model = Llama(LlamaConfig(**shape, **way), LoraSpec(4, 8.0))

        def loss(lora):
            logits = model.apply({"params": variables["params"], "lora": lora}, tokens, lengths) * real
            return (jax.nn.softmax(logits) * jnp.sin(jnp.arange(64.0))).sum() + (logits**2).mean(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(lora)

    for one, other in zip(*(jax.tree.leaves(found(way)) for way in ways), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * float(jnp.abs(one).max()))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_one_token_by_the_way_of_a_tpu(kv_heads):
    """Attention over a cache with rows of zeros beside the token's own, against softmax written out in float64."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 2, 16)), *rng.normal(size=(2, 3, 1, kv_heads, 16))
    keys, values = rng.normal(size=(2, 3, kv_heads, 40, 16))
    seen = np.arange(40) < np.array([40, 7, 1])[:, None]
    seen[1, 20:25] = True
    for impl in ("xla", "splash"):
        one, key, value, cached, stored = (jnp.asarray(x, jnp.float32) for x in (q, k, v, keys, values))
        found = attend_cached(one, cached, stored, jnp.asarray(seen), (key, value), impl=impl)
        for row in range(3):
            for head in range(2):
                own = head * kv_heads // 2
                them = np.concatenate([keys[row, own][seen[row]], k[row, 0, own][None]])
                scores = them @ q[row, 0, head] / 4
                weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
                wanted = weights @ np.concatenate([values[row, own][seen[row]], v[row, 0, own][None]])
                np.testing.assert_allclose(found[row, 0, head], wanted, rtol=0, atol=2e-6)  # float32
