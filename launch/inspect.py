"""Shows what is in packed corpora, on one HTML page that needs no network: what to look at before a pod is spent on them.

    python -m launch.inspect --data=out/openi --out=out/openi.html
    python -m launch.inspect --data=out/openi,out/mimic_cxr --out=out/both.html     # also: what does the one hold out that the other trains on?
    python -m launch.inspect --data=out/mimic_cxr --verify     # is every byte the one that was packed? no page

The page has films with their texts, labels and boxes, token lengths of the findings (with how many are longer than --text_length) and of the
whole rows that the three stages make of them, counts of labels, views and text methods, what packing left out and why, and films that are there
twice, equal or much alike. A mixture is shown by its members. Up to --films records of each split are read, evenly spaced; duplicates are looked for among all.

The page shows images, texts and ids: it is as sensitive as the corpus. Exit status 1 with --strict if a film that is held out is also trained on.

How long a row should be: for each stage's template the lengths that 50, 90, 99, 99.9 and 100 of 100 rows of --selection do not exceed, and the
--config.data.text_length and target_length that keep 99 whole and waste least: with the image, the row is a multiple of 128. How many tokens an
image is, --patch_size says (14; 16 for configs/stage1.py:biomedclip and configs/phantom.py).

Every command that opens a corpus compares sizes and ends of its shards with shards.json; --verify reads them whole and compares checksums,
after a copy, say, and before a pod starts. It names each shard that is not as it was packed, and ends with exit status 1 if there is one.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from rad_jax import errors
from rad_jax.chat import access

_DATA = flags.DEFINE_list("data", None, "Packed corpora.", required=True)
_OUT = flags.DEFINE_string("out", "out/corpus.html", "HTML file to write.")
_FILMS = flags.DEFINE_integer("films", 20_000, "Records of each split that are counted.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 24, "Films of each corpus that are shown.", lower_bound=0)
_TEXT_LENGTH = flags.DEFINE_integer("text_length", 256, "Tokens of findings that training would keep.", lower_bound=1)
_SELECTION = flags.DEFINE_string("selection", "frontal", "Rows of the training split whose lengths are told.")
_PATCH_SIZE = flags.DEFINE_integer("patch_size", 14, "Side of the image tower's patches in pixels.", lower_bound=1)
_STRICT = flags.DEFINE_bool("strict", False, "Exit status 1 if a held-out film is also in a training split.")
_VERIFY = flags.DEFINE_bool(
    "verify", False, "Compare the contents of all shards with their checksums, and do nothing else."
)


def main(_: Sequence[str]) -> int:
    from data import inspection
    from evaluation import corpus_page

    if _VERIFY.value:
        return verify(_DATA.value)
    corpora = [corpus for path in _DATA.value for corpus in inspection.members(Path(path))]
    found = [inspection.look(corpus, _FILMS.value, _SAMPLES.value, _SELECTION.value) for corpus in corpora]
    rows = inspection.shared(corpora)
    warnings = [line for facts in found for line in cautions(facts, _TEXT_LENGTH.value)]
    leaks = [row for row in rows if row["leak"]]
    warnings += [
        f"{row['first']} and {row['second']} share {row['equal']} equal and {row['near']} similar films."
        for row in leaks
    ]
    parts = [part(facts, _TEXT_LENGTH.value, _SELECTION.value, _PATCH_SIZE.value) for facts in found]
    level = access.strictest(corpus.access for corpus in corpora)
    path = corpus_page.write(_OUT.value, parts, warnings, shared(rows), level)
    for facts in found:
        print(f"{facts.corpus.path}: {sum(facts.corpus.splits.values())} films, {len(facts.skipped)} left out")
        for line in advice(facts, _SELECTION.value, _PATCH_SIZE.value):
            print(f"  {line}")
    for line in warnings:
        print(f"  look: {line}")
    print(f"wrote {path}")
    return 1 if leaks and _STRICT.value else 0


def verify(folders: Sequence[str]) -> int:
    """Reads every shard of these corpora, tells which are not as they were packed, and returns the exit status."""
    from data import inspection

    bad = 0
    for corpus in (corpus for path in folders for corpus in inspection.members(Path(path), "count")):
        found = inspection.verify(corpus)
        bad += len(found)
        for sentence in found:
            print(sentence)
        size = sum(shard["bytes"] for shard in corpus.shards.values())
        told = f"{len(found)} of them not as they were packed" if found else "all as they were packed"
        print(f"{corpus.path}: {len(corpus.shards)} shards, {size / 1e9:.2f} GB, {told}")
    return 1 if bad else 0


def cautions(facts: Any, text_length: int) -> list[str]:
    """What should be looked at before training."""
    from data.shards import BROKEN

    lines = []
    broken = sum(row["reason"] in BROKEN for row in facts.skipped)
    if broken:
        lines.append(f"{facts.name}: {broken} films were missing or damaged when it was packed.")
    tokens = np.concatenate(list(facts.tokens.values()))
    if not len(tokens):
        lines.append(f"{facts.name}: no text has findings.")
    elif long := int((tokens > text_length).sum()):
        lines.append(
            f"{facts.name}: {long} of {len(tokens)} findings have more than {text_length} tokens and would be cut."
        )
    return lines


def percent(share: float) -> str:
    """As "99.9 %"."""
    return f"{round(100 * share, 1):g} %"


def image_tokens(facts: Any, template: str, patch_size: int) -> int:
    """How many tokens of a row are the image's; none in the text tower's."""
    return 0 if template == "clip" else (facts.corpus.image_size // patch_size) ** 2


def advice(facts: Any, selection: str, patch_size: int) -> list[str]:
    """How long the rows of each stage are, and what to set."""
    from data.inspection import QUANTILES, STAGES, lengths

    if not facts.rows:
        return [f"no row of {selection} to train on, so no lengths"]
    lines = []
    for template, rows in facts.rows.items():
        found = lengths(rows, tokens := image_tokens(facts, template, patch_size))
        told = ", ".join(f"{length} in {percent(share)}" for share, length in zip(QUANTILES, found.text, strict=True))
        target = f" --config.data.target_length={found.target_length}" if found.target_length else ""
        whole = f", with {tokens:,} of the image a row of {found.row:,}," if tokens else ""
        lines.append(
            f"{STAGES[template]} ({template}), {len(rows)} rows of {selection}, text tokens up to {told}: "
            f"--config.data.text_length={found.text_length}{target}{whole} keeps {percent(found.kept)} whole"
        )
    return lines


def shared(rows: Sequence[dict[str, Any]]) -> Any:
    """The table of films in two splits; None without any."""
    if not rows:
        return None
    return {
        "title": "Films that two splits have",
        "note": "Equal: the same pixels. Similar: at most 7 of 256 bits of a difference hash apart. Each film is counted once, beside the first that has it.",
        "columns": ["one split", "other split", "equal", "similar", "held out and trained on"],
        "rows": [[r["first"], r["second"], r["equal"], r["near"], "yes" if r["leak"] else "no"] for r in rows],
    }


def part(facts: Any, text_length: int, selection: str, patch_size: int) -> Any:
    """A corpus as the page wants it."""
    meta, summary = facts.corpus.meta, facts.corpus.meta["summary"]
    tokens = np.concatenate(list(facts.tokens.values()))
    middle = f"median {int(np.median(tokens))}, greatest {int(tokens.max())}" if len(tokens) else "no findings"
    splits = ", ".join(f"{count} {split}" for split, count in facts.corpus.splits.items())
    copies = {kind: sum(summary.get(kind, {}).values()) for kind in ("duplicate_images", "near_duplicates")}
    tiles = [
        {"label": "films", "value": f"{sum(facts.corpus.splits.values()):,}", "note": splits},
        {"label": "patients", "value": f"{sum(facts.patients.values()):,}", "note": f"of {sum(facts.films.values()):,} films counted"},
        {"label": "texts", "value": f"{facts.counts['method'].total():,}", "note": f"tokens of findings: {middle}"},
        {"label": "left out", "value": f"{len(facts.skipped):,}", "note": "see skipped.csv in the corpus"},
        {"label": "equal films", "value": f"{copies['duplicate_images']:,}", "note": f"and {copies['near_duplicates']:,} that look like another"},
        {"label": "with boxes", "value": f"{facts.boxes:,}", "note": f"images of {meta['image_size']} pixels, {summary['bytes'] / 1e6:,.1f} MB"},
    ]  # fmt: skip
    return {
        "name": facts.name,
        "tiles": tiles,
        "histograms": {
            **{f"Tokens of findings, {split}": bins(of) for split, of in facts.tokens.items()},
            **{f"Text tokens of a row, {template}": bins(of[:, 0]) for template, of in facts.rows.items()},
        },
        "tables": [row_table(facts, selection, patch_size), *tables(facts, text_length)],
        "samples": [sample(record) for record in facts.samples],
    }


def row_table(facts: Any, selection: str, patch_size: int) -> dict[str, Any]:
    """Lengths of whole rows as a table of the page."""
    from data.inspection import QUANTILES, STAGES, lengths

    rows = []
    for template, of in facts.rows.items():
        found = lengths(of, image_tokens(facts, template, patch_size))
        settings = [found.text_length, found.target_length, found.row, percent(found.kept)]
        rows.append([f"{STAGES[template]}, {template}, tokens", len(of), *found.text, *settings])
        if found.target_length:
            rows.append([f"{STAGES[template]}, {template}, targets", len(of), *found.targets, *[""] * len(settings)])
    return {
        "title": f"Lengths of rows of {selection}, and what to set",
        "note": "Prompt, reason and findings by the corpus's tokenizer, uncut. text_length and target_length are settings of config.data: the shortest "
        f"that keep 99 of 100 rows whole. A row: with an image of {facts.corpus.image_size} pixels in patches of {patch_size}.",
        "columns": ["stage", "rows", *(percent(share) for share in QUANTILES), "text_length", "target_length", "row", "whole"],
        "rows": rows,
    }  # fmt: skip


def bins(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    from data.inspection import histogram

    return histogram(lengths)


def tables(facts: Any, text_length: int) -> list[dict[str, Any]]:
    """Counts as tables of the page."""
    from data.inspection import STATES
    from data.labels import CHEXPERT

    labels = [[label, *(facts.labels[label, state] for state in STATES.values())] for label in CHEXPERT]
    selections = facts.corpus.meta["selections"]
    splits = list(facts.corpus.splits)
    rows = [[name, *(of["splits"][split]["rows"] for split in splits)] for name, of in selections.items()]
    long = [[split, len(of), int((of > text_length).sum())] for split, of in facts.tokens.items()]
    reasons = Counter(row["reason"] for row in facts.skipped).most_common()
    # Corpora of earlier builds have no details.
    first = [[row["id"], Path(row["image"]).name, row["reason"], row.get("detail", "")] for row in facts.skipped[:20]]
    found = [
        {"title": "Labels", "columns": ["label", *STATES.values()], "rows": [row for row in labels if any(row[1:])]},
        {"title": "Selections, rows of an epoch", "columns": ["selection", *splits], "rows": rows},
        {"title": f"Findings of more than {text_length} tokens", "columns": ["split", "findings", "too long"], "rows": long},
        {"title": "Left out, by reason", "columns": ["reason", "inputs"], "rows": [list(row) for row in reasons]},
        {"title": "Left out, the first", "columns": ["id", "image", "reason", "detail"], "rows": first},
    ]  # fmt: skip
    titles = {
        "view": "Views",
        "sex": "Sex",
        "sections": "Sections",
        "method": "Methods of the texts",
    }
    return found + [
        {
            "title": title,
            "columns": [name, "how often"],
            "rows": [list(row) for row in facts.counts[name].most_common(20)],
        }
        for name, title in titles.items()
    ]


def sample(record: Any) -> dict[str, Any]:
    """A record as the page wants it."""
    from data.inspection import STATES
    from data.labels import CHEXPERT
    from evaluation.corpus_page import context_of, sections

    stated = [(label, STATES.get(int(value))) for label, value in zip(CHEXPERT, record["labels"], strict=True)]
    boxes = [
        (" ".join(filter(None, (a["finding"], a.get("side")))), a["box"]) for a in record["annotations"] if a.get("box")
    ]
    known = [
        record["split"],
        record["view"] or "view not known",
        record["sex"],
        f"{record['age']} years" if record["age"] >= 0 else "",
    ]
    known += [f"{record['orig_width']} x {record['orig_height']} pixels", record["source"]]
    return {
        "title": record["id"],
        "facts": " · ".join(filter(None, known)),
        "image_png": record["image"],
        "boxes": boxes,
        "labels": [context_of(label, state) for label, state in stated if state],
        "texts": sections(record["texts"]),
    }


if __name__ == "__main__":
    errors.run(main)
