"""
JWS (RFC 7515): signing input and compact serialization of header and claims, and parsing.

Values only. No private key, certificate or device is used here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NewType

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from hsmtoll.jsonio import read_strict

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ALGS",
    "RsaPublicKey",
    "SigningInput",
    "b64url",
    "compact",
    "digest_info",
    "read_segment",
    "read_unverified",
    "segment",
    "signing_input",
]

#: RFC 7515 section 5.1: ``BASE64URL(header) . BASE64URL(payload)``, ASCII, of a grant: only
#: `hsmtoll.signing.grant` makes it. A device reads it back before it signs, and refuses
#: anything else.
SigningInput = NewType("SigningInput", bytes)

#: The algorithms that Maskinporten accepts (M20): RSASSA-PKCS1-v1_5 with SHA-2.
ALGS: Final = ("RS256", "RS384", "RS512")

# RFC 8017 section 9.2, note 1: what stands before the digest inside the padding.
_DIGEST_INFO: Final = {
    "RS256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "RS384": bytes.fromhex("3041300d060960864801650304020205000430"),
    "RS512": bytes.fromhex("3051300d060960864801650304020305000440"),
}
_HASH: Final = {"RS256": "sha256", "RS384": "sha384", "RS512": "sha512"}
_JSON: Final = json.JSONEncoder(separators=(",", ":"))


def b64url(data: bytes) -> str:
    """Base64url without padding, as RFC 7515 section 2 wants it."""
    return _b64url(data).decode("ascii")


def _b64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def segment(part: Mapping[str, Any]) -> bytes:
    """``BASE64URL(UTF8(part))`` in ASCII, with members in the order given."""
    return _b64url(_JSON.encode(part).encode())


def signing_input(header: Mapping[str, Any] | bytes, claims: Mapping[str, Any]) -> bytes:
    """The bytes to be signed (RFC 7515 section 5.1); *header* may be a `segment` already."""
    first = header if isinstance(header, bytes) else segment(header)
    return b".".join((first, segment(claims)))


def compact(unsigned: bytes, signature: bytes) -> str:
    """The compact serialisation (RFC 7515 section 7.1)."""
    return b".".join((unsigned, _b64url(signature))).decode("ascii")


def read_unverified(assertion: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Header and claims of a compact JWS. *Not verified*: nothing here says who made it.

    Raises ValueError, without the value in its text, for anything else.
    """
    parts = assertion.split(".")
    if len(parts) != 3:
        raise ValueError("not three segments with dots between")
    return read_segment(parts[0], "header"), read_segment(parts[1], "payload")


def read_segment(part: str, name: str = "segment") -> dict[str, Any]:
    """The JSON object in one segment; ValueError as `read_unverified`."""
    try:
        raw = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
        value = read_strict(raw)
    except ValueError:
        raise ValueError(f"the {name} is not base64url of JSON") from None
    if isinstance(value, dict):
        return value
    raise ValueError(f"the {name} is not a JSON object")


def digest_info(alg: str, data: bytes) -> bytes:
    """DER DigestInfo over *data*, for devices that only have the raw RSA_PKCS mechanism."""
    return _DIGEST_INFO[alg] + hashlib.new(_HASH[alg], data).digest()


_DIGESTS: Final = {"RS256": hashes.SHA256(), "RS384": hashes.SHA384(), "RS512": hashes.SHA512()}


@dataclass(frozen=True, slots=True)
class RsaPublicKey:
    """The public half of an RSA key: two integers."""

    modulus: int
    exponent: int

    @property
    def bits(self) -> int:
        """Size of the modulus in bits."""
        return self.modulus.bit_length()

    def verify(self, alg: str, unsigned: bytes, signature: bytes) -> bool:
        """
        Whether *signature* is this key's RSASSA-PKCS1-v1_5 signature (RFC 7518 section 3.3).

        It is asked of every signature before it leaves: a wrong key, a wrong leaf and a
        faulty device are found here instead of at the far end (MP-124).
        """
        try:
            _loaded(self).verify(signature, unsigned, padding.PKCS1v15(), _DIGESTS[alg])
        except (InvalidSignature, ValueError):
            # ValueError: such numbers are no key.
            return False
        return True

    def padded(self, signature: bytes) -> bytes:
        """
        *signature* as long as the modulus (RFC 8017 section 8.2.1): some devices leave out the
        zeros that it begins with, one of 256, and others write one too many.
        """
        return signature.lstrip(b"\0").rjust((self.bits + 7) // 8, b"\0")

    @classmethod
    def from_pem(cls, text: str) -> RsaPublicKey:
        """
        From ``-----BEGIN PUBLIC KEY-----`` (RFC 7468). ValueError for anything else, and for
        a key that is not RSA.
        """
        try:
            key = serialization.load_pem_public_key(text.encode())
        except (ValueError, UnsupportedAlgorithm):
            raise ValueError("it is not a public key in PEM") from None
        if isinstance(key, rsa.RSAPublicKey):
            numbers = key.public_numbers()
            return cls(numbers.n, numbers.e)
        raise ValueError(f"Maskinporten accepts only RSA keys ({', '.join(ALGS)})")

    def spki(self) -> bytes:
        """SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7), DER."""
        return _loaded(self).public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def jwk(self) -> dict[str, str]:
        """The required members of the JWK (RFC 7518 section 6.3.1), no ``kid``."""
        return {"e": _b64_uint(self.exponent), "kty": "RSA", "n": _b64_uint(self.modulus)}

    def thumbprint(self) -> str:
        """The RFC 7638 thumbprint with SHA-256, base64url: 43 characters."""
        members = json.dumps(self.jwk(), separators=(",", ":"), sort_keys=True)
        return b64url(hashlib.sha256(members.encode()).digest())


@lru_cache(maxsize=32)
def _loaded(key: RsaPublicKey) -> rsa.RSAPublicKey:
    return rsa.RSAPublicNumbers(key.exponent, key.modulus).public_key()


def _b64_uint(number: int) -> str:
    # RFC 7518 section 2, Base64urlUInt: big-endian, as few bytes as possible.
    return b64url(number.to_bytes((number.bit_length() + 7) // 8, "big"))
