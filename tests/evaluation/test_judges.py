"""Judges: parsers against hand-written replies, aggregates against published arithmetic, and commands against a server on this machine."""

import hashlib
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from evaluation import chexprompt, crimson, green, grounded, judging, radfact, report, scoring, tables
from evaluation.grounded import Phrase
from evaluation.predictions import Row, access_of
from launch import evaluate, metaeval
from launch import judge as command
from rad_jax.chat.client import Answer, UnusableError
from rad_jax.corpus import Corpus
from rad_jax.errors import UserError

HEAD = "Number of clinically {}significant errors by type: {}"
SIGNIFICANT, INSIGNIFICANT = (1, 0, 2, 0, 0, 1), (0, 0, 0, 3, 0, 0)


def listed(counts, outer="[]", inner="()", quote=""):
    items = ", ".join(
        f"{inner[0]}{quote}{kind}{quote}, {n}{inner[1]}" for kind, n in zip("ABCDEF", counts, strict=True)
    )
    return f"{outer[0]}{items}{outer[1]}"


def two(first, second, between="\n"):
    return HEAD.format("", first) + between + HEAD.format("in", second)


PLAIN = two(listed(SIGNIFICANT), listed(INSIGNIFICANT))
# The forms of replies in which the published parser was seen to succeed, to fail, and to accept what it should not.
PARSED = {
    "square brackets outside": PLAIN,
    "round brackets outside": two(listed(SIGNIFICANT, "()"), listed(INSIGNIFICANT, "()")),
    "square brackets inside": two(listed(SIGNIFICANT, "[]", "[]"), listed(INSIGNIFICANT, "[]", "[]")),
    "blank line between": two(listed(SIGNIFICANT), listed(INSIGNIFICANT), "\n\n"),
    "chatter before": "Sure! I compared both reports (A to F) for clinically significant errors.\n\n" + PLAIN,
    "text after Explanation": PLAIN + "\nExplanation: (A, 9) would be wrong. Number of clinically significant errors by type: [(A, 7)]",
    "both lists on one line": two(listed(SIGNIFICANT), listed(INSIGNIFICANT), " "),
    "bold header": PLAIN.replace("Number of", "**Number of").replace("type:", "type:**"),
    "trailing note": PLAIN + "\nNote: the candidate also says (B, twice) that the heart is normal.",
    "quoted keys": two(listed(SIGNIFICANT, quote="'"), listed(INSIGNIFICANT, quote='"')),
    "JSON": json.dumps({"significant": dict(zip("ABCDEF", SIGNIFICANT, strict=True)), "insignificant": dict(zip("ABCDEF", INSIGNIFICANT, strict=True))}),
}  # fmt: skip
FAILED = {
    "only A and B": (two("[(A, 1), (B, 0)]", "[(A, 0), (B, 0)]"), chexprompt.MISSING),
    "cut at the token limit": (PLAIN[: PLAIN.rindex("(D")], chexprompt.CUT),
    "filtered": ("Prompt was filtered", chexprompt.FILTERED),
    "empty": ("", chexprompt.EMPTY),
}


def test_fifteen_replies():
    assert len(PARSED) + len(FAILED) == 15


@pytest.mark.parametrize("name", PARSED)
def test_a_reply_that_is_to_be_read(name):
    assert chexprompt.parse(PARSED[name]) == chexprompt.Counts(SIGNIFICANT, INSIGNIFICANT)


@pytest.mark.parametrize("name", FAILED)
def test_a_reply_that_is_to_fail(name):
    reply, reason = FAILED[name]
    with pytest.raises(UnusableError) as error:
        chexprompt.parse(reply)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (HEAD.format("", listed(SIGNIFICANT)), chexprompt.NO_LISTS),
        ("I cannot judge these reports.", chexprompt.NO_LISTS),
        (two(listed(SIGNIFICANT).replace("2", "1.5"), listed(INSIGNIFICANT)), chexprompt.CUT),
        (two(listed(SIGNIFICANT).replace("2", "-2"), listed(INSIGNIFICANT)), chexprompt.CUT),
        (two(listed(SIGNIFICANT).replace("B", "A"), listed(INSIGNIFICANT)), chexprompt.TWICE),
        (PLAIN + "\n" + HEAD.format("", listed(INSIGNIFICANT)), chexprompt.TWICE),
        (PLAIN[:-2], chexprompt.CUT),
        ('{"significant": {"A": 1}, "insignificant": {"A": 0}}', chexprompt.MISSING),
    ],
)
def test_no_reply_is_guessed_at(reply, reason):
    with pytest.raises(UnusableError) as error:
        chexprompt.parse(reply)
    assert error.value.reason == reason


