"""The two objectives: sums, weights, gradients of what trains, accumulation."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rad_jax import tasks
from rad_jax.errors import UserError
from rad_jax.models.llama import RopeScaling
from rad_jax.models.llava import LlavaConfig
from rad_jax.state import split

# float32 sums in another order through models of three layers, relative to the largest entry of a leaf; measured: 1.6e-5.
TOLERANCE = 5e-5


def test_unknown_projector(training):
    config = training.config("stage2")
    config.model.projector = "mlp3x_gelu"
    with pytest.raises(UserError, match="is 'mlp3x_gelu': choose mlp2x_gelu or linear"):
        tasks.model_config(config)


class Setting:
    """A task with random weights, split as its config says."""

    def __init__(self, training, stage, **model):
        self.config = training.config(stage)
        self.config.model.update(model)
        self.task = tasks.make_task(self.config)
        self.batch = functools.partial(training.batch, self.config)
        self.trainable, self.frozen = split(training.variables(self.config), self.config.trainable)

    @functools.cached_property
    def _function(self):
        # Compiling takes far longer than running, so it may do without polishing the code.
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        return jax.jit(self.task.value_and_grad, static_argnums=4, compiler_options=options)

    def __call__(self, batch, num_micro=1, seed=0):
        return self._function(self.trainable, self.frozen, batch, jax.random.key(seed), num_micro)


@pytest.fixture(scope="module")
def generative(training):
    return Setting(training, "stage3")


@pytest.fixture(scope="module")
def contrastive(training):
    return Setting(training, "stage1")


@pytest.fixture(params=["generative", "contrastive"])
def setting(request):
    return request.getfixturevalue(request.param)


def close(one, other, tolerance=TOLERANCE):
    assert str(jax.tree.structure(one)) == str(jax.tree.structure(other))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(other))
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        scale = max(np.abs(theirs).max(), 1e-2 * largest)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * scale)


def test_gradients_of_the_trainable_tree_and_of_nothing_else(setting):
    result = setting(setting.batch())
    assert str(jax.tree.structure(result.grads)) == str(jax.tree.structure(setting.trainable))
    shapes = jax.tree.map(lambda g, w: (g.shape, g.dtype) == (w.shape, w.dtype), result.grads, setting.trainable)
    assert jax.tree.all(shapes)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(result.grads) if leaf.ndim > 1)


def test_accumulation_gives_the_sums_of_the_whole_batch(setting):
    batch = setting.batch(blank=(2, 5))
    whole, parts = setting(batch, 1), setting(batch, 4)
    assert whole.weight == parts.weight > 0
    np.testing.assert_allclose(parts.loss_sum, whole.loss_sum, rtol=TOLERANCE)
    np.testing.assert_allclose(parts.metrics["accuracy"], whole.metrics["accuracy"])
    close(parts.grads, whole.grads)


def test_rows_without_weight_count_for_nothing(setting):
    """Loss and gradients are those of the other rows alone, whatever the blank rows hold."""
    batch = setting.batch(blank=(0, 3, 6))
    rest = {name: rows[batch["weight"] > 0] for name, rows in batch.items()}
    whole, alone = setting(batch), setting(rest)
    assert whole.weight == alone.weight
    np.testing.assert_allclose(whole.loss_sum, alone.loss_sum, rtol=TOLERANCE)
    close(whole.grads, alone.grads)


def test_generative_weight_is_the_number_of_targets(generative):
    batch = generative.batch(blank=(1,))
    assert generative(batch).weight == batch["target_weights"].sum()


def test_contrastive_weight_is_the_number_of_pairs(contrastive):
    assert contrastive(contrastive.batch(blank=(1, 2))).weight == 6


def test_token_loss_against_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 7)).astype(np.float32) * 3
    targets = rng.integers(0, 7, (3, 4))
    weights = (rng.random((3, 4)) > 0.4).astype(np.float32)
    loss, (weight, metrics) = tasks._token_loss(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    exact = logits.astype(np.float64)
    log_share = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    rows, columns = np.indices(targets.shape)
    expected = -(log_share[rows, columns, targets] * weights).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert weight == weights.sum()
    assert metrics["accuracy"] == ((exact.argmax(-1) == targets) * weights).sum()


def test_gradients_against_differences(generative):
    """Central differences along one random direction; rounding and the third derivative make each about 1e-3 of the slope."""
    batch = generative.batch()
    result = generative(batch)
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), generative.trainable)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), result.grads, direction)))
    ends = []
    for step in (2e-4, -2e-4):
        moved = jax.tree.map(lambda w, d, step=step: w + step * d, generative.trainable, direction)
        ends.append(generative._function(moved, generative.frozen, batch, jax.random.key(0), 1).loss_sum)
    np.testing.assert_allclose((ends[0] - ends[1]) / 4e-4, slope, rtol=5e-3)


def test_adapter_dropout_follows_the_key(training):
    lora = {**training.config("stage3").model.lora.to_dict(), "dropout": 0.5}
    dropping = Setting(training, "stage3", lora=lora)
    batch = dropping.batch()
    one, again, other = (dropping(batch, seed=seed).loss_sum for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_padding_does_not_matter(generative):
    batch = generative.batch()
    longer = {**batch, "tokens": np.pad(batch["tokens"], ((0, 0), (0, 3)), constant_values=7)}
    np.testing.assert_allclose(generative(longer).loss_sum, generative(batch).loss_sum, rtol=TOLERANCE)


def test_model_from_a_config_read_back_from_json(training):
    for stage in ("lm", "stage1", "stage2", "stage3"):
        config = training.config(stage)
        again = ConfigDict(json.loads(json.dumps(config.to_dict())))
        assert tasks.model_config(again) == tasks.model_config(config)
    llm = {**training.config("lm").model.llm.to_dict(), "rope_scaling": {"kind": "linear", "factor": 2.0}}
    vision = {**training.config("stage2").model.vision.to_dict(), "pixel_mean": [0.5, 0.5, 0.5]}
    shape = tasks.model_config(ConfigDict({"task": "generative", "model": {"llm": llm, "vision": vision}}))
    assert isinstance(shape, LlavaConfig) and shape.vision is not None
    assert shape.llm.rope_scaling == RopeScaling("linear", 2.0) and shape.vision.pixel_mean == (0.5, 0.5, 0.5)
    assert hash(shape) == hash(dataclasses.replace(shape))


@pytest.mark.parametrize("stage", ["lm", "stage1"])
def test_tokenizer_larger_than_the_model(training, stage):
    shape = tasks.model_config(training.config(stage))
    tasks.check_vocabulary(shape, 512, "tokenizer.json")
    with pytest.raises(
        UserError, match=r"tokenizer.json has 513 pieces but the config's vocab_size is 512: set it to 513"
    ):
        tasks.check_vocabulary(shape, 513, "tokenizer.json")
