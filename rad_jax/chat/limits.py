"""Requests and tokens a minute: who wants to send waits here, also who sends again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class StoppedError(Exception):
    """The run is over: nothing more is to be sent."""


class Limits:
    """Two token buckets and a pause that all threads keep. A bucket holds one second's worth, so that no minute sees a burst.

    Args:
        requests: a minute, None for as many as come.
        tokens: a minute, of questions and answers together.
        clock, wait: time in seconds, and what waits for so long and says whether to stop; others for tests.
    """

    def __init__(
        self,
        requests: float | None = None,
        tokens: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ):
        self.stopped = threading.Event()
        self._clock, self._wait = clock, wait or self.stopped.wait
        self._lock = threading.Lock()
        self._rates = [rate / 60 if rate else None for rate in (requests, tokens)]
        self._capacity = [max(1.0, rate) if rate else 0.0 for rate in self._rates]
        self._level = list(self._capacity)
        self._seen = clock()
        self._paused_until = self._seen

    def take(self, tokens: float) -> None:
        """Waits until a request of about so many tokens may go. A request larger than the bucket goes when it is full, and leaves a debt.

        Raises:
            StoppedError: the run is over.
        """
        needs = (1.0, float(tokens))
        while True:
            with self._lock:
                self._fill()
                seconds = self._paused_until - self._seen
                for need, rate, level, most in zip(needs, self._rates, self._level, self._capacity, strict=True):
                    if rate:
                        seconds = max(seconds, (min(need, most) - level) / rate)
                if seconds <= 1e-9:
                    self._level = [level - need for level, need in zip(self._level, needs, strict=True)]
                    return
            if self._wait(seconds):
                raise StoppedError

    def settle(self, reserved: float, used: float) -> None:
        """Gives back what of the tokens that `take` reserved was not used, or takes what was used beyond them."""
        with self._lock:
            self._level[1] += reserved - used

    def pause(self, seconds: float) -> None:
        """Nobody sends for so long: the server has asked for it."""
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)

    def sleep(self, seconds: float) -> None:
        """Waits alone.

        Raises:
            StoppedError: the run is over.
        """
        if self._wait(seconds):
            raise StoppedError

    def _fill(self) -> None:
        now = self._clock()
        passed, self._seen = now - self._seen, now
        for i, rate in enumerate(self._rates):
            if rate:
                self._level[i] = min(self._capacity[i], self._level[i] + passed * rate)
