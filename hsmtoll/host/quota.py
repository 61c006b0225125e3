"""What each caller had in the last minute and the last day, counted from the audit's records."""

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

#: Outcomes that say: the device was not asked, so nothing was had.
_NOT_ASKED: Final = ("device-down", "device-busy", "busy", "stopped")


class _Window:
    """When something was had, by jti: of the last day and, apart, of the last minute."""

    def __init__(self) -> None:
        self._spans = {MINUTE: deque[tuple[float, str]](), DAY: deque[tuple[float, str]]()}
        self._newest = 0.0

    def not_after(self, now: float) -> None:
        """
        The clock said more before: it was ahead then. What it called later was had by *now*, and
        no span is longer for it.
        """
        if self._newest > now:
            self._newest = now
            for span, each in self._spans.items():
                self._spans[span] = deque((min(at, now), jti) for at, jti in each)

    def add(self, at: float, jti: str = "") -> None:
        """One more, the newest."""
        self.not_after(at)
        self._newest = at
        for each in self._spans.values():
            each.append((at, jti))

    def take_back(self, jti: str) -> None:
        """Not had after all: the newest of that jti."""
        for each in self._spans.values():
            # From its end: it was added a moment ago.
            for place in range(len(each) - 1, -1, -1):
                if each[place][1] == jti:
                    del each[place]
                    break

    def of(self, span: float, now: float) -> deque[tuple[float, str]]:
        """Those of the last *span* seconds, oldest first: a look costs the same however many."""
        self.not_after(now)
        each = self._spans[span]
        while each and each[0][0] <= now - span:
            each.popleft()
        return each


@dataclass(slots=True)
class _Had:
    """When a caller was signed for, and when something was handed to it."""

    signed: _Window = field(default_factory=_Window)
    given: _Window = field(default_factory=_Window)


class Usage:
    """Signatures and releases by caller and profile. Not locked: its owner is."""

    def __init__(self) -> None:
        self._had: defaultdict[tuple[str, str], _Had] = defaultdict(_Had)

    def clock_was_set_back(self, now: float) -> None:
        """What was counted later than *now* was had by then."""
        for had in self._had.values():
            had.signed.not_after(now)
            had.given.not_after(now)

    def add(self, record: Mapping[str, Any], at: float) -> None:
        """Count an audit record, written at *at* (seconds since the epoch)."""
        event, jti = record["event"], str(record["jti"])
        if event not in ("intent", "result", "release"):
            return
        had = self._had[str(record["caller"]), str(record["profile"])]
        grant = (record["options"] or {}).get("mode", "grant") == "grant"
        windows = [had.signed, had.given] if grant else [had.signed]
        if event == "intent":
            for each in windows:
                each.add(at, jti)
        elif event == "release":
            had.given.add(at)
        elif record["outcome"] in _NOT_ASKED:
            for each in windows:
                each.take_back(jti)

    def counts(
        self, caller: str, profile: str, now: float, of: Literal["signed", "given", "either"]
    ) -> Counts:
        """What *caller* had of *profile* up to *now*."""
        seen = self._windows(caller, profile, of)
        return Counts(
            minute=max((len(each.of(MINUTE, now)) for each in seen), default=0),
            day=max((len(each.of(DAY, now)) for each in seen), default=0),
        )

    def free_in(
        self, caller: str, profile: str, now: float, *, minute: int | None, day: int | None
    ) -> float:
        """Seconds until *caller* is below both limits again, 1 at least."""
        waits = [1.0]
        for window in self._windows(caller, profile, "either"):
            for limit, span in ((minute, MINUTE), (day, DAY)):
                each = window.of(span, now)
                if limit == 0:
                    waits.append(span)
                elif limit is not None and len(each) >= limit:
                    waits.append(each[-limit][0] + span - now)
        return max(waits)

    def _windows(self, caller: str, profile: str, of: str) -> list[_Window]:
        had = self._had.get((caller, profile))
        if had is None:
            return []
        if of == "signed":
            return [had.signed]
        return [had.given] if of == "given" else [had.signed, had.given]
