"""
A card in a virtual reader of pcscd (Debian: vsmartcard-vpcd). Standard library alone: cards run
in virtual environments of their own.

vpcd's wire: two bytes of length, then either a control byte (0 off, 1 on, 2 reset, 4 ATR) or an
APDU, whose answer goes back the same way.
"""

from __future__ import annotations

import signal
import socket
import time
from abc import ABC, abstractmethod
from typing import Final, NamedTuple, Protocol

# Without it every APDU waits 40 ms for a delayed acknowledgement.
QUICKACK: Final = 12


class Card(Protocol):
    """What a reader needs of a card."""

    atr: bytes

    def reset(self) -> None:
        """Power is gone: verified PINs and selected applications with it."""

    def apdu(self, message: bytes) -> bytes:
        """The response, with its status word."""


class Command(NamedTuple):
    """A command APDU (ISO 7816-4), its chained parts put together."""

    ins: int
    p1: int
    p2: int
    data: bytes


class Refused(Exception):
    """A status word other than 9000."""

    def __init__(self, word: int) -> None:
        super().__init__(f"{word:04X}")
        self.word = word


class Application(ABC):
    """A card's side of APDUs: chained commands and responses, short and extended lengths."""

    atr: bytes

    def __init__(self) -> None:
        self.parts = b""
        self.rest = b""

    def reset(self) -> None:
        self.parts = self.rest = b""

    @abstractmethod
    def execute(self, command: Command) -> bytes:
        """The response's data; Refused with a status word."""

    def apdu(self, message: bytes) -> bytes:
        cla, ins, p1, p2 = message[:4]
        data, most = lengths(message[4:])
        if ins == 0xC0:
            return self.part(most)
        if cla & 0x10:
            self.parts += data
            return b"\x90\x00"
        data, self.parts = self.parts + data, b""
        try:
            self.rest = self.execute(Command(ins, p1, p2, data))
        except Refused as exc:
            self.rest = b""
            return exc.word.to_bytes(2, "big")
        except LookupError:
            return b"\x6a\x80"  # a part of the data is missing
        return self.part(most)

    def part(self, most: int) -> bytes:
        now, self.rest = self.rest[:most], self.rest[most:]
        return now + (bytes((0x61, min(len(self.rest), 256) & 255)) if self.rest else b"\x90\x00")


def lengths(body: bytes) -> tuple[bytes, int]:
    """The data of a command, and how much its response may hold."""
    if len(body) > 2 and body[0] == 0:  # extended
        if len(body) == 3:
            return b"", int.from_bytes(body[1:], "big") or 65536
        size = int.from_bytes(body[1:3], "big")
        return body[3 : 3 + size], int.from_bytes(body[3 + size :], "big") or 65536
    if len(body) <= 1:
        return b"", (body[0] if body else 0) or 256
    return body[1 : 1 + body[0]], int.from_bytes(body[1 + body[0] :], "big") or 256


def tlv(tag: int, value: bytes) -> bytes:
    """BER, whose tags may have two bytes."""
    size = len(value)
    if size < 128:
        length = bytes((size,))
    elif size < 256:
        length = bytes((0x81, size))
    else:
        length = b"\x82" + size.to_bytes(2, "big")
    return tag.to_bytes((tag.bit_length() + 7) // 8 or 1, "big") + length + value


def tlvs(data: bytes) -> dict[int, bytes]:
    """The members of a BER template, the last of each tag."""
    found = {}
    while data:
        size = 1
        if data[0] & 31 == 31:
            size = 2 if data[1] < 128 else 3
        tag, data = int.from_bytes(data[:size], "big"), data[size:]
        length, data = data[0], data[1:]
        if length > 128:
            more = length & 127
            length, data = int.from_bytes(data[:more], "big"), data[more:]
        found[tag], data = data[:length], data[length:]
    return found


class Reader:
    """The card in its slot, or out of it: SIGUSR1 takes it out, and puts it in again."""

    def __init__(self, port: int, card: Card) -> None:
        self.port = port
        self.card = card
        self.out = False
        self.line: socket.socket | None = None
        signal.signal(signal.SIGUSR1, self.toggle)

    def toggle(self, *_: object) -> None:
        self.out = not self.out
        if self.out and self.line is not None:
            self.line.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        while True:
            try:
                if not self.out:
                    with socket.create_connection(("127.0.0.1", self.port)) as line:
                        self.line = line
                        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        self.card.reset()
                        while True:
                            self.one(line)
            except OSError:
                self.line = None
            time.sleep(0.02)

    def one(self, line: socket.socket) -> None:
        message = read(line, int.from_bytes(read(line, 2), "big"))
        if len(message) > 1:
            answer = self.card.apdu(message)
        elif message == b"\x04":
            answer = self.card.atr
        else:
            self.card.reset()
            return
        line.sendall(len(answer).to_bytes(2, "big") + answer)


def read(line: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        line.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)
        part = line.recv(size - len(got))
        if not part:
            raise ConnectionResetError
        got += part
    return got
