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

#: Seconds. Smaller differences are ignored: the Date header has whole seconds (C07).
_NOISE: Final = 5.0


class Clock(Protocol):
    """A source of time; tests have their own."""

    def now(self) -> ClockReading:
        """One reading of both clocks."""

    def sleep(self, seconds: float) -> None:
        """Wait *seconds*."""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        # Not Linux: processes cannot know whether they share a boot.
        return f"process-{os.getpid()}"


class SystemClock:
    """The machine's own clocks."""

    def __init__(self) -> None:
        # CLOCK_BOOTTIME includes suspend; CLOCK_MONOTONIC on Linux does not.
        self._boot = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self._boot_id = _boot_id()

    def now(self) -> ClockReading:
        """One reading of both clocks."""
        return ClockReading(time.time(), time.clock_gettime(self._boot), self._boot_id)

    def sleep(self, seconds: float) -> None:
        """Wait *seconds*."""
        time.sleep(seconds)


def offset_of(
    headers: Mapping[str, str], *, sent: ClockReading, received: ClockReading
) -> float | None:
    """
    Seconds that the server's clock is ahead of ours; ``None`` if the response has no usable Date.

    Computed from the ``Date`` header and the midpoint of the round trip; half a second is added
    because the header has whole seconds. Responses of caches (with ``Age``) are not used.
    """
    if "date" not in headers or "age" in headers:
        return None
    date = _seconds(headers["date"])
    return None if date is None else date + 0.5 - (sent.wall + received.wall) / 2


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Seconds of a ``Retry-After`` header (RFC 9110 section 10.2.3), a number or a date."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    at = _seconds(value)
    return None if at is None else max(0.0, at - now)


def _seconds(date: str) -> float | None:
    """Epoch seconds of a date in a header; ``None`` if it is not a date."""
    from email.utils import parsedate_to_datetime  # noqa: PLC0415 - 5 ms, and only with an answer

    try:
        at = parsedate_to_datetime(date)
        # HTTP dates are UTC (RFC 9110 section 5.6.7); the asctime() form has no zone.
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


class Skew:
    """
    The difference to Maskinporten's clock, which corrects only ``iat``.

    It is kept in the file *path* (``None``: in memory), never in a shared store, because each
    machine has its own clock. *seconds* are added to this machine's time.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._kept = PersistedText(path)
        self.seconds = 0.0
        #: The difference at the last response, in seconds; ``None`` before the first.
        self.observed: float | None = None
        with contextlib.suppress(ValueError):
            seconds = float(self._kept.read() or 0.0)
            # The file may be wrong: apply the same limit as for a response.
            self.seconds = seconds if abs(seconds) <= MAX_SKEW else 0.0

    def learn(self, offset: float) -> bool:
        """Update the correction to *offset*, noise to 0. Returns whether the correction changed."""
        self.observed = offset
        corrected = 0.0 if abs(offset) < _NOISE else offset
        if abs(offset) > MAX_SKEW or abs(corrected - self.seconds) < _NOISE:
            return False
        self.seconds = corrected
        self._kept.write(f"{corrected:.1f}")
        return True

    def check(self, offset: float) -> None:
        """ClockError if *offset* is too large to be corrected."""
        if abs(offset) > MAX_SKEW:
            raise ClockError(
                f"clock: this machine is {abs(offset):.0f} s "
                f"{'behind' if offset > 0 else 'ahead of'} Maskinporten",
                hint="synchronise the clock (NTP); up to 300 s would have been corrected",
                code="clock-skew",
                who="you",
            )
