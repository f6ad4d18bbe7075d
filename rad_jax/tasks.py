"""The two objectives. Each gives value_and_grad(trainable, frozen, batch, rng, num_micro) -> (loss_sum, weight, grads, metrics).

`loss_sum` and `grads` are sums over the global batch and `weight` is what to divide them by (tokens, or pairs), so that a loop need not
know the objective. Gradient accumulation is inside: `num_micro` slices of the batch go through the model one after another.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from rad_jax import sharding
from rad_jax.checkpoint import Run
from rad_jax.contrastive import contrastive_loss
from rad_jax.errors import UserError
from rad_jax.images import normalise
from rad_jax.lora import LoraSpec
from rad_jax.models.attention import Impl
from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import Clip, ClipConfig
from rad_jax.models.llama import LlamaConfig, RopeScaling
from rad_jax.models.llava import Llava, LlavaConfig
from rad_jax.models.projector import KINDS
from rad_jax.models.vit import VitConfig
from rad_jax.state import Tree, join, select

Array = jax.Array
Batch = Mapping[str, Array]


class Result(NamedTuple):
    """Sums over the batch: loss, weight, gradients, and metrics to be divided by the weight."""

    loss_sum: Array
    weight: Array
    grads: Tree
    metrics: dict[str, Array]


def model_config(config: Any) -> ClipConfig | LlavaConfig:
    """The model that `config.model` describes.

    Raises:
        UserError: a projector of another kind than there are.
    """
    model = config.model.to_dict() if hasattr(config.model, "to_dict") else config.model
    vision = VitConfig(**model["vision"]) if model.get("vision") else None
    if config.task == "contrastive":
        assert vision is not None
        return ClipConfig(vision, BertConfig(**model["text"]), model["embed_dim"], model.get("loss", "softmax"))
    lora = dict(model.get("lora") or {})
    if lora:
        lora["targets"] = tuple(lora["targets"])
    llm = dict(model["llm"])
    if isinstance(llm.get("rope_scaling"), Mapping):
        llm["rope_scaling"] = RopeScaling(**llm["rope_scaling"])
    kind = model.get("projector", KINDS[0])
    if kind not in KINDS:
        raise UserError(f"config.model.projector is {kind!r}: choose {' or '.join(KINDS)}.")
    return LlavaConfig(LlamaConfig(**llm), vision, LoraSpec(**lora) if lora else None, kind)


def check_vocabulary(config: ClipConfig | LlavaConfig, found: int, where: Any) -> None:
    """Refuses a tokenizer with more pieces than the model has rows.

    Raises:
        UserError: it has.
    """
    rows = config.text.vocab_size if isinstance(config, ClipConfig) else config.llm.vocab_size
    if found > rows:
        raise UserError(f"{where} has {found} pieces but the config's vocab_size is {rows}: set it to {found} or more.")


# What may differ between the model that weights were made with and the one that goes on with them: it does not change a number's meaning.
_FREE = {"dtype", "remat", "unroll", "attention", "rope", "flat_adapters", "feature_layer", "max_positions", "dropout"}


def adopt(config: Any, bases: Sequence[Run]) -> None:
    """Completes `config.model` from the bases: what it leaves open is theirs, and what it says must be what they say.

    Weights that were made with another epsilon, activation or rotary base would fit by their shapes and give other numbers.

    Raises:
        UserError: a setting differs.
    """
    kinds = {"vision": VitConfig, "text": BertConfig, "llm": LlamaConfig, "lora": LoraSpec}
    for run in bases:
        for part in [part for part in kinds if run.config["model"].get(part) and config.model.get(part)]:
            theirs, ours = run.config["model"][part], config.model[part]
            full = {field.name: field.default for field in dataclasses.fields(kinds[part])} | theirs
            for key in sorted(full.keys() - _FREE):
                if key in ours and _plain(ours[key]) != _plain(full[key]):
                    raise UserError(
                        f"{run.path} has {part}.{key} = {_plain(full[key])!r} but the config says {_plain(ours[key])!r}: "
                        f"give --config.model.{part}.{key}, or the base that belongs to this config."
                    )
                if key not in ours and key in theirs:
                    with config.unlocked():
                        ours[key] = theirs[key]


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value.to_dict() if hasattr(value, "to_dict") else value


def make_task(config: Any) -> "Generative | Contrastive":
    """The task that `config.task` names, over the model that `config.model` describes."""
    shape = model_config(config)
    if config.frozen_dtype == "int8":
        if not isinstance(shape, LlavaConfig):
            raise UserError("config.frozen_dtype is int8 but the task has no language model: give bfloat16 or float32.")
        shape = dataclasses.replace(shape, llm=dataclasses.replace(shape.llm, int8=True))
    return Contrastive(Clip(shape)) if isinstance(shape, ClipConfig) else Generative(Llava(shape), config.dropout_bits)


def restore(
    run: Run, mesh: Mesh, dtype: str | None = None, attention: Impl = "xla"
) -> "tuple[Generative | Contrastive, Tree]":
    """The task of a finished run or a base, and its variables placed on the mesh.

    Args:
        run: as `checkpoint.load_run` gives it.
        mesh: the devices.
        dtype: to hold the weights and to compute in; without it the run's own, for a base float32.
        attention: implementation (models.attention); not the run's own, which may be for another machine.

    Raises:
        UserError: the run and its bases do not give every variable, or are no whole model.
    """
    config = ml_collections.ConfigDict(run.config)
    # What its weights were rounded to in training and how masks were drawn does not matter here, and a base says neither.
    config.update({"frozen_dtype": "float32", "dropout_bits": "threefry2x32"})
    if config.task == "tower":
        raise UserError(f"{run.path} is an image tower alone: name it in --base of a training, with what it lacks.")
    for part in {"vision", "text", "llm"} & set(config.model):
        config.model[part].attention = attention
        config.model[part].dtype = dtype or config.model[part].get("dtype", "float32")
    task = make_task(config)
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    shapes = nn.unbox(boxed)
    variables = select(run.variables, shapes)
    missing = flatten_dict(shapes, sep="/").keys() - flatten_dict(variables, sep="/").keys()
    if missing:
        raise UserError(
            f"{run.path} lacks {len(missing)} variables of its model, {min(missing)} the first: it is no whole model."
        )
    places = sharding.variable_shardings(boxed, mesh)

    def placed(leaf: Any, place: Any) -> Array:
        return sharding.place(leaf, leaf.dtype if dtype is None else jnp.dtype(dtype), place)

    return task, jax.tree.map(placed, variables, places)


@dataclasses.dataclass(frozen=True)
class Generative:
    """Next-token prediction on the labelled positions; with images, or on text alone.

    `dropout_bits` names JAX's generator of the dropout masks: "threefry2x32" gives the same on every mesh, "rbg" is the hardware's on TPUs.
    """

    model: Llava
    dropout_bits: str = "threefry2x32"

    def init(self, rng: Array) -> Any:
        """Fresh variables, boxed with their logical axis names."""
        c = self.model.config
        tokens = jnp.zeros((1, 2), jnp.int32)
        images = None
        if c.vision is not None:
            images = jnp.zeros((1, c.vision.image_size, c.vision.image_size, 3))
        return self.model.init(rng, tokens, jnp.full((1,), 2), images, jnp.zeros((1, 1), jnp.int32))

    def value_and_grad(self, trainable: Tree, frozen: Tree, batch: Batch, rng: Array, num_micro: int) -> Result:
        def one(micro: Batch, index: Array) -> Result:
            def loss(trainable: Tree) -> tuple[Array, tuple[Array, dict[str, Array]]]:
                logits = self._logits(join(trainable, frozen), micro, jax.random.fold_in(rng, index))
                return _token_loss(logits, micro["targets"], micro["target_weights"])

            (loss_sum, (weight, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
            return Result(loss_sum, weight, grads, metrics)

        if num_micro == 1:
            return one(batch, jnp.zeros((), jnp.int32))
        micro = split_batch(batch, num_micro)
        start = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro), jnp.zeros((), jnp.int32)),
        )

        def add(total: Result, item: tuple[Batch, Array]) -> tuple[Result, None]:
            return jax.tree.map(jnp.add, total, one(*item)), None

        return jax.lax.scan(add, start, (micro, jnp.arange(num_micro)))[0]

    def _logits(self, variables: Tree, batch: Batch, rng: Array) -> Array:
        images, vision = None, self.model.config.vision
        if vision is not None and "image" in batch:
            images = normalise(batch["image"], jnp, vision.pixel_mean, vision.pixel_std)
        if self.dropout_bits == "rbg":
            rng = jax.random.wrap_key_data(jax.random.bits(rng, (4,)), impl="rbg")
        return self.model.apply(
            variables, batch["tokens"], batch["length"], images, batch["target_positions"], rngs={"dropout": rng}
        )


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Images and texts of the global batch find each other: CLIP's loss or SigLIP's, as the model's config says."""

    model: Clip

    def init(self, rng: Array) -> Any:
        """Fresh variables, boxed with their logical axis names."""
        size = self.model.config.vision.image_size
        return self.model.init(rng, jnp.zeros((1, size, size, 3)), jnp.zeros((1, 2), jnp.int32), jnp.full((1,), 2))

    def value_and_grad(self, trainable: Tree, frozen: Tree, batch: Batch, rng: Array, num_micro: int) -> Result:
        del rng  # The towers have no dropout.

        def features(trainable: Tree, micro: Batch) -> tuple[Array, Array, Array, Array]:
            vision = self.model.config.vision
            images = normalise(micro["image"], jnp, vision.pixel_mean, vision.pixel_std)
            return self.model.apply(join(trainable, frozen), images, micro["tokens"], micro["length"])

        def global_loss(*features: Array) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            images, texts, scale, bias = features
            return contrastive_loss(images, texts, scale, bias, batch["weight"], kind=self.model.config.loss)

        def loss(trainable: Tree) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            return global_loss(*features(trainable, batch))

        if num_micro == 1:
            (loss_sum, (weight, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
            return Result(loss_sum, weight, grads, metrics)

        # GradCache (Gao et al. 2021): the loss sees the global batch, the towers one micro-batch at a time.
        micro = split_batch(batch, num_micro)
        images, texts, scales, biases = jax.lax.map(lambda m: features(trainable, m), micro)
        whole = merge_batch({"images": images, "texts": texts})
        gradient = jax.value_and_grad(global_loss, argnums=(0, 1, 2, 3), has_aux=True)
        (loss_sum, (weight, metrics)), found = gradient(whole["images"], whole["texts"], scales[0], biases[0])
        rows = split_batch({"images": found[0], "texts": found[1]}, num_micro)
        d_scale, d_bias = found[2] / num_micro, found[3] / num_micro

        def add(total: Tree, item: tuple[Batch, Batch]) -> tuple[Tree, None]:
            _, pull_back = jax.vjp(lambda t: features(t, item[0]), trainable)
            (grads,) = pull_back((item[1]["images"], item[1]["texts"], d_scale, d_bias))
            return jax.tree.map(jnp.add, total, grads), None

        grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable), (micro, rows))
        return Result(loss_sum, weight, grads, metrics)