def test_lists_said_twice_alike_count_once():
    assert chexprompt.parse(PLAIN + "\n\nTo sum up:\n" + PLAIN) == chexprompt.Counts(SIGNIFICANT, INSIGNIFICANT)


def test_our_own_examples_are_read_by_our_own_parser():
    """The five worked examples of the prompt, each pair of lists; and its answer form has all the types."""
    text = (judging.PROMPTS / "chexprompt.txt").read_text(encoding="utf-8")
    examples = [part.partition("Errors:\n")[2].split("\n\n")[0] for part in text.split("Example ")[1:]]
    assert len(examples) == 5
    totals = [sum(counts.significant + counts.insignificant) for counts in map(chexprompt.parse, examples)]
    assert totals == [0, 3, 2, 2, 2]
    assert "___" not in text


def aggregate(values, failed=0, reason="filtered"):
    """Metrics of CheXprompt counts of (significant, insignificant) errors, all of type A."""
    verdicts = [
        judging.Verdict([chexprompt.scores(chexprompt.Counts((a, 0, 0, 0, 0, 0), (b, 0, 0, 0, 0, 0)))])
        for a, b in values
    ]
    verdicts += [judging.Verdict(reasons=[reason])] * failed
    pairs = [judging.Pair(str(i), "r", "c") for i in range(len(verdicts))]
    lines = judging.rows(pairs, verdicts, "s", "sig")
    judged = judging.Judged("sig", {line["id"]: line["scores"] for line in lines})
    return {metric.name: metric for metric in judging.metrics(judged, [pair.id for pair in pairs])}, lines


def test_aggregates():
    """Hand-computed: four reports rated, one failed. The standard deviation is the sample's, 1.7078; the population's, 1.4790, is not reported."""
    found, lines = aggregate([(0, 0), (1, 0), (3, 1), (0, 2)], failed=1)
    assert found["chexprompt_significant"].total() == 1.0
    assert found["chexprompt_total"].total() == 1.75
    spread = judging.extras(found["chexprompt_total"])["sd"]
    assert spread == pytest.approx(1.7078, abs=1e-4) and spread * np.sqrt(3 / 4) == pytest.approx(1.4790, abs=1e-4)
    free = found["chexprompt_significant_free"]
    assert (free.total(), free.n, free.n_failed) == (0.5, 4, 1)
    assert judging.extras(free)["bounds"] == pytest.approx([0.4, 0.6])
    assert found["chexprompt_error_free"].total() == 0.25
    assert judging.extras(found["chexprompt_error_free"])["bounds"] == pytest.approx([0.2, 0.4])
    assert found["chexprompt_significant_A"].total() == 1.0 and found["chexprompt_significant_B"].total() == 0.0
    assert lines[-1]["failed"] == "filtered" and lines[-1]["scores"] == {}
    setting = scoring.Setting(list("aabbc"), "patient", 500, 0)
    row = scoring.entries([found["chexprompt_total"]], setting)[0]
    assert row["n_failed"] == 1 and row["n"] == 4 and row["ci"][0] < 1.75 < row["ci"][1]
    assert row["signature"] == "sig|mean|unit:patient|ci:percentile-500-seed0"


def test_comparisons_are_over_the_reports_that_both_have_a_verdict_of():
    """Five reports. A lacks a verdict of the last, which is B's worst, and B of the first, which is A's worst; by hand over the other three."""
    errors = {"a": [9.0, 1.0, 2.0, 3.0, None], "b": [None, 2.0, 2.0, 4.0, 20.0]}
    ids = list("vwxyz")
    judged = {
        name: judging.Judged(
            "sig", {i: {} if v is None else {"chexprompt_total": v} for i, v in zip(ids, row, strict=True)}
        )
        for name, row in errors.items()
    }
    a, b = (judging.metrics(judged[name], ids) for name in "ab")
    assert (a[0].total(), b[0].total()) == (15 / 4, 28 / 4)
    setting = scoring.Setting(ids, "report", 200, 0)
    row = scoring.compare(("a", "b"), a, b, setting, 100)[0]
    assert (row["n"], row["n_dropped"]) == (3, 2)
    assert row["diff"] == pytest.approx(2 / 3) and 0.0 <= row["ci"][0] <= row["ci"][1] <= 1.0
    assert row["p"] == 0.5  # of four ways to swap the two reports that differ, two are as far apart
    gate = scoring.parse_gate("chexprompt_total > 1")
    assert not gate.fails(a[0], b[0], setting)  # 7 less 3.75 would have failed it
    again = scoring.compare(("a", "a"), a, a, setting, 100)[0]
    assert (again["diff"], again["n"], again["n_dropped"]) == (0.0, 4, 0)
    table = tables.comparisons({"comparisons": [row | {"profile": "native", "p_holm": 0.5}]})
    assert table[0][-1] == "n" and table[1][-1] == "3 (2 lack a score)"


