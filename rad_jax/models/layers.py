"""Dense, norms, embedding and the feed-forward block: parameters with logical axis names, and Dense's optional LoRA branch."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rad_jax.lora import LoraSpec

Array = jax.Array
Init = Any


def gelu(x: Array) -> Array:
    """x Phi(x) (Hendrycks and Gimpel 2016), computed in float32 by erf as torch does.

    `jax.nn.gelu` takes erfc, which keeps the digits of results near 0 and is longer: a ViT's feed-forward layer takes 12 % more cycles of a
    TPU with it, and XLA's CPU backend 1.6 times as long for the function.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # SigLIP
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP
    "silu": jax.nn.silu,
}

_kept = jax.checkpoint_policies.save_only_these_names
# What the backward pass finds of a block's forward pass beside the block's input; it computes the rest again. The names are given where
# the values arise, by `checkpoint_name`; "attended" is the output of the attention.
REMAT_POLICIES = {
    "full": None,
    "attention": _kept("q", "k", "v", "attended", "adapter"),
    # All that comes out of a large matrix product: what is computed again is norms, activations and additions.
    "minimal": _kept("q", "k", "v", "attended", "adapter", "middle", "gate", "up", "hidden"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def fan_in_normal(axes: int) -> Init:
    """Normal init with standard deviation 1 / sqrt(fan in), where the first `axes` axes are contracted."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.normal(key, shape, dtype) / math.sqrt(math.prod(shape[:axes]))

    return init


def fan_in_uniform(axes: int) -> Init:
    """torch's default Linear init, U(-1/sqrt(fan in), 1/sqrt(fan in)); also peft's for the LoRA A matrix."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        bound = 1 / math.sqrt(math.prod(shape[:axes]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dropped(x: Array, rate: float, key: Array) -> tuple[Array, float]:
    """Dropout (Srivastava et al. 2014) of x [B, S, *in]: entries become 0 with probability `rate`, to 1/256.

    8 random bits per entry, for the masks of adapters are most of what there is to draw. Entries a quarter of the rows apart share a 32-bit
    word, so that no word has to be taken apart across the lanes of a vector register.

    Returns:
        x with its zeros, and the factor that keeps the mean, for what x is multiplied to: that is narrower.
    """
    threshold = round(rate * 256)
    words = jax.random.bits(key, (x.shape[0], -(-x.shape[1] // 4), *x.shape[2:]), jnp.uint32)
    least = jnp.uint32(threshold << 24)
    kept = jnp.concatenate([words << (24 - bits) >= least for bits in (0, 8, 16, 24)], axis=1)
    return jnp.where(kept[:, : x.shape[1]], x, 0), 1 / (1 - threshold / 256)


def scanned(block: Any, depth: int, remat: str, unroll: int) -> Any:
    """`block` repeated `depth` times over stacked parameters: one compiled body however deep the model.

    Args:
        block: a linen module class; its call takes the carry, then one scanned input, then broadcast inputs.
        depth: L, number of layers.
        remat: "none" or a name in `REMAT_POLICIES`.
        unroll: layers written out per loop turn; XLA's CPU backend runs a small model twice as fast without the loop.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0, "scales": 0, "attention": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=depth,
        unroll=min(unroll, depth),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class Dense(nn.Module):
    """Linear map over the last `in_axes` axes, to one or several output axes.

    y[..., *out] = x[..., *in] kernel[*in, *out] + bias[*out]; with `lora` also (alpha / R) (dropout(x) A[*in, R]) B[R, *out]. LoRA
    dropout is active when a `dropout` rng is given. With `int8` the kernel is frozen, in whole numbers, to be multiplied by a scale per output
    from the collection `scales` (`rad_jax.quantise`). `flat_adapter` is whether the adapter's products are two-dimensional (`product`); where
    they are not, a TPU need not copy heads into another order. Several maps of one input are best computed `together`.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    in_axes: int = 1
    use_bias: bool = True
    lora: LoraSpec | None = None
    dtype: Any = jnp.float32
    kernel_init: Init = None
    int8: bool = False
    flat_adapter: bool = True

    def __call__(self, x: Array) -> Array:
        return together([self], x, dropout_key(self))[0]

    @nn.compact
    def base(self, x: Array) -> tuple[Array, Array | None, Array | None]:
        """What the map gives without its adapter, and the adapter's A [*in, R] and B [R, *out], None where it has none."""
        inputs = x.shape[x.ndim - self.in_axes :]
        kernel_init = nn.initializers.zeros if self.int8 else self.kernel_init or fan_in_normal(self.in_axes)
        stored = jnp.int8 if self.int8 else jnp.float32
        kernel = self.param("kernel", _named(kernel_init, self.axes), inputs + self.features, stored)
        y = contract(x, kernel, self.axes, self.in_axes, self.dtype)
        if self.int8:
            ones = _named(nn.initializers.ones, self.axes[self.in_axes :])
            scale = self.variable("scales", "kernel", ones, None, self.features, jnp.float32).value
            y = (y * scale).astype(self.dtype)
        if self.use_bias:
            bias_axes = self.axes[self.in_axes :]
            bias = self.param("bias", _named(nn.initializers.zeros, bias_axes), self.features, jnp.float32)
            y = y + bias.astype(self.dtype)
        return y, *(self._adapter(inputs, self.lora) if self.lora else (None, None))

    def _adapter(self, inputs: tuple[int, ...], spec: LoraSpec) -> tuple[Array, Array]:
        def created(init: Init, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
            return _named(init, axes)(self.make_rng("params"), shape, jnp.float32)

        a_axes, b_axes = self.adapter_axes
        a = self.variable("lora", "a", created, fan_in_uniform(self.in_axes), (*inputs, spec.rank), a_axes).value
        b = self.variable("lora", "b", created, nn.initializers.zeros, (spec.rank, *self.features), b_axes).value
        return a, b

    @property
    def adapter_axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Logical axes of the adapter's A and B."""
        return (*self.axes[: self.in_axes], "rank"), ("rank", *self.axes[self.in_axes :])


def dropout_key(module: nn.Module) -> Array | None:
    """A key of this module's for dropout; None where none is given, as when nothing is learned."""
    return module.make_rng("dropout") if module.has_rng("dropout") else None


def together(maps: Sequence[Dense], x: Array, key: Array | None) -> list[Array]:
    """Linear maps of one input [B, S, *in]; `key` draws the mask of LoRA dropout, None for none.

    Their adapters share the mask (peft draws one each), and their matrices A are one product: each alone is narrower than the multipliers of a TPU
    and, with a rank of 64, takes as long to read the input as to multiply it.
    """
    x = x.astype(maps[0].dtype)
    found = [layer.base(x) for layer in maps]
    adapted = [i for i, (_, a, _) in enumerate(found) if a is not None]
    outputs = [y for y, _, _ in found]
    if not adapted:
        return outputs
    first = maps[adapted[0]]
    assert first.lora is not None
    scale, multiply = first.lora.scale, product if first.flat_adapter else jnp.tensordot
    if key is not None and first.lora.dropout:
        x, growth = dropped(x, first.lora.dropout, key)
        scale *= growth
    # Gathered each by itself, then laid side by side.
    left = jnp.concatenate([whole(found[i][1], first.adapter_axes[0], first.dtype) for i in adapted], axis=-1)
    low = checkpoint_name(multiply(x, left, first.in_axes), "adapter") * scale
    for place, i in enumerate(adapted):
        part = low[..., place * first.lora.rank : (place + 1) * first.lora.rank]
        outputs[i] = outputs[i] + multiply(part, whole(found[i][2], maps[i].adapter_axes[1], first.dtype), 1)
    return outputs


def contract(x: Array, kernel: Array, names: tuple[str, ...], axes: int, dtype: Any) -> Array:
    """x [..., *in] times a sharded kernel [*in, *out] with logical axes `names`, of which the first `axes` are contracted."""
    return product(x, whole(kernel, names, dtype), axes)


def whole(kernel: Array, names: tuple[str, ...], dtype: Any) -> Array:
    """A kernel's shards brought together along the axes that share out weights, in the smaller of the stored type and the one computed in.

    Left to itself XLA cuts the product into a loop over shards.
    """
    kernel = kernel if kernel.dtype == jnp.int8 else kernel.astype(dtype)
    kernel = nn.with_logical_constraint(kernel, tuple(None if name in ("embed", "rank") else name for name in names))
    return kernel.astype(dtype)


def product(x: Array, kernel: Array, axes: int) -> Array:
    """x [..., *in] times kernel [*in, *out], as one two-dimensional product.

    The gradient of a many-axis dot makes XLA's CPU backend copy transposed operands (2.5x slower).
    """
    batch, inputs, outputs = x.shape[: x.ndim - axes], kernel.shape[:axes], kernel.shape[axes:]
    rows = x.reshape(-1, math.prod(inputs))
    return (rows @ kernel.reshape(rows.shape[1], -1)).reshape(batch + outputs)


class LayerNorm(nn.Module):
    """Layer normalisation over D, computed in float32 (Ba et al. 2016)."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", _named(nn.initializers.ones, ("norm",)), x.shape[-1:], jnp.float32)
        bias = self.param("bias", _named(nn.initializers.zeros, ("norm",)), x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        return ((x - mean) * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over D, computed in float32 (Zhang and Sennrich 2019)."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", _named(nn.initializers.ones, ("norm",)), x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * scale).astype(self.dtype)


class Embed(nn.Module):
    """Rows of a table [V, D] by id."""

    rows: int
    width: int
    axes: tuple[str, str] = ("vocab", "embed")
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", _named(init, self.axes), (self.rows, self.width), jnp.float32)
        return jnp.take(table, ids, axis=0).astype(self.dtype)


class Mlp(nn.Module):
    """Two-layer feed-forward with biases: fc2(activation(fc1(x)))."""

    hidden: int
    activation: str = "gelu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        x = Dense((self.hidden,), ("embed", "mlp"), dtype=self.dtype, name="fc1")(x)
        x = checkpoint_name(nn.with_logical_constraint(x, ("batch", "length", "act_mlp")), "hidden")
        return Dense((width,), ("mlp", "embed"), dtype=self.dtype, name="fc2")(ACTIVATIONS[self.activation](x))


def _named(init: Init, axes: tuple[str, ...]) -> Init:
    return nn.with_logical_partitioning(init, axes)
