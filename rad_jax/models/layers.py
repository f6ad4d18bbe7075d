"""Dense, norms, embedding and the feed-forward block: parameters with logical axis names, and Dense's optional LoRA branch."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rad_jax.lora import LoraSpec

Array = jax.Array
Init = Any

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
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


def dropout_mask(key: Array, shape: tuple[int, ...], rate: float) -> Array:
    """Entries that dropout (Srivastava et al. 2014) keeps, each with probability 1 - `rate`: 32 random bits decide, compared as they are."""
    return jax.random.bits(key, shape, jnp.uint32) >= jnp.uint32(round(rate * 2**32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapted(
    rate: float, x: Array, kernel: Array, scales: Array | None, a: Array, b: Array, kept: Array | None
) -> Array:
    """x W + (dropout(x) A) B, for rows x [M, D], W [D, F], A [D, R], B [R, F]: [M, F] in x's dtype.

    With `scales` [F], W's columns are multiplied by them; with `kept` [M, D], the adapter sees x / (1 - rate) there and 0 elsewhere.

    Written out with its gradient for the sake of the order of sums: a thin product costs what writing its wide result costs, so that is
    written in float32 as it arises, and added where the large product ends, while XLA would add it in another pass over both.
    """
    return _adapted_forward(rate, x, kernel, scales, a, b, kept)[0]


def _adapted_forward(rate: float, x: Array, kernel: Array, scales: Any, a: Array, b: Array, kept: Any) -> Any:
    low = checkpoint_name(_product(_masked(x, kept, rate), a).astype(x.dtype), "adapter")
    wide = _product(x, kernel) if scales is None else _product(x, kernel) * scales
    y = wide + jax.lax.optimization_barrier(_product(low, b))
    return y.astype(x.dtype), (x, kernel, scales, a, b, kept, low)


def _adapted_backward(rate: float, saved: Any, dy: Array) -> Any:
    x, kernel, scales, a, b, kept, low = saved
    d_low = _product(dy, b.T).astype(x.dtype)
    d_a, d_b = _product(_masked(x, kept, rate).T, d_low), _product(low.T, dy)
    through = jax.lax.optimization_barrier(_masked(_product(d_low, a.T), kept, rate))
    d_wide = dy if scales is None else (dy * scales).astype(x.dtype)
    d_x = (_product(d_wide, kernel.T) + through).astype(x.dtype)
    # Of a frozen kernel nobody asks for the gradient, and XLA leaves its product out.
    d_kernel = _product(x.T, d_wide).astype(kernel.dtype)
    return d_x, d_kernel, None, d_a.astype(a.dtype), d_b.astype(b.dtype), None


adapted.defvjp(_adapted_forward, _adapted_backward)


def _product(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _masked(x: Array, kept: Array | None, rate: float) -> Array:
    return x if kept is None else jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


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
    from the collection `scales` (`rad_jax.quantise`).
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    in_axes: int = 1
    use_bias: bool = True
    lora: LoraSpec | None = None
    dtype: Any = jnp.float32
    kernel_init: Init = None
    int8: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs = x.shape[x.ndim - self.in_axes :]
        x = x.astype(self.dtype)
        kernel_init = nn.initializers.zeros if self.int8 else self.kernel_init or fan_in_normal(self.in_axes)
        stored = jnp.int8 if self.int8 else jnp.float32
        kernel = self.param("kernel", _named(kernel_init, self.axes), inputs + self.features, stored)
        kernel = self._matrix(kernel, self.axes, self.in_axes)
        scales = None
        if self.int8:
            ones = _named(nn.initializers.ones, self.axes[self.in_axes :])
            scales = self.variable("scales", "kernel", ones, None, self.features, jnp.float32).value.reshape(-1)
        # As one two-dimensional product: the gradient of a many-axis dot makes XLA's CPU backend copy transposed operands (2.5x slower).
        rows = x.reshape(-1, kernel.shape[0])
        if self.lora is not None:
            y = adapted(self.lora.dropout, rows, kernel, scales, *self._adapter(rows, inputs, self.lora))
        else:
            y = rows @ kernel if scales is None else (_product(rows, kernel) * scales).astype(self.dtype)
        y = y.reshape(x.shape[: x.ndim - self.in_axes] + self.features)
        if self.use_bias:
            bias_axes = self.axes[self.in_axes :]
            bias = self.param("bias", _named(nn.initializers.zeros, bias_axes), self.features, jnp.float32)
            y = y + bias.astype(self.dtype)
        return y

    def _adapter(self, rows: Array, inputs: tuple[int, ...], spec: LoraSpec) -> tuple[Array, Array, Array | None]:
        """A [D, R], B [R, F] times alpha / R, and the dropout mask [M, D]."""

        def created(init: Init, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
            return _named(init, axes)(self.make_rng("params"), shape, jnp.float32)

        a_axes = (*self.axes[: self.in_axes], "rank")
        b_axes = ("rank", *self.axes[self.in_axes :])
        a = self.variable("lora", "a", created, fan_in_uniform(self.in_axes), (*inputs, spec.rank), a_axes).value
        b = self.variable("lora", "b", created, nn.initializers.zeros, (spec.rank, *self.features), b_axes).value
        kept = None
        if spec.dropout and self.has_rng("dropout"):
            kept = dropout_mask(self.make_rng("dropout"), rows.shape, spec.dropout)
        return self._matrix(a, a_axes, self.in_axes), self._matrix(b * spec.scale, b_axes, 1), kept

    def _matrix(self, kernel: Array, names: tuple[str, ...], inputs: int) -> Array:
        """A kernel as a matrix in the dtype computed in, its `inputs` first axes as one and its others as one.

        Its shards are brought together here, in the smaller of the stored dtype and that one: left to itself, XLA cuts the product into a
        loop over shards.
        """
        kernel = kernel if kernel.dtype == jnp.int8 else kernel.astype(self.dtype)
        kernel = nn.with_logical_constraint(kernel, tuple(None if name == "embed" else name for name in names))
        return kernel.reshape(math.prod(kernel.shape[:inputs]), -1).astype(self.dtype)


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
        # Whole rows are looked up: XLA would otherwise take words cut along D, and turn them over to the batch by way of full copies.
        table = nn.with_logical_constraint(table.astype(self.dtype), (self.axes[0], "act_embed"))
        return jnp.take(table, ids, axis=0)


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
