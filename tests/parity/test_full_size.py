"""The real widths: the tower of 518 pixels, Llama-7B's layers, and a whole LLaVA of four of them. Each test also runs at a small size.

Weights are drawn by their names, so that a model is made, run and freed before the other one is made.
"""

import csv
import dataclasses
import gc
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import stage3
from rad_jax import images, prompts, tasks
from rad_jax.interop import foreign_configs, hf_dinov2, hf_llama, hf_llava, peft_lora, tables, timm_vit
from rad_jax.models.llama import Llama
from rad_jax.models.llava import Llava, LlavaConfig
from rad_jax.models.vit import Vit

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = tasks.model_config(stage3.get_config("cpu-1"))
assert isinstance(SHAPE, LlavaConfig) and SHAPE.vision is not None and SHAPE.lora is not None
TOWER = dataclasses.replace(SHAPE.vision, dtype="float32")
LLM = dataclasses.replace(SHAPE.llm, dtype="float32")
LORA = dataclasses.replace(SHAPE.lora, dropout=0.0)
TINY_TOWER = dataclasses.replace(TOWER, image_size=28, patch_size=7, width=24, depth=3, heads=4, mlp_dim=96)
TINY_LLM = dataclasses.replace(LLM, width=32, depth=2, heads=4, kv_heads=4, mlp_dim=48)
TINY_LORA = dataclasses.replace(LORA, rank=4, alpha=8.0)
# Of the largest state, which is about 50: float32 rounds by 6e-8 of a number, and two orders of summation end 1e-6 apart after 12 blocks.
STATES = 5e-6
# Logits reach 7. A rotary frequency that is rounded to the next float32 turns a query by 5e-5 at position 1,500, and uneven attention makes
# more of it in a few of 2.8 million logits: measured at an eighth of the width, 7e-6 in the mean and 1e-4 at worst.
LOGITS_MEAN, LOGITS_WORST = 3e-5, 5e-4
TIMM = "vit_base_patch14_dinov2"
# What makes timm's model the tiny tower; the full one has its name.
TINY_TIMM = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 3, "num_heads": 4}


