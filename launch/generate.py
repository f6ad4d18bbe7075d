"""Writes findings: for the studies of a packed corpus, or for one image file.

    python -m launch.generate --checkpoint=out/demo/stage3 --data=out/demo/data --split=test --out=out/demo/predictions.jsonl
    python -m launch.generate --checkpoint=RUN --image=film.dcm --indication="Shortness of breath."

Rows of the file are id, query, reference, prediction. Greedy unless --temperature is given. --pixels=noise and --pixels=shuffled show the
model noise or another study's image instead: how much of a score comes from looking.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rad_jax import errors
from rad_jax.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string(
        "checkpoint", None, "Run of launch.train (a stage 2 or 3), or base of launch.convert.", required=True
    )
    flags.DEFINE_string("data", None, "Packed corpus; with --split and --out.")
    flags.DEFINE_string("split", "test", "Which studies of the corpus.")
    flags.DEFINE_string(
        "selection", "all", "Which texts of which films: a selection of the corpus (its corpus.json lists them)."
    )
    flags.DEFINE_string("out", None, "JSONL file to write.")
    flags.DEFINE_integer("limit", None, "Only the first so many studies.", lower_bound=1)
    flags.DEFINE_enum("pixels", "real", ["real", "noise", "shuffled"], "What the model is shown.")
    flags.DEFINE_string("image", None, "One PNG, JPEG or DICOM file instead of a corpus.")
    flags.DEFINE_string("indication", "", "Reason for the exam, with --image.")
    flags.DEFINE_integer("batch_size", 64, "Studies at once.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 256, "Longest text.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
    flags.DEFINE_float(
        "top_p", 1.0, "Sample among the tokens that together have this probability.", lower_bound=0.0, upper_bound=1.0
    )
    flags.DEFINE_integer("seed", 0, "Of the sampling and of the noise.")
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "To compute in; without it as the run was trained, for a converted base float32.",
    )


def main(_: Sequence[str]) -> None:
    options = flags.FLAGS
    if bool(options.image) == bool(options.data):
        raise UserError("give either --data (and --out) or --image.")
    if options.data and not options.out:
        raise UserError("--out is missing: the JSONL file to write.")
    writer = Writer(Path(options.checkpoint), options)
    if options.image:
        print(writer.one(Path(options.image), options.indication))
        return
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with partial.open("w") as file:
        for row in writer.corpus(Path(options.data), options.split, options.selection, options.limit, options.pixels):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(out)


class Writer:
    """A checkpoint ready to write findings."""

    def __init__(self, checkpoint: Path, options: Any):
        import jax

        from rad_jax import prompts, sharding, tasks
        from rad_jax.checkpoint import load_run

        run = load_run(checkpoint)
        self._mesh = sharding.make_mesh(jax.device_count(), 1, 1)
        task, self._variables = tasks.restore(run, self._mesh, options.dtype)
        vision = task.model.config.vision
        if not isinstance(task, tasks.Generative) or vision is None:
            raise UserError(f"{checkpoint} cannot write findings of an image: give a run of stage 2 or 3.")
        self._model, self._image_size = task.model, vision.image_size
        self._tokenizer = prompts.load_tokenizer(run.tokenizer_file)
        self._options = options

    def one(self, image: Path, indication: str) -> str:
        """The findings of one file."""
        import numpy as np

        from rad_jax import images, prompts

        size = self._image_size
        pixels = images.centre_crop(images.resize_short(images.load_grey(image), size), size)
        ids = prompts.render_v1(self._tokenizer, prompts.question(indication or None), None).ids
        batch = {
            "image": np.stack([pixels] * self._mesh.size),
            "tokens": np.stack([np.asarray(ids, np.int32)] * self._mesh.size),
            "length": np.full(self._mesh.size, len(ids), np.int32),
        }
        return self._write(batch)[0]

    def corpus(
        self, data: Path, split: str, selection: str, limit: int | None, pixels: str
    ) -> Iterator[dict[str, str]]:
        """A row per study, in the corpus's order."""
        import numpy as np
        from tqdm import tqdm

        from rad_jax import input_pipeline

        corpus = input_pipeline.Corpus.open(data)
        source = corpus.source(split, selection)
        text_length, _ = input_pipeline.longest(corpus, split, selection, "prompt")
        total = min(limit or len(source), len(source))
        devices = self._mesh.size
        batches = input_pipeline.eval_batches(
            corpus,
            split,
            template="prompt",
            batch_size=-(-min(self._options.batch_size, total) // devices) * devices,
            text_length=text_length,
            target_length=0,
            image_size=self._image_size,
            selection=selection,
            limit=limit,
        )
        rng = np.random.default_rng(self._options.seed)
        unusable = 0
        with tqdm(total=total, desc=f"generate ({pixels})", unit="study", disable=None) as bar:
            for batch in batches:
                batch["image"] = change(batch["image"], batch["index"] >= 0, pixels, rng)
                texts = self._write(batch)
                for text, number, usable in zip(texts, batch["index"], batch["weight"] > 0, strict=True):
                    if number < 0:
                        continue
                    record = source[int(number)]
                    unusable += not usable
                    yield {
                        "id": record["id"],
                        "query": record["question"],
                        "reference": record["findings"],
                        "prediction": text if usable else "",
                    }
                    bar.update()
        if unusable:
            print(f"{unusable} studies have no prediction: their image could not be read or their prompt is too long.")

    def _write(self, batch: dict[str, Any]) -> list[str]:
        import jax

        from rad_jax import generate, sharding

        inputs = {name: batch[name] for name in ("image", "tokens", "length")}
        with jax.set_mesh(self._mesh):
            ids = generate.generate(
                self._model,
                self._variables,
                sharding.place_batch(inputs, self._mesh),
                jax.random.key(self._options.seed),
                max_new_tokens=self._options.max_new_tokens,
                eos_id=self._tokenizer.eos_id,
                temperature=self._options.temperature,
                top_p=self._options.top_p,
            )
        rows = jax.device_get(ids).tolist()
        return [self._tokenizer.decode(until(row, self._tokenizer.eos_id)).strip() for row in rows]


def until(ids: list[int], end: int) -> list[int]:
    """The ids before the first `end`."""
    return ids[: ids.index(end)] if end in ids else ids


def change(images: Any, real: Any, pixels: str, rng: Any) -> Any:
    """The images uint8 [B, Y, X] themselves, noise, or each the next study's; `real` bool [B] marks rows that are studies."""
    import numpy as np

    if pixels == "noise":
        return rng.integers(0, 256, images.shape, dtype=np.uint8)
    if pixels == "shuffled":
        images = images.copy()
        images[real] = np.roll(images[real], 1, axis=0)
    return images


if __name__ == "__main__":
    define_flags()
    errors.run(main)