def test_a_report_without_a_reference_needs_no_verdict(tmp_path):
    """launch.judge leaves it out, so its scores lack it; the rows of the others stay in their places."""
    preds = tmp_path / "p.jsonl"
    rows = [
        {"id": i, "query": "", "reference": text, "prediction": "x"} for i, text in (("a", "x"), ("b", " "), ("c", "y"))
    ]
    preds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = {"p": judging.Judged("sig", {"a": {"green": 1.0}, "c": {}})}
    _, scored, _ = report.score(evaluate.read_inputs([preds]), report.Options(judged=[judged]))
    metric = next(m for m in scored[0].systems["p"] if m.name == "green")
    assert metric.rows.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]] and (metric.n, metric.n_failed) == (1, 1)
    assert metric.scored is not None and metric.scored.tolist() == [True, False, False]
    with pytest.raises(UserError, match="lack 1 of the 2 reports"):
        report.score(
            evaluate.read_inputs([preds]), report.Options(judged=[{"p": judging.Judged("s", {"a": {"green": 1.0}})}])
        )


def test_votes():
    votes = [chexprompt.scores(chexprompt.Counts((n, 0, 0, 0, 0, 0), (0,) * 6)) for n in (0, 1, 2)]
    verdict = judging.Verdict(votes)
    assert verdict.scores()["chexprompt_total"] == 1.0 and verdict.spread()["chexprompt_total"] == 1.0
    assert verdict.scores()["chexprompt_error_free"] == pytest.approx(1 / 3)
    assert not judging.Verdict(votes[:2], ["x"]).failed and not judging.Verdict(votes[:1], ["x"]).failed
    assert judging.Verdict(votes[:1], ["x", "y"]).failed == "x" and judging.Verdict([], ["y"]).failed == "y"


def green_text(significant, matched, marks="abcdef", insignificant=(0,) * 6):
    names = (
        "False report",
        "Missing finding",
        "Wrong location",
        "Wrong severity",
        "Comparison not in reference",
        "Omitted comparison",
    )

    def block(counts):
        return "\n".join(f"({mark}) {name}: {n}. words" for mark, name, n in zip(marks, names, counts, strict=True))

    return (
        f"[Explanation]:\nwords\n\n[Clinically Significant Errors]:\n{block(significant)}\n\n"
        f"[Clinically Insignificant Errors]:\n{block(insignificant)}\n\n[Matched Findings]:\n{matched}\n"
    )


@pytest.mark.parametrize(
    ("errors", "matched", "score"),
    [
        ((2, 3, 0, 1, 0, 0), "0. ", 0),
        ((2, 1, 2, 0, 0, 0), "1. heart", 0.166667),
        ((0, 2, 1, 1, 0, 0), "2. a; b", 0.333333),
        ((1, 0, 0, 0, 0, 0), "1. a", 0.5),
        ((1, 0, 1, 1, 0, 0), "1. a", 0.25),
        ((0, 0, 0, 0, 0, 0), "3. a; b; c", 1),
        ((0, 0, 0, 0, 0, 0), "2 findings", 1),
    ],
)
def test_green_arithmetic(errors, matched, score):
    for marks in ("abcdef", "123456"):
        assert green.scores(green.parse(green_text(errors, matched, marks)))["green"] == pytest.approx(score, abs=1e-6)
    value = {
        "matched": int(matched[0]),
        "significant": dict(zip("ABCDEF", errors, strict=True)),
        "insignificant": dict.fromkeys("ABCDEF", 5),
    }
    assert green.scores(green.parse(json.dumps(value)))["green"] == pytest.approx(score, abs=1e-6)


