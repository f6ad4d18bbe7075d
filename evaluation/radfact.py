"""RadFact-style judging: the share of a candidate's statements that follow from the reference, and the reverse (Bannur et al. 2024).

Two steps: a model splits both reports into statements, then says of each whether it follows from the other report. Precision is the share of
the candidate's statements that do, recall that of the reference's; a report without a statement has no share. Where RadFact counts a failed
call as "does not follow", ours fails the report. Boxes are not judged. Prompts are our own.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation import grounded
from evaluation.grounded import Phrase
from evaluation.judging import PROMPTS, Ask, Judge, Pair, Scores, Vote
from rad_jax.chat import schema, templates
from rad_jax.chat.client import Question, UnusableError

NAME, VERSION = "radfact", 1
PRECISION, RECALL = f"{NAME}_precision", f"{NAME}_recall"
_MOST = 100  # statements of a report; more are the work of a model that does not stop
STATEMENTS: dict[str, Any] = {
    "type": "object",
    "properties": {"statements": {"type": "array", "items": {"type": "string"}}},
    "required": ["statements"],
    "additionalProperties": False,
}
FOLLOWS: dict[str, Any] = {
    "type": "object",
    "properties": {"follows": {"type": "boolean"}},
    "required": ["follows"],
    "additionalProperties": False,
}


def judge(_: Path | None = None) -> Judge:
    """The judge, with our prompts."""
    split = templates.load(PROMPTS / "radfact_split.txt", {"report"})
    entail = templates.load(PROMPTS / "radfact_entail.txt", {"report", "statement"})

    def splitting(text: str, vote: int) -> Question:
        return Question((text, vote), split.fill({"report": text}), statements, STATEMENTS, vote)

    def entailing(report: str, statement: str, vote: int) -> Question:
        messages = entail.fill({"report": report, "statement": statement})
        return Question((report, statement, vote), messages, follows, FOLLOWS, vote)

    def run(ask: Ask, pairs: Sequence[Pair], votes: int) -> Iterator[Vote]:
        texts = dict.fromkeys(
            (text, vote) for p in pairs for text in (p.reference, p.candidate) for vote in range(votes)
        )
        parts = {question.id: answer for question, answer in ask(splitting(*key) for key in texts if key[0].strip())}
        wanted: dict[tuple[str, str, int], None] = {}
        for pair in pairs:
            for vote in range(votes):
                for side, other in ((pair.candidate, pair.reference), (pair.reference, pair.candidate)):
                    found = parts.get((side, vote))
                    for statement in found.value or () if found else ():
                        wanted[other, statement, vote] = None
        verdicts = {question.id: answer for question, answer in ask(entailing(*key) for key in wanted)}
        for place, pair in enumerate(pairs):
            for vote in range(votes):
                yield place, *_scores(pair, vote, parts, verdicts)

    def first(pair: Pair, vote: int) -> list[Question]:
        return [splitting(text, vote) for text in (pair.reference, pair.candidate) if text.strip()]

    return Judge(NAME, f"{NAME}-v{VERSION}|prompts:{split.sha256},{entail.sha256}", run, first)


def statements(text: str) -> list[str]:
    """The statements of an answer, empty ones and repetitions left out."""
    found = [" ".join(statement.split()) for statement in schema.read(text, STATEMENTS)["statements"]]
    kept = list(dict.fromkeys(statement for statement in found if statement))
    if len(kept) > _MOST:
        raise UnusableError("too many statements", f"a report has no more than {_MOST} statements")
    return kept


def follows(text: str) -> bool:
    """The verdict of an answer."""
    return bool(schema.read(text, FOLLOWS)["follows"])


def _scores(
    pair: Pair, vote: int, parts: dict[Any, Any], verdicts: dict[Any, Any]
) -> tuple[Scores | str, list[dict[str, Any]]]:
    """Both shares of a pair, or why there are none; and every statement with its verdict."""
    out: dict[str, list[bool]] = defaultdict(list)
    evidence = []
    for name, side, other in ((PRECISION, pair.candidate, pair.reference), (RECALL, pair.reference, pair.candidate)):
        split = parts.get((side, vote))
        if split is None:  # an empty report
            continue
        if split.reason:
            return str(split.reason), []
        for statement in split.value:
            verdict = verdicts[other, statement, vote]
            if verdict.reason:
                return str(verdict.reason), []
            out[name].append(verdict.value)
            evidence.append({"of": name, "statement": statement, "follows": verdict.value})
    shares = {name: grounded.radfact([Phrase(follows) for follows in out[name]]) for name in (PRECISION, RECALL)}
    return {name: found["logical"] for name, found in shares.items()}, evidence
