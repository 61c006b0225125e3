"""
A PIV card (NIST SP 800-73-4) with the additions of a YubiKey 5 for vpcd: python -m
tests.modules.piv_card PORT. Written from the published commands; the modules in front of it,
OpenSC and ykcs11, are the makers' own.

PIN 123456, PUK 12345678, three tries each; the management key is the one that YubiKeys come with.
"""

from __future__ import annotations

import datetime as dt
import secrets
import sys
from typing import Final

from cryptography import x509
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.modules.vpcd import Application, Command, Reader, Refused, tlv, tlvs

AID: Final = bytes.fromhex("A000000308")
PIN, PUK = b"123456", b"12345678"
TRIES: Final = 3
MANAGEMENT: Final = bytes.fromhex("010203040506070801020304050607080102030405060708")
VERSION, SERIAL = bytes((5, 2, 7)), 12345678
#: Keys for programs, and the one that attests where they were made.
SLOTS: Final = (0x9A, 0x9C, 0x9D, 0x9E, 0xF9)
SIGNATURE: Final = 0x9C
RSA_2048: Final = 0x07

NOT_FOUND, WRONG_DATA, NOT_SUPPORTED = 0x6A82, 0x6A80, 0x6D00
NOT_VERIFIED, BLOCKED, WRONG_KEY = 0x6982, 0x6983, 0x6A88


def padded(secret: bytes) -> bytes:
    return secret.ljust(8, b"\xff")


