"""
This machine's clocks, and their difference to Maskinporten's.

Only this module reads a clock; other modules get the time as a value.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from hsmtoll.errors import ClockError
from hsmtoll.remembered import PersistedText
from hsmtoll.token import ClockReading

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_SKEW", "Clock", "Skew", "SystemClock", "offset_of", "retry_after"]

#: Seconds. A larger difference is an error of this machine's clock and is not corrected.
MAX_SKEW: Final = 300.0

#: Seconds. Below this the Date header, whole seconds and a round trip, proves nothing (C07).
_NOISE: Final = 5.0


class Clock(Protocol):
    """Where time comes from; a test brings its own."""

    def now(self) -> ClockReading:
        """Both clocks, read together."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        # Not Linux: no boot is known to be the same as another process's.
        return f"process-{os.getpid()}"


class SystemClock:
    """The machine's own clocks."""

    def __init__(self) -> None:
        # CLOCK_BOOTTIME goes on while the machine sleeps; CLOCK_MONOTONIC does not on Linux.
        self._boot = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self._boot_id = _boot_id()

    def now(self) -> ClockReading:
        """Both clocks, read together."""
        return ClockReading(time.time(), time.clock_gettime(self._boot), self._boot_id)

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


def offset_of(
    headers: Mapping[str, str], *, sent: ClockReading, received: ClockReading
) -> float | None:
    """
    Seconds that the server's clock is ahead of ours; ``None`` if the response has no usable Date.

    From the ``Date`` header of an answer that no cache has kept (no ``Age``), against the
    midpoint of the round trip; the header names a whole second, so its middle is meant.
    """
    if "date" not in headers or "age" in headers:
        return None
    named = _seconds(headers["date"])
    return None if named is None else named + 0.5 - (sent.wall + received.wall) / 2


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Seconds of a ``Retry-After`` header (RFC 9110 section 10.2.3), a number or a date."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    at = _seconds(value)
    return None if at is None else max(0.0, at - now)


def _seconds(date: str) -> float | None:
    """Seconds since 1970 of a date in a header, or ``None`` if it is none."""
    from email.utils import parsedate_to_datetime  # noqa: PLC0415 - 5 ms, and only with an answer

    try:
        at = parsedate_to_datetime(date)
        # HTTP's dates are UTC (RFC 9110 section 5.6.7); the form of asctime() names no zone.
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


class Skew:
    """
    What this machine has learned of Maskinporten's clock; it corrects ``iat`` and nothing else.

    Kept in a file of this machine, never in a shared store: another machine has another
    clock. *path* ``None`` keeps it in memory. *seconds* are to be added to our own time.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._kept = PersistedText(path)
        self.seconds = 0.0
        with contextlib.suppress(ValueError):
            seconds = float(self._kept.read() or 0.0)
            # A file that others or a bug wrote corrects no more than an answer may.
            self.seconds = seconds if abs(seconds) <= MAX_SKEW else 0.0

    def learn(self, offset: float) -> bool:
        """Take *offset* in; whether that changed the correction. Noise is taken as none."""
        corrected = 0.0 if abs(offset) < _NOISE else offset
        if abs(offset) > MAX_SKEW or abs(corrected - self.seconds) < _NOISE:
            return False
        self.seconds = corrected
        self._kept.write(f"{corrected:.1f}")
        return True

    def check(self, offset: float) -> None:
        """ClockError if *offset* is beyond what is corrected."""
        if abs(offset) > MAX_SKEW:
            raise ClockError(
                f"clock: this machine is {abs(offset):.0f} s "
                f"{'behind' if offset > 0 else 'ahead of'} Maskinporten",
                hint="synchronise the clock (NTP); up to 300 s would have been corrected",
                code="clock-skew",
                who="you",
            )
