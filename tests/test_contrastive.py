"""The contrastive losses: against numpy and open_clip, on one device and on eight, and what is never in memory."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax import contrastive, sharding, tasks
from rad_jax.models.bert import BertConfig
from rad_jax.models.clip import Clip, ClipConfig
from rad_jax.models.vit import VitConfig
from rad_jax.state import split

PAIRS, WIDTH, SCALE, BIAS = 48, 6, 14.0, -3.0
KINDS = ["softmax", "sigmoid"]
MESHES = [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two to twelve blocks per device."""
    monkeypatch.setattr(contrastive, "ROWS", 4)


def features(seed=0):
    rng = np.random.default_rng(seed)
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, PAIRS, WIDTH)))
    return images.astype(np.float32), texts.astype(np.float32)


def on(mesh, function, *arrays):
    """`function` compiled for a mesh, rows spread, and its value."""
    scalars = (np.float32(SCALE), np.float32(BIAS))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        placed = sharding.place_batch({str(number): array for number, array in enumerate(arrays)}, mesh)
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        compiled = jax.jit(function, compiler_options=options).lower(*placed.values(), *scalars).compile()
        return jax.device_get(compiled(*placed.values(), *scalars)), compiled


def gradient(kind):
    """(images, texts, weights, scale, bias) -> the loss with its metrics, and gradients of all but the weights."""

    def loss(images, texts, weights, scale, bias):
        return contrastive.contrastive_loss(images, texts, scale, bias, weights, kind=kind)

    return jax.value_and_grad(loss, argnums=(0, 1, 3, 4), has_aux=True)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_against_numpy(training, kind):
    """In float64; rows without weight are nobody's negative. float32 sums of 40 losses hold to about 1e-6."""
    images, texts = features()
    weights = (np.arange(PAIRS) % 5 > 0).astype(np.float32)
    ((loss, (weight, metrics)), _), _ = on(training.mesh(), gradient(kind), images, texts, weights)
    kept = weights > 0
    z = SCALE * images[kept].astype(np.float64) @ texts[kept].T + BIAS
    if kind == "softmax":
        both = np.log(np.exp(z).sum(1)) + np.log(np.exp(z).sum(0))
        expected = (both / 2 - np.diag(z)).sum()
    else:
        signs = 2 * np.eye(len(z)) - 1
        expected = np.log1p(np.exp(-signs * z)).sum()
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    assert weight == kept.sum()
    assert metrics["accuracy"] == (z.argmax(1) == np.arange(len(z))).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_open_clip_on_every_mesh(training, kind):
    """open_clip averages over pairs. Both sum in float32, in other orders: 3e-6 of the largest entry; measured at most 8e-7."""
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("open_clip.loss")
    arrays = [torch.from_numpy(x).requires_grad_() for x in features()]
    numbers = [torch.tensor(x, requires_grad=True) for x in (SCALE, BIAS)]
    peer = peers.ClipLoss() if kind == "softmax" else peers.SigLipLoss()
    theirs = peer(*arrays, *numbers) * PAIRS
    theirs.backward()
    expected = [x.grad.numpy() for x in (*arrays, *numbers)]
    for axes in MESHES:
        ones = np.ones(PAIRS, np.float32)
        ((loss, _), grads), _ = on(training.mesh(**axes), gradient(kind), *features(), ones)
        np.testing.assert_allclose(loss, theirs.item(), rtol=2e-6, err_msg=str(axes))
        # A softmax does not see the bias: its gradient is a sum of rounding errors in both, and nothing has it as a parameter.
        for ours, other in zip(grads[: 4 - (kind == "softmax")], expected, strict=False):
            np.testing.assert_allclose(ours, other, rtol=0, atol=3e-6 * np.abs(other).max(), err_msg=str(axes))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_without_one_pair_is_zero(training, kind):
    images, texts = features()
    ((loss, (weight, _)), grads), _ = on(training.mesh(), gradient(kind), images, texts, np.zeros(PAIRS, np.float32))
    assert loss == weight == 0
    assert all((x == 0).all() for x in jax.tree.leaves(grads))


