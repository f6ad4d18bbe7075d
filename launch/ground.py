"""Where a model looks: attention maps of words and phrases, scored by the pointing game and more where boxes are known.

    python -m launch.ground --checkpoint=out/demo/stage3 --data=out/demo/data --predictions=out/demo/predictions.jsonl --out=out/demo/grounding
    python -m launch.ground --checkpoint=STAGE3 --boxes=grounding_boxes.csv --patients=reports.csv --out=OUT
    python -m launch.ground --checkpoint=STAGE1 --boxes=grounding_boxes.csv --patients=reports.csv --out=OUT

With --predictions: of generated texts. Writes OUT/grounding.json and OUT/maps.npz (study id -> map of a word). In a corpus with boxes the heads
are chosen on the validation split with the reference texts and then used unchanged: up to eight averaged, or all of them weighted if that points
better there, less what they look at in every film; predictions of these patients are refused. --covering adds a map to choose from: how much less
likely the sentence becomes when a part of the film is covered.
What is scored is the attention while the sentence that names a finding is written, with intervals ("ci") that resample patients. In a corpus
without boxes the maps are of the longest
word, averaged over heads of the last half of the layers. --every_word also writes OUT/words.json and OUT/words.npz, a map of every word of
every text, which launch.evaluate --attention shows under the mouse.

With --boxes: of phrases on films, without a corpus (`evaluation.phrases` says what the file holds). A run of stage 2 or 3 is told the phrase as
its answer; of one of stage 1 it is the tower's attention, or the likeness of its patches to the phrase. Heads are chosen on three
tenths of the patients (--patients: a CSV with image and patient), the scores are of the others, with intervals that resample patients.

On several machines every process gets the same command, with --multihost as in launch.train; process 0 writes the files.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from rad_jax import distributed, errors
from rad_jax.chat import access
from rad_jax.errors import UserError

if TYPE_CHECKING:
    from evaluation.heads import Heads
    from evaluation.looking import Looker, Target

# Phrases lie where they usually lie, so a map that knows no film can beat the boxes' area; beating other films' maps takes looking.
LOOKS = 0.01


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Run of launch.train.", required=True)
    flags.DEFINE_string("data", None, "Packed corpus, for --predictions.")
    flags.DEFINE_string("predictions", None, "What launch.generate wrote for a split of this corpus.")
    flags.DEFINE_bool("every_word", False, "Also write a map of every word of the predictions.")
    flags.DEFINE_bool(
        "covering", False, "Score also what the text loses where the film is covered: up to 64 more passes for each."
    )
    flags.DEFINE_string("boxes", None, "CSV of films, phrases and boxes, instead of --data and --predictions.")
    flags.DEFINE_string("patients", None, "CSV with image and patient, for --boxes.")
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_integer("batch_size", 32, "Texts at once.", lower_bound=1)
    distributed.define_flags()


def main(_: Sequence[str]) -> None:
    from evaluation.looking import open_looker

    options = flags.FLAGS
    if bool(options.boxes) == bool(options.data and options.predictions):
        raise UserError("give --data and --predictions, or --boxes")
    distributed.join()
    looker, out = open_looker(Path(options.checkpoint), options.batch_size), Path(options.out)
    if options.boxes:
        patients = Path(options.patients) if options.patients else None
        of_phrases(looker, Path(options.boxes), patients, out, options.covering)
    elif looker.what == "tower":
        raise UserError(f"{options.checkpoint} writes no texts: give a run of stage 2 or 3, or --boxes")
    else:
        data, predictions = Path(options.data), Path(options.predictions)
        of_predictions(looker, data, predictions, out, options.every_word, options.covering)


def of_predictions(
    looker: "Looker", data: Path, predictions: Path, out: Path, every_word: bool = False, covering: bool = False
) -> None:
    """Maps of generated texts, and their scores in a corpus with boxes."""
    import numpy as np

    from evaluation import heads, phrases
    from evaluation.corpus import ANNOTATED, records_of
    from evaluation.pointing import box_mask, pointing_game
    from evaluation.predictions import read_predictions
    from rad_jax.corpus import Corpus

    corpus = Corpus.open(data)
    rows = read_predictions(predictions).rows
    records = records_of(corpus, {row.id for row in rows})
    pairs = [(records[row.id], row.prediction) for row in rows if row.id in records]
    result: dict[str, Any] = {}
    size = (looker.image_size, looker.image_size)
    best: heads.Heads | None = None
    if corpus.meta["dataset"] in ANNOTATED:
        source = corpus.source("validation")
        validation = (source[number] for number in range(len(source)))
        known = [t for record in validation for t in finding_targets(record, record["findings"], size[0])]
        check_apart((t.record for t in known), (record for record, _ in pairs), predictions)
        maps, candidates = seen(looker, [sentence(t) for t in known], covering)
        masks = [box_mask(t.boxes, *size) for t in known]
        reading = heads.choose(maps, masks, candidates)
        if covering:  # too much for every word, whose maps are for people
            maps, candidates = maps[:, :-1], candidates[:-1]
        best = heads.choose(maps, masks, candidates) if covering else reading
        targets = [t for record, text in pairs for t in finding_targets(record, text, size[0])]
        scored: list[Any] = []
        if targets:
            scored = list(looked(looker, reading, [sentence(t) for t in targets], covering))
        pointing = pointing_game(scored, [t.boxes for t in targets], [size] * len(targets))
        made = phrases.signature(looker.what, "sentences-of-named-findings", size[0], reading.averaged, covering)
        chosen = {"chosen": in_words(looker, reading, maps), "validation_accuracy": reading.share}
        result = {"signature": made, **chosen, **asdict(pointing)}
        if targets:
            result |= beyond_pointing(targets, scored, size)
    else:
        targets = [t for record, text in pairs if (t := longest_word(record, text))]
    first: dict[str, Target] = {}
    for target in targets:
        first.setdefault(target.record["id"], target)
    shown: Any = looker.maps(list(first.values()), lambda maps: one_map(maps, best)) if first else []
    if every_word:
        write_words(looker, pairs, best, out, corpus.access)
    if not distributed.first():
        return
    if "accuracy" in result:
        tell(result)
    out.mkdir(parents=True, exist_ok=True)
    result["words"] = {
        name: {"word": target.text[slice(*target.span)], "finding": target.name, "boxes": target.boxes}
        for name, target in first.items()
    }
    told = json.dumps(result, indent=1) + "\n"  # it quotes words of the texts
    access.create(out / "grounding.json", corpus.access).write_text(told, encoding="utf-8")
    np.savez_compressed(out / "maps.npz", **dict(zip(first, shown, strict=True)))


def seen(looker: "Looker", targets: "Sequence[Target]", covering: bool) -> tuple[Any, list[tuple[int, int]]]:
    """Maps of all heads, with a last layer of what covering parts of the film loses if that is wanted, and those to choose from."""
    import numpy as np

    lost = looker.covered(targets) if covering else None  # first: a tower refuses
    maps = looker.maps(targets)
    candidates = looker.candidates(maps)
    if lost is None:
        return maps, candidates
    alike = np.broadcast_to(lost[:, None, None], (len(maps), 1, *maps.shape[2:]))
    return np.concatenate([maps, alike], axis=1), [*candidates, (maps.shape[1], 0)]


def looked(looker: "Looker", best: "Heads", targets: "Sequence[Target]", covering: bool) -> Any:
    """float32 [n, h, w]: the maps of targets as the chosen heads show them, kept batch by batch."""
    from evaluation.heads import weighted

    if not covering:
        return looker.maps(targets, best.read)
    attention = looker.maps(targets, lambda maps: weighted(maps, best.weights[:-1]))
    return attention + best.weights[-1, 0] * looker.covered(targets) - best.mean


def in_words(looker: "Looker", best: "Heads", maps: Any) -> str:
    """The chosen heads in words; `maps` are without what covering adds."""
    names = looker.named(best.chosen, maps)
    return f"mean of {names}" if best.averaged else f"weighted sum, above all of {names}"


def check_apart(chosen_on: Iterable[dict[str, Any]], scored: Iterable[dict[str, Any]], predictions: Path) -> None:
    """Raises UserError when records that are scored have patients among those of the records that heads are chosen on."""
    theirs, ours = ({record["patient"] or record["id"] for record in records} for records in (chosen_on, scored))
    if shared := len(theirs & ours):
        raise UserError(
            f"{predictions}: {shared} of its {len(ours)} patients are among those that the heads are chosen on, give predictions of another "
            "split than validation"
        )


def one_map(maps: Any, best: "Heads | None") -> Any:
    """[n, h, w] of maps [n, L, N, h, w]: of the chosen heads, or the mean over heads of the last half of the layers."""
    return best.read(maps) if best else maps[:, maps.shape[1] // 2 :].mean((1, 2))


def write_words(
    looker: "Looker", pairs: Sequence[tuple[Any, str]], best: "Heads | None", out: Path, level: str
) -> None:
    """words.json (id -> text and spans) and words.npz (id -> maps float16 [words, h, w])."""
    import re

    import numpy as np

    from evaluation.looking import Target

    words: dict[str, Any] = {}
    maps: dict[str, Any] = {}
    for record, text in pairs:
        spans = [found.span() for found in re.finditer(r"\w+", text)]
        if spans:
            own = looker.maps([Target(record, text, span, "", []) for span in spans], lambda maps: one_map(maps, best))
            words[record["id"]] = {"text": text, "spans": spans}
            maps[record["id"]] = own.astype(np.float16)
    if distributed.first():
        out.mkdir(parents=True, exist_ok=True)
        access.create(out / "words.json", level).write_text(json.dumps(words) + "\n", encoding="utf-8")
        np.savez_compressed(out / "words.npz", **maps)


def of_phrases(looker: "Looker", boxes: Path, patients: Path | None, out: Path, covering: bool = False) -> None:
    """Maps of phrases on films with boxes, and their scores on the patients that nothing was chosen on."""
    import numpy as np

    from evaluation import heads, phrases
    from evaluation.looking import Target

    regions = phrases.read(boxes, looker.image_size, phrases.read_patients(patients))
    kept = regions.kept
    held = phrases.validation_patients([region.patient for region in kept])
    question = phrases.QUESTION
    targets = [
        Target({"id": r.film, "question": question, "image": r.image}, r.phrase, (0, len(r.phrase)), r.phrase, [])
        for r in kept
    ]
    on = [i for i, region in enumerate(kept) if region.patient in held]
    rest = [i for i in range(len(kept)) if kept[i].patient not in held]
    maps, candidates = seen(looker, [targets[i] for i in on], covering)
    best = heads.choose(maps, [kept[i].mask for i in on], candidates)
    read = looked(looker, best, [targets[i] for i in rest], covering)
    found = phrases.scores(list(read), [kept[i] for i in rest])
    if not distributed.first():
        return
    result = {
        "model": looker.what,
        "signature": phrases.signature(looker.what, "phrases", looker.image_size, best.averaged, covering),
        "chosen": in_words(looker, best, maps[:, :-1] if covering else maps),
        "validation_patients": len(held),
        "validation_n": len(on),
        "validation_accuracy": best.share,
        **found,
        "skipped": [dict(zip(("image", "phrase", "reason"), row, strict=True)) for row in regions.skipped],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "grounding.json").write_text(json.dumps(result, indent=1) + "\n")
    named = {f"{kept[i].film}|{kept[i].phrase}": map_ for i, map_ in zip(rest, read, strict=True)}
    np.savez_compressed(out / "maps.npz", **named)
    tell_phrases(result)


def tell_phrases(result: dict[str, Any]) -> None:
    """The scores in a few lines."""

    def shown(score: Any) -> str:
        if score is None:
            return "n/a"
        low, high = score["ci"]
        return f"{score['value']:.3f} [{low:.3f}, {high:.3f}]"

    chosen = (
        f"{result['chosen']}, chosen on {result['validation_n']} phrases of {result['validation_patients']} patients"
    )
    print(f"{result['model']}: {chosen} ({result['validation_accuracy']:.2f} hit)")
    print(f"{result['n']} phrases of {result['patients']} other patients; {len(result['skipped'])} skipped")
    for name in ("accuracy", "chance", "above_chance", "mass", "contrast", "mean_iou"):
        print(f"  {name.replace('_', ' '):14}{shown(result[name])}")
    control = result["shuffled"]
    if control["n"]:
        own, other = control["accuracy"], control["shuffled_accuracy"]
        print(
            f"with the maps of other patients for the same phrase {other:.3f} instead of {own:.3f} (p {control['p']:.4f})"
        )
        looks = own > other and control["p"] < LOOKS
        print("the model looks at the film" if looks else "pointing is at chance: other films' maps do as well")


def tell(result: dict[str, Any]) -> None:
    """The pointing game in a line or two."""
    if not result["n"]:
        print("pointing game: no text names a finding that its film has.")
        return
    low, high = result["ci"]["accuracy"]
    counts = f"{result['n']} findings of {result['patients']} patients"
    print(
        f"pointing game: {result['accuracy']:.2f} [{low:.2f}, {high:.2f}] of {counts} (chance {result['chance']:.2f})"
    )
    control = result["shuffled"]
    if control["n"]:
        accuracy = f"{control['shuffled_accuracy']:.2f} (p {control['p']:.4f})"
        print(f"maps of other patients with the same finding: {accuracy}")


def beyond_pointing(targets: "Sequence[Target]", maps: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Mass, contrast and overlap, means over the targets of their maps scaled to [0, 1]; the intervals of these and of the pointing game,
    which resample patients; and the control with other patients' maps."""
    import numpy as np

    from evaluation import phrases, pointing

    masks = [pointing.box_mask(target.boxes, *size) for target in targets]
    patients = [target.record["patient"] or target.record["id"] for target in targets]
    rows = np.array([phrases.row(map_, mask) for map_, mask in zip(maps, masks, strict=True)])
    found = phrases.means(rows, patients)
    control = pointing.against_shuffled(maps, masks, [target.name for target in targets], patients)
    return {
        **{name: found[name] and found[name]["value"] for name in ("above_chance", "mass", "contrast", "mean_iou")},
        "ci": {name: found[name] and found[name]["ci"] for name in phrases.NAMES},
        "patients": found["patients"],
        "shuffled": asdict(control),
    }


