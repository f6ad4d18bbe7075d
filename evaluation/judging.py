"""Judges that are language models: from their verdicts on single reports to scores with intervals, failures counted and bounded.

A judge gives every report some scores, once or in several votes; a report's score is the mean of its votes. A report of which fewer than half
the votes are usable has failed: it is in no mean, and for shares of reports it gives two bounds, all failed ones good or none of them. Verdicts
are kept as lines of a file {"id", "system", "signature", "votes", "scores", "sd", "failed"}, which launch.evaluate and launch.metaeval read.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import statistics
from evaluation.metric import Metric, mean, mean_rows
from rad_jax.chat.client import Answer, Question
from rad_jax.errors import UserError

PROMPTS = Path(__file__).parent / "prompts"
Scores = dict[str, float | None]
Ask = Callable[[Iterable[Question]], Iterable[tuple[Question, Answer]]]
# Harmonic means of two mean scores.
_HARMONIC = {"radfact_f1": ("radfact_precision", "radfact_recall")}
SHARES = "_free"  # what scores end in that are 1 for a good report and 0 for another


@dataclass(frozen=True)
class Pair:
    """A candidate report beside its reference."""

    id: str
    reference: str
    candidate: str


# Place of the pair, its scores or why there are none, and what the judge points at.
Vote = tuple[int, Scores | str, list[Any]]
Run = Callable[[Ask, Sequence[Pair], int], Iterator[Vote]]


@dataclass(frozen=True)
class Judge:
    """One way to judge.

    Attributes:
        name: of the judge.
        signature: of its prompts and rules, without the model's.
        run: (ask, pairs, votes) -> yields a `Vote` for every pair and vote.
        first: (pair, vote) -> the first requests of a pair, to count them before anything is sent.
    """

    name: str
    signature: str
    run: Run
    first: Callable[[Pair, int], list[Question]]


@dataclass
class Verdict:
    """What a judge says of one report: the scores of its usable votes, why the others are not, and what it points at, of all votes."""

    votes: list[Scores] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    evidence: list[Any] = field(default_factory=list)

    @property
    def failed(self) -> str:
        """Why the report has no score; empty when it has one."""
        return self.reasons[0] if len(self.votes) < max(1, len(self.reasons)) else ""

    def scores(self) -> Scores:
        """Mean over the votes; None where no vote has the score. Nothing for a report that failed."""
        if self.failed:
            return {}
        return {name: _mean([vote[name] for vote in self.votes]) for name in self.votes[0]}

    def spread(self) -> Scores:
        """Standard deviation between votes (of the sample), for two votes and more."""
        if self.failed or len(self.votes) < 2:
            return {}
        columns = {name: [vote[name] for vote in self.votes] for name in self.votes[0]}
        return {
            name: float(np.std([v for v in values if v is not None], ddof=1))
            for name, values in columns.items()
            if sum(value is not None for value in values) > 1
        }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def single_question(make: Callable[[Pair, int], Question], score: Callable[[Any], Scores]) -> Run:
    """The `run` of a judge that asks one question for a pair and vote, whose answer's value `score` turns into scores."""

    def run(ask: Ask, pairs: Sequence[Pair], votes: int) -> Iterator[Vote]:
        questions = (make(pair, vote) for pair in pairs for vote in range(votes))
        places = {pair.id: place for place, pair in enumerate(pairs)}
        for question, answer in ask(questions):
            place = places[question.id]
            if answer.reason:
                yield place, answer.reason, []
            else:
                yield place, score(answer.value), list(getattr(answer.value, "evidence", ()))

    return run


def judge(kind: Judge, ask: Ask, pairs: Sequence[Pair], votes: int) -> list[Verdict]:
    """The verdict of every pair, in order."""
    verdicts = [Verdict() for _ in pairs]
    for place, found, evidence in kind.run(ask, pairs, votes):
        verdicts[place].evidence += evidence
        if isinstance(found, str):
            verdicts[place].reasons.append(found)
        else:
            verdicts[place].votes.append(found)
    return verdicts


