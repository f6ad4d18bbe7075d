"""Writing with a cache against writing without, sampling, and the attention that is drawn."""

import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rad_jax import sharding, tasks
from rad_jax.generate import generate, sample
from rad_jax.grounding import attention_to_image
from rad_jax.images import normalise
from rad_jax.prompts import IMAGE_ID

NEW = 7
NEVER = -1  # an end of text that no token is


@pytest.fixture(scope="module")
def models(training):
    """Stage -> model, random variables, and a batch of ragged prompts."""

    def make(stage, **vision):
        config = training.config(stage)
        with config.unlocked():
            if vision:
                config.model.vision.update(vision)
        batch = training.batch(config, rows=4, seed=5)
        inputs = {name: batch[name] for name in ("image", "tokens", "length") if name in batch}
        return tasks.make_task(config).model, training.variables(config, seed=2), inputs

    siglip = {"class_token": False, "activation": "gelu_tanh", "pixel_mean": [0.5] * 3, "pixel_std": [0.5, 0.4, 0.3]}
    return {"stage3": make("stage3"), "lm": make("lm"), "no class token": make("stage3", **siglip)}


def pixels(model, images):
    """As the model's own tower wants them."""
    return normalise(images, jnp, model.config.vision.pixel_mean, model.config.vision.pixel_std)


def slowly(model, variables, batch, count):
    """Greedy ids [B, count] by a full forward pass over everything for each token; each row on its own."""
    room = batch["tokens"].shape[1] + count

    @jax.jit
    def last(ids, length, images):
        return model.apply(variables, ids, length[None], images, (length - 1)[None, None])[0, 0].argmax()

    rows = []
    for row, length in enumerate(batch["length"]):
        ids = list(batch["tokens"][row, :length])
        images = pixels(model, batch["image"][row : row + 1]) if "image" in batch else None
        for _ in range(count):
            padded = np.array([ids + [0] * (room - len(ids))], np.int32)
            ids.append(int(last(padded, np.int32(len(ids)), images)))
        rows.append(ids[length:])
    return np.array(rows)


def quickly(model, variables, batch, seed=0, **options):
    options = {"max_new_tokens": NEW, "eos_id": NEVER, **options}
    return np.asarray(generate(model, variables, batch, jax.random.key(seed), **options))


@pytest.fixture(scope="module")
def greedy(models):
    return {stage: quickly(*parts) for stage, parts in models.items()}


@pytest.mark.parametrize("stage", ["stage3", "lm", "no class token"])
def test_cache_gives_what_full_passes_give(models, greedy, stage):
    """Prompts of different lengths in one batch, with and without images."""
    model, variables, batch = models[stage]
    assert len(set(batch["length"])) > 1
    np.testing.assert_array_equal(greedy[stage], slowly(model, variables, batch, NEW))
    assert len(np.unique(greedy[stage])) > 4  # the random model does not repeat itself


def test_row_alone_gives_what_it_gives_in_a_batch(models, greedy):
    model, variables, batch = models["stage3"]
    alone = {name: values[2:3] for name, values in batch.items()}
    np.testing.assert_array_equal(quickly(model, variables, alone), greedy["stage3"][2:3])


def test_row_ends_at_its_end_of_text(models, greedy):
    """Other rows go on; what follows the end is filled with it."""
    model, variables, batch = models["stage3"]
    end = int(greedy["stage3"][1, 3])
    found = quickly(model, variables, batch, eos_id=end)
    for row, expected in zip(found, greedy["stage3"], strict=True):
        stop = list(expected).index(end) if end in expected else NEW
        np.testing.assert_array_equal(row[:stop], expected[:stop])
        assert (row[stop:] == end).all()
    assert (found[1] == end).sum() >= NEW - 3


def test_tiny_top_p_is_greedy(models, greedy):
    model, variables, batch = models["stage3"]
    found = quickly(model, variables, batch, temperature=1.3, top_p=1e-6)
    np.testing.assert_array_equal(found, greedy["stage3"])