def finding_targets(record: dict[str, Any], text: str, size: int) -> "Iterator[Target]":
    """The findings that a text names and the film has, with their boxes in the square of `size` pixels that the model sees."""
    from data.phantom.parser import locate
    from evaluation.looking import Target
    from rad_jax import images

    annotations = json.loads(record["annotations"])
    shape = images.decode_png(record["image"]).shape
    for name in dict.fromkeys(a["finding"] for a in annotations):
        span = locate(text, name)
        boxes = images.boxes_seen([a["box"] for a in annotations if a["finding"] == name], (shape[0], shape[1]), size)
        if span is not None and boxes:
            yield Target(record, text, span, name, boxes)


def sentence(target: "Target") -> "Target":
    """The whole sentence that the target's span stands in."""
    import re
    from dataclasses import replace

    start, stop = target.span
    spans = (found.span() for found in re.finditer(r"[^.\s][^.]*", target.text))
    return replace(target, span=next(span for span in spans if span[0] <= start and stop <= span[1]))


def longest_word(record: dict[str, Any], text: str) -> "Target | None":
    """The longest word of a text; None for an empty one."""
    import re

    from evaluation.looking import Target

    words = sorted(re.finditer(r"\w+", text), key=lambda match: -len(match.group()))
    return Target(record, text, words[0].span(), "", []) if words else None


if __name__ == "__main__":
    define_flags()
    errors.run(main)
