"""Exports a trained model to PyTorch: a folder that transformers loads as LlavaForConditionalGeneration, with no code of ours.

    python -m launch.export --checkpoint=RUN_OF_STAGE_3 --data=CORPUS --out=BUNDLE

Adapters are merged. Then the folder is loaded in PyTorch, and token ids, pixels, image features, logits and greedy texts of held-out
studies are compared with JAX; on any difference over its tolerance nothing is written. What was compared stands in BUNDLE/rad_jax.json.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags

from rad_jax import errors
from rad_jax.errors import UserError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run of launch.train to export (stage 2 or 3).", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an older --out once the new one is verified.")
_DATA = flags.DEFINE_string("data", None, "Packed corpus whose held-out studies are compared.", required=True)
_SPLIT = flags.DEFINE_string("split", "test", "Split of the corpus that they come from.")
_FORMAT = flags.DEFINE_enum("format", "hf", ["hf"], "hf: transformers' LlavaForConditionalGeneration.")
_DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "Of the exported weights.")
_STUDIES = flags.DEFINE_integer("studies", 4, "How many studies are compared.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Length of the compared texts.", lower_bound=1)


def main(_: Sequence[str]) -> None:
    from rad_jax import checkpoint, tasks
    from rad_jax.interop.export import export_bundle
    from rad_jax.models.llava import LlavaConfig

    out = Path(_OUT.value)
    run = checkpoint.load_run(Path(_CHECKPOINT.value))
    config = tasks.model_config(SimpleNamespace(**run.config))
    if not isinstance(config, LlavaConfig) or config.vision is None:
        raise UserError(f"{run.path} is no image-to-text model: export a run of stage 2 or 3.")
    studies = held_out(Path(_DATA.value), _SPLIT.value, config.vision.image_size, _STUDIES.value)
    result = export_bundle(
        run.variables,
        config,
        run.tokenizer_file,
        out,
        _DTYPE.value,
        studies=studies,
        max_new_tokens=_NEW_TOKENS.value,
        provenance={"run": run.path.name, "step": run.step, "sha256": run.sha256},
        overwrite=_OVERWRITE.value,
    )
    print(
        f"{out}: written in {_DTYPE.value}; PyTorch and JAX agree on {result['studies']} studies "
        f"(greatest difference: features {result['max_abs_feature_diff']:.1e}, logits {result['max_abs_logit_diff']:.1e}; "
        "token ids and texts equal)"
    )


def held_out(data: Path, split: str, image_size: int, count: int) -> list[tuple[Any, str | None]]:
    """The first frontal studies of a split: image uint8 [Y, X] as the model sees it, and indication."""
    from rad_jax import images, input_pipeline

    corpus = input_pipeline.Corpus.open(data)
    if corpus.image_size < image_size:
        raise UserError(f"{data} holds images of {corpus.image_size} pixels, the model needs {image_size}.")
    source = corpus.source(split)
    records = [source[int(number)] for number in corpus.numbers(split, frontal_only=True)[:count]]
    return [
        (images.centre_crop(images.decode_png(record["image"]), image_size), record["indication"] or None)
        for record in records
    ]


if __name__ == "__main__":
    errors.run(main)
