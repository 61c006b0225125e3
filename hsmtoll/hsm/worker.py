"""
The process that a device is isolated in.

It is started by `hsmtoll.hsm.child`, speaks over one socket alone, and ends with it. It says
hello before any module is loaded: what fails before that is no module's fault.
Settings come as the first message and a PIN when a login needs it; neither environment nor
argv has them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.errors import DeviceError, HsmTollError
from hsmtoll.hsm.codec import decode, encode, hints
from hsmtoll.hsm.device import Device
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin import Pin
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pipe import Opening, Pipe, Reply
from hsmtoll.hsm.protect import keep_secrets_in_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.hsm.pin import PinSource
    from hsmtoll.signing.grant import Read

#: Seconds that a call may still take once nobody waits for it any more.
_GRACE: Final = 2.0
#: What is answered, by the names of Device's methods. What a program with rules answers is enough
#: to sign grants, and to see that the device works.
_FOR_GRANTS: Final = frozenset(
    {"certificates", "other_certificates", "key", "sign", "self_test", "close"}
)
_QUESTIONS: Final = _FOR_GRANTS | {
    "sign_request",
    "generate",
    "private_keys",
    "store",
    "inspect",
    "token_users",
}


class _Asked:
    """The PIN source of the other side."""

    def __init__(self, there: Pipe, user: str) -> None:
        self._there = there
        self._user = user

    def read(self, *, device: str) -> Pin:
        self._there.send({"pin": self._user, "device": device})
        said = self._there.receive()
        if "error" in said:
            raise decode(HsmTollError, said["error"])
        return Pin(
            said["value"], source=said["source"], version=said["version"], typed=said["typed"]
        )


class _Records(logging.Handler):
    """What would be logged here, for the other side to log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._records: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.name, record.levelno, record.getMessage()))

    def taken(self) -> tuple[tuple[str, int, str], ...]:
        """All of them; the next time those that came since."""
        taken, self._records = self._records, []
        return tuple(taken)


def main(
    descriptor: int,
    stderr: int | None = None,
    *,
    rules: Callable[[dict[str, Any]], Callable[[Read], None]] | None = None,
) -> None:
    """
    Serve one device over the socket *descriptor* until the other side ends. *stderr*, where it is
    given, becomes the standard error from here on. *rules* makes of what it is told a check of
    each grant before it is signed, which raises for what is not to be.
    """
    # It has the PIN and the login. A core file of a module that crashed would show them as well.
    keep_secrets_in_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    records = _Records()
    logger = logging.getLogger("hsmtoll")
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    if stderr is not None:
        os.dup2(stderr, 2)
        os.close(stderr)
    with socket.socket(fileno=descriptor) as connection:
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        there = Pipe(connection)
        with contextlib.suppress(EOFError, OSError):
            there.send({"hello": os.getpid()})
            opening: Opening = decode(Opening, there.receive())
            check = rules(opening.rules or {}) if rules is not None else None
            questions = _QUESTIONS if rules is None else _FOR_GRANTS
            with _device(there, opening, check) as device:
                while True:
                    question = there.receive()
                    answer, error = _answered(device, question, questions)
                    reply = Reply(
                        generation=device.generation,
                        pin_state=device.pin_state,
                        pin_accepted=device.pin_accepted,
                        log=records.taken(),
                        error=error,
                    )
                    there.send({"answer": encode(answer), **encode(reply)})
                    if question["do"] == "close":
                        return


def _end_with(connection: socket.socket) -> None:
    """A call that hangs does not outlive those who asked."""
    poll = select.poll()
    poll.register(connection, 0)
    poll.poll()
    time.sleep(_GRACE)
    os._exit(1)


def _device(there: Pipe, opening: Opening, check: Callable[[Read], None] | None) -> InProcessDevice:
    def source(user: str, given: bool) -> PinSource | None:
        return _Asked(there, user) if given else None

    return InProcessDevice(
        opening.module_path,
        opening.uri,
        pin=source("user", opening.pin),
        signing_pin=source("signing", opening.signing_pin),
        pin_log=PinLog(opening.pin_log, optional=opening.pin_log_optional),
        public_key=opening.public_key,
        use_final_try=opening.use_final_try,
        allow_exportable_key=opening.allow_exportable_key,
        user_type=opening.user_type,
        audience=opening.audience,
        rules=check,
        lock_timeout=opening.lock_timeout,
        back_off=False,
    )


def _answered(
    device: InProcessDevice, question: dict[str, Any], questions: frozenset[str]
) -> tuple[Any, HsmTollError | None]:
    """The answer, or why there is none."""
    try:
        do = question["do"]
        if do not in questions:
            return None, DeviceError("the device's process does not answer this", code="worker")
        kinds = hints(getattr(Device, do))
        told = {name: decode(kinds[name], question[name]) for name in question.keys() - {"do"}}
        # Who asks for a signature verifies it, on the other side.
        return getattr(device, "unverified" if do == "sign" else do)(**told), None
    except HsmTollError as exc:
        return None, exc
    except Exception as exc:  # noqa: BLE001 - whatever it is, the other side must hear of it
        kind = type(exc).__name__
        return None, DeviceError(f"the device's process: {kind}", code="worker")