def rows(pairs: Sequence[Pair], verdicts: Sequence[Verdict], system: str, signature: str) -> list[dict[str, Any]]:
    """The lines of a file of scores."""
    out = []
    for pair, verdict in zip(pairs, verdicts, strict=True):
        row: dict[str, Any] = {"id": pair.id, "system": system, "signature": signature, "votes": len(verdict.votes)}
        row["scores"] = verdict.scores()
        if spread := verdict.spread():
            row["sd"] = spread
        if verdict.failed:
            row["failed"] = verdict.failed
        out.append(row)
    return out


@dataclass(frozen=True)
class Judged:
    """The scores of one system by one judge: id -> scores, empty for a report that failed."""

    signature: str
    scores: dict[str, Scores]

    def names(self) -> list[str]:
        """Of all scores, in order."""
        return list(dict.fromkeys(name for row in self.scores.values() for name in row))


def read(path: Path) -> dict[str, Judged]:
    """System -> its scores in a file that launch.judge wrote. Raises UserError for another file, or one that names a report twice."""
    if not path.is_file():
        raise UserError(f"no scores at {path}: launch.judge writes them")
    out: dict[str, Judged] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, system, signature = str(row["id"]), str(row["system"]), str(row["signature"])
            scores: Scores = {str(k): None if v is None else float(v) for k, v in row["scores"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}, line {number}: no line of launch.judge's scores") from None
        judged = out.setdefault(system, Judged(signature, {}))
        if name in judged.scores or judged.signature != signature:
            raise UserError(
                f"{path}, line {number}: a report stands twice, or was judged in another way than the others"
            )
        judged.scores[name] = scores
    return out


def metrics(judged: Judged, ids: Sequence[str]) -> list[Metric]:
    """One metric for every score: the mean over the reports that were rated, rows in the order of `ids`.

    Raises UserError when the file lacks one of the ids.
    """
    if missing := sum(name not in judged.scores for name in ids):
        raise UserError(f"the judge's scores lack {missing} of the {len(ids)} reports: judge the same predictions")
    found = [judged.scores[name] for name in ids]
    failed = sum(not row for row in found)
    out, columns = [], {}
    for name in judged.names():
        columns[name] = _rows([row.get(name) for row in found])
        rated = int(columns[name][:, 1].sum())
        scored = columns[name][:, 1] > 0
        out.append(Metric(name, f"{judged.signature}|mean", columns[name], mean, rated, n_failed=failed, scored=scored))
    for name, (first, second) in _HARMONIC.items():
        if first in columns and second in columns:
            both = np.concatenate([columns[first], columns[second]], axis=1)
            scored = np.asarray(both.any(axis=1))
            how = f"{judged.signature}|harmonic-mean-of-means"
            out.append(Metric(name, how, both, _harmonic, int(scored.sum()), n_failed=failed, scored=scored))
    return out


def _rows(values: Sequence[float | None]) -> np.ndarray:
    known = [value is not None and math.isfinite(value) for value in values]
    table = mean_rows(np.array([value or 0.0 for value in values]))
    return table * np.array(known)[:, None]


def _harmonic(totals: np.ndarray) -> np.ndarray:
    first, second = mean(totals[:, :2]), mean(totals[:, 2:])
    both = first + second
    return np.where(both == 0, 0.0, statistics.ratio(2 * first * second, both))


def extras(metric: Metric) -> dict[str, Any]:
    """What is told beside a metric's value: the sample's standard deviation of a mean, the two bounds of a share when reports failed."""
    if metric.rows.shape[1] != 2:
        return {}
    values = metric.rows[metric.rows[:, 1] > 0, 0]
    out: dict[str, Any] = {"sd": float(values.std(ddof=1)) if len(values) > 1 else None}
    if metric.name.endswith(SHARES) and metric.n_failed:
        everyone = len(values) + metric.n_failed
        out["bounds"] = [float(values.sum() / everyone), float((values.sum() + metric.n_failed) / everyone)]
    return out
