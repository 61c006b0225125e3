"""Exponential back-off: the delay after failures doubles up to a limit."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Backoff", "delay", "jitter"]


def delay(failures: int, *, first: float, longest: float) -> float:
    """Seconds to wait after so many *failures* (1, 2, …) in a row."""
    # After days of failures the count is in the thousands, and 2.0**1024 overflows.
    return min(first * 2.0 ** min(failures - 1, 64), longest)


def jitter(least: float, most: float) -> float:
    """A random number between *least* and *most*, so that retries of many callers spread out."""
    return random.uniform(least, most)  # noqa: S311 - not for cryptography


@dataclass(slots=True)
class Backoff:
    """
    Consecutive failures and the end of the wait after the last one (*until*, by a monotonic clock
    in seconds). The wait is *first* seconds, then doubles each time, up to *longest*.
    """

    first: float
    longest: float
    failures: int = 0
    until: float = 0.0

    def failed(self, now: float, *, factor: float = 1.0, at_least: float = 0.0) -> None:
        """
        Record a failure at *now*: wait *factor* times the usual delay, but *at_least* seconds.
        """
        self.failures += 1
        seconds = delay(self.failures, first=self.first, longest=self.longest) * factor
        self.until = now + max(seconds, at_least)

    def worked(self) -> None:
        """Record a success: reset the wait."""
        self.failures, self.until = 0, 0.0
