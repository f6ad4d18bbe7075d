"""Exports a model to other programs: PyTorch, peft, LLaVA-Rad's own code, open_clip, llama.cpp.

    python -m launch.export --checkpoint=RUN_OF_STAGE_3 --data=CORPUS --out=BUNDLE
    python -m launch.export --checkpoint=bases/llava-rad --format=llava --out=llava-rad-lora
    python -m launch.export --verify=BUNDLE --checkpoint=RUN_OF_STAGE_3 --data=CORPUS

formats
  hf         LlavaForConditionalGeneration for transformers 4.57 and 5, adapters merged, with no code of ours; of a language model without
             an image tower, a LlamaForCausalLM
  hf_adapter the same with the adapters apart, in BUNDLE/adapter for peft
  peft       the LoRA adapter for the language model alone
  llava      the files of microsoft/llava-rad: adapter, projector, tower; name --out llava-rad... so that its code takes them for that
  open_clip  both towers of stage 1
  gguf       the language model for llama.cpp, adapters merged, its tokenizer inside, with --dtype=q8_0 in half the bytes. No mmproj: llama.cpp
             computes this family's image towers wrongly, so that the file writes and continues text but sees no films

Weights are written one at a time. With --data (formats hf, hf_adapter of an image-to-text model) the folder is then loaded in PyTorch,
and token ids, pixels, image features, logits and greedy texts of held-out studies are compared with JAX in float32, which takes memory
for both; on any difference over its tolerance nothing is left.

--verify with --checkpoint compares later, or elsewhere, and every format: peft, open_clip and transformers load the folder, and logits
and greedy texts of drawn ids, embeddings of drawn images and texts, or the projector's outputs are compared; hf_adapter and peft take
peft, llava and open_clip take open_clip, gguf takes accelerate, which are in .venv-dev. Without --checkpoint, or without PyTorch, it compares the hashes of the
files with the receipt and repeats what was found then. Everything stands in receipt.json.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rad_jax import errors
from rad_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run of launch.train, or base of launch.convert, to export.")
_OUT = flags.DEFINE_string("out", None, "Folder to write.")
_VERIFY = flags.DEFINE_string("verify", None, "Exported folder to check instead of writing one.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an older --out once the new one is verified.")
_DATA = flags.DEFINE_string("data", None, "Packed corpus whose held-out studies are compared.")
_SPLIT = flags.DEFINE_string("split", "test", "Split of the corpus that they come from.")
_FORMAT = flags.DEFINE_enum(
    "format", "hf", ["hf", "hf_adapter", "peft", "llava", "open_clip", "gguf"], "What to write; see above."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float16", "float32", "keep", "q8_0"],
    "Of the weights; without it float16 for hf, hf_adapter and gguf, and as they are for the others. q8_0 is for gguf alone.",
)
_STUDIES = flags.DEFINE_integer("studies", 4, "How many studies are compared.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Length of the compared texts.", lower_bound=1)


def main(_: Sequence[str]) -> None:
    from rad_jax import checkpoint
    from rad_jax.interop import exported

    if (_OUT.value is None) == (_VERIFY.value is None):
        raise UserError("give either --out, to export, or --verify, to check what was exported (see --help).")
    model = None
    if _CHECKPOINT.value:
        model = exported.from_run(checkpoint.load_run(Path(_CHECKPOINT.value)))
    if _VERIFY.value:
        check(Path(_VERIFY.value), model)
    elif model is None:
        raise UserError("--checkpoint is missing: give the run or base to export (see --help).")
    else:
        write(Path(_OUT.value or ""), model)


def write(out: Path, model: Any) -> None:
    """Exports, and says what came of it."""
    from rad_jax.interop.export import export
    from rad_jax.interop.gguf import VISION
    from rad_jax.interop.verify import FORMATS

    studies = []
    if _DATA.value:
        if _FORMAT.value not in FORMATS:
            raise UserError(
                f"--data compares bundles of --format=hf and hf_adapter; --format={_FORMAT.value} is written without it."
            )
        studies = held_out(model)
    if _FORMAT.value in FORMATS and model.tokenizer is None:
        print("warning: the checkpoint has no tokenizer: weights and configuration only (convert with --tokenizer).")
    if _DTYPE.value == "q8_0" and _FORMAT.value != "gguf":
        raise UserError(f"--dtype=q8_0 is GGUF's own: --format={_FORMAT.value} is written without it.")
    dtype = _DTYPE.value or ("float16" if _FORMAT.value in (*FORMATS, "gguf") else "keep")
    result = export(
        model, _FORMAT.value, out, dtype, studies=studies, max_new_tokens=_NEW_TOKENS.value, overwrite=_OVERWRITE.value
    )
    print(
        f"{out}: {result['bytes'] / 1e9:.2f} GB as {_FORMAT.value} ({dtype}) in {result['seconds']:.0f} s ({result['mb_per_s']:.0f} MB/s)."
    )
    if _FORMAT.value == "gguf":
        print(f"warning: {VISION}.")
    if "differences" in result:
        report(result["differences"])
    elif _FORMAT.value in FORMATS:
        print(f"Not compared with PyTorch: give --data, or run launch.export --verify={out} later.")


def check(folder: Path, model: Any) -> None:
    """Compares an exported folder with its model; without PyTorch, or the model, with its receipt."""
    from importlib.util import find_spec

    from rad_jax.interop import receipt, verify, verify_parts
    from rad_jax.serving import bundle

    found = bundle.check_files(folder)
    print(f"{folder}: {len(found['files'])} files, all with the hashes of the receipt.")
    whole = found["format"] in verify.FORMATS and "vocab_size" in found  # of an image-to-text model
    if model is not None and find_spec("torch") and (_DATA.value or not whole):
        if whole:
            result = verify.verify(folder, model, held_out(model), _NEW_TOKENS.value)
        else:
            result = verify_parts.verify(folder, model, found["format"], found["dtype"], _NEW_TOKENS.value)
        verify.check(result, folder)
        receipt.add(folder, differences=result)
        report(result)
    elif "differences" in found:
        print("Not compared again (that takes PyTorch, --checkpoint and for image-to-text models --data). When it was:")
        report(found["differences"])
    else:
        raise UserError(
            f"{folder} was never compared with its model: give --checkpoint, for an image-to-text model --data too, with PyTorch "
            "installed."
        )


def report(result: dict[str, Any]) -> None:
    """One line on a comparison."""
    found = [
        f"{name} {result[f'max_abs_{key}_diff']:.1e}"
        for name, key in (("pixels", "pixel"), ("features", "feature"), ("logits", "logit"))
        if f"max_abs_{key}_diff" in result
    ]
    line = f"PyTorch and JAX agree on {result['studies']} studies" if "studies" in result else "PyTorch and JAX agree"
    line += f" (greatest difference: {', '.join(found)}"
    line += "; greedy texts equal" if "text_equal" in result else ""
    if "max_abs_activation" in result:
        line += f"; greatest activation {max(result['max_abs_activation'].values()):.0f} of float16's 65504"
    print(line + ")")


def held_out(model: Any) -> list[tuple[Any, str | None]]:
    """The first frontal studies of a split: image uint8 [Y, X] as the model sees it, and indication."""
    from rad_jax import images
    from rad_jax.corpus import Corpus

    if model.config is None or model.config.vision is None:
        raise UserError("--data is for image-to-text models: this checkpoint is none.")
    data, split, size = Path(_DATA.value or ""), _SPLIT.value, model.config.vision.image_size
    corpus = Corpus.open(data)
    if corpus.image_size < size:
        raise UserError(f"{data} holds images of {corpus.image_size} pixels, the model needs {size}.")
    source = corpus.source(split, "frontal")
    records = [source[number] for number in range(len(source))[: _STUDIES.value]]
    return [
        (images.centre_crop(images.decode_png(record["image"]), size), record["indication"] or None)
        for record in records
    ]


if __name__ == "__main__":
    errors.run(main)
