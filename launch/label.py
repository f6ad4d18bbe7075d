"""Labels reports with the 14 CheXpert classes: by rules, without weights, or by a BERT labeler that you bring.

    python -m launch.label reports.csv --text=findings --id=study --out=labels.csv
    python -m launch.label PREDS.jsonl --text=prediction --out=labels.csv
    python -m launch.label reports.csv --text=findings --id=uid --out=labels.csv --against=chexpert.csv
    python -m launch.label PREDS.jsonl --text=prediction --out=labels.csv --weights=chexbert.pth --vocabulary=vocab.txt
    python -m launch.label PREDS.jsonl --text=prediction --out=entities.json --radgraph=WEIGHTS/radgraph

The input is CSV or JSON lines. labels.csv has an id and the 14 classes: 1 positive, 0 negative, -1 uncertain, empty for not mentioned.
--weights names a checkpoint of a BERT with 14 classifiers, as CheXbert has them, and --vocabulary its vocab.txt; it runs on all devices. The
labels of references and predictions then go to launch.evaluate --labels, which gives the chexbert_ metrics.
--radgraph names an unpacked archive of RadGraph's model (launch.doctor says what belongs there): instead of labels the file then has
entities and relations as JSON, for launch.evaluate --radgraph.
--against=LABELS.csv compares with another labeler's file of that form: F1 of the positive class as it stands, and without the reports in
which that file calls a plainly normal heart or mediastinum positive; every disagreement, sorted by class, goes to
labels.disagreements.csv (it holds report text).
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from evaluation import agreement, labels, rule_labeler
from rad_jax import errors
from rad_jax.chat import access
from rad_jax.errors import UserError


def read_texts(path: Path, id_field: str, text_field: str) -> dict[str, str]:
    """id -> text of a CSV or JSONL file. Raises UserError for a missing file or field and for an id that stands twice."""
    if not path.is_file():
        raise UserError(f"no reports at {path}: give a CSV or JSONL file")
    out: dict[str, str] = {}
    for line, row in _rows(path):
        for field in (id_field, text_field):
            if row.get(field) is None:
                raise UserError(f"{path}, line {line}: no field {field!r}, choose fields with --id and --text")
        name = str(row[id_field])
        if name in out:
            raise UserError(f"{path}, line {line}: an id stands twice, keep one row per report")
        out[name] = str(row[text_field])
    if not out:
        raise UserError(f"{path} holds no report")
    return out


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    value = json.loads(line)
                    yield number, value if isinstance(value, dict) else {}
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: convert it first") from None
    except json.JSONDecodeError:
        raise UserError(f"{path}, line {number}: not JSON; a CSV file must end in .csv") from None


def compare(texts: dict[str, str], table: np.ndarray, reference: dict[str, np.ndarray], out: Path) -> list[str]:
    """Writes the disagreements with `reference` to `out`, which quotes reports and is for its owner's eyes, and says in lines how far the two agree.

    Raises UserError when no id is in both.
    """
    names = list(texts)
    rows = [i for i, name in enumerate(names) if name in reference]
    if not rows:
        raise UserError("--against holds none of the ids: give the labels of the same reports, with the same --id")
    theirs, ours = np.array([reference[names[i]] for i in rows]), table[rows]
    with access.create(out, access.PRIVATE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "id", "reference", "rules", "text"])
        for column, row in agreement.disagreements(theirs, ours):
            name = names[rows[row]]
            codes = [labels.to_file(codes[row, column]) for codes in (theirs, ours)]
            writer.writerow([labels.CLASSES[column], name, *codes, texts[name]])
    wrong = [agreement.calls_normal_abnormal(texts[names[i]], codes) for i, codes in zip(rows, theirs, strict=True)]
    kept = [i for i, classes in enumerate(wrong) if not classes]
    counts = ", ".join(f"{sum(name in w for w in wrong)} {name}" for name in agreement.ORGANS)
    both = agreement.agreement(theirs, ours), agreement.agreement(theirs[kept], ours[kept])
    lines = [
        f"{len(rows)} reports in both files; F1 of the positive class, in brackets without the reports in which the"
    ]
    lines += [f"reference calls a plainly normal organ positive ({counts}; {len(kept)} reports left)"]
    for number, name in enumerate(labels.CLASSES):
        counted = f"{both[0].tp[number] + both[0].fn[number]} positive"
        lines.append(f"  {name:28}{both[0].f1[number]:.3f} ({both[1].f1[number]:.3f})  {counted}")
    for kind in ("micro", "macro"):
        lines.append(f"  {kind:28}{getattr(both[0], kind):.4f} ({getattr(both[1], kind):.4f})")
    return lines


def main(argv: Sequence[str]) -> None:
    options = flags.FLAGS
    if len(argv) != 2:
        raise UserError("give one file of reports: python -m launch.label REPORTS.csv --text=findings --out=labels.csv")
    texts = read_texts(Path(argv[1]), options.id, options.text)
    if options.radgraph:
        from evaluation import radgraph_model

        found = radgraph_model.RadGraphModel(Path(options.radgraph)).annotate(list(texts.values()))
        radgraph_model.write(Path(options.out), list(texts), found)
        print(f"written: {options.out}, {len(texts)} reports, {sum(map(len, found))} entities")
        return
    reference = labels.read_csv(Path(options.against), options.id) if options.against else None
    if options.weights:
        from evaluation.bert_labeler import BertLabeler

        if not options.vocabulary:
            raise UserError("--weights needs --vocabulary, the vocab.txt that the model was trained with")
        table = BertLabeler(Path(options.weights), Path(options.vocabulary)).label(list(texts.values())).codes
    else:
        bar = tqdm(texts.values(), desc="reports", unit="report", disable=None)
        table = np.array([rule_labeler.label(text, options.chexpert_habits) for text in bar], np.int8)
    out = Path(options.out)
    labels.write_csv(out, texts, table)
    print(f"written: {out}, {len(texts)} reports, {(table == labels.POSITIVE).sum()} positive labels")
    if reference is not None:
        where = out.with_suffix(".disagreements.csv")
        print("\n".join(compare(texts, table, reference, where)) + f"\nwritten: {where}")


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    flags.DEFINE_string("text", "findings", "Field that holds the report.")
    flags.DEFINE_string("id", "id", "Field that names it; also the id column of --against.")
    flags.DEFINE_string("out", None, "CSV file to write, JSON with --radgraph.", required=True)
    flags.DEFINE_string("weights", None, "Checkpoint of a BERT labeler, instead of the rules.")
    flags.DEFINE_string("vocabulary", None, "vocab.txt of --weights.")
    flags.DEFINE_string("radgraph", None, "Folder of RadGraph's model: entities and relations instead of labels.")
    flags.DEFINE_string("against", None, "Labels of the same reports to compare with.")
    flags.DEFINE_bool(
        "chexpert_habits",
        True,
        "As the CheXpert labeler: every 'plate' is a device, and a heart at 'upper limits of normal' enlarged unless 'at' or 'within' stands before.",
    )


if __name__ == "__main__":
    define_flags()
    errors.run(main, positional=True)
