"""
The desk: who comes decides and writes at once; one thread waits for the disk, for all.

    step ──► critical section: decide, append ──► one sync for all who came ──► what follows of each

Where an event loop runs, what follows is run by it: one thread then does nearly all there is to do,
and no other one takes the interpreter away from it. A crowd costs one sync.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from functools import partial
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

#: Where so many callers are served at once, a sync waits for others to come, in seconds: each of
#: them waits less for the disk than all would for one another (PostgreSQL's commit_siblings and
#: commit_delay). Few callers never wait.
_SIBLINGS: Final = 10
_DELAY: Final = 0.002


class Desk:
    """
    The place before *audit*. Steps are taken one after the other, in the order in which they were
    put, by the threads that put them; what follows of them keeps that order. *company* says how
    many are served at this moment.
    """

    def __init__(self, audit: Audit, company: Callable[[], int] = lambda: 0) -> None:
        self._audit = audit
        self._company = company
        # Those whose records are on the way to the disk, and the record that must be there.
        self._written: queue.SimpleQueue[tuple[Then, Failed, int] | None] = queue.SimpleQueue()
        self._due: deque[tuple[Step, Failed]] = deque()
        self._busy = False
        self._closed = False
        #: Runs what follows; ``None`` where the desk's own thread does.
        self.follow: Callable[[Callable[[], None]], object] | None = None
        self._thread = threading.Thread(target=self._run, name="hsmtoll-desk", daemon=True)
        self._thread.start()

    def put(self, step: Step, failed: Failed) -> None:
        """
        Take *step*, here and now: what it returns is called when its records are on disk,
        otherwise *failed* is.
        """
        with self._audit.held():
            self._due.append((step, failed))
            # One that is put by another step, or by what it tells, comes after that one.
            if self._busy:
                return
            self._busy = True
            try:
                while self._due:
                    self._take(*self._due.popleft())
            finally:
                self._busy = False

    def _take(self, step: Step, failed: Failed) -> None:
        if self._closed:
            _tell(failed, TryAgainLater("busy: the host is ending", code="busy", retry_after=1.0))
            return
        try:
            then = step()
        except Exception as exc:  # noqa: BLE001 - whatever it is, its caller is told
            _tell(failed, exc)
        else:
            if then is not None:
                self._written.put((then, failed, self._audit.seq))

    @property
    def alive(self) -> bool:
        """Whether anything is still said to be on disk."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Have what was written followed, and end; a second time changes nothing."""
        with self._audit.held():
            self._closed = True
        self._written.put(None)
        self._thread.join(_GOODBYE)

    def _run(self) -> None:
        open_for_more = True
        while open_for_more:
            batch: list[tuple[Then, Failed, int]] = []
            each = self._written.get()
            if self._company() >= _SIBLINGS:
                time.sleep(_DELAY)
            while each is not None:
                batch.append(each)
                try:
                    each = self._written.get_nowait()
                except queue.Empty:
                    break
            else:
                open_for_more = False
            if batch:
                self._sync(batch)

    def _sync(self, batch: list[tuple[Then, Failed, int]]) -> None:
        why: HsmTollError | None = None
        try:
            # That of the last one: they were written in this order.
            self._audit.sync(batch[-1][2])
        except HsmTollError as exc:
            why = exc
        what = partial(_follow, batch, why)
        if self.follow is not None:
            # A loop that is over takes nothing.
            with contextlib.suppress(RuntimeError):
                self.follow(what)
                return
        what()


def _follow(batch: list[tuple[Then, Failed, int]], why: HsmTollError | None) -> None:
    for then, failed, _ in batch:
        if why is not None:
            _tell(failed, why)
            continue
        try:
            then()
        except Exception as exc:  # noqa: BLE001 - whatever it is, its caller is told
            _tell(failed, exc)


def _tell(failed: Failed, exc: Exception) -> None:
    # Nobody is left to be told of a failure to tell one.
    with contextlib.suppress(Exception):
        failed(exc)
        return
    _log.error("unexpected: a mistake in hsmtoll, please report it (%s)", type(exc).__name__)
