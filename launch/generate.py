"""Writes findings: for the studies of a packed corpus, or for one image file.

    python -m launch.generate --checkpoint=out/demo/stage3 --data=out/demo/data --split=test --out=out/demo/predictions.jsonl
    python -m launch.generate --checkpoint=RUN --image=film.dcm --indication="Shortness of breath."
    python -m launch.generate --checkpoint=RUN --data=CORPUS --split=train --out=labels.jsonl --batch_size=256 --tensor=4 --dtype=bfloat16

Rows of the file are id, query, reference, prediction, in the corpus's order. Greedy unless --temperature is given. --pixels=noise,
--pixels=blank and --pixels=shuffled show the model noise, an even grey or the next study's image instead: how much of a score comes from
looking (launch.blind does it in one).

Studies are worked on by the length of their prompts, --batch_size at once over all devices. What is written stays in OUT.partial until all
is done: the same command after a kill goes on from there. --tensor devices share a copy of the weights, its heads and its cache, and
--fsdp devices share out the weights of the copies; a row's text does not depend on where it is written, but for rounding.

On several machines every process gets the same command, with --multihost as in launch.train; process 0 writes the file.
"""

import functools
import sys
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rad_jax import distributed, errors, images
from rad_jax.errors import UserError

BLANK = 128  # the grey of --pixels=blank


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
    flags.DEFINE_enum("pixels", "real", ["real", "noise", "blank", "shuffled"], "What the model is shown.")
    flags.DEFINE_string("image", None, "One PNG, JPEG or DICOM file instead of a corpus.")
    flags.DEFINE_string("indication", "", "Reason for the exam, with --image.")
    flags.DEFINE_enum(
        "dicom",
        "window",
        images.DICOM_STYLES,
        "Grey values of a DICOM file of --image: as the file says, or as MIMIC-CXR-JPG was made. As the corpus of the training.",
    )
    flags.DEFINE_integer("batch_size", 64, "Studies at once, over all devices.", lower_bound=1)
    flags.DEFINE_integer("fsdp", 1, "Devices that share out the weights, each with studies of its own.", lower_bound=1)
    flags.DEFINE_integer("tensor", 1, "Devices that work on the same studies, each with some heads.", lower_bound=1)
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
    flags.DEFINE_enum(
        "attention",
        "xla",
        ["xla", "splash", "cudnn"],
        "How it is computed: splash is for TPUs, cudnn for NVIDIA GPUs in 16 bits, xla for any machine.",
    )
    distributed.define_flags()


def main(_: Sequence[str]) -> None:
    options = flags.FLAGS
    if bool(options.image) == bool(options.data):
        raise UserError("give either --data (and --out) or --image.")
    if options.data and not options.out:
        raise UserError("--out is missing: the JSONL file to write.")
    distributed.join()
    writer = Writer(options)
    if options.image:
        text = writer.one(Path(options.image), options.indication)
        if distributed.first():
            print(text)
        return
    write(writer, options)


def write(writer: "Writer", options: Any) -> None:
    """The findings of a corpus, in --out."""
    from rad_jax.corpus import Corpus
    from rad_jax.writing import Unfinished

    corpus = Corpus.open(options.data)
    total = min(options.limit or sys.maxsize, len(corpus.source(options.split, options.selection)))
    unfinished = Unfinished(Path(options.out), writer.settings(corpus), corpus.access)
    distributed.agree(f"{len(unfinished.rows)} studies written beside {options.out}")
    if unfinished.rows and distributed.first():
        print(f"{len(unfinished.rows)} studies are written already: going on after them.")
    for rows in writer.corpus(corpus, total, done=frozenset(unfinished.rows)):
        if distributed.first():  # the others only work along
            unfinished.add(rows)
    if distributed.first():
        unfinished.finish(total)


