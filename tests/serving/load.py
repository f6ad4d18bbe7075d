"""Asks a running server from many clients at once and prints what it did.

    python tests/serving/load.py http://127.0.0.1:8000 PID FILM... --clients=64 --seconds=300

Each film is asked about once alone: that is the right answer. Then each client asks about one film after the other, streamed or whole by turns,
and waits and asks again when the queue is full. Printed are answers, wrong and failed ones, those that hung (over --patience seconds), the
median and 99th percentile of seconds to first token and to the whole answer, tokens a second, and the memory over time of the server with its
children. Memory is flat if the median of the last third of its values is at most --growth above that of the middle third: the first one warms up.
Exit status 1 if an answer was wrong, failed or hung, or memory was not flat.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx


@dataclasses.dataclass
class Told:
    """What one client saw."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    wrong: int = 0
    failed: int = 0
    hung: int = 0
    refused: int = 0


def ask(client: httpx.Client, film: bytes, stream: bool, tokens: int) -> tuple[int, str, int, float, float]:
    """Status, findings, tokens, and seconds until the first token (0 where not streamed) and in all; 429 has no findings."""
    began, first, fields = time.monotonic(), 0.0, {"max_new_tokens": str(tokens), "stream": str(stream)}
    with client.stream("POST", "/v1/findings", files={"file": film}, data=fields) as answer:
        if answer.status_code != 200:
            answer.read()
            return answer.status_code, answer.headers.get("retry-after", "1"), 0, 0.0, 0.0
        if not stream:
            found = json.loads(answer.read())
        else:
            kind = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                    first = first or (time.monotonic() - began if kind == "piece" else 0.0)
                elif line.startswith("data: ") and kind in ("done", "error"):
                    found = json.loads(line.removeprefix("data: "))
    if "findings" not in found:
        return 500, "", 0, 0.0, 0.0
    return 200, found["findings"], found["usage"]["completion_tokens"], first, time.monotonic() - began


def client(url: str, films: list[bytes], right: list[str], start: int, end: float, given: argparse.Namespace) -> Told:
    """One client, until `end`."""
    told = Told()
    with httpx.Client(base_url=url, timeout=given.patience) as connection:
        for turn in itertools.count(start):
            if time.monotonic() >= end:
                return told
            try:
                status, text, tokens, first, seconds = ask(
                    connection, films[turn % len(films)], turn % 2 == 0, given.tokens
                )
            except httpx.TimeoutException:
                told.hung += 1
                continue
            except httpx.TransportError:
                told.failed += 1
                continue
            if status == 429:
                told.refused += 1
                time.sleep(min(float(text), max(end - time.monotonic(), 0)))
            elif status != 200:
                told.failed += 1
            else:
                told.wrong += text != right[turn % len(films)]
                told.tokens += tokens
                told.seconds.append(seconds)
                if first:
                    told.first.append(first)
    raise AssertionError("unreachable")


def anonymous(pid: int) -> float:
    """Megabytes of own memory of the process and its children."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    found = 0.0
    for one in (pid, *(int(child) for children in lists for child in children)):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:  # it has ended in between
            continue
        found += sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
    return found


def growth(memory: list[float]) -> float:
    """From the median of the middle third of values to that of the last; the first third is warming up."""
    third = max(len(memory) // 3, 1)
    return statistics.median(memory[-third:]) / statistics.median(memory[-2 * third : -third] or memory[:1]) - 1


def share(values: list[float], part: float) -> float:
    return sorted(values)[min(int(part * len(values)), len(values) - 1)] if values else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("pid", type=int)
    parser.add_argument("films", nargs="+", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--patience", type=float, default=180)
    parser.add_argument("--growth", type=float, default=0.05, help="Of the server's memory, as a share.")
    given = parser.parse_args()
    films = [path.read_bytes() for path in given.films]
    with httpx.Client(base_url=given.url, timeout=given.patience) as connection:
        right = [ask(connection, film, False, given.tokens)[1] for film in films]
    end, answers = time.monotonic() + given.seconds, []

    def run(number: int) -> None:
        answers.append(client(given.url, films, right, number, end, given))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(given.clients)]
    memory = [anonymous(given.pid)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(given.seconds / 30, 10))
        memory.append(anonymous(given.pid))
    seconds = [s for told in answers for s in told.seconds]
    first = [s for told in answers for s in told.first]
    counts = {
        name: sum(getattr(told, name) for told in answers) for name in ("wrong", "failed", "hung", "refused", "tokens")
    }
    print(f"{given.clients} clients, {given.seconds:.0f} s: {len(seconds)} answers, {counts}")
    print(
        f"whole answer: median {share(seconds, 0.5):.2f} s, p99 {share(seconds, 0.99):.2f} s, longest {max(seconds, default=0):.2f} s"
    )
    print(
        f"first token: median {share(first, 0.5):.2f} s, p99 {share(first, 0.99):.2f} s; {counts['tokens'] / given.seconds:.0f} tokens/s"
    )
    grown = growth(memory)
    print("memory, MB: " + " ".join(f"{size:.0f}" for size in memory) + f"; it grew by {grown:.1%} after warming up")
    lost = len(answers) < given.clients
    return int(lost or not seconds or bool(counts["wrong"] + counts["failed"] + counts["hung"]) or grown > given.growth)


if __name__ == "__main__":
    sys.exit(main())