def test_green_takes_no_missing_block_for_a_zero():
    whole = green_text((0,) * 6, "1. a")
    for broken in (
        "",
        whole.partition("[Clinically Insig")[0],
        whole.replace("(c)", "(g)"),
        whole.replace("1. a", "many"),
    ):
        with pytest.raises(UnusableError):
            green.parse(broken)


@pytest.mark.parametrize(
    ("matched", "missed", "invented", "expected"),
    [
        ([crimson.Matched("urgent")], [], [], 1.0),  # crimson-score 0.2.0
        ([], [], [], 1.0),
        ([crimson.Matched("urgent")], ["actionable"], [], 0.6667),
        ([crimson.Matched("urgent", ["significant"])], [], [], 0.6667),
        ([crimson.Matched("actionable", ["significant"])], [], [], 0.5),
        ([], [], ["actionable"], -0.3333),
        ([], [], ["urgent"], -0.5),
        ([crimson.Matched("actionable")], [], ["urgent"], -0.3333),
        ([], ["urgent", "actionable"], [], 0.0),
        ([crimson.Matched("benign")], [], [], 1.0),
    ],
)
def test_crimson_arithmetic(matched, missed, invented, expected):
    assert crimson.score(matched, missed, invented) == pytest.approx(expected, abs=5e-5)


def test_crimson_knows_its_severities():
    with pytest.raises(KeyError):
        crimson.score([], ["severe"], [])


def test_crimson_reads_the_example_of_its_prompt():
    text = (judging.PROMPTS / "crimson.txt").read_text(encoding="utf-8")
    reply = next(line for line in text.splitlines() if line.startswith('{"matched"'))
    found = crimson.parse(reply)
    # matched: 0.5 x 0.5 / (0.5 + 0.5), benign nothing; of it 0.5 for the invented one.
    assert crimson.scores(found) == pytest.approx(
        {"crimson": -0.25 / 1.25, "crimson_matched": 2, "crimson_missed": 1, "crimson_invented": 1}
    )
    assert [item["of"] for item in found.evidence] == ["matched", "matched", "missed", "invented"]
    for broken in ("", reply.replace("urgent", "severe"), reply.replace('"missed"', '"lost"'), reply[:-2]):
        with pytest.raises(UnusableError):
            crimson.parse(broken)


def test_crimson_as_a_command(tmp_path, chat_server, options):
    """A server that finds every sentence with another word than the reference's invented: scores, interval and evidence are written."""
    write_predictions(tmp_path / "p.jsonl", 8)

    def reply(body):
        reference, candidate = re.findall(r'"""(.*?)"""', body["messages"][-1]["content"], re.DOTALL)[-2:]
        parts = [{part for part in re.split(r"[.]\s*", text) if part} for text in (reference, candidate)]
        lists = {"missed": parts[0] - parts[1], "invented": parts[1] - parts[0]}
        named = {
            name: [{"finding": part, "severity": "actionable"} for part in sorted(found)]
            for name, found in lists.items()
        }
        return json.dumps({"matched": [], **named})

    command.judge_file(
        tmp_path / "p.jsonl", options(tmp_path / "o", chat_server(reply).url, judge="crimson", access="public")
    )
    scored = judging.read(tmp_path / "o" / "scores.jsonl")["p"].scores
    assert scored["s0"]["crimson"] == 1.0  # word for word
    assert scored["s1"] == pytest.approx(
        {"crimson": -1 / 3, "crimson_matched": 0, "crimson_missed": 1, "crimson_invented": 1}
    )
    assert scored["s2"]["crimson"] == 0.0 and scored["s2"]["crimson_missed"] == 2.0
    entry = json.loads((tmp_path / "o" / "results.json").read_text())["metrics"][0]
    assert entry["name"] == "crimson" and entry["ci"][0] < entry["value"] < entry["ci"][1]
    first = json.loads((tmp_path / "o" / "evidence.jsonl").read_text().splitlines()[1])
    assert {item["finding"] for item in first["evidence"]} == {"Clear lungs", "Edema"}


REFERENCE = "Small left effusion. No pneumothorax. Clear lungs. Normal heart."
CANDIDATE = "Small left effusion. No pneumothorax. Edema. Normal heart."