class Drawn(Mapping[str, np.ndarray]):
    """Random tensors, each drawn when it is looked up, and the same every time.

    Matrices have the spread of Llama's own at 4,096 channels, 0.02, and a larger one in a narrower model, so that attention is as
    uneven and states are as large; gains are about one, biases about zero.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], width: int):
        self._shapes = shapes
        self._spread = 0.02 * (4096 / width) ** 0.5

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
        x *= np.float32(self._spread if len(shape) > 1 else 0.2)
        if len(shape) == 1 and not name.endswith("bias"):
            x += 1
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def placed(table: tables.Table, tensors: Mapping[str, np.ndarray], dtype: str = "float32") -> dict[str, Any]:
    """The tree of `tables.load` as arrays of JAX; never are all the foreign tensors there beside it."""
    layers = {path: entry.layers for entry in table.entries for path, _ in entry.leaves}
    stacks: dict[str, np.ndarray] = {}
    leaves = {}
    pieces = tables.pieces(table, dict.fromkeys(table.shapes(), np.dtype(np.float32)))
    for piece, value in zip(pieces, tables.read(table, tensors), strict=True):
        count = layers[piece.path]
        if count is None:
            leaves[piece.path] = jnp.asarray(value, dtype)
            continue
        stacks.setdefault(piece.path, np.empty((count, *piece.shape), np.float32))[piece.layer] = value
        if piece.layer == count - 1:
            leaves[piece.path] = jnp.asarray(stacks.pop(piece.path), dtype)
    return tables.unflatten(leaves)


def theirs(kind: Any, config: Any, tensors: Mapping[str, np.ndarray], dtype: str = "float32") -> Any:
    """A model of transformers that holds these very arrays, if they are of its dtype."""
    transformers.utils.logging.disable_progress_bar()
    found = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    model, info = kind.from_pretrained(
        None, config=config, state_dict=found, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def channels_first(x: np.ndarray) -> Any:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def both(tiny: Any, full: Any) -> Any:
    """A test at a small size, and at the real one among the long tests."""
    return pytest.mark.parametrize(
        "size", [pytest.param(tiny, id="tiny"), pytest.param(full, id="full", marks=pytest.mark.slow)]
    )


@both((TINY_TOWER, TINY_TIMM), (TOWER, {}))
def test_tower(size, parity):
    timm = pytest.importorskip("timm")
    config, timm_shape = size
    whole = dataclasses.replace(config, feature_layer=None)
    table = hf_dinov2.table(whole)
    weights = Drawn(table.shapes(), config.width)
    x = np.random.default_rng(0).normal(size=(1, config.image_size, config.image_size, 3)).astype(np.float32)
    states = {}
    with torch.inference_mode():
        described = transformers.Dinov2Config(**foreign_configs.hf_vision_config(whole))
        model = theirs(transformers.Dinov2Model, described, weights)
        output = model(channels_first(x), output_hidden_states=True)
        states["transformers Dinov2Model"] = {None: output.last_hidden_state, -2: output.hidden_states[-2]}
        model = timm.create_model(TIMM, pretrained=False, num_classes=0, **timm_shape).eval()
        named = tables.store(timm_vit.table(whole), tables.load(table, weights))
        model.load_state_dict({name: torch.from_numpy(tensor.copy()) for name, tensor in named})
        ((patches, token),) = model.forward_intermediates(
            channels_first(x),
            indices=[config.depth - 2],
            intermediates_only=True,
            return_prefix_tokens=True,
            output_fmt="NLC",
        )
        before = torch.cat([token, patches], dim=1)
        states[f"timm {TIMM}"] = {None: model.forward_features(channels_first(x)), -2: before}
    for layer in (None, -2):
        used = dataclasses.replace(config, feature_layer=layer)
        ours = jax.jit(Vit(used).apply)({"params": placed(hf_dinov2.table(used), weights)}, x)
        for against, other in states.items():
            name = f"ViT of {config.image_size} px, {'block -2' if layer else 'whole'}"
            parity.forward(name, against, ours, other[layer], STATES * float(other[layer].abs().max()))


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


def compare_logits(parity: Any, name: str, against: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """The worst of very many, and all of them together, which is the sharper one."""
    parity.forward(f"{name}, logits", against, ours, theirs, LOGITS_WORST)
    parity.forward(f"{name}, logits, root mean square", against, root_mean_square(ours - theirs), 0.0, LOGITS_MEAN)


@both((dataclasses.replace(TINY_LLM, vocab_size=96), 64), (dataclasses.replace(LLM, depth=2), 256))
def test_llama(size, parity):
    config, length = size
    table = hf_llama.table(config)
    drawn = Drawn(table.shapes(), config.width)
    # Values that bfloat16 holds, so that only computing rounds.
    weights = {name: drawn[name].astype(ml_dtypes.bfloat16).astype(np.float32) for name in drawn}
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (1, length)).astype(np.int32)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        described = transformers.LlamaConfig(**foreign_configs.hf_text_config(config))
        model = theirs(transformers.LlamaForCausalLM, described, weights, dtype)
        with torch.inference_mode():
            logits["theirs", dtype] = model(torch.from_numpy(tokens).long()).logits.float().numpy()
        del model
        gc.collect()
        ours = Llama(dataclasses.replace(config, dtype=dtype))
        logits["ours", dtype] = np.asarray(jax.jit(ours.apply)({"params": placed(table, weights, dtype)}, tokens))
    name, against = f"Llama of width {config.width}", "transformers LlamaForCausalLM"
    exact = logits["theirs", "float32"]
    compare_logits(parity, f"{name}, float32", against, logits["ours", "float32"], exact)
    error, own = (root_mean_square(logits[side, "bfloat16"] - exact) for side in ("ours", "theirs"))
    assert own > 1e-3  # it did compute in bfloat16
    parity.forward(f"{name}, error of bfloat16", "1.5 x transformers' own", error, 0.0, 1.5 * own)


def conversation(size: int, real: Any) -> dict[str, np.ndarray]:
    """A batch of one row as in stage 3: a real film and report in the `v1` template, with padding behind it."""
    tokenizer = prompts.load_tokenizer(real / "tokenizer/llama2_tokenizer.model")
    with open(real / "reports.csv", encoding="utf-8") as file:
        report = next(csv.DictReader(file))
    example = prompts.render_v1(tokenizer, prompts.question(report["indication"]), report["findings"])
    labels = np.array(example.labels, np.int32)
    places = np.flatnonzero(labels != prompts.NO_LOSS)
    assert len(places) > 50
    film = images.centre_crop(images.resize_short(images.load_grey(real / report["image"]), size), size)
    row = {
        "image": film,
        "tokens": np.pad(np.array(example.ids, np.int32), (0, 8), constant_values=tokenizer.pad_id),
        "length": np.int32(len(labels)),
        "targets": labels[places],
        "target_positions": (places - 1).astype(np.int32),
        "target_weights": np.ones(len(places), np.float32),
    }
    return {name: np.asarray(value)[None] for name, value in row.items()}


Compared = tuple[np.ndarray, float, dict[str, Any]]  # logits [U, V], mean loss, gradients


def their_llava(config: LlavaConfig, weights: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> Compared:
    import peft

    vision, llm, spec = config.vision, config.llm, config.lora
    assert vision is not None and spec is not None
    image_id = llm.vocab_size - 1  # transformers' placeholder must be a row of the table
    described = transformers.LlavaConfig(
        vision_config=foreign_configs.hf_vision_config(vision),
        text_config=foreign_configs.hf_text_config(llm),
        image_token_index=image_id,
        projector_hidden_act="gelu",
        vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    whole = dataclasses.replace(config, vision=dataclasses.replace(vision, feature_layer=None))
    names = hf_llava.table(whole).shapes()
    base = theirs(transformers.LlavaForConditionalGeneration, described, {name: weights[name] for name in names})
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=spec.rank,
            lora_alpha=int(spec.alpha),
            lora_dropout=spec.dropout,
            target_modules=rf".*language_model.*\.({'|'.join(spec.targets)})_proj",
        ),
    )
    pairs = {peft_lora.plain_name(n): p for n, p in model.named_parameters() if "lora_" in n}
    linear = {n.split("model.")[-1]: p.requires_grad_() for n, p in model.named_parameters() if "projector" in n}
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(torch.from_numpy(weights[name]))
    ids = batch["tokens"][0, : batch["length"][0]].tolist()
    assert image_id not in ids
    place = ids.index(prompts.IMAGE_ID)
    ids[place : place + 1] = [image_id] * vision.patches
    pixels = images.normalise(batch["image"], np, vision.pixel_mean, vision.pixel_std)
    kept = torch.from_numpy(batch["target_positions"][0]).long() + vision.patches - 1
    assert place < batch["target_positions"].min()
    output = model(input_ids=torch.tensor([ids]), pixel_values=channels_first(pixels), logits_to_keep=kept)
    loss = torch.nn.functional.cross_entropy(output.logits[0], torch.from_numpy(batch["targets"][0]).long())
    loss.backward()
    projector = tuple(e for e in hf_llava.table(config).entries if e.name.startswith("multi_modal_projector."))
    grads = {
        "params": tables.load(tables.Table("projector", projector), {n: p.grad.numpy() for n, p in linear.items()}),
        "lora": {"llm": tables.load(peft_lora.table(llm, spec), {n: p.grad.numpy() for n, p in pairs.items()})},
    }
    return output.logits[0].detach().numpy(), loss.item(), grads


def our_llava(config: LlavaConfig, weights: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> Compared:
    """Loss and gradients by the task that stage 3 trains on."""
    vision, model = config.vision, Llava(config)
    assert vision is not None and config.lora is not None
    frozen = placed(hf_llava.table(config), weights)
    lora = {"llm": placed(peft_lora.table(config.llm, config.lora), weights)}
    trainable = {"params": {"projector": frozen.pop("projector")}, "lora": lora}
    # Arguments, not constants of the compiled program.
    step = jax.jit(tasks.Generative(model).value_and_grad, static_argnames="num_micro")
    result = step(trainable, {"params": frozen}, dict(batch), jax.random.key(0), num_micro=1)
    grads = jax.tree.map(lambda g: np.asarray(g / result.weight), result.grads)
    pixels = images.normalise(batch["image"], np, vision.pixel_mean, vision.pixel_std)
    variables = {"params": {**frozen, **trainable["params"]}, "lora": lora}
    logits = jax.jit(model.apply)(variables, batch["tokens"], batch["length"], pixels, batch["target_positions"])
    return np.asarray(logits[0]), float(result.loss_sum / result.weight), grads


@both(
    LlavaConfig(TINY_LLM, TINY_TOWER, TINY_LORA),
    LlavaConfig(dataclasses.replace(LLM, depth=4), TOWER, LORA),
)
def test_llava_with_lora(size, parity, real):
    pytest.importorskip("peft")
    assert size.vision is not None and size.lora is not None
    whole = dataclasses.replace(size, vision=dataclasses.replace(size.vision, feature_layer=None))
    shapes = hf_llava.table(whole).shapes() | peft_lora.table(size.llm, size.lora).shapes()
    weights, batch = Drawn(shapes, size.llm.width), conversation(size.vision.image_size, real)
    logits, loss, grads = their_llava(size, weights, batch)
    gc.collect()
    our_logits, our_loss, our_grads = our_llava(size, weights, batch)
    name, against = f"LLaVA of width {size.llm.width} with LoRA", "transformers LLaVA + peft"
    compare_logits(parity, name, against, our_logits, logits)
    parity.forward(f"{name}, loss", against, our_loss, loss)
    parity.gradients(f"{name}, gradients", against, our_grads, grads)
