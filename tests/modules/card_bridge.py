"""
An OpenPGP card for vpcd: python card_bridge.py PORT. Run in a virtual environment of its own,
which has the card (PyPI: smartcard-app-openpgp, GPL); hsmtoll never sees it.

SIGUSR1 takes the card out, and puts it in again. vpcd's wire: two bytes of length, then either
a control byte (0 off, 1 on, 2 reset, 4 ATR) or an APDU, whose answer goes back the same way.
"""

# mypy: ignore-errors
# What is imported lives in that environment alone.

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time

import ZODB
import ZODB.DB
import ZODB.MappingStorage
from smartcard import MASTER_FILE_IDENTIFIER, Card
from smartcard.app.openpgp import OpenPGP
from smartcard.app.openpgp.tag import (
    AlgorithmAttributesAuthentication,
    AlgorithmAttributesDecryption,
    AlgorithmAttributesSignature,
)
from smartcard.asn1 import CodecBER
from smartcard.utils import transaction_manager

# 7816-4: what a real card answers, and the package leaves out.
VERIFY, SELECT_DATA, GET_DATA, GET_RESPONSE = 0x20, 0xA5, 0xCA, 0xC0
OK, NOT_FOUND, BLOCKED = b"\x90\x00", b"\x6a\x88", b"\x69\x83"
REFUSED = b"\x69\x82"
# Without it every APDU waits 40 ms for a delayed acknowledgement.
QUICKACK = 12


def made() -> Card:
    """A fresh card that holds RSA-2048 keys."""
    OpenPGP._has_key_derived_function = False
    storage = ZODB.MappingStorage.MappingStorage()
    root = ZODB.DB(storage=storage, pool_size=1).open(transaction_manager=transaction_manager).root
    with transaction_manager:
        card = root.card = Card(name=b"hsmtoll-test")
        application = OpenPGP(identifier=b"\x20\x26")
        application.activateSelf()
        for kind in (
            AlgorithmAttributesSignature,
            AlgorithmAttributesDecryption,
            AlgorithmAttributesAuthentication,
        ):
            parameters = {
                "public_exponent_bit_length": 32,
                "modulus_bit_length": 2048,
                "import_format": kind.RSA.IMPORT_FORMAT_STANDARD,
            }
            value = {"algorithm": kind.RSA, "parameter_dict": parameters}
            application.putData(
                tag=kind, value=kind.encode(value=value, codec=CodecBER), encode=False, index=0
            )
        card.createFile(card.traverse((MASTER_FILE_IDENTIFIER,)), application)
    return card


class Reader:
    """The card in its slot, or out of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.card = made()
        with transaction_manager:
            self.atr = bytes(self.card.getATR())
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
                    with socket.create_connection(("127.0.0.1", self.port)) as self.line:
                        self.line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        self.reset()
                        while True:
                            self.one()
            except OSError:
                self.line = None
            time.sleep(0.02)

    def one(self) -> None:
        message = self.read(int.from_bytes(self.read(2), "big"))
        if len(message) > 1:
            answer = self.apdu(message)
        elif message == b"\x04":
            answer = self.atr
        else:
            self.reset()
            return
        self.line.sendall(len(answer).to_bytes(2, "big") + answer)

    def read(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            self.line.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)
            part = self.line.recv(size - len(got))
            if not part:
                raise ConnectionResetError
            got += part
        return got

    def reset(self) -> None:
        with transaction_manager:
            self.card.clearVolatile()

    def apdu(self, message: bytes) -> bytes:
        instruction, where = message[1], message[2:4]
        if instruction == SELECT_DATA:
            return OK
        if instruction == GET_DATA and where == b"\x7f\x21":
            return OK  # no certificate on it
        if instruction == GET_DATA and where == b"\x00\xfa":
            return NOT_FOUND
        answer = bytes(self.card.runAPDU(bytearray(message)))
        if instruction == VERIFY and answer == REFUSED:
            # A card says how many tries are left; the package only that this was none.
            left = bytes(self.card.runAPDU(bytearray([0, VERIFY, 0, message[3]])))
            return left if left[1] & 15 else BLOCKED
        return answer


if __name__ == "__main__":
    logging.basicConfig(level=os.environ.get("LOG", "ERROR"))
    Reader(int(sys.argv[1])).run()
