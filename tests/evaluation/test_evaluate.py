"""The whole evaluation on a small corpus that stands in memory, and the command as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import corpus as corpora
from evaluation import report
from evaluation.predictions import Predictions, Row
from launch.evaluate import evaluate
from rad_jax import images
from rad_jax.errors import UserError
from rad_jax.input_pipeline import Corpus

ROOT = Path(__file__).parents[2]


def record(name: str, findings: str, grey: int, annotations: list[dict[str, Any]], patient: str = "") -> dict[str, Any]:
    image = np.full((32, 40), grey, np.uint8)
    return {
        "id": name,
        "patient": patient,
        "findings": findings,
        "image": images.encode_png(image),
        "annotations": json.dumps(annotations),
    }


def effusion(side: str) -> list[dict[str, Any]]:
    box = [1, 2, 3, 4]
    return [{"finding": "pleural_effusion", "side": side, "size": "small", "place": None, "box": box}]


LEFT, RIGHT, CLEAR = "Small left pleural effusion.", "Small right pleural effusion.", "The lungs are clear."
RECORDS: dict[str, list[dict[str, Any]]] = {
    "train": [
        record("t1", CLEAR, 10, []),
        record("t2", LEFT, 100, effusion("left")),
        record("t3", CLEAR, 200, []),
        record("t4", "", 50, []),
        record("t5", RIGHT, 90, []) | {"image": b"broken"},
    ],
    "validation": [],
    "test": [
        record("a", LEFT, 104, effusion("left"), "p1"),
        record("b", RIGHT, 12, effusion("right"), "p1"),
        record("c", CLEAR, 190, [], "p2"),
        record("d", CLEAR, 60, [], "p3"),
    ],
}
PREDICTIONS = {"a": LEFT, "b": LEFT, "c": CLEAR, "d": ""}


class MemoryCorpus(Corpus):
    def source(self, split: str, selection: str = "all") -> Any:
        return RECORDS[split]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryCorpus:
    splits = {name: len(rows) for name, rows in RECORDS.items()}
    made = MemoryCorpus(Path("memory"), {"dataset": "phantom", "image_size": 32, "splits": splits})
    monkeypatch.setattr(Corpus, "open", classmethod(lambda cls, path: made))
    return made


def write(path: Path, predictions: dict[str, str], extra: str = "") -> Path:
    references = {row["id"]: row["findings"] for rows in RECORDS.values() for row in rows}
    rows = [
        {"id": i, "query": "", "reference": references.get(i, "x"), "prediction": p} for i, p in predictions.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + extra)
    return path


def test_with_truth_and_baselines(memory: MemoryCorpus, tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", PREDICTIONS | {"stranger": "x"}, extra="broken\n")
    result = evaluate(preds, tmp_path / "out", Path("memory"), with_baselines=True)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    rows = result["rows"]
    assert (rows["read"], rows["scored"], rows["empty_predictions"]) == (6, 4, 1)
    assert rows["malformed"] == [{"line": 6, "reason": "not JSON"}]
    assert rows["not_in_corpus"] == [5]

    own = result["systems"]["prediction"]["findings"]
    assert own["per_finding"]["pleural_effusion"]["f1"] == 1.0
    assert own["per_finding"]["pleural_effusion"]["support"] == 2
    assert (own["laterality"]["value"], own["laterality"]["n"]) == (0.5, 2)
    assert own["macro_f1"]["value"] is None  # two positives are not enough for the macro mean
    assert own["patients"] == 3
    assert "unit:patient" in own["laterality"]["signature"]

    # Studies a to d are nearest in grey to t2, t1, t3, and d (60) to t2: t4 has no report, t5 no image.
    assert result["systems"]["most frequent report"]["findings"]["per_finding"]["pleural_effusion"]["recall"] == 0.0
    thumbnail = result["systems"]["nearest thumbnail"]["findings"]["per_finding"]["pleural_effusion"]
    assert (thumbnail["recall"], thumbnail["precision"]) == (0.5, 0.5)

    text = (tmp_path / "out" / "results.md").read_text()
    for part in (
        "1 of 6 rows left out as malformed (line 6: not JSON)",
        "pleural effusion",
        "nearest thumbnail",
        "bleu4|",
    ):
        assert part in text


def test_macro_mean_needs_only_the_asked_support(memory: MemoryCorpus) -> None:
    records = corpora.records_of(memory, PREDICTIONS)
    rows = [Row(name, "", CLEAR, text, i) for i, (name, text) in enumerate(PREDICTIONS.items())]
    from data.phantom.parser import parse

    studies = corpora.studies_of(memory, records)
    result = report.evaluate(Predictions(rows, []), studies=studies, parse=parse, min_support=2)
    macro = result["systems"]["prediction"]["findings"]["macro_f1"]
    assert macro["value"] == 1.0 and macro["classes"] == ["pleural_effusion"]
    assert "classes:1|min-support:2" in macro["signature"]


def test_folder_corpus_has_patients_but_no_truth(memory: MemoryCorpus, tmp_path: Path) -> None:
    folder = MemoryCorpus(memory.path, {**memory.meta, "dataset": "folder"})
    studies = corpora.studies_of(folder, corpora.records_of(folder, PREDICTIONS))
    assert studies["a"] == report.Study("p1", None)
    rows = [Row(name, "", CLEAR, text, i) for i, (name, text) in enumerate(PREDICTIONS.items())]
    result = report.evaluate(Predictions(rows, []), studies=studies, parse=lambda text: [])
    assert "findings" not in result["systems"]["prediction"]
    assert "unit:patient" in result["systems"]["prediction"]["text"]["bleu4"]["signature"]
    assert any("whose truth is known" in note for note in report.warnings(result))
    assert report.finding_table(result) == []
    assert report.summary_table(result)[0] == ["system", "BLEU-1", "BLEU-4", "ROUGE-L"]


def test_predictions_of_another_corpus_are_refused(memory: MemoryCorpus, tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", {"x": "y"})
    with pytest.raises(UserError, match="holds none of the predicted ids"):
        evaluate(preds, tmp_path / "out", Path("memory"))
    assert not (tmp_path / "out").exists()


def test_empty_references_stay_out_of_the_word_overlap() -> None:
    rows = [Row("a", "", CLEAR, CLEAR, 1), Row("b", "", " ", CLEAR, 2)]
    result = report.evaluate(Predictions(rows, []))
    text = result["systems"]["prediction"]["text"]
    assert text["bleu4"]["value"] == pytest.approx(100.0)
    assert text["bleu4"]["n"] == text["rouge_l"]["n"] == 1
    assert result["rows"]["empty_references"] == 1
    assert report.evaluate(Predictions(rows[1:], []))["systems"]["prediction"]["text"] is None


def test_missing_packages_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.text_metrics.missing_packages", lambda: ["sacrebleu"])
    result = report.evaluate(Predictions([Row("a", "", CLEAR, CLEAR, 1)], []))
    assert "text" not in result["systems"]["prediction"]
    assert "sacrebleu not installed (pip install rad_jax[eval])" in report.warnings(result)[0]
    report.markdown(result)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.evaluate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_prints_a_table(tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", PREDICTIONS, extra="{}\n")
    done = run(str(preds), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "1 of 5 rows left out as malformed (line 5: no field 'id')." in done.stdout
    assert "1 of 4 predictions are empty and score as such." in done.stdout
    assert "| system" in done.stdout and "ROUGE-L" in done.stdout
    assert CLEAR not in done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "results.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one predictions file and a folder"),
        (["absent.jsonl", "--out={tmp}/out"], "no predictions file at absent.jsonl"),
        (["{tmp}/p.jsonl"], "give one predictions file and a folder"),
        (["{tmp}/p.jsonl", "--out={tmp}/out", "--baselines"], "--baselines needs --data"),
        (["{tmp}/p.jsonl", "--out={tmp}/out", "--data={tmp}"], "no packed corpus here"),
        (["{tmp}/p.jsonl", "--out={tmp}/p.jsonl"], "p.jsonl: "),
    ],
)
def test_command_ends_in_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    write(tmp_path / "p.jsonl", PREDICTIONS)
    done = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert message in done.stderr and "Traceback" not in done.stderr