def by_sentences(questions):
    """A model that splits at full stops and lets follow what stands there word for word."""
    for question in questions:
        text = question.messages[-1]["content"]
        if "Statement:" in text:
            report, statement = re.findall(r'"""(.*?)"""', text, re.DOTALL)[-2:]
            yield question, Answer(question.check(json.dumps({"follows": statement in report})))
        else:
            report = re.findall(r'"""(.*?)"""', text, re.DOTALL)[-1]
            parts = [f"{part}." for part in report.rstrip(".").split(". ")]
            yield question, Answer(question.check(json.dumps({"statements": parts})))


def test_radfact():
    pairs = [
        judging.Pair("a", REFERENCE, CANDIDATE),
        judging.Pair("b", "Edema.", "Edema. Mass."),
        judging.Pair("c", "Edema.", ""),
    ]
    verdicts = judging.judge(radfact.judge(), by_sentences, pairs, votes=2)
    assert [v.scores() for v in verdicts] == [
        {"radfact_precision": 0.75, "radfact_recall": 0.75},
        {"radfact_precision": 0.5, "radfact_recall": 1.0},
        {"radfact_precision": None, "radfact_recall": 0.0},
    ]
    lines = judging.rows(pairs, verdicts, "s", "sig")
    found = {
        m.name: m
        for m in judging.metrics(judging.Judged("sig", {r["id"]: r["scores"] for r in lines}), ["a", "b", "c"])
    }
    precision, recall = 0.625, 1.75 / 3
    assert found["radfact_precision"].n == 2 and found["radfact_recall"].n == 3
    assert found["radfact_f1"].total() == pytest.approx(2 * precision * recall / (precision + recall))


def test_the_harmonic_mean_is_that_of_the_means():
    """RadFact's own test, from verdicts: logical precision and recall 0.75 give 0.75, spatial 0.5 and 0.6667 give 0.5714."""
    said = grounded.radfact([Phrase(True), Phrase(True, True), Phrase(True, False), Phrase(False)])
    true = grounded.radfact([Phrase(True, True), Phrase(True, True), Phrase(True), Phrase(False, True)])
    for share, expected in (("logical", (0.75, 0.75, 0.75)), ("spatial", (0.5, 0.6667, 0.5714))):
        judged = judging.Judged("sig", {"a": {"radfact_precision": said[share], "radfact_recall": true[share]}})
        found = {m.name: m.total() for m in judging.metrics(judged, ["a"])}
        names = ("radfact_precision", "radfact_recall", "radfact_f1")
        assert [found[name] for name in names] == pytest.approx(expected, abs=1e-4)


def test_a_failed_call_fails_the_report():
    def ask(questions):
        for question, answer in by_sentences(questions):
            failing = (
                "Edema" in question.messages[-1]["content"].rpartition('"""Edema')[1]
                and "Statement" in question.messages[-1]["content"]
            )
            yield question, Answer(reason="filtered") if failing else answer

    pairs = [judging.Pair("a", REFERENCE, CANDIDATE), judging.Pair("b", "Mass.", "Mass.")]
    verdicts = judging.judge(radfact.judge(), ask, pairs, votes=1)
    assert [v.failed for v in verdicts] == ["filtered", ""]


def test_who_may_have_predictions():
    rows = [Row("a", "", "", "", 1, level) for level in ("public", "")]
    assert access_of(rows) == "private"
    assert access_of(rows[:1]) == "public"
    assert access_of(rows, "public") == "public"
    assert access_of(rows, "public", "credentialed") == "credentialed"
    assert access_of([Row("a", "", "", "", 1, "credentialed")], "public") == "credentialed"
    assert access_of([Row("a", "", "", "", 1, "no level")]) == "private"


def counter(body):
    """A CheXprompt judge by rules: a sentence of one report that the other lacks is a significant error, of type A or B."""
    reference, candidate = re.findall(r'"""(.*?)"""', body["messages"][-1]["content"], re.DOTALL)[-2:]
    parts = [{part for part in re.split(r"[.]\s*", text) if part} for text in (reference, candidate)]
    return two(listed((len(parts[1] - parts[0]), len(parts[0] - parts[1]), 0, 0, 0, 0)), listed((0,) * 6))


def evident(**changes):
    """The answer of the prompt's own example, changed."""
    text = (judging.PROMPTS / "chexprompt_json.txt").read_text(encoding="utf-8")
    return json.loads(next(line for line in text.splitlines() if line.startswith('{"evidence"'))) | changes


