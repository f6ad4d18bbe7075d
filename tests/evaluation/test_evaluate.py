"""The whole evaluation on a small corpus that stands in memory, and the command as a user runs it."""

import csv
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import corpus as corpora
from evaluation import labels, panels, profiles, report, rouge, scoring, tables
from evaluation.predictions import Predictions, Row
from launch import compare
from launch import evaluate as command
from rad_jax import images
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError

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
        assert selection == "all"
        return RECORDS[split]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryCorpus:
    splits = {name: len(rows) for name, rows in RECORDS.items()}
    made = MemoryCorpus(Path("memory"), {"dataset": "phantom", "access": "public", "image_size": 32, "splits": splits})
    monkeypatch.setattr(Corpus, "open", classmethod(lambda cls, path: made))
    return made


def write(path: Path, predictions: dict[str, str], extra: str = "") -> Path:
    references = {row["id"]: row["findings"] for rows in RECORDS.values() for row in rows}
    rows = [
        {"id": i, "query": "", "reference": references.get(i, "x"), "prediction": p} for i, p in predictions.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + extra)
    return path


def run_evaluate(paths: list[Path], out: Path, data: str | None = None, baselines: bool = False, **options: Any) -> Any:
    """What the command does, in this process."""
    inputs = command.read_inputs(paths)
    found = command.corpus_options(Path(data) if data else None, baselines, inputs)
    return command.evaluate(inputs, report.Options(draws=200, trials=200, **found, **options), out)


def value(result: Any, name: str, system: str | None = None) -> Any:
    return (report.lookup(result, name, system) or {})["value"]


