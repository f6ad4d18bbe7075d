"""Turns weights made elsewhere into a base that --base and --checkpoint can name, tensor by tensor, without PyTorch.

    python -m launch.convert --format=hf_llama  --source=vicuna-7b-v1.5 --out=bases/vicuna
    python -m launch.convert --format=open_clip --source=biomedclip --image_size=512 --out=bases/biomedclip
    python -m launch.convert --format=llava_rad --source=llava-rad --base=bases/vicuna --out=bases/llava-rad
    python -m launch.generate --checkpoint=bases/llava-rad --image=film.png --indication="Cough."

formats
  hf_llama   Hugging Face folder of a Llama, Vicuna or Mistral (config.json; safetensors or .bin, with or without index)
  hf_llava   Hugging Face LlavaForConditionalGeneration with a DINOv2, CLIP or SigLIP tower, such as launch.export writes
  open_clip  BiomedCLIP and BiomedCLIP-CXR with open_clip's configuration beside them, training checkpoints included; or a bare timm ViT
  clip       OpenAI CLIP's image tower, Hugging Face's or open_clip's
  siglip     Hugging Face SigLIP's image tower
  dinov2     Hugging Face Dinov2Model: DINOv2, RAD-DINO
  llava_rad  microsoft/llava-rad (adapter, projector, tower), a merged LLaVA, or an mm_projector.bin; --base names the converted Vicuna
  peft       a LoRA adapter; --base names the converted language model
  bert       Hugging Face BERT: BiomedBERT
  meta       a llama2.c .bin file

Tensors that our models have no use for are kept and go out again with launch.export. A .bin or .pt file is read by an unpickler that
knows tensors and nothing else: no code in it is run.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from rad_jax import errors

_SOURCE = flags.DEFINE_string("source", None, "File or folder with the foreign weights.", required=True)
_FORMAT = flags.DEFINE_enum(
    "format",
    None,
    ["hf_llama", "hf_llava", "open_clip", "clip", "siglip", "dinov2", "llava_rad", "peft", "bert", "meta"],
    "What they are; see above.",
    required=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "tokenizer.model, tokenizer.json or vocab.txt, or a folder with one; without it, the source's."
)
_BASE = flags.DEFINE_list("base", [], "Converted base (or run) that an adapter or a projector belongs to.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Resample the tower's position table to this many pixels.")


def main(_: Sequence[str]) -> None:
    from rad_jax import checkpoint
    from rad_jax.interop.convert import convert

    source, out = Path(_SOURCE.value), Path(_OUT.value)
    if not source.exists():
        raise errors.UserError(f"{source}: no such file or folder: check --source.")
    bases = [checkpoint.load_run(Path(path)) for path in _BASE.value]
    tokenizer = Path(_TOKENIZER.value) if _TOKENIZER.value else None
    done = convert(source, _FORMAT.value, out, bases=bases, tokenizer=tokenizer, image_size=_IMAGE_SIZE.value)
    record = checkpoint.read_config(out)
    if record["tokenizer"] is None and set(record["config"]["model"]) & {"llm", "text"}:
        print(f"warning: no tokenizer found: {out} exports weights and configuration only (give --tokenizer).")
    memory = (
        ""
        if done["peak_anon_bytes"] is None
        else f"; at most {done['peak_anon_bytes'] / 1e9:.2f} GB of memory of its own"
    )
    print(
        f"{out}: {done['tensors']} arrays, {done['bytes'] / 1e9:.2f} GB in {done['seconds']:.0f} s "
        f"({done['mb_per_s']:.0f} MB/s){memory}. Carried unused: {done['carried']}, dropped: {len(done['dropped'])}."
    )


if __name__ == "__main__":
    errors.run(main)
