"""The TPU's attention kernel and rotary product, run on this CPU in interpreted mode, against the plain ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rad_jax import sharding
from rad_jax.models import attention, llama

# float32 sums in another order; measured: 5e-7 in outputs of size 1, 1e-6 of a gradient's largest entry.
TOLERANCE = 5e-6
# Lengths of the rows (None: all real), padded length, query heads, key heads, width of a head, causal.
CASES = {
    "decoder, grouped queries": ((40, 17), 40, 4, 2, 16, True),
    "text tower": ((40, 17), 40, 2, 2, 16, False),
    "two blocks": pytest.param((1100, 1090), 1100, 1, 1, 16, True, marks=pytest.mark.slow),
    "image tower": pytest.param(None, 1370, 1, 1, 64, False, marks=pytest.mark.slow),
}


def both(lengths, size, heads, kv_heads, width, causal, mesh=None):
    """Outputs at real queries, and gradients of a random sum of them, by XLA's attention and by the kernel."""
    rng = np.random.default_rng(0)
    rows = 2 if lengths is None else len(lengths)
    q, k, v, probe = (
        rng.normal(size=(rows, size, n, width)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)
    )
    real = np.ones((rows, size), bool) if lengths is None else np.arange(size) < np.asarray(lengths)[:, None]
    given = None if lengths is None else jnp.asarray(lengths, jnp.int32)

    def loss(q, k, v, impl):
        y = attention.attend(q, k, v, given, causal=causal, impl=impl)
        return (y * probe * real[:, :, None, None]).sum(), y

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    found = []
    for impl in ("xla", "splash_interpret"):
        if mesh is None:
            (_, y), grads = step(q, k, v, impl)
        else:
            with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
                (_, y), grads = step(q, k, v, impl)
        found.append((np.asarray(y)[real], jax.tree.map(np.asarray, grads)))
    return found


def close(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize(("lengths", "size", "heads", "kv_heads", "width", "causal"), CASES.values(), ids=CASES)
def test_kernel_gives_what_xla_gives(lengths, size, heads, kv_heads, width, causal):
    close(*reversed(both(lengths, size, heads, kv_heads, width, causal)))


def test_kernel_over_a_mesh(training):
    """Rows over data and fsdp, heads over tensor: each device runs the kernel on its own."""
    mesh = training.mesh(data=2, fsdp=2, tensor=2)
    xla, splash = both((40, 17, 3, 9), 40, 4, 2, 16, True, mesh)
    close(splash, xla)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        x = jax.ShapeDtypeStruct((4, 40, 4, 16), jnp.float32)
        call = jax.make_jaxpr(lambda q: attention.attend(q, q, q, None, causal=True, impl="splash_interpret"))(x)
    (mapped,) = [equation for equation in call.eqns if equation.primitive.name == "shard_map"]
    assert mapped.params["out_specs"] == (PartitionSpec(("data", "fsdp"), None, "tensor", None),)


@pytest.mark.parametrize(
    ("length", "padded", "block"),
    [(1, 128, 128), (128, 128, 128), (1024, 1024, 1024), (1370, 1536, 768), (1664, 1792, 896), (1792, 1792, 896)],
)
def test_blocks(length, padded, block):
    assert attention._blocks(length) == (padded, block)


def test_rotary_product_is_exact():
    """The signed permutation only moves numbers, in 16 bit too; so does its transpose in the gradient."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 3, 16)), jnp.bfloat16)
    cos, sin = llama.angles(jnp.broadcast_to(jnp.arange(9), (2, 9)), 16, 10000.0)
    halves, product = (llama.rope(x, cos, sin, by) for by in ("halves", "matmul"))
    assert halves.dtype == product.dtype == jnp.bfloat16
    np.testing.assert_array_equal(halves, product)
    x = x.astype(jnp.float32)
    slopes = [jax.grad(lambda x, by=by: (llama.rope(x, cos, sin, by) ** 3).sum())(x) for by in ("halves", "matmul")]
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-6, atol=1e-6)