def test_with_truth_and_baselines(memory: MemoryCorpus, tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", PREDICTIONS | {"stranger": "x"}, extra="broken\n")
    result = run_evaluate([preds], tmp_path / "out", "memory", baselines=True)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    source = result["inputs"][0]
    assert (source["read"], source["n"], source["empty_predictions"], source["access"]) == (6, 4, 1, "public")
    assert source["malformed"] == [{"line": 6, "reason": "not JSON"}]
    assert source["not_in_corpus"] == [5]
    assert source["sha256"] == hashlib.sha256(preds.read_bytes()).hexdigest()
    assert [s["kind"] for s in result["systems"]] == ["predictions", *["baseline"] * 3]

    macro, side = (report.lookup(result, name) or {} for name in ("finding_macro_f1", "laterality"))
    assert (macro["per_finding"]["pleural_effusion"]["f1"], macro["per_finding"]["pleural_effusion"]["support"]) == (
        1.0,
        2,
    )
    assert (side["value"], side["n"]) == (0.5, 2)
    assert macro["value"] is None  # two positives are not enough for the macro mean
    assert "unit:patient" in side["signature"]

    # Studies a to d are nearest in grey to t2, t1, t3, and d (60) to t2: t4 has no report, t5 no image.
    frequent = report.lookup(result, "finding_macro_f1", "most frequent normal report") or {}
    assert frequent["per_finding"]["pleural_effusion"]["recall"] == 0.0
    thumbnail = report.lookup(result, "finding_macro_f1", "nearest thumbnail") or {}
    assert [thumbnail["per_finding"]["pleural_effusion"][k] for k in ("recall", "precision")] == [0.5, 0.5]

    text = (tmp_path / "out" / "results.md").read_text()
    for part in (
        "1 of 6 rows left out as malformed (line 6: not JSON)",
        "pleural effusion",
        "nearest thumbnail",
        "order:4|",
    ):
        assert part in text


def test_the_unit_is_what_the_profiles_resample(memory: MemoryCorpus, tmp_path: Path) -> None:
    """LLaVA-Rad's profile resamples reports, whether the patients are known or not."""
    preds = write(tmp_path / "p.jsonl", PREDICTIONS)
    cases = (("native", "memory", "patient"), ("llava-rad", "memory", "report"), ("native", None, "report"))
    for profile, data, unit in (*cases, ("llava-rad,native", "memory", "report,patient")):
        inputs = command.read_inputs([preds])
        found = command.corpus_options(Path(data) if data else None, False, inputs)
        result, scored, _ = report.score(inputs, report.Options(profiles=profile.split(","), **found))
        assert result["inputs"][0]["unit"] == unit
        assert [part.setting.unit for part in scored] == unit.split(",")


def test_schema(tmp_path: Path) -> None:
    """The names and fields that readers of results.json rely on."""
    result = run_evaluate([write(tmp_path / "p.jsonl", PREDICTIONS)], tmp_path / "out")
    assert list(result) == [
        *("schema_version", "created", "tool", "inputs", "systems", "metrics", "published"),
        *("subgroups", "comparisons", "warnings"),
    ]
    assert {"path", "sha256", "n", "unit", "access"} <= result["inputs"][0].keys()
    names = [metric["name"] for metric in result["metrics"]]
    assert {
        "bleu_1",
        "bleu_2",
        "bleu_3",
        "bleu_4",
        "rouge_1",
        "rouge_2",
        "rouge_l",
        "rules_micro_14",
        "rules_macro_5_plus",
    } <= {*names}
    wanted = {"name", "profile", "system", "signature", "value", "ci", "bootstrap_median", "n", "n_failed"}
    assert all(wanted <= metric.keys() for metric in result["metrics"])
    assert not any(name.startswith("chexbert") for name in names)
    for absent in ("chexbert_micro_14", "chexbert_macro_5_plus", "radgraph_partial", "green", "chexprompt"):
        assert any(absent in warning for warning in result["warnings"])
    with pytest.raises(UserError, match="chexbert_micro_14 was not computed"):
        report.require(result, ["bleu_4", "chexbert_micro_14"])


def test_values_by_hand(tmp_path: Path) -> None:
    result = run_evaluate([write(tmp_path / "p.jsonl", PREDICTIONS)], tmp_path / "out")
    # a and c are right word for word, b has one word of four wrong, d says nothing.
    assert value(result, "rouge_l") == pytest.approx((1 + 0.75 + 1 + 0) / 4)
    # Labels of a, b: effusion; c, d: no finding, of which d's is not said.
    assert value(result, "rules_micro_14") == pytest.approx(2 * 3 / (2 * 3 + 0 + 1))
    rows = [json.loads(line) for line in (tmp_path / "out" / "per_report.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(PREDICTIONS)
    assert [row["scores"]["rouge_l"] for row in rows] == [1.0, 0.75, 1.0, 0.0]
    table = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert {row["metric"] for row in table} == {row["name"] for row in result["metrics"]}
    latex = (tmp_path / "out" / "results.tex").read_text()
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 2 and "BLEU-4" in latex
    markdown, shown = (tmp_path / "out" / "results.md").read_text(), {*tables.HEADLINES, *panels.NAMES}
    for name in {row["name"] for row in result["metrics"]} - shown:  # what is no headline is in a table of its own
        assert f"| {name} " in markdown and name.replace("_", "\\_") in latex


def test_several_systems_are_compared_paired(tmp_path: Path) -> None:
    base = write(tmp_path / "base.jsonl", PREDICTIONS)
    right = write(tmp_path / "right.jsonl", {"a": LEFT, "b": RIGHT, "c": CLEAR})
    result = run_evaluate([base, right], tmp_path / "out")
    assert [s["name"] for s in result["systems"]] == ["base", "right"]
    assert result["inputs"][0]["n"] == 3
    assert "base.jsonl: 1 of 4 rows left out, another file lacks their id." in result["warnings"]
    found = next(row for row in result["comparisons"] if row["metric"] == "rouge_l")
    assert (found["a"], found["b"], found["n_better"], found["n_worse"]) == ("base", "right", 1, 0)
    assert found["diff"] == pytest.approx(0.25 / 3)
    assert found["p"] == 1.0 and found["p_min"] == 0.25 and found["exact"] and found["p_holm"] == 1.0
    assert found["family"] == len(result["comparisons"])
    assert result["metrics"][0]["system"] == "base"


def test_files_that_disagree_on_a_reference_are_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", PREDICTIONS), write(tmp_path / "2.jsonl", PREDICTIONS)
    two.write_text(two.read_text().replace('"reference": "The lungs', '"reference": "Both lungs'))
    with pytest.raises(UserError, match="the references of 2 studies differ"):
        run_evaluate([one, two], tmp_path / "out")
    with pytest.raises(UserError, match="no study in common"):
        run_evaluate([one, write(tmp_path / "3.jsonl", {"x": "y"})], tmp_path / "out")


def test_subgroups(tmp_path: Path) -> None:
    rows = [
        {"id": f"s{i}", "query": "", "reference": "one two", "prediction": "one two" if i % 2 else "six"}
        for i in range(45)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    views = ["id,view,sex", *(f"s{i},{'PA' if i % 2 else 'AP'},{'F' if i < 15 else ''}" for i in range(45))]
    (tmp_path / "g.csv").write_text("\n".join(views) + "\n")
    result = run_evaluate([tmp_path / "p.jsonl"], tmp_path / "out", groups=command.read_groups(tmp_path / "g.csv"))
    found = {(r["column"], r["group"]): (r["value"], r["n"]) for r in result["subgroups"] if r["name"] == "rouge_l"}
    assert found == {("view", "PA"): (1.0, 22), ("view", "AP"): (0.0, 23)}  # 15 women are too few
    text = (tmp_path / "out" / "results.md").read_text()
    assert "view: PA" in text and "Behind the averages" in text
    (tmp_path / "no_id.csv").write_text("x\n")
    for name, message in (("no_id.csv", "no column 'id'"), ("absent.csv", "no groups at")):
        with pytest.raises(UserError, match=message):
            command.read_groups(tmp_path / name)


def test_profiles_stand_side_by_side(tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", PREDICTIONS)
    names = list(profiles.PROFILES)
    result = run_evaluate([preds], tmp_path / "out", profiles=names, bleu=["hf"])
    signatures = {(m["profile"], m["name"]): m["signature"] for m in result["metrics"]}
    assert {profile for profile, _ in signatures} == {*names}
    assert len({signatures[profile, "bleu_4"] for profile in ("native", "llava-rad", "radeval")}) == 3
    assert "tok:blank" in signatures["radeval", "bleu_4"] and "stem:porter" in signatures["radeval", "rouge_l"]
    assert "smooth:none" in signatures["native", "bleu_4_hf"] and ("radeval", "bleu_4_hf") not in signatures
    assert "f:1.2" in signatures["r2gen", "rouge_l"] and "idf:4-references" in signatures["r2gen", "cider"]
    assert "tok:radcliq" in signatures["rexrank", "bleu_2"]
    assert "value:median-200" in signatures["llava-rad", "rouge_l"] and "seed3" in signatures["llava-rad", "rouge_l"]
    middle = rouge.bootstrap_of_means(np.array([1.0, 0.75, 1.0, 0.0]), 200, 3)[1]
    assert (report.lookup(result, "rouge_l", profile="llava-rad") or {})["value"] == middle


def test_label_files_give_their_metrics(tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", PREDICTIONS)
    true, said = np.zeros((4, 14), np.int8), np.zeros((4, 14), np.int8)
    true[:3, 1] = said[1:, 1] = labels.POSITIVE
    said[0, 1] = labels.UNCERTAIN
    for name, table in (("true", true), ("said", said)):
        labels.write_csv(tmp_path / f"{name}.csv", PREDICTIONS, table)
    inputs = command.read_inputs([preds], [tmp_path / "said.csv"])
    options = report.Options(draws=200, reference_labels=labels.read_csv(tmp_path / "true.csv"))
    result, _ = report.evaluate(inputs, options)
    assert value(result, "chexbert_micro_14") == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert value(result, "chexbert_micro_14_plus") == pytest.approx(2 * 3 / (2 * 3 + 1))
    assert value(result, "chexbert_macro_5") == pytest.approx(2 / 3 / 5)
    assert not any("chexbert" in warning.split(" left out")[0] for warning in result["warnings"])
    other, _ = report.evaluate(inputs, dataclasses.replace(options, labels_by="mine"))
    assert value(other, "mine_micro_14") == value(result, "chexbert_micro_14")
    assert (report.lookup(other, "mine_micro_14") or {})["signature"].startswith("mine|labels:14|")
    labels.write_csv(tmp_path / "said.csv", ["a"], said[:1])
    with pytest.raises(UserError, match="--labels: a file lacks 3 of the 4 studies"):
        report.evaluate(command.read_inputs([preds], [tmp_path / "said.csv"]), options)


def test_macro_mean_needs_only_the_asked_support(memory: MemoryCorpus, tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", PREDICTIONS)
    macro = report.lookup(run_evaluate([preds], tmp_path / "out", "memory", min_support=2), "finding_macro_f1") or {}
    assert macro["value"] == 1.0 and macro["per_finding"]["pleural_effusion"]["in_macro"]
    assert "classes:1|min-support:2" in macro["signature"]


def test_folder_corpus_has_patients_but_no_truth(memory: MemoryCorpus, tmp_path: Path) -> None:
    folder = MemoryCorpus(memory.path, {**memory.meta, "dataset": "folder"})
    studies = corpora.studies_of(folder, corpora.records_of(folder, PREDICTIONS))
    assert studies["a"] == report.Study("p1", None)
    inputs = command.read_inputs([write(tmp_path / "p.jsonl", PREDICTIONS)])
    result, _ = report.evaluate(inputs, report.Options(draws=200, studies=studies, parse=lambda text: []))
    assert report.lookup(result, "finding_macro_f1") is None
    assert "unit:patient" in (report.lookup(result, "bleu_4") or {})["signature"]
    assert any("whose truth is known" in warning for warning in result["warnings"])
    head = tables.summary(result, "native")[0]
    assert head == ["system", "rules micro 14", "rules macro 14", "BLEU-1", "BLEU-2", "BLEU-4", "ROUGE-L"]


def test_predictions_of_another_corpus_are_refused(memory: MemoryCorpus, tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", {"x": "y"})
    with pytest.raises(UserError, match="holds none of the predicted ids"):
        run_evaluate([preds], tmp_path / "out", "memory")
    assert not (tmp_path / "out").exists()


def test_empty_references_stay_out_of_text_scores() -> None:
    rows = [Row("a", "", CLEAR, CLEAR, 1), Row("b", "", " ", CLEAR, 2)]
    result, each = report.evaluate([report.Input("p", Predictions(rows, []))], report.Options(draws=200))
    bleu4 = report.lookup(result, "bleu_4") or {}
    assert bleu4["value"] == pytest.approx(100.0) and bleu4["n"] == 1 and value(result, "rules_micro_14") == 1.0
    assert "1 of 2 references are empty: not in scores of the text." in result["warnings"]
    assert [row["scores"]["rouge_l"] for row in each] == [1.0, None]
    nothing, _ = report.evaluate([report.Input("p", Predictions(rows[1:], []))], report.Options(draws=200))
    assert nothing["metrics"] == []
    tables.markdown(nothing)


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.rouge.installed", lambda: False)
    inputs = [report.Input("p", Predictions([Row("a", "", CLEAR, CLEAR, 1)], []))]
    result, _ = report.evaluate(inputs, report.Options(draws=200))
    assert report.lookup(result, "rouge_l") is None and report.lookup(result, "bleu_4") is not None
    assert any("rouge-score is not installed (pip install rad_jax[eval])" in line for line in result["warnings"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rouge_l < -0.5pp at 95%", scoring.Gate("rouge_l", True, -0.5, True, 0.95)),
        ("bleu_4>2", scoring.Gate("bleu_4", False, 2.0, False, None)),
    ],
)
def test_gates_are_read(text: str, expected: scoring.Gate) -> None:
    assert scoring.parse_gate(text) == scoring.parse_gate(str(expected)) == expected


@pytest.mark.parametrize("text", ["rouge_l", "rouge_l = 3", "rouge_l < x", "rouge_l < 1 at 100%", "rouge_l < 1 at 95"])
def test_what_is_no_gate(text: str) -> None:
    with pytest.raises(ValueError, match="rouge_l"):
        scoring.parse_gate(text)


@pytest.mark.parametrize(
    ("gate", "fails"),
    [
        ("rouge_l < -1pp", True),  # 0.5 lower everywhere
        ("rouge_l < -0.5pp at 95%", True),
        ("rouge_l < -60pp", False),
        ("rouge_l > 0", False),
        ("bleu_4 < -0.5 at 95%", True),
    ],
)
def test_gates_fail_on_what_got_worse(tmp_path: Path, gate: str, fails: bool) -> None:
    inputs = command.read_inputs(thirty_reports(tmp_path, "one two five six"))
    result, failures = compare.compare(inputs, report.Options(trials=200), [scoring.parse_gate(gate)])
    assert bool(failures) == fails
    found = next(row for row in result["comparisons"] if row["metric"] == "rouge_l")
    assert (found["diff"], found["n_worse"], found["p"]) == (-0.5, 30, 1 / 201)
    with pytest.raises(UserError, match="no metric 'nothing'"):
        compare.compare(inputs, report.Options(), [scoring.parse_gate("nothing < 0")])


def thirty_reports(folder: Path, new: str) -> tuple[Path, Path]:
    """base.jsonl says what the references say, new.jsonl says `new`."""
    for file, text in (("base", "one two three four"), ("new", new)):
        rows = [{"id": f"s{i}", "query": "", "reference": "one two three four", "prediction": text} for i in range(30)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "base.jsonl", folder / "new.jsonl"


def test_comparing_ends_in_a_status(tmp_path: Path) -> None:
    """0 when no gate fails, 1 when one does, after everything was written and told, and 2 for what is no gate."""
    files = thirty_reports(tmp_path, "one two five six")

    def run_compare(name: str, *gates: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "launch.compare", *map(str, files), f"--out={tmp_path / name}", "--trials=200"]
        line += [f"--fail_if={gate}" for gate in gates]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)

    passed = run_compare("passed", "rouge_l < -60pp", "bleu_4 > 0")
    assert (passed.returncode, "FAILED" in passed.stdout) == (0, False), passed.stderr
    failed = run_compare("failed", "rouge_l < -60pp", "rouge_l < -1pp at 95%")
    assert failed.returncode == 1, failed.stderr
    said = [line for line in failed.stdout.splitlines() if line.startswith("FAILED")]
    assert said == ["FAILED: new against base: rouge_l < -1pp at 95% (-0.5000)"]
    for done, name in ((passed, "passed"), (failed, "failed")):
        assert "| ROUGE-L" in done.stdout
        rows = json.loads((tmp_path / name / "comparisons.json").read_text())["comparisons"]
        assert next(row["diff"] for row in rows if row["metric"] == "rouge_l") == -0.5
    for gate, message in (("rouge_l = 3", "is no condition"), ("nothing < 0", "no metric 'nothing'")):
        refused = run_compare("refused", gate)
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "refused").exists()


def test_comparing_what_was_given(tmp_path: Path) -> None:
    """Annotations for both systems and a judge's scores for each: their metrics are compared, and gates may name them."""
    files = thirty_reports(tmp_path, "one two three")
    for name, count in (("references", 2), ("base", 2), ("new", 1)):
        words = ("lungs", "clear")[:count]
        entities = {str(i): {"tokens": word, "label": "OBS-DP", "relations": []} for i, word in enumerate(words)}
        (tmp_path / f"{name}.json").write_text(json.dumps({f"s{i}": {"entities": entities} for i in range(30)}))
    for system, errors in (("base", 0.0), ("new", 2.0)):
        rows = [
            {"id": f"s{i}", "system": system, "signature": "judge", "votes": 1, "scores": {"chexprompt_total": errors}}
            for i in range(30)
        ]
        (tmp_path / f"judged_{system}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [sys.executable, "-m", "launch.compare", *map(str, files), f"--out={tmp_path}", "--trials=200"]
    line += ["--radgraph=" + ",".join(str(tmp_path / f"{name}.json") for name in ("references", "base", "new"))]
    line += ["--judged=" + ",".join(str(tmp_path / f"judged_{name}.jsonl") for name in ("base", "new"))]
    line += ["--fail_if=radgraph_partial < 0 at 95%", "--fail_if=chexprompt_total > 1.5 at 95%"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    found = {row["metric"]: row for row in json.loads((tmp_path / "comparisons.json").read_text())["comparisons"]}
    assert found["radgraph_partial"]["diff"] == pytest.approx(2 / 3 - 1) and found["radgraph_partial"]["n_worse"] == 30
    assert found["chexprompt_total"]["diff"] == 2.0 and found["chexprompt_total"]["p"] == 1 / 201
    assert (found["chexprompt_total"]["n_better"], found["chexprompt_total"]["n_worse"]) == (0, 30)  # more errors
    assert "FAILED: new against base: chexprompt_total > 1.5 at 95% (+2.0000)" in done.stdout
    assert "FAILED: new against base: radgraph_partial < 0 at 95% (-0.3333)" in done.stdout


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "launch.evaluate", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_prints_a_table(tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", PREDICTIONS, extra="{}\n")
    done = run(str(preds), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "1 of 5 rows left out as malformed (line 5: no field 'id')." in done.stdout
    assert "1 of 4 predictions are empty and score as such." in done.stdout
    assert "| system" in done.stdout and "ROUGE-L" in done.stdout
    assert CLEAR not in done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted((*command.FILES, command.PAGE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a predictions file and a folder"),
        (["absent.jsonl", "--out={tmp}/out"], "no predictions file at absent.jsonl"),
        (["{tmp}/p.jsonl"], "give a predictions file and a folder"),
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


def test_a_required_metric_that_is_missing_is_status_2_with_the_rest_written(tmp_path: Path) -> None:
    preds = write(tmp_path / "p.jsonl", PREDICTIONS)
    done = run(str(preds), f"--out={tmp_path / 'out'}", "--require=bleu_4,chexbert_micro_14")
    assert done.returncode == 2 and "--require: chexbert_micro_14 was not computed" in done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]


@pytest.mark.parametrize(
    ("level", "flags", "expected"),
    [
        ("credentialed", [], "credentialed"),
        ("credentialed", ["--access=public"], "credentialed"),
        ("public", [], "public"),
        ("", ["--access=public"], "public"),
    ],
)
def test_the_strictest_access_counts(tmp_path: Path, level: str, flags: list[str], expected: str) -> None:
    preds = write(tmp_path / "p.jsonl", PREDICTIONS)
    rows = [json.loads(line) | ({"access": level} if level else {}) for line in preds.read_text().splitlines()]
    preds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(str(preds), f"--out={tmp_path / 'out'}", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["inputs"][0]["access"] == expected
    restricted = "Restricted data." in (tmp_path / "out" / "report.html").read_text()
    assert restricted == (expected != "public")
    mode = (tmp_path / "out" / "per_report.jsonl").stat().st_mode & 0o077
    assert (mode == 0) == (expected != "public")


def test_groups_of_a_corpus() -> None:
    known = {"view": "AP", "sex": "F", "age": 63, "indication": "Cough."}
    records = {"a": known, "b": {**known, "sex": "", "age": -1, "indication": " "}, "c": {**known, "age": 91}}
    found = corpora.groups_of(records)
    assert found["a"] == {"view": "AP", "sex": "F", "age": "60-79", "indication": "given"}
    assert found["b"] == {"view": "AP", "sex": "", "age": "", "indication": "absent"}
    assert [corpora.groups_of({"x": {"age": age}})["x"]["age"] for age in (0, 17, 18, 39, 80, 91)] == [
        *("00-17", "00-17", "18-39", "18-39", "80+", "80+"),
    ]
    with pytest.raises(UserError, match="--groups=corpus needs"):
        command.corpus_options(None, False, [], True)
