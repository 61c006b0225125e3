"""How long to wait after failures: twice as long after each one, up to a limit."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Backoff", "delay", "jitter"]


def delay(failures: int, *, first: float, longest: float) -> float:
    """Seconds to wait after so many *failures* (1, 2, …) in a row."""
    # Whatever keeps failing for days counts to thousands, and no float holds 2**1024.
    return min(first * 2.0 ** min(failures - 1, 64), longest)


def jitter(least: float, most: float) -> float:
    """A random number between the two: those who failed together do not come back together."""
    return random.uniform(least, most)  # noqa: S311 - spreads callers, keeps no secret


@dataclass(slots=True)
class Backoff:
    """
    Failures in a row, and *until* when (a clock in seconds that never goes back) to wait after the
    last one: *first* seconds, then twice as long each time, *longest* at most.
    """

    first: float
    longest: float
    failures: int = 0
    until: float = 0.0

    def failed(self, now: float, *, factor: float = 1.0, at_least: float = 0.0) -> None:
        """One more failure, at *now*: wait *factor* times as long as usual, and *at_least* that."""
        self.failures += 1
        seconds = delay(self.failures, first=self.first, longest=self.longest) * factor
        self.until = now + max(seconds, at_least)

    def worked(self) -> None:
        """There is nothing to wait for any more."""
        self.failures, self.until = 0, 0.0