def test_errors_must_be_pointed_at():
    pair = judging.Pair(
        "a", "Moderate left pleural effusion. Old healed rib fracture.", "Moderate right pleural effusion."
    )
    counts = chexprompt.parse_with_evidence(json.dumps(evident()), pair)
    assert (counts.significant, counts.insignificant) == ((0, 0, 1, 0, 0, 0), (0, 1, 0, 0, 0, 0))
    assert counts.evidence[0]["note"] == "wrong side"
    error = evident()["evidence"][0]
    for answer, reason in (
        (evident(evidence=[]), chexprompt.NOT_EVIDENT),
        (evident(evidence=[error]), chexprompt.NOT_EVIDENT),
        (evident(evidence=[error | {"candidate_span": "huge effusion"}]), chexprompt.NOT_QUOTED),
        (evident(evidence=[error | {"candidate_span": "", "reference_span": ""}]), chexprompt.NOT_QUOTED),
        (evident(evidence=[error | {"type": "G"}]), "not of the schema"),
        (evident(significant={"A": 1}), "not of the schema"),
    ):
        with pytest.raises(UnusableError) as found:
            chexprompt.parse_with_evidence(json.dumps(answer), pair)
        assert found.value.reason == reason


def test_evidence_is_kept(tmp_path, chat_server, options):
    row = {"id": "a", "query": "", "reference": "Moderate left pleural effusion. Old healed rib fracture."}
    (tmp_path / "p.jsonl").write_text(json.dumps(row | {"prediction": "Moderate right pleural effusion."}) + "\n")
    replies = iter([evident(evidence=[]), evident()])
    server = chat_server(lambda body: json.dumps(next(replies)))
    command.judge_file(tmp_path / "p.jsonl", options(tmp_path / "o", server.url, judge="chexprompt_json"))
    assert (
        "evidence and counts differ for significant C, insignificant B" in server.bodies[1]["messages"][-1]["content"]
    )
    modes = [(tmp_path / "o" / name).stat().st_mode & 0o777 for name in ("evidence.jsonl", "scores.jsonl")]
    assert modes == [0o600, 0o600]  # nobody says that these predictions are public
    kept = json.loads((tmp_path / "o" / "evidence.jsonl").read_text())
    assert kept["id"] == "a" and [error["type"] for error in kept["evidence"]] == ["C", "B"]
    scores = judging.read(tmp_path / "o" / "scores.jsonl")["p"]
    assert scores.scores["a"]["chexprompt_total"] == 2.0 and scores.signature.startswith("chexprompt-json-v1|prompt:")


def write_predictions(path, count, **more):
    """Reports of which every fourth is right; the others lack sentences, or have one of their own."""
    rows = []
    for number in range(count):
        reference, wrong = f"{REFERENCE} Note {number}.", number % 4
        candidate = f"{CANDIDATE} Note {number}." if wrong == 1 else ". ".join(reference.split(". ")[wrong:])
        rows.append({"id": f"s{number}", "query": "", "reference": reference, "prediction": candidate} | more)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def options(client_options):
    def say(out, endpoint, **other):
        own = {"judge": "chexprompt", "model": "rules", "votes": 1, "draws": 200, "data": None, "access": None}
        return client_options(**own | {"out": str(out), "endpoint": endpoint} | other)

    return say


