"""The TPU's attention kernel and rotary product, run on this CPU in interpreted mode, against the plain ones; cuDNN's, where a GPU is."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
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


def both(lengths, size, heads, kv_heads, width, causal, mesh=None, kernel="splash_interpret", dtype=np.float32, rows=2):
    """Outputs at real queries, and gradients of a random sum of them, by XLA's attention and by the kernel; float32 numpy."""
    rng = np.random.default_rng(0)
    rows = rows if lengths is None else len(lengths)
    q, k, v, probe = (rng.normal(size=(rows, size, n, width)).astype(dtype) for n in (heads, kv_heads, kv_heads, heads))
    real = np.ones((rows, size), bool) if lengths is None else np.arange(size) < np.asarray(lengths)[:, None]
    given = None if lengths is None else jnp.asarray(lengths, jnp.int32)

    def loss(q, k, v, impl):
        y = attention.attend(q, k, v, given, causal=causal, impl=impl)
        return (y * probe * real[:, :, None, None]).sum(), y

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    found = []
    for impl in ("xla", kernel):
        if mesh is None:
            (_, y), grads = step(q, k, v, impl)
        else:
            with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
                (_, y), grads = step(q, k, v, impl)
        y, grads = jax.tree.map(lambda x: np.asarray(x, np.float32), (y, grads))
        found.append((y[real], grads))
    return found


def close(one, other, tolerance=TOLERANCE):
    np.testing.assert_allclose(one[0], other[0], rtol=0, atol=tolerance)
    for mine, theirs in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


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


ROWS = (40, 17, 3, 9, 40, 1, 22, 30)
# Lengths, padded length, causal, the mask that cuDNN is asked for.
MASKS = {
    "decoder": (ROWS, 40, True, "PADDING_CAUSAL"),
    "text tower": (ROWS, 40, False, "PADDING"),
    "image tower": (None, 40, False, "NO_MASK"),
    "odd image tower": (None, 41, False, "PADDING"),
    "odd rows": (None, 41, True, "CAUSAL"),
}


@pytest.mark.parametrize("axes", [None, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one device", "mesh"])
@pytest.mark.parametrize(("lengths", "size", "causal", "mask"), MASKS.values(), ids=MASKS)
def test_cudnn_is_called_for_each_devices_rows_and_heads(training, monkeypatch, axes, lengths, size, causal, mask):
    """Lowered for a GPU that is not here: forward and backward call cuDNN, with the mask that is meant and as many lengths as rows."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    q, k = (jax.ShapeDtypeStruct((8, size, n, 64), jnp.bfloat16) for n in (4, 2))
    given = None if lengths is None else jax.ShapeDtypeStruct((8,), jnp.int32)

    def loss(q, k, v, lengths):
        return attention.attend(q, k, v, lengths, causal=causal, impl="cudnn").astype(jnp.float32).sum()

    def code():
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, given)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    if axes is None:
        text = code()
    else:
        with jax.set_mesh(training.mesh(**axes)), nn.logical_axis_rules(sharding.RULES):
            text = code()
    calls = [line for line in text.splitlines() if "stablehlo.custom_call @__cudnn" in line]
    assert [re.findall(r"@__cudnn\$(\w+)\(", line) for line in calls] == [["fmhaSoftmax"], ["fmhaSoftmaxBackward"]]
    rows, heads = (8, 1) if axes is None else (2, 2)
    for line in calls:
        assert re.findall(r"\\22mask_type\\22: \\22(\w+)\\22", line) == [mask]
        taken = line.rsplit(" : (", 1)[1].split(") -> ")[0]
        kinds = [f"tensor<{rows}x{size + size % 2}x{n // heads}x64xbf16>" for n in (4, 2, 2)]
        assert taken.startswith(", ".join(kinds))
        assert re.findall(r"tensor<\w+xi32>", taken) == [f"tensor<{rows}xi32>"] * 2 * ("PADDING" in mask)


@pytest.mark.parametrize("over", ["one device", "mesh"])
@pytest.mark.parametrize(("lengths", "size", "causal", "mask"), MASKS.values(), ids=MASKS)
def test_cudnn_gives_what_xla_gives(training, over, lengths, size, causal, mask):
    """In bfloat16: a rounding is 2^-9 of a number, and outputs are of size 1."""
    if jax.default_backend() != "gpu":
        pytest.skip("no NVIDIA GPU: with one, and JAX for it (pip install 'jax[cuda13]'), set JAX_PLATFORMS=cuda")
    devices = next(n for n in (8, 4, 2, 1) if n <= jax.device_count())
    mesh = training.mesh(fsdp=devices) if over == "mesh" else None
    xla, cudnn = both(lengths, size, 4, 2, 64, causal, mesh, kernel="cudnn", dtype=jnp.bfloat16, rows=8)
    close(cudnn, xla, tolerance=2e-2)


@pytest.mark.parametrize(
    ("length", "causal", "encoder"),
    [
        *((length, (padded, padded), (padded, padded)) for length, padded in ((1, 128), (128, 128), (1024, 1024))),
        # BiomedCLIP's tower of 512 pixels, that of the paper, and the longest that is one block.
        (1025, (1280, 640), (1152, 1152)),
        (1370, (1536, 768), (1408, 1408)),
        (1408, (1536, 768), (1408, 1408)),
        *((length, (padded, padded // 2), (padded, padded // 2)) for length, padded in ((1409, 1536), (1664, 1792))),
    ],
)
def test_blocks(length, causal, encoder):
    assert attention._blocks(length, causal=True) == causal and attention._blocks(length, causal=False) == encoder
    assert attention.whole_blocks(length, "splash") == causal[0] and attention.whole_blocks(length, "xla") == length


def test_kernels_of_an_image_tower(monkeypatch):
    """What the kernel is asked for: queries by 128 against all keys, and a backward pass over the whole row, its keys in parts."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    asked, make = [], kernel.make_splash_mha

    def recorded(*arguments, **options):
        asked.append((*arguments, options["block_sizes"]))
        return make(*arguments, **options)

    monkeypatch.setattr(kernel, "make_splash_mha", recorded)
    for length, causal in ((1370, False), (1370, True)):
        x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        jax.eval_shape(lambda q, c=causal: attention.attend(q, q, q, None, causal=c, impl="splash_interpret"), x)
    (masks, tower), (_, decoder) = asked
    assert masks.shape == (1, 1408, 1408)
    assert (tower.block_q, tower.block_kv, tower.block_kv_compute) == (128, 1408, 1408)
    assert (tower.block_q_dkv, tower.block_kv_dkv, tower.block_kv_dkv_compute) == (1408, 1408, 128)
    assert (tower.block_q_dq, tower.block_kv_dq) == (1408, 1408)
    assert {getattr(decoder, f.name) for f in dataclasses.fields(decoder) if f.name.startswith("block")} == {768}


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
