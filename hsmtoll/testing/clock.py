"""A simulated clock for tests: it advances only when a test advances it."""

from __future__ import annotations

import threading
import time

from hsmtoll.token import ClockReading

__all__ = ["SettableClock"]


class SettableClock:
    """
    Wall clock and boot clock of a machine, in seconds. `sleep` advances them without waiting.

    `advance` lets time pass on both, as while suspended; `set_wall` sets the wall clock only;
    `reboot` restarts the boot clock.
    """

    def __init__(self, wall: float, boot: float = 1000.0) -> None:
        self._lock = threading.Lock()
        self._moment = ClockReading(wall, boot, "boot-1")
        self._boots = 1

    @classmethod
    def at_real_time(cls) -> SettableClock:
        """A clock that is set to the current time."""
        return cls(time.time())

    def now(self) -> ClockReading:
        """Read both clocks."""
        return self._moment

    def sleep(self, seconds: float) -> None:
        """Advance both clocks and return at once."""
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Advance both clocks."""
        with self._lock:
            at = self._moment
            self._moment = ClockReading(at.wall + seconds, at.boot + seconds, at.boot_id)

    def set_wall(self, wall: float) -> None:
        """Set the wall clock; the boot clock does not change."""
        with self._lock:
            self._moment = ClockReading(wall, self._moment.boot, self._moment.boot_id)

    def reboot(self) -> None:
        """Restart the boot clock, with a new boot id."""
        with self._lock:
            self._boots += 1
            self._moment = ClockReading(self._moment.wall, 10.0, f"boot-{self._boots}")