def _token_loss(logits: Array, targets: Array, weights: Array) -> tuple[Array, tuple[Array, dict[str, Array]]]:
    """Summed cross-entropy: logits [B, U, V], targets int [B, U], weights [B, U]."""
    logits = nn.with_logical_constraint(logits, ("batch", "length", "act_vocab"))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = (jax.nn.logsumexp(logits, axis=-1) - chosen) * weights
    correct = ((logits.argmax(-1) == targets) * weights).sum()
    return losses.sum(), (weights.sum(), {"accuracy": correct})


def split_batch(batch: Batch, num_micro: int) -> dict[str, Array]:
    """[B, ...] -> [num_micro, B / num_micro, ...], each slice spread over all devices that hold the batch."""

    def sliced(x: Array) -> Array:
        x = x.reshape(x.shape[0] // num_micro, num_micro, *x.shape[1:]).swapaxes(0, 1)
        return nn.with_logical_constraint(x, (None, "batch") + (None,) * (x.ndim - 2))

    return {name: sliced(rows) for name, rows in batch.items()}


def merge_batch(micro: Batch) -> dict[str, Array]:
    """Undoes `split_batch`: [num_micro, B / num_micro, ...] -> [B, ...], rows in their old order."""

    def merged(x: Array) -> Array:
        x = x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return nn.with_logical_constraint(x, ("batch",) + (None,) * (x.ndim - 1))

    return {name: merged(rows) for name, rows in micro.items()}
