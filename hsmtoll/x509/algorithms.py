"""
Public keys and signatures of certificates: their algorithms and parameters. Nothing is verified.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hsmtoll import der
from hsmtoll.jws import RsaPublicKey

__all__ = ["MAX_EXPONENT", "MAX_MODULUS", "Pss", "Signature", "public_key", "signature"]

#: Maximum bits of an RSA key's modulus and exponent: the time of a verification grows with the size
#: of the exponent and with the square of that of the modulus.
MAX_MODULUS: Final = 8192
MAX_EXPONENT: Final = 64

_CURVE: Final = {
    "1.2.840.10045.3.1.1": ("P-192", 192),
    "1.3.132.0.33": ("P-224", 224),
    "1.2.840.10045.3.1.7": ("P-256", 256),
    "1.3.132.0.34": ("P-384", 384),
    "1.3.132.0.35": ("P-521", 521),
    "1.3.132.0.10": ("secp256k1", 256),
    "1.3.36.3.3.2.8.1.1.7": ("brainpoolP256r1", 256),
    "1.3.36.3.3.2.8.1.1.11": ("brainpoolP384r1", 384),
    "1.3.36.3.3.2.8.1.1.13": ("brainpoolP512r1", 512),
}
_EDWARDS: Final = {"1.3.101.112": ("ed25519", 256), "1.3.101.113": ("ed448", 456)}
_RSA: Final = {"1.2.840.113549.1.1.1": "rsa", "1.2.840.113549.1.1.10": "rsa-pss"}
_EC: Final = "1.2.840.10045.2.1"

_SCHEME: Final = {
    "1.2.840.113549.1.1.4": ("pkcs1v15", "md5"),
    "1.2.840.113549.1.1.5": ("pkcs1v15", "sha1"),
    "1.2.840.113549.1.1.11": ("pkcs1v15", "sha256"),
    "1.2.840.113549.1.1.12": ("pkcs1v15", "sha384"),
    "1.2.840.113549.1.1.13": ("pkcs1v15", "sha512"),
    "1.2.840.113549.1.1.14": ("pkcs1v15", "sha224"),
    "1.2.840.10045.4.1": ("ecdsa", "sha1"),
    "1.2.840.10045.4.3.1": ("ecdsa", "sha224"),
    "1.2.840.10045.4.3.2": ("ecdsa", "sha256"),
    "1.2.840.10045.4.3.3": ("ecdsa", "sha384"),
    "1.2.840.10045.4.3.4": ("ecdsa", "sha512"),
    "1.3.101.112": ("ed25519", ""),
    "1.3.101.113": ("ed448", ""),
}
_PSS: Final = "1.2.840.113549.1.1.10"
_MGF1: Final = "1.2.840.113549.1.1.8"
_DIGEST: Final = {
    "1.3.14.3.2.26": "sha1",
    "2.16.840.1.101.3.4.2.4": "sha224",
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}


class Signature(NamedTuple):
    """
    Algorithm, parameters and value of a certificate's signature; *not verified* here.

    *scheme*: ``pkcs1v15 pss ecdsa ed25519 ed448``, or ``unknown``, also if the certificate's two
    algorithm fields differ (RFC 5280 section 4.1.1.2). *digest*: ``sha256`` …, empty if the scheme
    has a digest of its own. *salt*: bytes.
    """

    scheme: str
    digest: str
    mask_digest: str
    salt: int
    value: bytes


class Pss(NamedTuple):
    """
    RSASSA-PSS parameters (RFC 4055 section 3.1). A digest that is not known here is empty. *salt*:
    bytes; for a key, the minimum.
    """

    digest: str
    mask_digest: str
    salt: int


def public_key(spki: bytes) -> tuple[str, int, RsaPublicKey | None, Pss | None]:
    """Key type, bits, the RSA key (else None), and the parameters of an RSASSA-PSS key."""
    algorithm, key = der.parts(spki)
    name, *parameters = der.parts(algorithm)
    oid, raw = der.oid(name), der.content(key, der.BIT_STRING)[1:]
    if oid in _RSA:
        # Some issuers omit a modulus' leading zero: other readers take it as positive as well.
        modulus, exponent = (
            int.from_bytes(der.content(each, der.INTEGER), "big") for each in der.parts(raw)
        )
        if not (modulus and exponent):
            raise ValueError("modulus or exponent of its RSA key is 0")
        for what, value, most in (
            ("its RSA key", modulus, MAX_MODULUS),
            ("the exponent of its RSA key", exponent, MAX_EXPONENT),
        ):
            if value.bit_length() > most:
                raise ValueError(f"{what} has {value.bit_length()} bits, more than {most}")
        restricted = _RSA[oid] == "rsa-pss" and parameters
        pss = _pss(parameters[0]) if restricted else None
        return _RSA[oid], modulus.bit_length(), RsaPublicKey(modulus, exponent), pss
    if oid == _EC:
        curve = parameters[0] if parameters else b""
        if curve[:1] != bytes([der.OID]):
            return "ec", 8 * (len(raw) // 2), None, None
        named = der.oid(curve)
        known, bits = _CURVE.get(named, (named, 8 * (len(raw) // 2)))
        return f"ec:{known}", bits, None, None
    known, bits = _EDWARDS.get(oid, (oid, 8 * len(raw)))
    return known, bits, None, None


def signature(fields: der.CertificateFields) -> Signature:
    """The certificate's signature with its algorithm; not verified."""
    value = der.content(fields.signature, der.BIT_STRING)[1:]
    unknown = Signature("unknown", "", "", 0, value)
    if fields.signature_algorithm != fields.algorithm:
        return unknown
    name, *parameters = der.parts(fields.algorithm)
    oid = der.oid(name)
    if oid != _PSS:
        scheme, digest = _SCHEME.get(oid, ("unknown", ""))
        return Signature(scheme, digest, digest, 0, value)
    # RFC 4055 section 3.1: in a signature they must be present.
    pss = _pss(parameters[0]) if parameters else None
    if pss is None or not (pss.digest and pss.mask_digest):
        return unknown
    return Signature("pss", pss.digest, pss.mask_digest, pss.salt, value)


def _pss(parameters: bytes) -> Pss:
    """Parse RSASSA-PSS-params (RFC 4055 section 3.1); unknown digests become empty."""
    try:
        given = {each[0]: der.content(each, each[0]) for each in der.parts(parameters)}
        digest = mask_digest = "sha1"
        if 0xA0 in given:
            digest = _DIGEST.get(der.oid(der.parts(given[0xA0])[0]), "")
        if 0xA1 in given:
            function, inner = der.parts(given[0xA1])
            known = der.oid(function) == _MGF1
            mask_digest = _DIGEST.get(der.oid(der.parts(inner)[0]), "") if known else ""
        salt = der.number(given[0xA2]) if 0xA2 in given else 20
        # The trailer field has only one valid value, its default, which DER omits.
        odd = 0xA3 in given and der.number(given[0xA3]) != 1
    except (ValueError, IndexError):
        return Pss("", "", 0)
    if odd or salt < 0 or given.keys() - {0xA0, 0xA1, 0xA2, 0xA3}:
        return Pss("", "", 0)
    return Pss(digest, mask_digest, salt)
