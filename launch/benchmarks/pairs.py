"""Programs timed in turn, each a process of its own, so that what slows the machine slows all of them."""

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from launch.demo import KEEP_MEMORY
from rad_jax.errors import UserError

PAUSE = 0.03  # seconds between two runs, for OpenMP's threads to end their spinning


class Run(NamedTuple):
    """One run of a side: seconds on the clock, seconds of all its threads, and what it gave."""

    wall_s: float
    cpu_s: float
    result: Any


class Side:
    """A process that prepares something once and then runs it whenever it is asked to.

    Args:
        name: for error messages.
        threads: cores that it may use; numerical libraries start as many threads.
        prepare: called in the process with `arguments`; gives the function to be timed, which must return finished numbers.
        arguments: of `prepare`.
    """

    def __init__(self, name: str, threads: int, prepare: Callable[..., Callable[..., Any]], *arguments: Any):
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, prepare, arguments), daemon=True)
        with _environment(
            KEEP_MEMORY | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        ):
            self._process.start()
        theirs.close()

    def run(self, *arguments: Any) -> Run:
        """One run.

        Raises:
            UserError: the process failed.
        """
        self._pipe.send(arguments)
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise UserError(f"the benchmark's process {self._name} ended by itself.") from None
        if isinstance(answer, str):
            raise UserError(f"the benchmark's process {self._name} failed: {answer}")
        time.sleep(PAUSE)
        return answer

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()  # of one that is still computing
        self._process.join()


def alternate(sides: Mapping[str, Side], rounds: int, arguments: Sequence[Any]) -> dict[str, list[Run]]:
    """`rounds` runs of every side, in turn; every second round the other way about, so that no side always follows the same one."""
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides)
        if number % 2:
            order.reverse()
        for name in order:
            runs[name].append(sides[name].run(*arguments))
    return runs


def row(name: str, runs: Mapping[str, Sequence[Run]], skipped: str) -> dict[str, Any]:
    """A line of the table: our side, "ours", against the fastest of the others.

    Returns:
        name; ours_s and peer_s, medians; ratio, theirs through ours; ratio_quartiles of the rounds; the same of CPU seconds; which peer
        was the fastest, and what of its work we do not do.
    """
    middle = {side: statistics.median(run.wall_s for run in done) for side, done in runs.items()}
    peer = min((side for side in runs if side != "ours"), key=lambda side: middle[side])
    rounds = [p.wall_s / o.wall_s for o, p in zip(runs["ours"], runs[peer], strict=True)]
    quartiles = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else rounds * 3
    cpu = {side: statistics.median(run.cpu_s for run in runs[side]) for side in ("ours", peer)}
    return {
        "name": name,
        "ours_s": middle["ours"],
        "peer_s": middle[peer],
        "ratio": middle[peer] / middle["ours"],
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "ours_cpu_s": cpu["ours"],
        "peer_cpu_s": cpu[peer],
        "cpu_ratio": cpu[peer] / cpu["ours"],
        "peer": peer,
        "skipped": skipped,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows for people."""
    print(f"{'':34}{'ours':>10}{'peer':>10}{'ratio':>7}{'half of rounds':>16}{'CPU s':>17}{'ratio':>7}  peer")
    for r in rows:
        low, high = r["ratio_quartiles"]
        cpu = f"{r['ours_cpu_s']:.4f} / {r['peer_cpu_s']:.4f}"
        print(
            f"{r['name']:34}{r['ours_s']:9.4f}s{r['peer_s']:9.4f}s{r['ratio']:7.2f}{f'{low:.2f} to {high:.2f}':>16}"
            f"{cpu:>17}{r['cpu_ratio']:7.2f}  {r['peer']}"
        )
        print(f"    {r['equality']}\n    we skip: {r['skipped']}")


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """For processes that are started meanwhile; what the user set counts."""
    before = dict(os.environ)
    os.environ.update(dict(values) | before)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    pipe: Connection, threads: int, prepare: Callable[..., Callable[..., Any]], arguments: Sequence[Any]
) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    try:
        function = prepare(*arguments)
        while True:
            given = pipe.recv()
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*given)
            pipe.send(Run(time.perf_counter() - wall, time.process_time() - cpu, result))
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
