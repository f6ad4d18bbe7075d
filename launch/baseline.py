"""Has a vision model (GPT-4V and the like, or a local one) write findings for a packed corpus: a baseline system for launch.evaluate.

    python -m launch.baseline --data=CORPUS --split=test --model=MODEL --out=gpt.jsonl --dry_run --prices=2.5,10
    python -m launch.baseline --data=CORPUS --split=test --model=MODEL --out=gpt.jsonl
    python -m launch.evaluate ours.jsonl gpt.jsonl --data=CORPUS --out=EVALUATION

MODEL runs behind any endpoint of OpenAI's form that takes images; without --endpoint one on this machine, port 8000. A corpus that is not
public goes to no other machine unless --attested_by names who made sure that it may. --prompt is a file of turns with {{question}}, see
evaluation/prompts/vision.txt.

The file has a line for every study, as launch.generate writes it; where the model gave none, the prediction is empty and `failed` says why.
The model is shown the square of the film that a trained model sees. OUT.info.json has prompt, model, tokens and cost. Answers are kept in
OUT.cache, so that the same command goes on where it was stopped.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from evaluation import vision
from rad_jax import errors
from rad_jax.chat import access, command
from rad_jax.chat import client as chat
from rad_jax.errors import UserError

UNREADABLE = "unreadable image"


def define_flags() -> None:
    """Only when run as a program, so that several commands can be imported side by side."""
    flags.DEFINE_string("data", None, "Packed corpus.", required=True)
    flags.DEFINE_string("split", "test", "Which studies of it.")
    flags.DEFINE_string("selection", "all", "Which texts of which films: a selection of the corpus.")
    flags.DEFINE_string("out", None, "JSONL file to write.", required=True)
    flags.DEFINE_string("prompt", None, "File with another prompt than our own.")
    flags.DEFINE_integer("limit", None, "Only the first so many studies.", lower_bound=1)
    command.define_flags(max_tokens=512)


def main(_: Sequence[str]) -> None:
    print(write(flags.FLAGS))


def write(options: Any) -> str:
    """Does what the flags say; returns what to tell.

    Raises UserError for flags or a corpus that cannot be used, and when too many studies fail.
    """
    from tqdm import tqdm

    from rad_jax.corpus import Corpus

    corpus, out = Corpus.open(options.data), Path(options.out)
    source = corpus.source(options.split, options.selection)
    total = min(options.limit or sys.maxsize, len(source))
    prompt = vision.prompt_of(Path(options.prompt) if options.prompt else None)
    make = vision.asker(prompt, corpus.image_size)
    asked = command.client_of(options, out)
    found: dict[int, chat.Answer] = {}

    def questions() -> Iterator[chat.Question]:
        for number in range(total):
            try:
                yield make(number, source[number])
            except UserError:
                found[number] = chat.Answer(reason=UNREADABLE)

    if options.dry_run:
        return command.dry_run(asked, questions(), options, corpus.access)
    command.check_access(options, corpus.access)
    for question, answer in tqdm(asked.ask(questions()), total=total, desc="findings", unit="study", disable=None):
        found[question.id] = answer
    rows = [row(source[number], found[number], corpus.access) for number in range(total)]
    beside = out.with_name(out.name + ".whole")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows)
    access.create(beside, corpus.access).write_text(text, encoding="utf-8")
    beside.replace(out)
    known = {"corpus": corpus.identity(options.split, options.selection), "prompt": prompt.sha256}
    info = json.dumps(known | command.record(asked, options, corpus.access), indent=1)
    Path(f"{out}.info.json").write_text(info + "\n", encoding="utf-8")
    failed = Counter(answer.reason for answer in found.values() if answer.reason)
    told = f"{out}: findings of {total - failed.total()} of {total} studies"
    return told + (f"; the others have an empty prediction ({chat.describe(failed)})" if failed else "")


def row(record: dict[str, Any], answer: chat.Answer, level: str) -> dict[str, str]:
    """One line of the predictions file."""
    line = {
        "id": record["id"],
        "query": record["question"],
        "reference": record["findings"],
        "prediction": "" if answer.reason else answer.value,
        "access": level,
    }
    return line | ({"failed": answer.reason} if answer.reason else {})


if __name__ == "__main__":
    define_flags()
    errors.run(main)
