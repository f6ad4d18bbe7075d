"""Weights that a user brings: what is computed with them, what doctor says of them, and files that changed."""

import dataclasses
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evaluation import bertscore, bleu, models, radcliq, radgraph, report, weights
from evaluation.predictions import Predictions, Row
from launch import compare, doctor
from rad_jax.errors import UserError

TEXTS = [("a", "Small left effusion.", "Small effusion."), ("b", "Clear lungs.", "Clear lungs."), ("c", "x", "")]


class Labeler:
    """As `BertLabeler`: codes and vectors that follow from the text's length."""

    asked: list[list[str]] = []  # noqa: RUF012

    def __init__(self, *paths: Path) -> None:
        assert all(path.is_file() for path in paths)
        self.sha256 = "c" * 64

    def label(self, texts: list[str]) -> Any:
        self.asked.append(texts)
        codes = np.array([[len(t) % 4] * 13 + [0] for t in texts], np.int8)
        return SimpleNamespace(codes=codes, cls=np.array([[len(t) + 1.0, 3.0] for t in texts]))


class Annotator:
    def __init__(self, folder: Path) -> None:
        self.sha256 = "d" * 64

    def annotate(self, texts: list[str]) -> list[radgraph.Annotation]:
        return [
            {str(i): {"tokens": w, "label": "OBS-DP", "relations": []} for i, w in enumerate(t.split())} for t in texts
        ]


