"""Where a run's time goes: seconds by phase, and what share of all of it was learning."""

import contextlib
import time
from collections.abc import Callable, Iterator

# "learn" is whatever is in no other phase: the step itself, and reading its numbers.
PHASES = ("start", "compile", "learn", "data", "save", "evaluate")
LEARN = "learn"
_DOING = {
    "start": "starting",
    "compile": "compiling",
    LEARN: "computing steps",
    "data": "waiting for data",
    "save": "saving",
    "evaluate": "evaluating",
}


class Phases:
    """Seconds of this process by phase. `moved` is called at every change of phase."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._began = self._since = clock()
        self._now, self._last = LEARN, 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.moved: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Inside, time belongs to `name`; phases nest, the inner one counts."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def forgive(self, name: str) -> None:
        """Counts the last stretch of `name` as learning after all."""
        self._seconds[name] -= self._last
        self._seconds[LEARN] += self._last
        self._last = 0.0

    def doing(self) -> str:
        """The phase, for people: "waiting for data"."""
        return _DOING[self._now]

    def seconds(self) -> dict[str, float]:
        """Seconds so far, by phase; their sum is the time since the beginning."""
        self._switch(self._now)
        return dict(self._seconds)

    def goodput(self) -> float:
        """The share of the time that was learning."""
        seconds = self.seconds()
        return seconds[LEARN] / max(sum(seconds.values()), 1e-9)

    def _switch(self, name: str) -> str:
        now, before = self._clock(), self._now
        self._last = now - self._since
        self._seconds[before] += self._last
        self._since, self._now = now, name
        if name != before:
            self.moved()
        return before
