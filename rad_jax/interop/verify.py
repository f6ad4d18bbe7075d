"""Whether PyTorch makes the same of an exported bundle as JAX makes of the model it came from."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rad_jax.errors import UserError
from rad_jax.generate import generate
from rad_jax.images import normalise
from rad_jax.interop.exported import Exported
from rad_jax.interop.ranges import LARGEST_FLOAT16, Study
from rad_jax.lazy import first_layers
from rad_jax.models.llava import Llava, LlavaConfig
from rad_jax.models.vit import Vit, VitConfig
from rad_jax.prompts import IMAGE_ID, Tokenizer, load_tokenizer, question, render_v1
from rad_jax.serving import reference

# Differences in float32 of the same mathematics summed in another order; measured 1e-6 to 1e-5 on small models, more at full depth.
PIXELS, FEATURES, LOGITS = 1e-5, 1e-4, 1e-3
FORMATS = ("hf", "hf_adapter")  # bundles that can be compared on studies; the other formats are in verify_parts


def verify(bundle: Path, exported: Exported, studies: Sequence[Study], max_new_tokens: int) -> dict[str, Any]:
    """Compares token ids, pixels, tower features, logits and greedy text on some studies, both sides computing in float32.

    Args:
        bundle: folder that `bundle.write` made, with its receipt.
        exported: what it was made from. A bundle in float16 is compared with weights rounded to float16.
        studies: images of the tower's size, and indications.
        max_new_tokens: how far the greedy texts go.

    Returns:
        max_abs_pixel_diff, max_abs_feature_diff, max_abs_logit_diff (over all words of prompt and text, pieces of the model's own
        vocabulary), token_ids_equal, text_equal, studies; max_abs_activation, the greatest output of each block in PyTorch, which
        float16 must hold; versions of the libraries.

    Raises:
        UserError: the bundle cannot be loaded, or lacks or adds weights.
    """
    torch_side = reference.load(bundle)
    tokenizer_path = exported.tokenizer
    if exported.config is None or exported.config.vision is None or tokenizer_path is None:
        raise UserError(f"{bundle}: only an image-to-text model with its tokenizer can be compared on studies.")
    dtype = json.loads((bundle / "config.json").read_text(encoding="utf-8"))["dtype"]
    apart = (bundle / "adapter").is_dir()
    variables, config = as_stored(exported, dtype, merged=not apart and dtype != "float32")
    tokenizer = load_tokenizer(tokenizer_path)
    with jax.default_matmul_precision("highest"):
        ours = _jax_side(variables, config, tokenizer, studies, max_new_tokens)
    assert config.vision is not None
    image_id = torch_side.model.config.image_token_index
    result: dict[str, Any] = dict.fromkeys(("max_abs_pixel_diff", "max_abs_feature_diff", "max_abs_logit_diff"), 0.0)
    ids_equal = text_equal = True

    def differ(name: str, a: np.ndarray, b: np.ndarray) -> None:
        # A NaN on either side must not pass as small.
        result[name] = float(np.maximum(result[name], np.abs(a - b).max()))

    for (image, indication), (prompt, written, features, logits) in zip(studies, ours, strict=True):
        expanded = _expanded(prompt, image_id, config.vision.patches)
        ids_equal &= torch_side.prompt(image, indication) == expanded
        differ("max_abs_pixel_diff", _normalised(image, config.vision), torch_side.pixels(image))
        differ("max_abs_feature_diff", features, torch_side.features(image))
        theirs = torch_side.logits(expanded + written, image)
        words = np.array([token != image_id for token in expanded + written])
        differ("max_abs_logit_diff", logits, theirs[words][:, : config.llm.vocab_size])
        new = torch_side.greedy(expanded, image, max_new_tokens)
        text_equal &= new == written and torch_side.text(new) == tokenizer.decode(written)
    result |= {"token_ids_equal": ids_equal, "text_equal": text_equal, "studies": len(studies)}
    return result | {"max_abs_activation": torch_side.activations(*studies[0]), "versions": reference.versions()}


def check(result: Mapping[str, Any], bundle: Path) -> None:
    """Refuses a folder that is not the model.

    Raises:
        UserError: a difference is over its tolerance, or ids or texts differ.
    """
    limits = {"max_abs_pixel_diff": PIXELS, "max_abs_feature_diff": FEATURES, "max_abs_logit_diff": LOGITS}
    # Written so that a NaN fails.
    wrong = [
        f"{name} {result[name]:.1e} is over {limit:.0e}"
        for name, limit in limits.items()
        if name in result and not result[name] <= limit
    ]
    wrong += [
        f"the output of {block} reaches {value:.0f}, beyond float16"
        for block, value in result.get("max_abs_activation", {}).items()
        if not value <= LARGEST_FLOAT16
    ]
    wrong += [f"{name} is false" for name in ("token_ids_equal", "text_equal") if not result.get(name, True)]
    if wrong:
        raise UserError(f"{bundle}: PyTorch and JAX do not agree on it: {'; '.join(wrong)}; do not use it.")


def as_stored(exported: Exported, dtype: str, *, merged: bool) -> tuple[dict[str, Any], LlavaConfig]:
    """The model to compare with, to be computed in float32: blocks after the features cut off, and weights rounded as the folder's are.

    Args:
        exported: the model.
        dtype: of the folder's weights.
        merged: fold the adapters in before rounding, as the folder has them. Left apart they are added in the forward pass, so that
            a merge that rounds nothing is compared too.
    """
    variables, config = exported.variables, exported.config
    assert config is not None
    if merged:
        variables, config = {"params": exported.merged()}, dataclasses.replace(config, lora=None)
    params = variables["params"]
    parts = {"llm": params["llm"]}
    exact: dict[str, Any] = {"dtype": "float32", "remat": "none", "attention": "xla"}
    vision = None
    if config.vision is not None:
        tower = {name: node for name, node in params["vision"].items() if name != "norm"}
        used = config.vision.blocks_used
        tower["blocks"] = jax.tree.map(lambda x: first_layers(x, used), tower["blocks"])
        parts |= {"vision": tower, "projector": params["projector"]}
        vision = dataclasses.replace(config.vision, **exact)
    kept: dict[str, Any] = {"params": parts}
    if config.lora is not None:
        kept["lora"] = variables["lora"]
    kept = jax.tree.map(lambda x: rounded(x, dtype), kept)
    return kept, dataclasses.replace(config, llm=dataclasses.replace(config.llm, **exact), vision=vision)


def rounded(x: Any, dtype: str) -> jax.Array:
    """What a folder of this dtype holds of an array, in float32."""
    x = jnp.asarray(x)
    return (x if dtype == "keep" else x.astype(dtype)).astype(jnp.float32)


def _jax_side(
    variables: dict[str, Any], config: LlavaConfig, tokenizer: Tokenizer, studies: Sequence[Study], max_new_tokens: int
) -> list[tuple[list[int], list[int], np.ndarray, np.ndarray]]:
    """For each study the prompt's ids, the greedy ids, features [P, D], and logits [words, V] of both stretches of ids."""
    model = Llava(config)
    prompts = [render_v1(tokenizer, question(indication), None).ids for _, indication in studies]
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    tokens = np.full((len(studies), lengths.max() + max_new_tokens), tokenizer.pad_id, np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    images = np.stack([image for image, _ in studies])
    batch = {"tokens": tokens[:, : lengths.max()], "length": lengths, "image": images}
    new = np.asarray(
        generate(model, variables, batch, jax.random.key(0), max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id)
    )
    written = [_until(row.tolist(), tokenizer.eos_id) for row in new]
    for row, ids, more in zip(tokens, prompts, written, strict=True):
        row[len(ids) : len(ids) + len(more)] = more
    lengths = lengths + np.array([len(more) for more in written], np.int32)
    everywhere = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    assert config.vision is not None
    pixels = _normalised(images, config.vision)
    logits = np.asarray(jax.jit(model.apply)(variables, tokens, lengths, pixels, everywhere))
    states = jax.jit(Vit(config.vision).apply)({"params": variables["params"]["vision"]}, pixels)
    features = np.asarray(states)[:, -config.vision.patches :]
    words = (tokens != IMAGE_ID) & (everywhere < lengths[:, None])
    return [
        (ids, more, states, row[real])
        for ids, more, states, row, real in zip(prompts, written, features, logits, words, strict=True)
    ]


def _normalised(images: np.ndarray, vision: VitConfig) -> np.ndarray:
    """uint8 [..., Y, X] to float32 [..., Y, X, C] with the tower's own statistics."""
    normalised: np.ndarray = normalise(images, np, vision.pixel_mean, vision.pixel_std)
    return normalised


def _until(ids: list[int], eos_id: int) -> list[int]:
    """Ids up to the end of sequence, which stays."""
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


def _expanded(ids: Sequence[int], image_id: int, patches: int) -> list[int]:
    """The placeholder as transformers has it: its own id once per patch."""
    place = list(ids).index(IMAGE_ID)
    return [*ids[:place], *[image_id] * patches, *ids[place + 1 :]]