def shapes(jaxpr):
    """Shapes of all values in a jaxpr and in those within it."""
    for equation in jaxpr.eqns:
        yield from (value.aval.shape for value in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_no_array_has_as_many_numbers_as_there_are_pairs_of_rows(training, kind, axes):
    """Neither in the program nor in what the compiler made of it: all features, or a block of logits, is the most."""
    mesh, arrays = training.mesh(**axes), (*features(), np.ones(PAIRS, np.float32))
    _, compiled = on(mesh, gradient(kind), *arrays)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        jaxpr = jax.make_jaxpr(gradient(kind))(*arrays, SCALE, BIAS).jaxpr
    most, copies = PAIRS * max(contrastive.ROWS, WIDTH), axes.get("data", 1) * axes.get("fsdp", 1)
    sizes = [int(np.prod(shape)) for shape in shapes(jaxpr)]
    found = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text() or "")
    in_code = [int(np.prod([int(n) for n in shape.split(",")])) for shape in found]
    assert PAIRS * contrastive.ROWS in sizes and PAIRS * contrastive.ROWS in in_code
    # In the program each device's copy of all features is a part of one array; in what is compiled it stands alone.
    assert max(sizes) <= most * copies < PAIRS**2 and max(in_code) <= most


def test_sizes_are_seen(training):
    """The plain loss would fail the test above."""
    jaxpr = jax.make_jaxpr(lambda x, y: jax.lax.map(lambda _: jax.nn.logsumexp(x @ y.T), jnp.arange(2)))(*features())
    assert (PAIRS, PAIRS) in set(shapes(jaxpr.jaxpr))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_micro", [1, 3])
def test_whole_step_has_no_square_of_the_batch(training, kind, num_micro):
    config = training.config("stage1")
    config.model.loss = kind
    task = tasks.make_task(config)
    trainable, frozen = split(training.variables(config), config.trainable)
    batch = training.batch(config, rows=72)  # a number that no other axis has
    with jax.set_mesh(training.mesh(data=2, fsdp=2, tensor=2)), nn.logical_axis_rules(sharding.RULES):
        jaxpr = jax.make_jaxpr(task.value_and_grad, static_argnums=4)(
            trainable, frozen, batch, jax.random.key(0), num_micro
        )
    found = set(shapes(jaxpr.jaxpr))
    assert (3, 72) in found  # 18 rows per device; the largest block of at most 4 that divides them
    assert not [shape for shape in found if shape.count(72) > 1]


def test_caching_of_gradients_on_eight_devices(training):
    """Micro-batches on a mesh give the sums of the whole batch on one device; tolerances as in test_tasks.py."""
    config = training.config("stage1")
    config.model.loss = "sigmoid"
    task = tasks.make_task(config)
    trainable, frozen = split(training.variables(config), config.trainable)
    batch = training.batch(config, rows=16, blank=(3, 4))
    found = {}
    for num_micro, axes in ((1, {}), (2, {"data": 2, "fsdp": 2, "tensor": 2})):
        mesh = training.mesh(**axes)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
            step = jax.jit(functools.partial(task.value_and_grad, num_micro=num_micro), compiler_options=options)
            found[num_micro] = jax.device_get(
                step(trainable, frozen, sharding.place_batch(batch, mesh), jax.random.key(0))
            )
    one, many = found[1], found[2]
    assert one.weight == many.weight == 14
    np.testing.assert_allclose(many.loss_sum, one.loss_sum, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(one.grads))
    for ours, other in zip(jax.tree.leaves(many.grads), jax.tree.leaves(one.grads), strict=True):
        scale = max(np.abs(other).max(), 1e-2 * largest)
        np.testing.assert_allclose(ours, other, rtol=0, atol=5e-5 * scale)


def config(remat="none", **changes):
    vision = VitConfig(32, 8, 16, 3, 2, 64, remat=remat, **changes)
    return ClipConfig(vision, BertConfig(64, 16, 2, 2, 32, remat=remat), 8)


def test_activation_bytes_of_towers_that_keep_their_blocks_inputs_alone():
    """17 tokens of 16 numbers in 2 bytes: under full rematerialisation a block more is one more of them."""
    found = [
        contrastive.activation_bytes(
            Clip(ClipConfig(VitConfig(32, 8, 16, depth, 2, 64, remat="full", dtype="bfloat16"), config().text, 8)), 10
        )
        for depth in (3, 7)
    ]
    assert found[1]["image"] - found[0]["image"] == 4 * 17 * 16 * 2
    assert found[1]["text"] == found[0]["text"]


def test_activation_bytes_against_the_compiler():
    """Temporary memory of a compiled gradient grows by as much per image; it also holds what is on its way, and may drop what is cheap."""
    model = Clip(config())
    inputs = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 4), int), jnp.ones(1, int)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))

    def temporary(rows):
        def loss(variables, images):
            return model.apply(variables, images, method="encode_image").sum()

        images = jax.ShapeDtypeStruct((rows, 32, 32, 3), jnp.float32)
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        compiled = jax.jit(jax.grad(loss), compiler_options=options).lower(variables, images).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    measured = (temporary(96) - temporary(32)) / 64
    assert 0.5 < contrastive.activation_bytes(model, 4)["image"] / measured < 2
