"""Has a language model sort the reports of a corpus into sections, drop what needs an earlier image, and translate Spanish and Portuguese.

    python -m launch.structure --dataset=openi --source=openi --model=MODEL --out=out/openi.structured.jsonl --dry_run
    python -m launch.structure --dataset=openi --source=openi --model=MODEL --out=out/openi.structured.jsonl
    python -m launch.structure --dataset=padchest --source=padchest --model=MODEL --out=out/padchest.structured.jsonl
    python -m launch.pack --dataset=openi --source=openi --structured=out/openi.structured.jsonl --out=out/openi

MODEL runs behind any endpoint of OpenAI's form; without --endpoint one on this machine, port 8000, as vLLM, SGLang or llama.cpp open it. A
corpus that is not public goes to no other machine unless --attested_by names who made sure that it may. --limit takes the first reports only.

A text is kept when it is faithful by the rules of data/reports/guards.py: no new number, no finding lost, invented or denied, no side changed, no
denial lost, no measurement lost. A text that is not is asked for once more; if that fails too it goes with its reason to
OUT.rejected.jsonl. OUT.info.json counts all of it, and the words that still speak of an earlier image. Answers are kept in OUT.cache, so that
the same command goes on where it was stopped and asks nothing twice. All these files hold report text.

How near the findings are to those that rules find: OUT.pairs.jsonl has both for every English report, in the form of a predictions file.

    python -m launch.evaluate out/openi.structured.jsonl.pairs.jsonl --out=out/openi.structured
    python -m launch.judge out/openi.structured.jsonl.pairs.jsonl --judge=chexprompt --model=MODEL --out=out/openi.judged
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from data.corpora import CORPORA
from rad_jax import errors
from rad_jax.chat import access, command
from rad_jax.chat import client as chat
from rad_jax.errors import UserError

MOST_FAILURES = 1000


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    known = [name for name in CORPORA if name != "phantom"]
    flags.DEFINE_enum("dataset", None, known, "Corpus whose reports are read.", required=True)
    flags.DEFINE_string(
        "source", None, "Folder that holds it, as for launch.pack; the films need not be there.", required=True
    )
    flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
    flags.DEFINE_enum("language", None, ["en", "es", "pt"], "Of the reports, where it is not the corpus's own.")
    flags.DEFINE_string("prompt", None, "File with another prompt; see data/reports/prompts.")
    flags.DEFINE_integer("limit", None, "Only the first so many reports.", lower_bound=1)
    command.define_flags(max_tokens=1024, max_failures=MOST_FAILURES)


def main(_: Sequence[str]) -> None:
    print(structure_corpus(flags.FLAGS))


def structure_corpus(options: Any) -> str:
    """Does what the flags say; returns what to tell.

    Raises UserError for flags or a corpus that cannot be used, and when too many reports fail.
    """
    from data.corpora import builder_class
    from data.reports import structure

    out, kind = Path(options.out), builder_class(options.dataset)
    level, language = kind.access, options.language or kind.language
    prompt = structure.prompt_of(language, Path(options.prompt) if options.prompt else None)
    documents = kind(data_dir=out.parent, source=options.source, image_size=1).documents()
    documents = dict(itertools.islice(documents.items(), options.limit))
    if not documents:
        raise UserError(f"--dataset={options.dataset} has no reports to structure.")
    asked = command.client_of(options, out)
    questions = (structure.question(document, prompt, language) for document in documents.values())
    if options.dry_run:
        return command.dry_run(asked, questions, options, level)
    command.check_access(options, level)
    answers = collect(asked, questions, len(documents))
    info = {
        "dataset": options.dataset,
        "language": language,
        "prompt": prompt.sha256,
        **command.record(asked, options, level),
    }
    if language == "en":
        found = {key: (document.findings, answers[key]) for key, document in documents.items()}
        whole(Path(f"{out}.pairs.jsonl"), (json.dumps(pair, ensure_ascii=False) for pair in pairs(found, level)), level)
    return write(out, {key: answers[key] for key in documents}, info)


def pairs(found: dict[str, tuple[str, chat.Answer]], level: str) -> Iterator[dict[str, str]]:
    """Lines of a predictions file: a report's findings by rules as the reference, the model's as the prediction, where there are both."""
    for key, (by_rules, answer) in found.items():
        if by_rules and not answer.reason and answer.value["findings"]:
            yield {
                "id": key,
                "query": "",
                "reference": by_rules,
                "prediction": answer.value["findings"],
                "access": level,
            }


def collect(asked: chat.Client, questions: Iterable[chat.Question], total: int) -> dict[Any, chat.Answer]:
    """Id -> answer of all questions, with a bar."""
    from tqdm import tqdm

    bar = tqdm(asked.ask(questions), total=total, desc="reports", unit="report", disable=None)
    return {question.id: answer for question, answer in bar}


def write(out: Path, answers: dict[str, chat.Answer], info: dict[str, Any]) -> str:
    """Writes texts, rejected ones and counts, each whole or not at all; returns what to tell."""
    from data.reports import structure

    kept = {key: answer.value for key, answer in answers.items() if not answer.reason}
    rejected = {key: answer for key, answer in answers.items() if answer.reason}
    level = info["access"]
    whole(out, (json.dumps(structure.row(key, value, level), ensure_ascii=False) for key, value in kept.items()), level)
    lines = ({"key": key, "access": level, "reason": a.reason, "answer": a.text} for key, a in rejected.items())
    whole(Path(f"{out}.rejected.jsonl"), (json.dumps(line, ensure_ascii=False) for line in lines), level)
    words = Counter(word for value in kept.values() for word in value["residue"])
    reasons = Counter(answer.reason for answer in rejected.values())
    counts = {
        "reports": len(answers),
        "structured": len(kept),
        "rejected": dict(reasons),
        "with_findings": sum(value["findings"] is not None for value in kept.values()),
        "with_impression": sum(value["impression"] is not None for value in kept.values()),
        "with_residue": sum(bool(value["residue"]) for value in kept.values()),
        "residue": dict(words.most_common()),
    }
    whole(Path(f"{out}.info.json"), [json.dumps(counts | info, indent=1)], level)
    told = f"{out}: {len(kept)} of {len(answers)} reports structured"
    if rejected:
        told += f", {len(rejected)} rejected ({chat.describe(reasons)}), see {out}.rejected.jsonl"
    return told + f"; {counts['with_residue']} may still speak of an earlier image, see {out}.info.json"


def whole(path: Path, lines: Iterable[str], level: str) -> None:
    """Writes a file in place of another one, whole or not at all, for its owner's eyes alone unless `level` is public."""
    beside = path.with_name(path.name + ".whole")
    access.create(beside, level).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    define_flags()
    errors.run(main)
