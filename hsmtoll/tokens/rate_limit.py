"""
Rate limit for signatures, counted in the shared store.

A device may charge for each signature, and a request that always fails must not use them up.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import TryAgainLater
from hsmtoll.fork import after_fork, notice_fork
from hsmtoll.jsonio import read_lenient
from hsmtoll.tokens.stores import name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.clock import Clock
    from hsmtoll.tokens.stores import Store

__all__ = ["RateLimit"]

_HOUR: Final = 3600.0

#: Seconds. Times further in the future, from another machine's clock, count as now.
_AHEAD: Final = 300.0


class RateLimit:
    """At most *per_hour* signatures per identity, over all programs that share the *store*."""

    def __init__(self, store: Store, clock: Clock, *, per_hour: int) -> None:
        self._store = store
        self._clock = clock
        self._per_hour = per_hour
        self._own: dict[str, list[float]] = {}
        self._start_afresh()
        after_fork(self._start_afresh)

    def _start_afresh(self) -> None:
        self._guard = threading.Lock()

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        notice_fork()
        with self._guard, self._store.lock(key, timeout=2.0):
            yield

    def acquire(self, identity: str) -> None:
        """Count one signature of *identity*; TryAgainLater if the limit is reached."""
        key = name_of("budget", identity)
        with self._locked(key):
            now = self._clock.now().wall
            shared, own = self._counts(key, now)
            # If the store is down or its file was removed, this process's own counts still apply.
            spent = max(shared, own, key=len)
            if len(spent) >= self._per_hour:
                # Store the corrected times: one in the future would be corrected again each time.
                self._own[key] = spent
                self._store.put(key, json.dumps(spent).encode(), ttl=_HOUR)
                wait = max(1.0, sorted(spent)[-self._per_hour] + _HOUR - now)
                raise TryAgainLater(
                    f"signing: {len(spent)} signatures in the last hour, which is the limit",
                    hint=f"the next is permitted in {wait:.0f} s; HSMTOLL_BUDGET__PER_HOUR sets "
                    "the limit, but first find out what causes so many signatures",
                    code="budget",
                    signed=False,
                    retry_after=wait,
                )
            self._add(key, spent, own, now)

    def record(self, identity: str) -> None:
        """Count one signature of *identity*, known only afterwards, without checking the limit."""
        key = name_of("budget", identity)
        with self._locked(key):
            now = self._clock.now().wall
            shared, own = self._counts(key, now)
            self._add(key, max(shared, own, key=len), own, now)

    def _add(self, key: str, spent: list[float], own: list[float], now: float) -> None:
        self._own[key] = [*own, now]
        self._store.put(key, json.dumps([*spent, now]).encode(), ttl=_HOUR)

    def give_back(self, identity: str) -> None:
        """Undo the last `acquire`: nothing was signed."""
        key = name_of("budget", identity)
        with self._locked(key):
            kept = self._store.get(key)
            shared = _times(kept.value) if kept else []
            own = self._own.get(key, [])
            # Remove this process's entry; another process may have added its own since.
            last = own[-1] if own else None
            if last is None:
                return
            self._own[key] = own[:-1]
            if last in shared:
                shared.remove(last)
                self._store.put(key, json.dumps(shared).encode(), ttl=_HOUR)

    def _counts(self, key: str, now: float) -> tuple[list[float], list[float]]:
        """Times of the last hour's signatures: all in the store, and this process's own."""
        kept = self._store.get(key)
        shared = _counted(_times(kept.value), now) if kept else []
        return shared, _counted(self._own.get(key, []), now)


def _counted(times: list[float], now: float) -> list[float]:
    # A clock that is set back frees no signatures: times in the future count as now.
    return [at if at <= now + _AHEAD else now for at in times if at > now - _HOUR]


def _times(raw: bytes) -> list[float]:
    times = read_lenient(raw)
    return [at for at in times if isinstance(at, float | int)] if isinstance(times, list) else []
