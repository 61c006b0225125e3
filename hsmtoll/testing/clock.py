"""A clock that stands still until it is moved: suspend, drift and years in no time."""

from __future__ import annotations

import threading
import time

from hsmtoll.token import ClockReading

__all__ = ["SettableClock"]


class SettableClock:
    """
    Both clocks of a machine, in seconds. Sleeping moves them, so nothing waits.

    `advance` is time that passes, awake or asleep; `set_wall` is somebody who sets the clock;
    `reboot` starts the boot clock anew.
    """

    def __init__(self, wall: float, boot: float = 1000.0) -> None:
        self._lock = threading.Lock()
        self._moment = ClockReading(wall, boot, "boot-1")
        self._boots = 1

    @classmethod
    def at_real_time(cls) -> SettableClock:
        """Standing at the time it is."""
        return cls(time.time())

    def now(self) -> ClockReading:
        """Both clocks."""
        return self._moment

    def sleep(self, seconds: float) -> None:
        """Returns at once; the time has passed."""
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        with self._lock:
            at = self._moment
            self._moment = ClockReading(at.wall + seconds, at.boot + seconds, at.boot_id)

    def set_wall(self, wall: float) -> None:
        """Set the wall clock; the boot clock knows nothing of it."""
        with self._lock:
            self._moment = ClockReading(wall, self._moment.boot, self._moment.boot_id)

    def reboot(self) -> None:
        """Start the machine again."""
        with self._lock:
            self._boots += 1
            self._moment = ClockReading(self._moment.wall, 10.0, f"boot-{self._boots}")