def test_sampling_follows_its_key(models):
    model, variables, batch = models["stage3"]
    one, again, other = (quickly(model, variables, batch, k, temperature=1.0) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1.0, [0.4, 0.3, 0.2, 0.1]),
        (0.71, [0.4, 0.3, 0.2, 0]),
        (0.5, [0.4, 0.3, 0, 0]),
        (0.3, [0.4, 0, 0, 0]),
        (0.0, [0.4, 0, 0, 0]),
    ],
)
def test_sample_has_the_distribution_of_the_logits(top_p, kept):
    """20,000 draws: a share's standard error is at most 0.0035; allowed are four of them."""
    shares, order = np.array([0.4, 0.3, 0.2, 0.1]), np.array([2, 0, 3, 1])
    logits = jnp.broadcast_to(jnp.log(shares)[order], (20_000, 4))
    drawn = sample(logits, jax.random.split(jax.random.key(4), len(logits)), top_p)
    found = np.bincount(drawn, minlength=4)[np.argsort(order)] / len(drawn)
    expected = np.array(kept) / sum(kept)
    np.testing.assert_allclose(found, expected, atol=0.014)
    assert (found[expected == 0] == 0).all()


def test_temperature_divides_the_logits(models):
    """At a temperature near zero a sample is the greedy text."""
    model, variables, batch = models["lm"]
    np.testing.assert_array_equal(quickly(model, variables, batch, temperature=1e-4), quickly(model, variables, batch))


def test_row_without_a_study_is_not_written_for(models, greedy):
    model, variables, batch = models["stage3"]
    index = np.array([4, -1, 7, -1], np.int32)
    end = int(greedy["stage3"][0, 1])
    found = quickly(model, variables, {**batch, "index": index}, eos_id=end)
    assert (found[1] == end).all() and (found[3] == end).all()
    np.testing.assert_array_equal(found[0, :1], greedy["stage3"][0, :1])


class Scripted:
    """A model that writes what `variables` say, int32 [B, U], and reports each token it is asked for after the first."""

    config = SimpleNamespace(vision=None, llm=SimpleNamespace(unroll=1, depth=2))

    def __init__(self, asked):
        self._asked = asked

    def apply(self, script, tokens, lengths, *given, method):
        if method == "prefill":
            cache = jnp.zeros((1, len(lengths), 1, tokens.shape[1], 1))
            return jax.nn.one_hot(script[:, 0], 9), lengths, (cache, cache)
        cache, _, _ = given
        written = lengths[0] - 1  # each prompt has one token
        jax.debug.callback(lambda step: self._asked.append(int(step)), written, ordered=True)
        return jax.nn.one_hot(script[:, jnp.minimum(written + 1, script.shape[1] - 1)], 9), cache


@pytest.mark.parametrize(
    ("index", "turns"),
    [
        ([0, 1, 2], 5),  # until the longest text has ended
        ([0, 1, -1], 3),
        ([-1, 1, -1], 2),
        ([-1, -1, -1], 0),
    ],
)
def test_loop_ends_with_the_last_text(index, turns):
    """How often the model is run, of 8 times that there is room for."""
    end = 8
    script = np.array([[3, 4, end, 5, 5, 5, 5, 5], [6, end, 7, 7, 7, 7, 7, 7], [1, 2, 1, 2, end, 3, 3, 3]], np.int32)
    asked: list[int] = []
    batch = {"tokens": np.ones((3, 1), np.int32), "length": np.ones(3, np.int32), "index": np.array(index, np.int32)}
    found = quickly(Scripted(asked), script, batch, max_new_tokens=8, eos_id=end)
    jax.effects_barrier()
    assert asked == list(range(turns))
    texts = np.where(np.cumsum(script == end, axis=1) > 0, end, script)
    np.testing.assert_array_equal(found, np.where(np.array(index)[:, None] < 0, end, texts))