class Scorer:
    baseline: Any = bertscore.Baseline("distilroberta-base", (0.0, 0.0, 0.0))

    def __init__(self, folder: Path) -> None:
        pass

    def frequencies(self, texts: list[str], digest: str) -> Any:
        return texts, digest

    def score(self, said: list[str], true: list[str], frequencies: Any) -> np.ndarray:
        shares = [len(a) / max(len(b), 1) for a, b in zip(said, true, strict=True)]
        return np.array([[0, 0, share / 2 if frequencies else share] for share in shares])

    def signature(self, frequencies: Any) -> str:
        return f"bertscore|model:x|idf:{frequencies}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole folder of weights, empty files all of them, and models that do not read them."""
    for item in weights.ITEMS:
        for names in item.files:
            path = tmp_path / "weights" / item.name / names[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(path.name)
    for name, fake in (("BertLabeler", Labeler), ("RadGraphModel", Annotator), ("BertScore", Scorer)):
        monkeypatch.setattr(models, name, fake)
    return tmp_path / "weights"


def inputs() -> list[report.Input]:
    rows = [Row(i, "", true, said, n) for n, (i, true, said) in enumerate(TEXTS, start=1)]
    return [report.Input("p", Predictions(rows, []))]


def scores(folder: Path, corpus: Any = None) -> tuple[dict[str, Any], Any]:
    options = report.Options(profiles=["native", "rexrank"], draws=100)
    result, _ = report.evaluate(*models.fill(inputs(), options, folder, corpus))
    return {m["name"]: m for m in result["metrics"]}, result


def test_everything_that_weights_give(folder: Path) -> None:
    Labeler.asked.clear()
    found, result = scores(folder)
    assert Labeler.asked == [["Small left effusion.", "Small effusion.", "Clear lungs.", "x", ""]]
    assert "labeler:chexbert-cccccccc" in found["chexbert_micro_14"]["signature"]
    assert "annotations:v1-dddddddd" in found["radgraph_partial"]["signature"]
    assert found["radgraph_simple"]["value"] == pytest.approx((2 * 2 / 5 + 1 + 0) / 3)
    bert = np.array([15 / 20, 1, 0])
    assert found["bertscore"]["value"] == pytest.approx(bert.mean())
    lengths = np.array([[20, 15], [12, 12], [1, 0]]) + 1.0
    semb = [float(np.dot([t, 3], [s, 3]) / np.hypot(t, 3) / np.hypot(s, 3)) for t, s in lengths]
    assert found["semb_score"]["value"] == pytest.approx(np.mean(semb))
    entities = np.array([2 / 5, 0.5, 0])
    words = bleu.metric([t[2] for t in TEXTS], [t[1] for t in TEXTS], 2, "radcliq").each()
    table = np.stack([entities, bert, semb, words], axis=1)
    for version in radcliq.MODELS:
        assert found[f"radcliq_{version}"]["value"] == pytest.approx(radcliq.scores(table, version).mean())
    assert not any(name in w for w in result["warnings"] for name in ("chexbert", "radgraph", "radcliq", "bertscore"))


def test_radcliq_is_of_one_encoder_without_frequencies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies weigh BERTScore alone; with another encoder there is no RadCliQ, and the warning names the one it needs."""
    plain, _ = scores(folder)
    found, result = scores(folder, (["one", "two"], "digest"))
    assert "digest" in found["bertscore"]["signature"]
    assert found["bertscore"]["value"] == pytest.approx(plain["bertscore"]["value"] / 2)
    for name in ("radcliq_v0", "radcliq_v1"):
        assert found[name]["value"] == plain[name]["value"] and found[name]["signature"] == plain[name]["signature"]
    assert not any("radcliq" in warning for warning in result["warnings"])
    monkeypatch.setattr(Scorer, "baseline", None)
    found, result = scores(folder)
    assert "radcliq_v1" not in found
    assert any("radcliq_v1" in warning and "distilroberta-base" in warning for warning in result["warnings"])


def test_baselines_are_scored_by_the_models_too(folder: Path) -> None:
    """A baseline that says what the predictions say gets their scores in every metric of a model; its texts go through once, with theirs."""
    Labeler.asked.clear()
    said = {i: text for i, _, text in TEXTS}
    options = report.Options(
        profiles=["native", "rexrank"],
        draws=100,
        trials=100,
        baselines={"same": said, "other": dict.fromkeys(said, "Clear lungs.")},
    )
    result, _ = report.evaluate(*models.fill(inputs(), options, folder, None))
    assert len(Labeler.asked) == 1
    table = {(m["system"], m["profile"], m["name"]): m for m in result["metrics"]}
    of_models = [
        key[1:]
        for key in table
        if key[0] == "p" and key[2].startswith(("chexbert", "radgraph", "bertscore", "semb", "radcliq"))
    ]
    assert {"chexbert_micro_14", "radgraph_partial", "bertscore", "semb_score", "radcliq_v1"} <= {
        name for _, name in of_models
    }
    for key in of_models:
        assert table["same", *key]["value"] == table["p", *key]["value"], key
        assert table["same", *key]["signature"] == table["p", *key]["signature"]
    assert table["other", "native", "bertscore"]["value"] == pytest.approx(np.mean([12 / 20, 1, 12]))
    assert {row["b"] for row in result["comparisons"] if row["metric"] == "bertscore"} == {"same", "other"}


def test_comparing_with_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """launch.compare fills in what the folder gives, for both systems, and its gates may name it."""
    files = []
    for system, said in (("base", [true for _, true, _ in TEXTS]), ("new", [said for *_, said in TEXTS])):
        rows = [{"id": i, "query": "", "reference": true, "prediction": text} for (i, true, _), text in zip(TEXTS, said, strict=True)]  # fmt: skip
        files.append(folder.parent / f"{system}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    unset = dict.fromkeys(("labels", "radgraph", "data"))
    given = {
        "fail_if": ["bertscore < -1pp"],
        "profile": "native",
        "judged": [],
        "trials": 100,
        "weights": str(folder),
        "labels_by": "chexbert",
    }
    monkeypatch.setattr(compare.flags, "FLAGS", SimpleNamespace(**unset, **given, out=str(folder.parent)))
    assert compare.main(["compare", *map(str, files)]) == 1
    found = {row["metric"]: row for row in json.loads((folder.parent / "comparisons.json").read_text())["comparisons"]}
    assert {"chexbert_micro_14", "radgraph_partial", "bertscore", "semb_score"} <= set(found)
    assert found["bertscore"]["diff"] == pytest.approx((15 / 20 + 1 + 0) / 3 - 1)
    monkeypatch.setattr(compare.flags.FLAGS, "weights", None)
    with pytest.raises(UserError, match="no metric 'bertscore'"):
        compare.main(["compare", *map(str, files)])


def test_what_is_missing_is_left_out(folder: Path) -> None:
    (folder / "radgraph/vocab.txt").unlink()
    (folder / "chexbert/chexbert.pth").unlink()
    found, result = scores(folder)
    assert "bertscore" in found and not any(n.startswith(("chexbert", "radgraph", "radcliq", "semb")) for n in found)
    assert any("CheXbert checkpoint with --weights" in warning for warning in result["warnings"])


def test_files_of_the_user_stay(folder: Path) -> None:
    table = {i: np.zeros(14, np.int8) for i, _, _ in TEXTS}
    given = [dataclasses.replace(inputs()[0], labels=table)]
    filled, options = models.fill(given, report.Options(reference_labels=table), folder)
    assert filled[0].labels is table and options.labels_how == "given"


def test_changed_files_are_refused(folder: Path) -> None:
    assert weights.check(folder) is None
    assert weights.seal(folder) == len(weights.files(folder)) == 8
    lines = (folder / weights.SUMS).read_text().splitlines()
    assert f"{hashlib.sha256(b'chexbert.pth').hexdigest()}  chexbert/chexbert.pth" in lines
    assert weights.check(folder) == 8 and weights.check(folder, ["bertscore"]) == 2
    (folder / "chexbert/vocab.txt").write_text("other")
    assert weights.check(folder, ["bertscore"]) == 2
    with pytest.raises(UserError, match=r"vocab\.txt is not the file"):
        scores(folder)
    (folder / "chexbert/vocab.txt").unlink()
    with pytest.raises(UserError, match=r"vocab\.txt is in SHA256SUMS"):
        weights.check(folder)
    with pytest.raises(UserError, match="no folder of weights"):
        weights.check(folder / "nothing")
    with pytest.raises(UserError, match="holds no weights"):
        weights.seal(folder.parent)


def test_doctor_says_what_is_there(folder: Path, tmp_path: Path) -> None:
    (folder / "bertscore/tokenizer.json").unlink()
    text = "\n".join(doctor.of_weights(folder))
    assert "+ chexbert/ for chexbert_*" in text and "Stanford academic" in text
    assert "- bertscore/ for" in text and "missing: tokenizer.json or vocab.txt" in text
    assert "no SHA256SUMS" in text
    assert all("missing" in line for line in doctor.of_weights(None) if line.startswith("  -"))
    lines = doctor.packages()
    assert any(line.startswith("  + jax ") and "Apache" in line for line in lines)
    monkey = dict(doctor.PACKAGES) | {"no-such-package": "nothing at all"}
    doctor.PACKAGES, before = monkey, doctor.PACKAGES
    try:
        assert "  - no-such-package: not installed; without it: nothing at all" in doctor.packages()
    finally:
        doctor.PACKAGES = before


def test_doctor_unpacks_and_seals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "radgraph").mkdir()
    with tarfile.open(tmp_path / "radgraph/radgraph.tar.gz", "w:gz") as tar:
        for name in ("config.json", "weights.th", "vocabulary/radgraph__ner_labels.txt", "../escape.txt"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    assert "not packed out yet" in "\n".join(doctor.of_weights(tmp_path))
    doctor.prepare(tmp_path)
    assert "SHA256SUMS, 4 files" in capsys.readouterr().out
    assert "missing: vocab.txt" in "\n".join(doctor.of_weights(tmp_path))
    assert not (tmp_path.parent / "escape.txt").exists()


def test_doctor_runs(tmp_path: Path) -> None:
    import subprocess

    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "launch.doctor"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cpu" in done.stdout and "Weights (none given: --weights=DIR)" in done.stdout
    bad = subprocess.run([*command, f"--weights={tmp_path / 'x'}"], cwd=root, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert bad.returncode == 2 and "no folder of weights" in bad.stderr and "Traceback" not in bad.stderr