class PivCard(Application):
    """Objects by their tag, keys by their slot."""

    atr = bytes.fromhex("3BFD1300008131FE158073C021C057597562694B657940")

    def __init__(self) -> None:
        super().__init__()
        # Who the card is; what has no such object is not listed by OpenSC.
        fasc_n = bytes.fromhex("D4E739DA739CED39CE739D836858210842108421C84210C3EB")
        chuid = tlv(0x30, fasc_n) + tlv(0x34, secrets.token_bytes(16)) + tlv(0x35, b"20500101")
        self.objects = {b"\x5f\xc1\x02": chuid + tlv(0x3E, b"") + tlv(0xFE, b"")}
        self.keys: dict[int, rsa.RSAPrivateKey] = {}
        self.secrets = {0x80: padded(PIN), 0x81: padded(PUK)}
        self.left = {0x80: TRIES, 0x81: TRIES}
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.selected = self.verified = self.just_verified = self.managed = False
        self.challenge = b""

    def execute(self, command: Command) -> bytes:
        if command.ins == 0xA4:
            return self.select(command)
        if not self.selected:
            raise Refused(NOT_SUPPORTED)
        answers = {
            0x20: self.verify,
            0x24: self.change_reference_data,
            0x2C: self.reset_retry_counter,
            0x47: self.generate,
            0x87: self.general_authenticate,
            0xCB: self.get_data,
            0xDB: self.put_data,
            0xF8: self.serial,
            0xF9: self.attest,
            0xFD: self.version,
        }
        if command.ins not in answers:
            raise Refused(NOT_SUPPORTED)
        try:
            return answers[command.ins](command)
        finally:
            self.just_verified = command.ins == 0x20 and self.verified

    def select(self, command: Command) -> bytes:
        name = AID + bytes.fromhex("000010000100")
        if command.p1 != 4 or len(command.data) < len(AID) or not name.startswith(command.data):
            raise Refused(NOT_FOUND)
        # Selected once more it keeps what it knows (SP 800-73-4, part 2, 3.1.1).
        self.selected = True
        return tlv(0x61, tlv(0x4F, name[len(AID) :]) + tlv(0x79, tlv(0x4F, AID)))

    def serial(self, _command: Command) -> bytes:
        return SERIAL.to_bytes(4, "big")

    def version(self, _command: Command) -> bytes:
        return VERSION

    # ------------------------------------------------------------------ PIN and PUK

    def check(self, which: int, given: bytes) -> None:
        if not self.left[which]:
            raise Refused(BLOCKED)
        if given != self.secrets[which]:
            self.left[which] -= 1
            raise Refused(0x63C0 | self.left[which] if self.left[which] else BLOCKED)
        self.left[which] = TRIES

    def verify(self, command: Command) -> bytes:
        if command.p2 != 0x80:
            raise Refused(WRONG_KEY)
        if command.p1 == 0xFF:
            self.verified = False
        elif command.data:
            self.verified = False
            self.check(0x80, command.data)
            self.verified = True
        elif not self.verified:
            raise Refused(0x63C0 | self.left[0x80] if self.left[0x80] else BLOCKED)
        return b""

    def change_reference_data(self, command: Command) -> bytes:
        self.check(command.p2, command.data[:8])
        self.secrets[command.p2] = command.data[8:]
        return b""

    def reset_retry_counter(self, command: Command) -> bytes:
        self.check(0x81, command.data[:8])
        self.secrets[0x80], self.left[0x80] = command.data[8:], TRIES
        return b""

    # ------------------------------------------------------------------ objects

    def get_data(self, command: Command) -> bytes:
        value = self.objects.get(tlvs(command.data)[0x5C])
        if not value:
            raise Refused(NOT_FOUND)
        return tlv(0x53, value)

    def put_data(self, command: Command) -> bytes:
        if not self.managed:
            raise Refused(NOT_VERIFIED)
        parts = tlvs(command.data)
        self.objects[parts[0x5C]] = parts[0x53]
        return b""

    # ------------------------------------------------------------------ keys

    def key(self, slot: int) -> rsa.RSAPrivateKey:
        if slot not in self.keys:
            raise Refused(NOT_FOUND)
        return self.keys[slot]

    def generate(self, command: Command) -> bytes:
        if not self.managed:
            raise Refused(NOT_VERIFIED)
        if tlvs(tlvs(command.data)[0xAC])[0x80] != bytes((RSA_2048,)) or command.p2 not in SLOTS:
            raise Refused(WRONG_DATA)
        made = rsa.generate_private_key(65537, 2048)
        self.keys[command.p2] = made
        modulus = made.public_key().public_numbers().n.to_bytes(256, "big")
        return tlv(0x7F49, tlv(0x81, modulus) + tlv(0x82, b"\x01\x00\x01"))

    def general_authenticate(self, command: Command) -> bytes:
        given = tlvs(tlvs(command.data)[0x7C])
        if command.p2 == 0x9B:
            return tlv(0x7C, self.manage(given))
        key = self.key(command.p2)
        if command.p1 != RSA_2048 or len(given[0x81]) != 256:
            raise Refused(WRONG_DATA)
        # The signature key wants the PIN immediately before, the card's own key never.
        if not (self.just_verified if command.p2 == SIGNATURE else self.verified):
            raise Refused(NOT_VERIFIED)
        numbers = key.private_numbers()
        number = pow(int.from_bytes(given[0x81], "big"), numbers.d, numbers.public_numbers.n)
        return tlv(0x7C, tlv(0x82, number.to_bytes(256, "big")))

    def manage(self, given: dict[int, bytes]) -> bytes:
        """Card and administrator prove to each other that they have the management key."""
        cipher = Cipher(TripleDES(MANAGEMENT), modes.ECB())  # noqa: S305  # as PIV says
        if given.get(0x80) == b"":
            self.challenge = secrets.token_bytes(8)
            return tlv(0x80, cipher.encryptor().update(self.challenge))
        if not self.challenge or given.get(0x80) != self.challenge:
            raise Refused(NOT_VERIFIED)
        self.managed, self.challenge = True, b""
        return tlv(0x82, cipher.encryptor().update(given[0x81]))

    def attest(self, command: Command) -> bytes:
        """A certificate of the card's maker for a key that was made on it."""
        key = self.key(command.p1)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Yubico PIV Attestation")])
        subject = f"YubiKey PIV Attestation {command.p1:x}"
        self.keys.setdefault(0xF9, rsa.generate_private_key(65537, 2048))
        now = dt.datetime.now(dt.UTC)
        made = x509.CertificateBuilder(
            issuer_name=name,
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - dt.timedelta(days=1),
            not_valid_after=now + dt.timedelta(days=3650),
        )
        return made.sign(self.keys[0xF9], hashes.SHA256()).public_bytes(Encoding.DER)


if __name__ == "__main__":
    Reader(int(sys.argv[1]), PivCard()).run()