class Writer:
    """A checkpoint ready to write findings, on a mesh over all devices."""

    def __init__(self, options: Any):
        import jax

        from rad_jax import prompts, sharding, tasks
        from rad_jax.checkpoint import load_run

        self._options, self._run = options, load_run(Path(options.checkpoint))
        copies, rest = divmod(jax.device_count(), options.fsdp * options.tensor)
        if rest:
            raise UserError(
                f"--fsdp={options.fsdp} x --tensor={options.tensor} does not divide the {jax.device_count()} devices here."
            )
        self._mesh, self._shares = sharding.make_mesh(copies, options.fsdp, options.tensor), copies * options.fsdp
        task, self._variables = tasks.restore(self._run, self._mesh, options.dtype, options.attention)
        vision = task.model.config.vision
        if not isinstance(task, tasks.Generative) or vision is None:
            raise UserError(f"{options.checkpoint} cannot write findings of an image: give a run of stage 2 or 3.")
        heads = task.model.config.llm.kv_heads
        if heads % options.tensor:
            raise UserError(f"--tensor={options.tensor} does not divide the model's {heads} heads of keys and values.")
        self._model, self._image_size = task.model, vision.image_size
        self._tokenizer = prompts.load_tokenizer(self._run.tokenizer_file)

    def settings(self, corpus: Any) -> dict[str, Any]:
        """What texts depend on."""
        names = ("split", "selection", "pixels", "max_new_tokens", "temperature", "top_p", "seed", "dtype", "attention")
        chosen = {name: getattr(self._options, name) for name in names}
        data = corpus.identity(self._options.split, self._options.selection)
        return {"checkpoint": self._run.sha256, "corpus": data["fingerprint"], **chosen}

    def one(self, image: Path, indication: str) -> str:
        """The findings of one file."""
        import numpy as np

        from rad_jax import prompts

        size = self._image_size
        pixels = images.centre_crop(images.load_short(image, size, self._options.dicom)[0], size)
        ids = prompts.render_v1(self._tokenizer, prompts.question(indication or None), None).ids
        batch = {
            "image": np.stack([pixels] * self._shares),
            "tokens": np.stack([np.asarray(ids, np.int32)] * self._shares),
            "length": np.full(self._shares, len(ids), np.int32),
            "index": -np.arange(self._shares, dtype=np.int32),  # below zero: nothing is written for the copies
        }
        return self._write(batch)[0]

    def corpus(self, corpus: Any, total: int, done: Container[int]) -> Iterator[dict[int, dict[str, str]]]:
        """Rows by the number of their study, a batch at a time: of the first `total` studies those that are not `done`."""
        import numpy as np
        from tqdm import tqdm

        from rad_jax import input_pipeline, writing

        split, selection = self._options.split, self._options.selection
        source, todo = corpus.source(split, selection), np.array([n for n in range(total) if n not in done], int)
        batch_size = -(-min(self._options.batch_size, max(len(todo), 1)) // self._shares) * self._shares
        lengths, unusable = input_pipeline.prompt_lengths(corpus, split, selection, todo), 0
        quiet = None if distributed.first() else True
        with tqdm(total=total, initial=total - len(todo), desc="generate", unit="study", disable=quiet) as bar:
            for text_length, places in writing.by_length(lengths, batch_size):
                for batch in self._batches(corpus, todo[places], total, batch_size, text_length):
                    rows = {}
                    texts = self._write(batch)
                    for text, number, usable in zip(texts, batch["index"].tolist(), batch["weight"] > 0, strict=True):
                        if number < 0:
                            continue
                        record = source[number]
                        unusable += not usable
                        rows[number] = {
                            "id": record["id"],
                            "query": record["question"],
                            "reference": record["findings"],
                            "prediction": text if usable else "",
                            "access": corpus.access,
                        }
                    yield rows
                    bar.update(len(rows))
        if unusable and distributed.first():
            print(f"{unusable} studies have no prediction: their image could not be read.")

    def _batches(
        self, corpus: Any, numbers: Any, total: int, batch_size: int, text_length: int
    ) -> Iterator[dict[str, Any]]:
        """Prompts of these studies with what the model is shown: their images, noise, grey, or each the image of the study after it."""
        import numpy as np

        from rad_jax.input_pipeline import eval_batches

        read = functools.partial(
            eval_batches,
            corpus,
            self._options.split,
            template="prompt",
            batch_size=batch_size,
            text_length=text_length,
            target_length=0,
            image_size=self._image_size,
            selection=self._options.selection,
        )
        if self._options.pixels == "shuffled":
            for batch, after in zip(read(order=numbers), read(order=(numbers + 1) % total), strict=True):
                yield {**batch, "image": after["image"]}
            return
        for batch in read(order=numbers):
            if self._options.pixels == "noise":
                rngs = [np.random.default_rng([self._options.seed, max(number, 0)]) for number in batch["index"]]
                shape = batch["image"].shape[1:]
                batch = {**batch, "image": np.stack([rng.integers(0, 256, shape, np.uint8) for rng in rngs])}
            if self._options.pixels == "blank":
                batch = {**batch, "image": np.full_like(batch["image"], BLANK)}
            yield batch

    def _write(self, batch: dict[str, Any]) -> list[str]:
        import flax.linen as nn
        import jax

        from rad_jax import generate, sharding

        inputs = {name: batch[name] for name in ("image", "tokens", "length", "index")}
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(sharding.RULES):
            ids = generate.generate(
                self._model,
                self._variables,
                sharding.place_whole(inputs, self._mesh),
                jax.random.key(self._options.seed),
                max_new_tokens=self._options.max_new_tokens,
                eos_id=self._tokenizer.eos_id,
                temperature=self._options.temperature,
                top_p=self._options.top_p,
            )
        rows = sharding.gather(ids).tolist()
        return [self._tokenizer.decode(until(row, self._tokenizer.eos_id)).strip() for row in rows]


def until(ids: list[int], end: int) -> list[int]:
    """The ids before the first `end`."""
    return ids[: ids.index(end)] if end in ids else ids


if __name__ == "__main__":
    define_flags()
    errors.run(main)
