"""Whether other libraries make the same of a format that holds a part: a language model, its adapters, the towers, a projector.

Ids and images are drawn, so nothing is needed but the folder and the model it came from.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rad_jax.errors import UserError
from rad_jax.generate import generate
from rad_jax.interop import foreign_configs, gguf, hf_llama, tables
from rad_jax.interop.exported import Exported
from rad_jax.interop.layouts import TOWER, tower_variables
from rad_jax.interop.verify import as_stored, rounded
from rad_jax.models.clip import Clip
from rad_jax.models.llava import Llava, LlavaConfig
from rad_jax.models.projector import Projector
from rad_jax.serving import reference

ROWS, LENGTH = 2, 24  # rows of drawn ids, and ids in a row
Result = dict[str, Any]


def verify(folder: Path, exported: Exported, format: str, dtype: str, max_new_tokens: int) -> Result:
    """Loads the folder in PyTorch and compares it with JAX, both computing in float32.

    Args:
        folder: what `export` made in one of the formats of `PARTS`.
        exported: what it was made from.
        format, dtype: as they stand in the receipt.
        max_new_tokens: how far the greedy texts go.

    Returns:
        max_abs_logit_diff and text_equal of a language model with its adapters, max_abs_feature_diff of towers (over the unit vectors
        of images and texts) and projector, whichever the format holds; versions of the libraries.

    Raises:
        UserError: the library cannot load it, or lacks or adds weights.
    """
    with jax.default_matmul_precision("highest"):
        return PARTS[format](folder, exported, dtype, max_new_tokens) | {"versions": reference.versions()}


def _language_model(folder: Path, exported: Exported, dtype: str, max_new_tokens: int) -> Result:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    reference.refuse_unfilled(folder, info)
    apart = (folder / "adapter").is_dir()
    if apart:
        model = _adapted(model, folder / "adapter")
    return _words(model, *as_stored(exported, dtype, merged=not apart and dtype != "float32"), max_new_tokens)


def _gguf(folder: Path, exported: Exported, dtype: str, max_new_tokens: int) -> Result:
    """As transformers' own reader of GGUF has it, with our weights rounded or quantised as the file's are."""
    import accelerate  # noqa: F401  transformers reads GGUF with it, and misses it with a ValueError
    import torch
    from transformers import AutoModelForCausalLM

    (file,) = folder.glob("*.gguf")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    reference.refuse_unfilled(folder, info)
    assert exported.config is not None
    config = dataclasses.replace(exported.config, lora=None)
    return _words(model, {"params": {"llm": gguf.held(exported, dtype)}}, config, max_new_tokens)


def _adapter(folder: Path, exported: Exported, dtype: str, max_new_tokens: int) -> Result:
    """The adapter on the language model it was trained on, which the folder does not hold."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert exported.config is not None
    llm, params = exported.config.llm, exported.variables["params"]["llm"]
    model = LlamaForCausalLM(LlamaConfig(**foreign_configs.hf_text_config(llm)))
    named = tables.store(hf_llama.table(llm), params)
    model.load_state_dict({name: torch.from_numpy(np.array(array, np.float32)) for name, array in named})
    variables = dict(exported.variables)
    variables["lora"] = jax.tree.map(lambda x: rounded(x, dtype), variables["lora"])
    return _words(_adapted(model, folder), variables, exported.config, max_new_tokens)


def _adapted(model: Any, folder: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    from rad_jax.interop import peft_lora, sources

    model = PeftModel.from_pretrained(model, folder)
    # peft only warns of names that it does not know, and starts adapters that a file lacks with zeros.
    loaded = set(get_peft_model_state_dict(model))
    stored = set(sources.open_source(next(folder / file for file in peft_lora.FILES if (folder / file).is_file())))
    if loaded != stored:
        raise UserError(
            f"{folder}: peft fills other adapters than are stored: {', '.join(sorted(loaded ^ stored)[:6])}."
        )
    return model


def _words(theirs: Any, variables: Mapping[str, Any], config: LlavaConfig, max_new_tokens: int) -> Result:
    """Logits of drawn ids, and greedy texts after them, of transformers' model and of ours."""
    import torch

    config = LlavaConfig(
        dataclasses.replace(config.llm, dtype="float32", remat="none", attention="xla"), None, config.lora
    )
    weights = {"params": {"llm": variables["params"]["llm"]}}
    if config.lora is not None:
        weights["lora"] = {"llm": variables["lora"]["llm"]}
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)
    vocab, model = config.llm.vocab_size, Llava(config)
    ids = np.random.default_rng(0).integers(3, vocab, (ROWS, LENGTH), dtype=np.int32)
    lengths, everywhere = np.full(ROWS, LENGTH, np.int32), np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    logits = jax.jit(model.apply)(weights, ids, lengths, None, everywhere)
    batch, never = {"tokens": ids, "length": lengths}, vocab  # no id ends these texts
    new = generate(model, weights, batch, jax.random.key(0), max_new_tokens=max_new_tokens, eos_id=never)
    tokens = torch.from_numpy(ids).long()
    with torch.inference_mode():
        other = theirs.eval()(input_ids=tokens).logits.float().numpy()
        # The model's own settings for writing may forbid ids; here any may come.
        plain = {"do_sample": False, "suppress_tokens": None, "eos_token_id": None, "max_new_tokens": max_new_tokens}
        written = theirs.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **plain)
    return {
        "max_abs_logit_diff": float(np.abs(np.asarray(logits) - other[..., :vocab]).max()),
        "text_equal": bool(np.array_equal(np.asarray(new), written[:, LENGTH:].numpy())),
        "rows": ROWS,
    }