def test_the_command(tmp_path, chat_server, capsys, options):
    preds, out = tmp_path / "preds.jsonl", tmp_path / "judged"
    write_predictions(preds, 40)
    server = chat_server(counter)
    server.faults = {2: "busy_ms", 5: "error", 7: "filtered", 9: "truncated", 12: "garbage"}
    reckoned = command.judge_file(preds, options(out, server.url, dry_run=True, prices=["1", "2"]))
    assert "40 requests, 0 of them answered in the cache" in reckoned and "the data is private" in reckoned
    assert not server.bodies
    told = command.judge_file(preds, options(out, server.url))
    assert "1 of 40 reports got no score: 1 filtered." in told
    assert "effusion" not in told + "".join(capsys.readouterr())
    result = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in result["metrics"]}
    assert rows["chexprompt_total"]["n"] == 39 and rows["chexprompt_total"]["n_failed"] == 1
    free = rows["chexprompt_error_free"]
    assert free["bounds"][0] < free["value"] < free["bounds"][1]
    signature = r"chexprompt-v1\|prompt:[0-9a-f]{8}\|model:rules\|.*\|votes:1\|mean\|unit:report\|ci:"
    assert re.match(signature, rows["chexprompt_total"]["signature"])

    before = len(server.bodies)  # again: only the one that failed is asked, and now answered
    command.judge_file(preds, options(out, server.url))
    assert len(server.bodies) == before + 1
    lines = {line["id"]: line for line in map(json.loads, (out / "scores.jsonl").read_text().splitlines())}
    assert len(lines) == 40 and not any("failed" in line for line in lines.values())
    errors = [line["scores"]["chexprompt_total"] for line in lines.values()]
    assert errors[:4] == [0, 2, 2, 3]
    scores = metaeval.read_scores(out / "scores.jsonl")
    assert len(scores.rows) == 40 and scores.rows["s1", "preds"]["", "chexprompt_significant"] == 2.0

    # Raters who count as the judge does agree with it wholly.
    ratings = {
        (name, ""): {"a": line["scores"]["chexprompt_total"], "b": line["scores"]["chexprompt_total"]}
        for name, line in lines.items()
    }
    agreed = metaeval.compare(scores, ratings, {key: key[0] for key in ratings}, draws=100)["metrics"][
        "chexprompt_total"
    ]
    assert agreed["n"] == 40 and agreed["tau"]["all"]["value"] == pytest.approx(1.0)
    assert agreed["distance"]["all"]["value"] == 0.0
    assert agreed["signature"].startswith("chexprompt-v1|prompt:") and agreed["better"] == "lower"

    given = report.Options(judged=[judging.read(out / "scores.jsonl")], draws=100, trials=100)
    found = evaluate.evaluate([*evaluate.read_inputs([preds])], given, tmp_path / "e")
    row = report.lookup(found, "chexprompt_total")
    assert row is not None and row["value"] == pytest.approx(np.mean(errors))
    assert row["signature"].startswith("chexprompt-v1|prompt:") and row["sd"] == pytest.approx(np.std(errors, ddof=1))
    assert not any("chexprompt" in sentence for sentence in found["warnings"])
    assert "CheXprompt significant errors" in (tmp_path / "e" / "results.md").read_text()


def test_too_many_failures_end_the_command(tmp_path, chat_server, options):
    write_predictions(tmp_path / "preds.jsonl", 40)
    server = chat_server(lambda body: "I would rather not.")
    with pytest.raises(UserError, match=r"3 questions failed \(3 not the two lists\), more than --max_failures=2"):
        command.judge_file(tmp_path / "preds.jsonl", options(tmp_path / "o", server.url, max_failures=2))
    assert not (tmp_path / "o" / "results.json").exists()
    with pytest.raises(UserError, match="no report got a score"):
        command.judge_file(tmp_path / "preds.jsonl", options(tmp_path / "o", server.url, max_failures=40))


def test_votes_of_a_model_that_wavers(tmp_path, chat_server, options):
    write_predictions(tmp_path / "preds.jsonl", 4)
    turn = itertools.count()
    server = chat_server(lambda body: two(listed((next(turn) % 2, 0, 0, 0, 0, 0)), listed((0,) * 6)))
    command.judge_file(
        tmp_path / "preds.jsonl", options(tmp_path / "o", server.url, votes=2, concurrency=1, temperature=1.0)
    )
    lines = [json.loads(line) for line in (tmp_path / "o" / "scores.jsonl").read_text().splitlines()]
    assert all(line["votes"] == 2 and line["scores"]["chexprompt_total"] == 0.5 for line in lines)
    assert all(line["sd"]["chexprompt_total"] == pytest.approx(0.7071, abs=1e-4) for line in lines)


def test_patients_of_a_corpus(tmp_path, tiny_corpus, chat_server, options):
    corpus = Corpus.open(tiny_corpus)
    source = corpus.source("train")
    rows = [source[number] for number in range(8)]
    text = [{"id": r["id"], "query": "", "reference": r["findings"], "prediction": r["findings"]} for r in rows]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    server = chat_server(counter)
    command.judge_file(tmp_path / "p.jsonl", options(tmp_path / "o", server.url, data=str(tiny_corpus)))
    result = json.loads((tmp_path / "o" / "results.json").read_text())
    assert result["inputs"][0]["access"] == "public" and "|unit:patient|" in result["metrics"][0]["signature"]
    assert result["metrics"][0]["value"] == 0.0


