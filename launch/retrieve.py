"""Image-text retrieval with the contrastive towers: does an image find its own report among many, and the report its image?

    python -m launch.retrieve --checkpoint=out/demo/stage1 --data=out/demo/data --split=test --candidates=100 --out=out/demo/retrieval.json

Recall at 1, 5 and 10, median and mean rank, in both directions, with ties counted against the model, for it, and as a random order of the tied
would be. "image_to_text" and "text_to_image" are over studies that differ: by their true findings where the corpus knows them, else by their
text; --candidates takes the first so many of them. "all_studies" is over all, where other studies with the same words in their report are no
rivals. Intervals ("ci") draw the studies anew by patient; what they are ranked among stays. "same_labels" is the share of the nearest 1, 5 and 10 that have the same 14 labels, in a corpus that has labels. A film with several texts is
a study for each. Every block has chance beside it and a signature that says how it was made.

--zero_shot also classifies the 14 CheXpert findings without training for it, by texts that affirm or deny each (--prompts=FILE for your own):
AUROC with intervals that resample patients, against the labels of the corpus (uncertain ones left out, not stated ones negative).

On several machines every process gets the same command, with --multihost as in launch.train; process 0 writes the file.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rad_jax import distributed, errors
from rad_jax.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Run of launch.train, stage 1.", required=True)
    flags.DEFINE_string("data", None, "Packed corpus.", required=True)
    flags.DEFINE_string("split", "test", "Which studies.")
    flags.DEFINE_string("out", None, "JSON file to write.", required=True)
    flags.DEFINE_integer("candidates", None, "Only the first so many different studies.", lower_bound=2)
    flags.DEFINE_bool("zero_shot", False, "Also classify the 14 findings.")
    flags.DEFINE_string("prompts", None, "JSON of prompts for --zero_shot: class -> positive and negative texts.")
    flags.DEFINE_integer("batch_size", 64, "Studies at once.", lower_bound=1)
    distributed.define_flags()


def main(_: Sequence[str]) -> None:
    import jax

    from evaluation import corpus as corpora
    from evaluation import tables, zero_shot
    from rad_jax import input_pipeline, sharding, tasks
    from rad_jax import retrieval as towers
    from rad_jax.checkpoint import load_run
    from rad_jax.corpus import Corpus

    options = flags.FLAGS
    distributed.join()
    run = load_run(Path(options.checkpoint))
    if run.config["task"] != "contrastive":
        raise UserError(f"{options.checkpoint} has no contrastive towers: give a run of stage 1.")
    mesh = sharding.make_mesh(jax.device_count(), 1, 1)
    task, variables = tasks.restore(run, mesh)
    assert isinstance(task, tasks.Contrastive)
    corpus = Corpus.open(options.data)
    batches = input_pipeline.eval_batches(
        corpus,
        options.split,
        template="clip",
        batch_size=-(-options.batch_size // mesh.size) * mesh.size,
        text_length=run.config["data"]["text_length"],
        target_length=0,
        image_size=task.model.config.vision.image_size,
        selection="pairs",
    )
    embedded = towers.embed(task.model, variables, batches, mesh)
    told = prompt_vectors(task.model, variables, mesh, corpus) if options.zero_shot else {}
    if not distributed.first():
        return
    source = corpus.source(options.split, "pairs")
    annotated = corpus.meta["dataset"] in corpora.ANNOTATED
    length = run.config["data"]["text_length"]
    result = scores(embedded, source, annotated, options.candidates, f"text:findings-or-impression|tokens:{length}")
    if told:
        result["zero_shot"] = classify(embedded, told, source, f"prompts:{zero_shot.digest(read_prompts())}|films:once")
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    for rows in tables_of(result):
        print(tables.markdown_table(rows))


def scores(embedded: dict[str, Any], source: Any, annotated: bool, candidates: int | None, how: str) -> dict[str, Any]:
    """What is written but for --zero_shot, as plain JSON.

    Args:
        embedded: images, texts and record numbers, of `rad_jax.retrieval.embed`.
        source: the records by number.
        annotated: whether their annotations list every finding.
        candidates: at most so many different studies; None for all.
        how: what was embedded, for the signatures.
    """
    import numpy as np

    from data.labels import NOT_STATED
    from evaluation.retrieval_metrics import label_precision, retrieval

    images, texts = embedded["images"], embedded["texts"]
    keys, equal, labels, patients = [], [], [], []
    for number in embedded["index"]:
        record = source[int(number)]
        keys.append(key(record, annotated))
        equal.append(words(record))
        labels.append(record["labels"])
        patients.append(record["patient"] or record["id"])
    keep, by = different(keys, candidates), "findings" if annotated else "words"
    shown = [patients[i] for i in keep]
    result: dict[str, Any] = retrieval(images[keep], texts[keep], None, f"studies:different-{by}|{how}", shown)
    result["all_studies"] = retrieval(images, texts, equal, f"studies:all|equal-words:no-rivals|{how}", patients)
    table = np.array(labels)
    stated = (table != NOT_STATED).any(axis=1)
    if stated.any():
        own = f"studies:labelled|{how}"
        whose = [patients[i] for i in np.flatnonzero(stated)]
        result["same_labels"] = label_precision(images[stated], texts[stated], table[stated], own, whose)
    return result


def tables_of(result: dict[str, Any]) -> Iterator[list[list[str]]]:
    """The scores as one or two tables, each a head row and its rows."""
    from evaluation.retrieval_metrics import DIRECTIONS
    from evaluation.tables import digits

    def ends(found: dict[str, Any], name: str, places: int) -> str:
        low, high = found["ci"][name]
        return f" [{low:.{places}f}, {high:.{places}f}]"

    rows = [["ties against / expected / for [95%, ties against]", "R@1", "R@5", "R@10", "median rank", "n"]]
    for name, block in (("different studies", result), ("all studies, equal reports no rivals", result["all_studies"])):
        for direction in DIRECTIONS:
            found = block[direction]
            ways = (found, found["ties_expected"], found["ties_for"])
            recalls = [" / ".join(digits(way[k], 2) for way in ways) + ends(found, k, 2) for k in ("r1", "r5", "r10")]
            ranks = " / ".join(f"{way['median_rank']:g}" for way in ways) + ends(found, "median_rank", 1)
            rows.append([f"{name}, {direction.replace('_', ' ')}", *recalls, ranks, str(found["n"])])
        rows.append([f"{name}, chance", *(digits(value, 2) for value in found["chance"].values()), "", str(found["n"])])
    yield rows
    if "same_labels" in result:
        rows = [["same 14 labels", "P@1", "P@5", "P@10", "chance", "n"]]
        for direction, found in result["same_labels"].items():
            names = [f"precision_{k}" for k in (1, 5, 10)]
            precisions = ["-" if found[k] is None else digits(found[k], 2) + ends(found, k, 2) for k in names]
            rows.append([direction.replace("_", " "), *precisions, digits(found["chance"], 2), str(found["n"])])
        yield rows


def prompt_vectors(model: Any, variables: Any, mesh: Any, corpus: Any) -> dict[str, tuple[Any, Any]]:
    """Class -> unit vectors of the texts that affirm and of those that deny it."""
    from rad_jax import prompts
    from rad_jax import retrieval as towers

    texts = read_prompts()
    tokenizer, most = corpus.tokenizer(), model.config.text.max_positions
    flat = [text for sides in texts.values() for side in sides for text in side]
    ids = [prompts.render_clip(tokenizer, text, most).ids for text in flat]
    rows = iter(towers.embed_texts(model, variables, ids, mesh))
    return {name: tuple(next_rows(rows, len(side)) for side in sides) for name, sides in texts.items()}


def read_prompts() -> dict[str, tuple[list[str], list[str]]]:
    """The texts of --prompts, or our own."""
    from evaluation import zero_shot

    return zero_shot.read_prompts(Path(flags.FLAGS.prompts) if flags.FLAGS.prompts else None)


def next_rows(rows: Iterator[Any], count: int) -> Any:
    """The next `count` rows as a matrix."""
    import numpy as np

    return np.stack(list(itertools.islice(rows, count)))


def classify(embedded: dict[str, Any], told: dict[str, tuple[Any, Any]], source: Any, how: str) -> Any:
    """AUROC of every class as plain JSON, also printed. A film with several texts counts once. how: for the signatures."""
    import numpy as np

    from evaluation import zero_shot

    records = [source[int(number)] for number in embedded["index"]]
    once = list({record["id"]: i for i, record in reversed(list(enumerate(records)))}.values())[::-1]
    images = embedded["images"][once]
    values = {name: zero_shot.scores(images, *sides) for name, sides in told.items()}
    labels = np.array([records[i]["labels"] for i in once])
    patients = [records[i]["patient"] or records[i]["id"] for i in once]
    result = zero_shot.evaluate(values, labels, patients, how=how)
    for name, found in result["classes"].items():
        shown = "n/a" if found["auroc"] is None else "{:.3f} [{:.3f}, {:.3f}]".format(found["auroc"], *found["ci"])
        print(f"  {name:28}{shown}  {found['positive']} positive of {found['n']}")
    if result["mean_auroc"] is not None:
        print("zero-shot AUROC, mean of {}: {:.3f}".format(sum(f["auroc"] is not None for f in result["classes"].values()), result["mean_auroc"]))  # fmt: skip
    return result


def key(record: dict[str, Any], annotated: bool) -> Any:
    """What makes a study the same as another: its true findings where the corpus lists them all, else the words of its text."""
    if not annotated:
        return words(record)
    findings = json.loads(record["annotations"])
    return tuple(sorted((f["finding"], str(f["side"]), str(f["size"]), str(f["place"])) for f in findings))


def words(record: dict[str, Any]) -> tuple[str, ...]:
    """The words, in lower case, of the text that stands for a study: its findings, else its impression."""
    return tuple(re.findall(r"\w+", (record["findings"] or record["impression"]).lower()))


def different(keys: list[Any], count: int | None) -> list[int]:
    """Positions of the first `count` pairwise different keys."""
    first: dict[Any, int] = {}
    for position, name in enumerate(keys):
        first.setdefault(name, position)
    return list(first.values())[:count]


if __name__ == "__main__":
    define_flags()
    errors.run(main)
