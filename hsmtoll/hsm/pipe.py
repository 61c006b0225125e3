"""
The protocol between a device and its worker process: JSON objects prefixed with their length, and
the two values in them besides calls and results.

    device   Opening ──► call ───────────────► PIN, if requested ──► …
    worker           hello ──► PIN request ──────────► answer, Reply
"""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.errors import HsmTollError
from hsmtoll.hsm.device import DeviceSettings

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

__all__ = ["Opening", "Pipe", "Reply"]

_HEAD: Final = struct.Struct(">I")
#: Bytes. A device full of certificates of the largest size stays below.
_LARGEST: Final = 32 * 1024 * 1024


class Pipe:
    """One end of a connected stream socket: whole messages in both directions, by one thread."""

    def __init__(self, there: socket.socket, now: Callable[[], float] = time.monotonic) -> None:
        self.socket = there
        self._now = now
        self._got = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message whole, within the socket's own timeout."""
        body = json.dumps(message).encode()
        self.socket.sendall(_HEAD.pack(len(body)) + body)

    def receive(self, *, until: float | None = None) -> dict[str, Any]:
        """
        Receive one message. EOFError if the other side has ended, TimeoutError after *until*,
        ValueError or TypeError for an invalid message.
        """
        while (message := self._whole()) is None:
            if until is not None:
                left = until - self._now()
                if left <= 0:
                    raise TimeoutError
                self.socket.settimeout(left)
            part = self.socket.recv(65536)
            if not part:
                raise EOFError
            self._got += part
        return message

    def _whole(self) -> dict[str, Any] | None:
        """The next message, if it was received completely."""
        if len(self._got) < _HEAD.size:
            return None
        (size,) = _HEAD.unpack_from(self._got)
        if size > _LARGEST:
            raise ValueError("the message is too large")
        end = _HEAD.size + size
        if len(self._got) < end:
            return None
        message = json.loads(self._got[_HEAD.size : end])
        del self._got[:end]
        if not isinstance(message, dict):
            raise TypeError("the message is not a JSON object")
        return message


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """
    The first message to a worker: its device. *pin* and *signing_pin*: whether there is a source,
    which the parent reads. *pin_log* and *pin_log_optional* are the fields of `PinLog`, *rules* the
    parameters of the worker's program.
    """

    settings: DeviceSettings
    pin: bool
    signing_pin: bool
    pin_log: Path | None
    pin_log_optional: bool
    rules: dict[str, str | bool | None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """
    The state of the device after a call, by `hsmtoll.hsm.device.Device`, the records to *log*
    (logger, level, message), and the *error* if the call failed.
    """

    generation: int
    pin_state: str | None
    pin_accepted: bool
    log: tuple[tuple[str, int, str], ...]
    error: HsmTollError | None = None
