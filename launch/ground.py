"""Where the model looked while it wrote a word: attention maps of generated texts, scored by the pointing game where boxes are known.

    python -m launch.ground --checkpoint=out/demo/stage3 --data=out/demo/data --predictions=out/demo/predictions.jsonl --out=out/demo/grounding

Writes OUT/grounding.json and OUT/maps.npz (study id -> map). Layer and head are chosen on the validation split with the reference texts
and then used unchanged. In a corpus without boxes the maps are of the longest word, averaged over heads of the last half of the layers.

On several machines every process gets the same command, with --multihost as in launch.train; process 0 writes the files.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from absl import flags

from rad_jax import distributed, errors
from rad_jax.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Run of launch.train, stage 2 or 3.", required=True)
    flags.DEFINE_string("data", None, "Packed corpus.", required=True)
    flags.DEFINE_string("predictions", None, "What launch.generate wrote for a split of this corpus.", required=True)
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_integer("batch_size", 32, "Texts at once.", lower_bound=1)
    distributed.define_flags()


@dataclass(frozen=True)
class Target:
    """A word of a text, and the boxes it should point at (empty when nobody knows)."""

    record: dict[str, Any]
    text: str
    span: tuple[int, int]
    name: str
    boxes: list[list[float]]


def main(_: Sequence[str]) -> None:
    import numpy as np

    from evaluation.corpus import ANNOTATED, records_of
    from evaluation.pointing import pointing_game
    from evaluation.predictions import read_predictions
    from rad_jax.input_pipeline import Corpus

    options = flags.FLAGS
    distributed.join()
    corpus = Corpus.open(options.data)
    looker = Looker(Path(options.checkpoint), options.batch_size)
    rows = read_predictions(Path(options.predictions)).rows
    records = records_of(corpus, {row.id for row in rows})
    pairs = [(records[row.id], row.prediction) for row in rows if row.id in records]
    result: dict[str, Any] = {}
    size = (looker.image_size, looker.image_size)
    if corpus.meta["dataset"] in ANNOTATED:
        source = corpus.source("validation")
        validation = (source[number] for number in range(len(source)))
        known = [t for record in validation for t in finding_targets(record, record["findings"])]
        maps = looker.maps(known)
        scores = np.array(
            [
                [pointing_game(head, [t.boxes for t in known], [size] * len(known)).accuracy for head in layer]
                for layer in np.moveaxis(maps, 0, 2)
            ]
        )
        layer, head = np.unravel_index(scores.argmax(), scores.shape)
        targets = [t for record, text in pairs for t in finding_targets(record, text)]
        chosen = looker.maps(targets)[:, layer, head] if targets else []
        pointing = pointing_game(chosen, [t.boxes for t in targets], [size] * len(targets))
        result = {
            "layer": int(layer),
            "head": int(head),
            "validation_accuracy": float(scores.max()),
            **asdict(pointing),
        }
        if targets:
            result |= beyond_pointing(targets, chosen, size)
    else:
        targets = [t for record, text in pairs if (t := longest_word(record, text))]
        maps = looker.maps(targets)
        chosen = maps[:, maps.shape[1] // 2 :].mean((1, 2))
    if not distributed.first():
        return
    if "accuracy" in result:
        tell(result)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    first: dict[str, tuple[Target, Any]] = {}
    for target, map_ in zip(targets, chosen, strict=True):
        first.setdefault(target.record["id"], (target, map_))
    result["words"] = {
        name: {"word": target.text[slice(*target.span)], "finding": target.name, "boxes": target.boxes}
        for name, (target, _) in first.items()
    }
    (out / "grounding.json").write_text(json.dumps(result, indent=1) + "\n")
    np.savez_compressed(out / "maps.npz", **{name: map_ for name, (_, map_) in first.items()})


def tell(result: dict[str, Any]) -> None:
    """The pointing game in a line or two."""
    if not result["n"]:
        print("pointing game: no text names a finding that its film has.")
        return
    print(f"pointing game: {result['accuracy']:.2f} of {result['n']} findings (chance {result['chance']:.2f})")
    control = result["shuffled"]
    if control["n"]:
        accuracy = f"{control['shuffled_accuracy']:.2f} (p {control['p']:.4f})"
        print(f"maps of other patients with the same finding: {accuracy}")


def beyond_pointing(targets: Sequence[Target], maps: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Mass, contrast and overlap, means over the targets of their maps scaled to [0, 1], and the control with other patients' maps."""
    import numpy as np

    from evaluation import pointing

    masks = [pointing.box_mask(target.boxes, *size) for target in targets]
    spans = [max(float(np.ptp(map_)), 1e-12) for map_ in maps]
    scores = [
        pointing.map_score((map_ - map_.min()) / span, mask)
        for map_, span, mask in zip(maps, spans, masks, strict=True)
        if not mask.all()
    ]
    contrasts = [score.contrast for score in scores if np.isfinite(score.contrast)]
    patients = [target.record["patient"] or target.record["id"] for target in targets]
    control = pointing.against_shuffled(maps, masks, [target.name for target in targets], patients)
    return {
        "mass": float(np.mean([score.mass for score in scores])) if scores else None,
        "contrast": float(np.mean(contrasts)) if contrasts else None,
        "mean_iou": float(np.mean([score.mean_iou for score in scores])) if scores else None,
        "shuffled": asdict(control),
    }


