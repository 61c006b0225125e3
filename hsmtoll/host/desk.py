"""
The desk: one thread decides and writes for all, as much at once as has come.

    step, step, step ──► critical section: decide, append ──► one sync ──► what follows of each

A crowd costs one section and one sync, and no thread of its own for each who waits.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import HsmTollError, TryAgainLater

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.host.audit import Audit

    #: What follows once the records of a step are on disk; it may not wait for anything.
    Then = Callable[[], None]
    #: Decides, appends, and says what follows, if something does. It runs inside `Audit.held`.
    Step = Callable[[], Then | None]
    #: Is told why a step failed, or why its records cannot be known to be on disk.
    Failed = Callable[[Exception], None]

__all__ = ["Desk"]

_log = logging.getLogger("hsmtoll.host")

#: Seconds that the end waits for what is still being written.
_GOODBYE: Final = 10.0


class Desk:
    """The thread before *audit*. Steps are taken in the order in which they were put."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._steps: queue.SimpleQueue[tuple[Step, Failed] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hsmtoll-desk", daemon=True)
        self._thread.start()

    def put(self, step: Step, failed: Failed) -> None:
        """
        Have *step* taken: what it returns is called when its records are on disk, otherwise
        *failed* is. Both are called by the desk's own thread, like the steps.
        """
        with self._lock:
            if not self._closed:
                self._steps.put((step, failed))
                return
        failed(TryAgainLater("busy: the host is ending", code="busy", retry_after=1.0))

    @property
    def alive(self) -> bool:
        """Whether anything that is put is taken."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Take what has come, and end; a second time changes nothing."""
        with self._lock:
            self._closed = True
            self._steps.put(None)
        self._thread.join(_GOODBYE)

    def _run(self) -> None:
        open_for_more = True
        while open_for_more:
            following: list[tuple[Then, Failed]] = []
            failures: list[tuple[Exception, Failed]] = []
            each = self._steps.get()
            with self._audit.held():
                while each is not None:
                    step, failed = each
                    try:
                        then = step()
                    except Exception as exc:  # noqa: BLE001 - whatever it is, its caller is told
                        failures.append((exc, failed))
                    else:
                        if then is not None:
                            following.append((then, failed))
                    try:
                        each = self._steps.get_nowait()
                    except queue.Empty:
                        break
                else:
                    open_for_more = False
                seq = self._audit.seq
            for why, failed in failures:
                _tell(failed, why)
            if following:
                self._follow(following, seq)

    def _follow(self, following: list[tuple[Then, Failed]], seq: int) -> None:
        try:
            self._audit.sync(seq)
        except HsmTollError as exc:
            for _, failed in following:
                _tell(failed, exc)
            return
        for then, failed in following:
            try:
                then()
            except Exception as exc:  # noqa: BLE001 - as above
                _tell(failed, exc)


def _tell(failed: Failed, exc: Exception) -> None:
    # Nobody is left to be told of a failure to tell one.
    with contextlib.suppress(Exception):
        failed(exc)
        return
    _log.error("unexpected: a mistake in hsmtoll, please report it (%s)", type(exc).__name__)
