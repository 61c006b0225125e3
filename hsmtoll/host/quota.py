"""Quota usage: sliding windows of a minute and a day per caller, counted from audit records."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from hsmtoll.host.policy import Counts

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DAY", "Usage"]

#: Seconds.
MINUTE: Final = 60.0
DAY: Final = 86_400.0

#: Outcomes with which the device was not called; the intent before them is not counted.
_NOT_SIGNED: Final = ("device-down", "device-busy", "busy", "stopped")


class _Window:
    """Sliding windows of a day and of a minute: times and jti, oldest first."""

    def __init__(self) -> None:
        self._spans = {MINUTE: deque[tuple[float, str]](), DAY: deque[tuple[float, str]]()}
        self._newest = 0.0

    def clamp_to(self, now: float) -> None:
        """
        Clamp later times to *now*: the clock was set back. Otherwise they would count for longer
        than their window.
        """
        if self._newest > now:
            self._newest = now
            for span, entries in self._spans.items():
                self._spans[span] = deque((min(at, now), jti) for at, jti in entries)

    def add(self, at: float, jti: str = "") -> None:
        """Add an entry at *at*, the newest."""
        self.clamp_to(at)
        self._newest = at
        for entries in self._spans.values():
            entries.append((at, jti))

    def remove(self, jti: str) -> None:
        """Remove the newest entry with *jti*."""
        for entries in self._spans.values():
            # From the end: it is one of the last.
            for place in range(len(entries) - 1, -1, -1):
                if entries[place][1] == jti:
                    del entries[place]
                    break

    def of(self, span: float, now: float) -> deque[tuple[float, str]]:
        """The entries of the last *span* seconds, oldest first. Amortised O(1)."""
        self.clamp_to(now)
        entries = self._spans[span]
        while entries and entries[0][0] <= now - span:
            entries.popleft()
        return entries


@dataclass(slots=True)
class _Windows:
    """The windows of one caller and profile: signatures, and replies given out."""

    signed: _Window = field(default_factory=_Window)
    given: _Window = field(default_factory=_Window)


class Usage:
    """Signatures and replies by caller and profile. Not thread-safe; the owner holds a lock."""

    def __init__(self) -> None:
        self._by_caller: defaultdict[tuple[str, str], _Windows] = defaultdict(_Windows)

    def clamp_to(self, now: float) -> None:
        """Clamp later times to *now*, after the clock was set back."""
        for windows in self._by_caller.values():
            windows.signed.clamp_to(now)
            windows.given.clamp_to(now)

    def add(self, record: Mapping[str, Any], at: float) -> None:
        """Count an audit record, written at *at* (seconds since the epoch)."""
        event, jti = record["event"], str(record["jti"])
        if event not in ("intent", "result", "release"):
            return
        windows = self._by_caller[str(record["caller"]), str(record["profile"])]
        grant = (record["options"] or {}).get("mode", "grant") == "grant"
        counted = [windows.signed, windows.given] if grant else [windows.signed]
        if event == "intent":
            for window in counted:
                window.add(at, jti)
        elif event == "release":
            windows.given.add(at)
        elif record["outcome"] in _NOT_SIGNED:
            for window in counted:
                window.remove(jti)

    def counts(
        self, caller: str, profile: str, now: float, of: Literal["signed", "given", "either"]
    ) -> Counts:
        """The usage of *profile* by *caller*, up to *now*."""
        seen = self._windows(caller, profile, of)
        return Counts(
            minute=max((len(window.of(MINUTE, now)) for window in seen), default=0),
            day=max((len(window.of(DAY, now)) for window in seen), default=0),
        )

    def free_in(
        self, caller: str, profile: str, now: float, *, minute: int | None, day: int | None
    ) -> float:
        """Seconds until *caller* is below both limits again; at least 1."""
        waits = [1.0]
        for window in self._windows(caller, profile, "either"):
            for limit, span in ((minute, MINUTE), (day, DAY)):
                entries = window.of(span, now)
                if limit == 0:
                    waits.append(span)
                elif limit is not None and len(entries) >= limit:
                    waits.append(entries[-limit][0] + span - now)
        return max(waits)

    def _windows(self, caller: str, profile: str, of: str) -> list[_Window]:
        windows = self._by_caller.get((caller, profile))
        if windows is None:
            return []
        if of == "signed":
            return [windows.signed]
        return [windows.given] if of == "given" else [windows.signed, windows.given]
