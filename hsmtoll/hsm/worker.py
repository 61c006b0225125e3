"""
The program of a worker process: one device, with its module in this process.

`hsmtoll.hsm.child` starts it. It communicates over one socket and ends when that is closed. It
sends ``hello`` before it loads a module, so that earlier failures are not attributed to the module.
The settings are the first message, and a PIN is sent when a login needs it; neither is in the
environment or in argv.
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
    from hsmtoll.signing.grant import ParsedGrant

#: Seconds that a call may still take after the parent has ended.
_ORPHAN_GRACE: Final = 2.0
#: Device methods that may be called. A program with rules permits only those for signing grants
#: and for testing the device.
_METHODS_FOR_GRANTS: Final = frozenset(
    {"certificates", "other_certificates", "key", "sign", "self_test", "close"}
)
_METHODS: Final = _METHODS_FOR_GRANTS | {
    "sign_request",
    "generate",
    "private_keys",
    "store",
    "inspect",
    "token_users",
}


class _PinFromParent:
    """A PIN source that requests the PIN from the parent process."""

    def __init__(self, pipe: Pipe, user: str) -> None:
        self._pipe = pipe
        self._user = user

    def read(self, *, device: str) -> Pin:
        self._pipe.send({"pin": self._user, "device": device})
        message = self._pipe.receive()
        if "error" in message:
            raise decode(HsmTollError, message["error"])
        return Pin(
            message["value"],
            source=message["source"],
            version=message["version"],
            typed=message["typed"],
        )


class _Records(logging.Handler):
    """Collects log records, which the parent process logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._records: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.name, record.levelno, record.getMessage()))

    def taken(self) -> tuple[tuple[str, int, str], ...]:
        """Return the records since the last call."""
        taken, self._records = self._records, []
        return tuple(taken)


def main(
    descriptor: int,
    stderr: int | None = None,
    *,
    rules: Callable[[dict[str, Any]], Callable[[ParsedGrant], None]] | None = None,
) -> None:
    """
    Serve one device over the socket *descriptor* until the parent ends. The descriptor *stderr*, if
    given, becomes the standard error. *rules* returns, for the parent's parameters, a function that
    raises for a grant that must not be signed.
    """
    # This process has the PIN: disable core files, as modules may crash.
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
        threading.Thread(target=_exit_with_parent, args=(connection,), daemon=True).start()
        pipe = Pipe(connection)
        with contextlib.suppress(EOFError, OSError):
            pipe.send({"hello": os.getpid()})
            opening: Opening = decode(Opening, pipe.receive())
            check = rules(opening.rules or {}) if rules is not None else None
            permitted = _METHODS if rules is None else _METHODS_FOR_GRANTS
            with _device(pipe, opening, check) as device:
                while True:
                    call = pipe.receive()
                    answer, error = _result_of(device, call, permitted)
                    reply = Reply(
                        generation=device.generation,
                        pin_state=device.pin_state,
                        pin_accepted=device.pin_accepted,
                        log=records.taken(),
                        error=error,
                    )
                    pipe.send({"answer": encode(answer), **encode(reply)})
                    if call["do"] == "close":
                        return


def _exit_with_parent(connection: socket.socket) -> None:
    """End this process soon after its parent, even if a call hangs."""
    poll = select.poll()
    poll.register(connection, 0)
    poll.poll()
    time.sleep(_ORPHAN_GRACE)
    os._exit(1)


def _device(
    pipe: Pipe, opening: Opening, check: Callable[[ParsedGrant], None] | None
) -> InProcessDevice:
    def source(user: str, given: bool) -> PinSource | None:
        return _PinFromParent(pipe, user) if given else None

    return InProcessDevice(
        opening.settings,
        pin=source("user", opening.pin),
        signing_pin=source("signing", opening.signing_pin),
        pin_log=PinLog(opening.pin_log, optional=opening.pin_log_optional),
        rules=check,
        back_off=False,
    )


def _result_of(
    device: InProcessDevice, call: dict[str, Any], permitted: frozenset[str]
) -> tuple[Any, HsmTollError | None]:
    """The result of the call, or its error."""
    try:
        do = call["do"]
        if do not in permitted:
            return None, DeviceError("the device's process does not answer this", code="worker")
        kinds = hints(getattr(Device, do))
        arguments = {name: decode(kinds[name], call[name]) for name in call.keys() - {"do"}}
        # The parent verifies signatures.
        return getattr(device, "unverified" if do == "sign" else do)(**arguments), None
    except HsmTollError as exc:
        return None, exc
    except Exception as exc:  # noqa: BLE001 - the parent waits for a reply to every call
        kind = type(exc).__name__
        return None, DeviceError(f"the device's process: {kind}", code="worker")
