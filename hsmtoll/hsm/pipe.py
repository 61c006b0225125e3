"""
What a device and the process that isolates it say to each other: frames, JSON objects with their
length before them, and the two values that are in them besides questions and answers.

    device   Opening ──► question ──────────────────────────► …
    worker           hello ──► (pin? ──► PIN) ──► answer, Reply
"""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.errors import HsmTollError
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey

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
        One message. EOFError where the other side ended, TimeoutError after *until*, ValueError
        or TypeError for what is none.
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
        """The next message, if all of it has come."""
        if len(self._got) < _HEAD.size:
            return None
        (size,) = _HEAD.unpack_from(self._got)
        if size > _LARGEST:
            raise ValueError("a frame that is too large")
        end = _HEAD.size + size
        if len(self._got) < end:
            return None
        message = json.loads(self._got[_HEAD.size : end])
        del self._got[:end]
        if not isinstance(message, dict):
            raise TypeError("a frame that is no message")
        return message


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """
    The settings of the worker's device: all but the PINs, of which it is told whether there is one
    (*pin*, *signing_pin*). *rules* are its program's.
    """

    module_path: Path
    uri: KeyUri
    pin: bool
    signing_pin: bool
    pin_log: Path | None
    pin_log_optional: bool
    public_key: RsaPublicKey | None
    use_final_try: bool
    allow_exportable_key: bool
    user_type: int | None
    audience: str | None
    lock_timeout: float
    rules: dict[str, str | bool | None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """
    What comes with an answer, or in its place as an *error*: how the device stands, as
    `hsmtoll.hsm.device.Device` has it, and what is to be logged: logger, level, message.
    """

    generation: int
    pin_state: str | None
    pin_accepted: bool
    log: tuple[tuple[str, int, str], ...]
    error: HsmTollError | None = None
