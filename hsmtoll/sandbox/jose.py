"""
Minimal JOSE for the sandbox: segments, RSA keys as JWK, PKCS#1 v1.5 signatures.

Deliberately no code of the client: an error in common code would cancel out.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

__all__ = ["HASHES", "compact", "decode", "encode", "jwk", "load_object", "public_key", "verified"]

HASHES: Final = {"RS256": hashes.SHA256(), "RS384": hashes.SHA384(), "RS512": hashes.SHA512()}

_SEGMENT = re.compile(r"[A-Za-z0-9_-]+")


def encode(data: bytes) -> str:
    """base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode(segment: str) -> bytes:
    """The reverse of `encode`; ValueError for anything else, padding included."""
    if not _SEGMENT.fullmatch(segment):
        raise ValueError("not base64url")
    try:
        return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except binascii.Error as error:
        raise ValueError("not base64url") from error


def load_object(segment: str) -> dict[str, Any]:
    """The JSON object inside a segment; ValueError if there is none, or a member twice."""
    found = json.loads(decode(segment).decode("utf-8"), object_pairs_hook=_once)
    if isinstance(found, dict):
        return found
    raise ValueError("not a JSON object")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member twice")
    return found


def jwk(key: rsa.RSAPublicKey) -> dict[str, str]:
    """kty, n, e (RFC 7518 section 6.3.1)."""
    numbers = key.public_numbers()
    parts = {"n": numbers.n, "e": numbers.e}
    return {"kty": "RSA"} | {
        name: encode(value.to_bytes((value.bit_length() + 7) // 8)) for name, value in parts.items()
    }


def public_key(found: dict[str, Any]) -> rsa.RSAPublicKey:
    """The RSA key of a JWK; ValueError if it is none."""
    if found.get("kty") != "RSA":
        raise ValueError("not an RSA key")
    try:
        n, e = (int.from_bytes(decode(found[name])) for name in ("n", "e"))
    except (KeyError, TypeError) as error:
        raise ValueError("a JWK without n and e") from error
    return rsa.RSAPublicNumbers(e, n).public_key()


def compact(header: dict[str, Any], claims: dict[str, Any], key: rsa.RSAPrivateKey) -> str:
    """A compact JWS under the ``alg`` of *header*."""
    parts = [encode(json.dumps(part, separators=(",", ":")).encode()) for part in (header, claims)]
    data = ".".join(parts).encode("ascii")
    signature = key.sign(data, padding.PKCS1v15(), HASHES[header["alg"]])
    return ".".join((*parts, encode(signature)))


def verified(alg: str, key: rsa.RSAPublicKey, data: bytes, signature: bytes) -> bool:
    """Whether *key* made *signature* over *data* under *alg*."""
    try:
        key.verify(signature, data, padding.PKCS1v15(), HASHES[alg])
    except InvalidSignature:
        return False
    return True