def test_samples_depend_on_a_rows_number_not_on_its_place(models):
    model, variables, batch = models["stage3"]
    numbered = {**batch, "index": np.array([9, 2, 5, 3], np.int32)}
    turned = {name: rows[::-1] for name, rows in numbered.items()}
    one, other = (quickly(model, variables, b, temperature=1.0) for b in (numbered, turned))
    np.testing.assert_array_equal(one, other[::-1])
    assert (one != quickly(model, variables, batch, temperature=1.0)).any()


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_write_what_one_writes(training, models, greedy, axes):
    """The cache lies over the devices and stays there: none of the collectives moves keys or values of the length of a row."""
    model, variables, few = models["stage3"]
    batch = {name: np.concatenate([rows, rows[::-1]]) for name, rows in few.items()}
    mesh = training.mesh(**axes)
    boxed = jax.eval_shape(tasks.Generative(model).init, jax.random.key(0))
    placed = jax.device_put(variables, sharding.variable_shardings(boxed, mesh))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        inputs = sharding.place_batch(batch, mesh)
        options = {"max_new_tokens": NEW, "eos_id": NEVER}
        compiled = generate.lower(model, placed, inputs, jax.random.key(0), **options).compile()
        found = compiled(placed, inputs, jax.random.key(0))
    np.testing.assert_array_equal(found, np.concatenate([greedy["stage3"], greedy["stage3"][::-1]]))
    llm, tokens = model.config.llm, batch["tokens"].shape[1] + model.config.image_tokens + NEW
    rows, heads = 8 // (axes.get("data", 1) * axes.get("fsdp", 1)), llm.kv_heads // axes.get("tensor", 1)
    code = compiled.as_text() or ""
    assert re.search(rf"f32\[(?:{llm.depth},)?{rows},{heads},{tokens},{llm.head_dim}\]", code)
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)\(", code)
    assert bool(moved) == (axes != {"data": 8})  # whole models side by side have nothing to tell each other
    assert not [shape for shape in moved if re.search(rf"\b{tokens},{llm.head_dim}$", shape)]


def first_layer(model, variables, batch, row):
    """Attention weights [N, S, S] of the first layer for one row, written out: RMSNorm, projections with adapters, rotation, softmax."""
    length = batch["length"][row : row + 1]
    tokens, images = batch["tokens"][row : row + 1, : length[0]], pixels(model, batch["image"][row : row + 1])
    features = model.apply(variables, images, method="encode_image")
    x = np.asarray(model.apply(variables, tokens, length, features, method="splice")[0][0], np.float64)
    params, adapters = variables["params"]["llm"]["layers"], variables["lora"]["llm"]["layers"]["attn"]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.llm.eps) * params["attn_norm"]["scale"][0]
    scale, half = model.config.lora.scale, model.config.llm.head_dim // 2
    angles = np.arange(len(x))[:, None, None] / 10000.0 ** (np.arange(half) / half)

    def rotated(name):
        kernel, a, b = params["attn"][name]["kernel"][0], adapters[name]["a"][0], adapters[name]["b"][0]
        y = np.einsum("sd,dnh->snh", x, kernel + scale * np.einsum("dr,rnh->dnh", a, b))
        first, second = y[..., :half], y[..., half:]
        turned = first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)
        return np.concatenate(turned, axis=-1)

    scores = np.einsum("snh,tnh->nst", rotated("q"), rotated("k")) / np.sqrt(2 * half)
    scores = np.where(np.tril(np.ones(scores.shape[1:])), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("stage", ["stage3", "no class token"])
def test_attention_to_image(models, stage):
    """The first layer equals the attention written out; with the words' share every query of every layer gives one."""
    model, variables, batch = models[stage]
    queries = np.stack([batch["length"] - 1, batch["length"] - 2], axis=1).astype(np.int32)
    seen = np.asarray(attention_to_image(model, variables, batch, queries))
    patches = model.config.vision.patches
    assert seen.shape == (4, 2, 2, 2, patches)

    images = pixels(model, batch["image"])
    _, state = model.apply(variables, batch["tokens"], batch["length"], images, queries, mutable=["attention"])
    whole = np.asarray(state["attention"]["llm"]["layers"]["attn"]["weights"][0])  # [L, B, N, S, S]
    for row in range(4):
        place = int(np.argmax(batch["tokens"][row] == IMAGE_ID))
        expected = first_layer(model, variables, batch, row)
        for number, query in enumerate(queries[row]):
            at = query + patches - 1  # these queries come after the image
            # float32 against float64; the shares are about 0.05.
            np.testing.assert_allclose(seen[row, 0, :, number], expected[:, at, place : place + patches], atol=1e-5)
            words = np.delete(whole[:, row, :, at], np.s_[place : place + patches], axis=-1)
            np.testing.assert_allclose(seen[row, :, :, number].sum(-1) + words.sum(-1), 1, atol=1e-5)
            assert (words.sum(-1) > 0).all()


def test_attention_before_the_image_is_not_on_it(models):
    """A causal model's first word cannot see an image that comes after it."""
    model, variables, batch = models["stage3"]
    tokens = batch["tokens"].copy()
    tokens[tokens == IMAGE_ID] = 9
    tokens[:, 3] = IMAGE_ID
    seen = attention_to_image(model, variables, {**batch, "tokens": tokens}, np.full((4, 1), 1, np.int32))
    np.testing.assert_array_equal(seen, 0)
