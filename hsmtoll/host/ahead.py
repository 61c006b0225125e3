"""
Signatures without a thread for each: the event loop hands the questions to the device's processes
ahead of time, so that none of them ever waits for the next one, and takes the answers as they come.

    ask ──► a process that signed before, nobody else waits for ──► its pipe ──► … ──► then
     └─ no: for a thread, which may wait, log in, start processes and judge what went wrong

It serves devices that are quick. With a slow one a thread costs nothing that shows, and whoever is
stopped or leaves before its turn has asked the device for nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from hsmtoll.errors import HsmTollError, foreign
from hsmtoll.hsm.isolated import Silent, to_sign

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from hsmtoll.hsm.isolated import Child, IsolatedDevice
    from hsmtoll.signer import Prepared

    #: Asked when its turn has come: what is to be signed, or ``None`` if a thread has to see to it.
    Prepare = Callable[[], Prepared | None]
    #: Gets the signature, not yet checked, or why there is none; ``None``: the device was not
    #: asked, and a thread has to.
    Then = Callable[[Prepared | None, bytes | HsmTollError | None], None]

__all__ = ["QUICK", "Ahead", "Turn"]

#: Seconds that a signature may take on a device that is asked ahead.
QUICK: Final = 0.025
#: Questions that a process has at once: the one that it is at, and the next one.
_DEPTH: Final = 2
#: Bytes. What is longer might not fit into a pipe with another one.
_LONGEST: Final = 64 * 1024


@dataclass(slots=True, eq=False)
class Turn:
    """One question that waits for its turn, or for its answer. *made*: what was asked."""

    prepare: Prepare
    then: Then
    made: Prepared | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _fate: Literal["open", "begun", "cancelled"] = "open"

    def cancel(self) -> bool:
        """Ask nothing, and say nothing, unless its turn has come: then False. From any thread."""
        return self._becomes("cancelled")

    def begin(self) -> bool:
        """Its turn has come: False if it was cancelled."""
        return self._becomes("begun")

    def _becomes(self, fate: Literal["begun", "cancelled"]) -> bool:
        with self._lock:
            if self._fate == "open":
                self._fate = fate
            return self._fate == fate


@dataclass(slots=True, eq=False)
class _Line:
    """One process and those who wait for its answers, in order; the first one's since *since*."""

    child: Child
    timer: asyncio.TimerHandle
    waiting: deque[Turn] = field(default_factory=deque)
    since: float = 0.0


class Ahead:
    """The way to one device from *loop*, in whose thread every method is called."""

    def __init__(self, device: IsolatedDevice, loop: asyncio.AbstractEventLoop) -> None:
        self._device = device
        self._doing = f"signing ({foreign(device.uri)})"
        self._loop = loop
        self._lines: list[_Line] = []
        self._pending: deque[Turn] = deque()
        device.freed = self._freed

    def ask(self, prepare: Prepare, then: Then) -> Turn | None:
        """
        Have signed what *prepare* says when it is its turn; *then* is called later, from the loop.
        ``None`` where the device is not quick: neither is called.
        """
        if self._device.pace > QUICK:
            return None
        turn = Turn(prepare, then)
        self._pending.append(turn)
        self._post()
        # One that was not started yet, or has to be looked after, is a thread's to wake.
        if self._pending and self._pending[-1] is turn and self._device.has_idle:
            self._pending.pop()
            self._give_away(turn)
        return turn

    def close(self) -> None:
        """Give all processes back; who waits for one of them has to ask another way."""
        self._device.freed = lambda: None
        for line in list(self._lines):
            self._end(line, None)
        self._give_up()

    def _freed(self) -> None:
        """In the thread that spoke to a process until now."""
        if self._pending:
            # A loop that is over has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._post)

    def _post(self) -> None:
        """Ask what can be asked now, and keep nobody else from a process that has nothing to do."""
        while self._pending and not self._device.wanted:
            line = self._line()
            if line is None:
                break
            turn = self._pending.popleft()
            if turn.begin():
                self._ask(line, turn)
        for line in [each for each in self._lines if not each.waiting]:
            self._let_go(line)
            self._device.take_back(line.child)
        if not self._lines and self._device.has_idle and not self._device.wanted:
            self._give_up()

    def _ask(self, line: _Line, turn: Turn) -> None:
        made = turn.prepare()
        if made is None or len(made.unsigned) > _LONGEST:
            self._elsewhere(turn)
            return
        turn.made = made
        if not line.waiting:
            line.since = self._loop.time()
        line.waiting.append(turn)
        try:
            line.child.post(to_sign(made.signer.alg, made.unsigned, (made.key,)), self._doing)
        except Silent as exc:
            self._end(line, exc)

    def _line(self) -> _Line | None:
        """The one with the fewest who wait; another process, as long as all have somebody."""
        free = [each for each in self._lines if len(each.waiting) < _DEPTH and each.child.steady]
        least = min(free, key=lambda line: len(line.waiting), default=None)
        if least is not None and not least.waiting:
            return least
        child = self._device.lend()
        if child is None:
            return least
        timer = self._loop.call_later(self._device.deadline, self._look, child)
        line = _Line(child, timer)
        self._lines.append(line)
        self._loop.add_reader(child.fileno(), self._came, line)
        return line

    def _came(self, line: _Line) -> None:
        """Something can be read: answers, or its end."""
        try:
            said = line.child.answers(self._doing)
        except Silent as exc:
            self._end(line, exc)
        else:
            for each in said:
                if not line.waiting:
                    # An answer that nobody asked for: what else it says is worth nothing.
                    self._end(line, None)
                    break
                self._answered(line, each)
        self._post()

    def _answered(self, line: _Line, said: dict[str, Any]) -> None:
        turn, now = line.waiting.popleft(), self._loop.time()
        try:
            outcome: bytes | HsmTollError = self._device.heard(
                line.child, said, took=now - line.since
            )
        except HsmTollError as exc:
            outcome = exc
        line.since = now
        turn.then(turn.made, outcome)

    def _look(self, child: Child) -> None:
        """Whether an answer is overdue."""
        line = next(each for each in self._lines if each.child is child)
        left = line.since + self._device.deadline - self._loop.time()
        if line.waiting and left <= 0:
            self._end(line, child.hung(self._doing))
            self._post()
        else:
            line.timer = self._loop.call_later(left, self._look, child)

    def _let_go(self, line: _Line) -> None:
        self._lines.remove(line)
        self._loop.remove_reader(line.child.fileno())
        line.timer.cancel()

    def _end(self, line: _Line, why: Silent | None) -> None:
        """The process ends. It was at the first question; the others it has not been asked."""
        self._let_go(line)
        if why is None:
            line.child.kill()
        else:
            error = self._device.lost(line.child, why)
            if line.waiting:
                first = line.waiting.popleft()
                self._loop.call_soon(first.then, first.made, error)
        self._device.take_back(line.child)
        for turn in line.waiting:
            self._elsewhere(turn)

    def _give_up(self) -> None:
        """There is no process that signs without a thread's help."""
        while self._pending:
            self._give_away(self._pending.popleft())

    def _give_away(self, turn: Turn) -> None:
        if turn.begin():
            self._elsewhere(turn)

    def _elsewhere(self, turn: Turn) -> None:
        self._loop.call_soon(turn.then, None, None)