def test_restricted_predictions_stay_here(tmp_path, options):
    write_predictions(tmp_path / "preds.jsonl", 3, access="credentialed")
    remote = options(tmp_path / "o", "https://192.0.2.1/v1", judge="green", access="public")
    with pytest.raises(UserError, match=r"this data is credentialed, and 192\.0\.2\.1 is another machine"):
        command.judge_file(tmp_path / "preds.jsonl", remote)


def test_scores_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / "scores.jsonl"
    row = {"id": "a", "system": "s", "signature": "x", "scores": {"green": 1}}
    cases: list[list[Any]] = [[row, row], [row, row | {"id": "b", "signature": "y"}], [{"id": "a"}], [[]]]
    for lines in cases:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(UserError, match=r"scores\.jsonl, line"):
            judging.read(file)
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="lack 1 of the 2 reports"):
        judging.metrics(judging.read(file)["s"], ["a", "b"])
    with pytest.raises(UserError, match="no scores at"):
        judging.read(tmp_path / "none")


def test_every_judge_has_a_prompt_of_its_own():
    signatures = {make().signature for make in command.JUDGES.values()}
    assert len(signatures) == len(command.JUDGES) == 5
    for make in command.JUDGES.values():
        questions = make().first(judging.Pair("i", "REFERENCE TEXT", "CANDIDATE TEXT"), 0)
        asked = " ".join(message["content"] for question in questions for message in question.messages)
        assert "REFERENCE TEXT" in asked and "CANDIDATE TEXT" in asked and "{{" not in asked


OWN = """Another wording; this line is not sent.
### system
SYSTEM OF THE FILE
### user
Count. Reference: {{reference}}
Candidate: \"\"\"{{candidate}}\"\"\"
"""


def test_a_prompt_of_the_users(tmp_path, chat_server, options):
    """Its turns are what is sent, filled in, its hash is in the signature, and another prompt's answers are not taken from the cache."""
    preds, prompt, out = tmp_path / "p.jsonl", tmp_path / "own.txt", tmp_path / "o"
    write_predictions(preds, 1)
    prompt.write_text(OWN, encoding="utf-8")
    server = chat_server(lambda body: PLAIN)
    command.judge_file(preds, options(out, server.url))
    command.judge_file(preds, options(out, server.url, prompt=str(prompt)))
    ours, own = (body["messages"] for body in server.bodies)  # two questions
    report_text = f"{REFERENCE} Note 0."
    assert own == [
        {"role": "system", "content": "SYSTEM OF THE FILE"},
        {"role": "user", "content": f'Count. Reference: {report_text}\nCandidate: """{report_text}"""'},
    ]
    assert ours != own and "SYSTEM OF THE FILE" not in str(ours)
    digest = hashlib.sha256(prompt.read_bytes()).hexdigest()[:8]
    scores = judging.read(out / "scores.jsonl")["p"]
    assert scores.signature.startswith(f"chexprompt-v1|prompt:{digest}|model:rules|")
    assert scores.scores["s0"]["chexprompt_total"] == sum(SIGNIFICANT) + sum(INSIGNIFICANT)
    result = json.loads((out / "results.json").read_text())
    assert all(f"|prompt:{digest}|" in entry["signature"] for entry in result["metrics"])
    for judge in ("green", "crimson", "chexprompt_json"):
        made = command.JUDGES[judge](prompt)
        assert f"|prompt:{digest}" in made.signature
        assert made.first(judging.Pair("i", "R", "C"), 0)[0].messages[0]["content"] == "SYSTEM OF THE FILE"


@pytest.mark.parametrize(
    ("judge", "text", "message"),
    [
        ("radfact", OWN, "--prompt belongs to judges of one prompt, and radfact has two"),
        ("chexprompt", None, "own.txt: no prompt in UTF-8 here"),
        ("chexprompt", "no turns", "own.txt: a prompt has turns"),
        (
            "green",
            OWN.replace("{{candidate}}", "{{report}}"),
            r"exactly the places \{\{candidate\}\}, \{\{reference\}\}",
        ),
    ],
)
def test_a_prompt_that_cannot_be_used(tmp_path, chat_server, options, judge, text, message):
    write_predictions(tmp_path / "p.jsonl", 1)
    if text is not None:
        (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    server = chat_server(counter)
    given = options(tmp_path / "o", server.url, judge=judge, prompt=str(tmp_path / "own.txt"))
    with pytest.raises(UserError, match=message):
        command.judge_file(tmp_path / "p.jsonl", given)
    assert not server.bodies and not (tmp_path / "o" / "scores.jsonl").exists()
