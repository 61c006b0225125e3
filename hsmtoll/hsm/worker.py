"""
The process that a Device is isolated in.

It is started by `hsmtoll.hsm.isolated`, speaks over one socket alone, and ends with it. It says
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.errors import DeviceError, HsmTollError, from_data, to_data
from hsmtoll.hsm import pipe
from hsmtoll.hsm.device import Device
from hsmtoll.hsm.inspect import inspect
from hsmtoll.hsm.ledger import Ledger
from hsmtoll.hsm.pin import Pin
from hsmtoll.hsm.protect import keep_secrets_in_memory
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import SigningInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.hsm.pin import PinSource

    #: Given the algorithm and what is to be signed.
    Check = Callable[[str, bytes], None]

#: Seconds that a call may still take once nobody waits for it any more.
_GRACE: Final = 2.0


class _Asked:
    """The PIN source of the other side."""

    def __init__(self, there: pipe.Pipe, user: str) -> None:
        self._there = there
        self._user = user

    def read(self, *, device: str) -> Pin:
        self._there.send({"pin": self._user, "device": device})
        said = self._there.receive()
        if "error" in said:
            raise from_data(said["error"], unknown=DeviceError)
        return Pin(
            said["value"], source=said["source"], version=said["version"], typed=said["typed"]
        )


class _Told(logging.Handler):
    """What would be logged here, for the other side to log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[list[Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append([record.name, record.levelno, record.getMessage()])


def main(
    descriptor: int,
    stderr: int | None = None,
    *,
    rules: Callable[[dict[str, Any]], Check] | None = None,
) -> None:
    """
    Serve one Device over the socket *descriptor* until the other side ends. *stderr*, where it is
    given, becomes the standard error from here on. *rules* makes of what it is told a check that
    is asked before each signature, and raises for what is not to be signed.
    """
    # It has the PIN and the login. A core file of a module that crashed would show them as well.
    keep_secrets_in_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = _Told()
    logger = logging.getLogger("hsmtoll")
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    if stderr is not None:
        os.dup2(stderr, 2)
        os.close(stderr)
    with socket.socket(fileno=descriptor) as connection:
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        there = pipe.Pipe(connection)
        with contextlib.suppress(EOFError, OSError):
            there.send({"hello": os.getpid()})
            settings = there.receive()
            device = _device(there, settings)
            check = rules(settings["rules"]) if rules is not None else None
            with contextlib.closing(device):
                while True:
                    question = there.receive()
                    answer = _answered(device, question, check)
                    answer |= {"generation": device.generation, "log": told.records}
                    told.records = []
                    there.send(answer)
                    if question["do"] == "close":
                        return


def _end_with(connection: socket.socket) -> None:
    """A call that hangs does not outlive those who asked."""
    poll = select.poll()
    poll.register(connection, 0)
    poll.poll()
    time.sleep(_GRACE)
    os._exit(1)


def _device(there: pipe.Pipe, told: dict[str, Any]) -> Device:
    def source(user: str) -> PinSource | None:
        return _Asked(there, user) if told[user] else None

    return Device(
        Path(told["module"]),
        KeyUri.parse(told["uri"]),
        pin=source("user"),
        signing_pin=source("signing"),
        ledger=Ledger(told["ledger"] and Path(told["ledger"]), optional=told["optional"]),
        public_key=pipe.keys_from([told["public_key"]])[0],
        use_final_try=told["use_final_try"],
        allow_exportable_key=told["allow_exportable_key"],
        user_type=told["user_type"],
        lock_timeout=told["lock_timeout"],
    )


def _answered(device: Device, question: dict[str, Any], check: Check | None) -> dict[str, Any]:
    try:
        if question["do"] == "sign" and check is not None:
            check(question["alg"], question["data"])
        answer = _answer(device, question)
        return {"data" if isinstance(answer, bytes) else "answer": answer}
    except HsmTollError as exc:
        return {"error": to_data(exc)}
    except Exception as exc:  # noqa: BLE001 - whatever it is, the other side must hear of it
        kind = type(exc).__name__
        return {"error": to_data(DeviceError(f"the device's process: {kind}", code="worker"))}


def _answer(device: Device, question: dict[str, Any]) -> Any:
    candidates = [key for key in pipe.keys_from(question.get("candidates", [])) if key]
    match question["do"]:
        case "certificates":
            return pipe.certificates_to(device.certificates(near=question["near"]))
        case "login":
            return device.login(whatever=question["whatever"])
        case "elsewhere":
            return pipe.certificates_to(device.elsewhere())
        case "key":
            return pipe.facts_to(device.key(candidates=candidates))
        case "inspect":
            return pipe.module_to(
                inspect(
                    device.module_path,
                    ledger=device._ledger,  # noqa: SLF001 - what it was told, once more
                    uri=device.uri,
                    pin=device._pin,  # noqa: SLF001
                    user_type=device.user_type,
                )
            )
        case "sign":
            unsigned = SigningInput(question["data"])
            # Who can check it does, on the other side.
            sign = device.unproven if candidates else device.sign
            return sign(question["alg"], unsigned, candidates=candidates)
        case "self-test":
            return device.self_test(question["alg"], candidates=candidates).hex()
        case _:
            device.close()
            return None