def finding_targets(record: dict[str, Any], text: str) -> Iterator[Target]:
    """The findings that a text names and the film has."""
    from data.phantom.parser import locate

    annotations = json.loads(record["annotations"])
    for name in dict.fromkeys(a["finding"] for a in annotations):
        span = locate(text, name)
        if span is not None:
            yield Target(record, text, span, name, [a["box"] for a in annotations if a["finding"] == name])


def longest_word(record: dict[str, Any], text: str) -> Target | None:
    """The longest word of a text; None for an empty one."""
    import re

    words = sorted(re.finditer(r"\w+", text), key=lambda match: -len(match.group()))
    return Target(record, text, words[0].span(), "", []) if words else None


class Looker:
    """A checkpoint ready to say where it looks."""

    def __init__(self, checkpoint: Path, batch_size: int):
        import jax

        from rad_jax import prompts, sharding, tasks
        from rad_jax.checkpoint import load_run

        run = load_run(checkpoint)
        self._mesh = sharding.make_mesh(jax.device_count(), 1, 1)
        task, self._variables = tasks.restore(run, self._mesh)
        self._model, self._batch_size = task.model, -(-batch_size // self._mesh.size) * self._mesh.size
        if run.config["task"] != "generative" or self._model.config.vision is None:
            raise UserError(f"{checkpoint} does not look at images while it writes: give a run of stage 2 or 3.")
        self.image_size = self._model.config.vision.image_size
        self._tokenizer = prompts.load_tokenizer(run.tokenizer_file)

    def maps(self, targets: Sequence[Target]) -> Any:
        """float32 [n, L, N, h, w]: attention to the image when the word was about to be written, averaged over the word's tokens."""
        import numpy as np
        from tqdm import tqdm

        rows = [self._row(target) for target in targets]
        length = max(len(row["ids"]) for row in rows)
        queries = max(len(row["queries"]) for row in rows)
        maps = []
        quiet = None if distributed.first() else True
        for start in tqdm(range(0, len(rows), self._batch_size), desc="attention", unit="batch", disable=quiet):
            chosen = rows[start : start + self._batch_size]
            padded = chosen + chosen[:1] * (self._batch_size - len(chosen))
            seen = self._look(padded, length, queries)
            maps += [m[:, :, : len(row["queries"])].mean(2) for m, row in zip(seen, chosen, strict=False)]
        side = round(maps[0].shape[-1] ** 0.5)
        return np.stack(maps).reshape(len(maps), *maps[0].shape[:2], side, side)

    def _look(self, rows: Sequence[dict[str, Any]], length: int, queries: int) -> Any:
        import jax
        import numpy as np

        from rad_jax import sharding
        from rad_jax.grounding import attention_to_image

        def stacked(name: str, size: int) -> Any:
            return np.stack([np.pad(row[name], (0, size - len(row[name])), mode="edge") for row in rows]).astype(
                np.int32
            )

        batch = {
            "image": np.stack([row["image"] for row in rows]),
            "tokens": stacked("ids", length),
            "length": np.array([len(row["ids"]) for row in rows], np.int32),
            "queries": stacked("queries", queries),
        }
        with jax.set_mesh(self._mesh):
            placed = sharding.place_whole(batch, self._mesh)
            at = placed.pop("queries")
            return sharding.gather(attention_to_image(self._model, self._variables, placed, at))

    def _row(self, target: Target) -> dict[str, Any]:
        from rad_jax import images, prompts

        record, tokenizer = target.record, self._tokenizer
        prompt = prompts.render_v1(tokenizer, record["question"], None).ids
        words = tokenizer.encode(target.text)
        ends = [len(tokenizer.decode(words[: k + 1])) for k in range(len(words))]
        start, stop = target.span
        inside = [k for k, end in enumerate(ends) if end > start and (ends[k - 1] if k else 0) < stop]
        return {
            "ids": prompt + words,
            "queries": [len(prompt) + k - 1 for k in inside],
            "image": images.centre_crop(images.decode_png(record["image"]), self.image_size),
        }


if __name__ == "__main__":
    define_flags()
    errors.run(main)
