"""
An OpenPGP card for vpcd: python -m tests.modules.openpgp_card PORT. Run in a virtual environment
of its own, which has the card (PyPI: smartcard-app-openpgp, GPL); hsmtoll never sees it.
"""

# mypy: ignore-errors
# What is imported lives in that environment alone.

from __future__ import annotations

import logging
import os
import sys

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

from tests.modules.vpcd import Reader

# 7816-4: what a real card answers, and the package leaves out.
VERIFY, SELECT_DATA, GET_DATA, GET_RESPONSE = 0x20, 0xA5, 0xCA, 0xC0
OK, NOT_FOUND, BLOCKED = b"\x90\x00", b"\x6a\x88", b"\x69\x83"
REFUSED = b"\x69\x82"


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


class OpenPgpCard:
    """The package's card, which answers as a real one does."""

    def __init__(self) -> None:
        self.card = made()
        with transaction_manager:
            self.atr = bytes(self.card.getATR())

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
    Reader(int(sys.argv[1]), OpenPgpCard()).run()