def _towers(folder: Path, exported: Exported, dtype: str, _: int) -> Result:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}", precision="fp32")
    return _embeddings(model, exported, dtype)


def _llava_rad(folder: Path, exported: Exported, dtype: str, max_new_tokens: int) -> Result:
    """The pieces that LLaVA-Rad's code puts together: projector, and of a whole folder adapter and towers."""
    import torch

    assert exported.config is not None
    whole = exported.config.lora is not None
    state = torch.load(folder / ("non_lora_trainables.bin" if whole else "mm_projector.bin"), weights_only=True)
    state = {name.split("mm_projector.")[1]: tensor.float() for name, tensor in state.items()}
    wide, narrow = state["0.weight"].shape
    theirs = torch.nn.Sequential(torch.nn.Linear(narrow, wide), torch.nn.GELU(), torch.nn.Linear(wide, wide))
    theirs.load_state_dict(state)
    features = np.random.default_rng(0).normal(size=(LENGTH, narrow)).astype(np.float32)
    params = jax.tree.map(lambda x: rounded(x, dtype), exported.variables["params"]["projector"])
    ours = Projector(wide, jnp.dtype("float32")).apply({"params": params}, features)
    with torch.inference_mode():
        result: Result = {"max_abs_feature_diff": _distance(ours, theirs(torch.from_numpy(features)).numpy())}
    if not whole:
        return result
    import open_clip

    config = json.loads((folder / f"{TOWER}.json").read_text(encoding="utf-8"))
    model = open_clip.model.CustomTextCLIP(**config.get("model_cfg", config))
    checkpoint = torch.load(folder / f"{TOWER}_checkpoint.pt", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in checkpoint.items()})
    towers = _embeddings(model.float(), exported, dtype)
    result["max_abs_feature_diff"] = float(np.maximum(result["max_abs_feature_diff"], towers["max_abs_feature_diff"]))
    return result | _adapter(folder, exported, dtype, max_new_tokens)


def _embeddings(theirs: Any, exported: Exported, dtype: str) -> Result:
    """Unit vectors of drawn images and texts, of open_clip's model and of ours."""
    import torch

    clip = exported.clip
    assert clip is not None
    exact: dict[str, Any] = {"dtype": "float32", "remat": "none", "attention": "xla"}
    vision, text = dataclasses.replace(clip.vision, **exact), dataclasses.replace(clip.text, **exact)
    tree = jax.tree.map(lambda x: rounded(x, dtype), tower_variables(exported))
    rng, size = np.random.default_rng(0), vision.image_size
    images = rng.normal(size=(ROWS, size, size, 3)).astype(np.float32)
    ids = rng.integers(5, text.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    lengths = np.array([LENGTH, LENGTH // 2], np.int32)
    ids[1, LENGTH // 2 :] = 0  # BERT's padding, which open_clip masks
    ours = jax.jit(Clip(dataclasses.replace(clip, vision=vision, text=text)).apply)(
        {"params": tree}, images, ids, lengths
    )
    with torch.inference_mode():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        others = theirs.eval()(pixels, torch.from_numpy(ids).long())
        others = others if isinstance(others, tuple) else tuple(others.values())
    differences = [_distance(a, b.numpy()) for a, b in zip(ours[:2], others[:2], strict=True)]
    return {"max_abs_feature_diff": float(np.max(differences))}


def _distance(a: Any, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - b).max())


PARTS: dict[str, Callable[[Path, Exported, str, int], Result]] = {
    "hf": _language_model,
    "hf_adapter": _language_model,
    "peft": _adapter,
    "llava": _llava_rad,
    "open_clip": _towers,
    "gguf": _gguf,
}
