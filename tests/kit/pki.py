"""
Certificates for the tests of certificate and chain, made by cryptography alone.

Keys are made once per process: `ec_key` and `rsa_key` are pools with numbers.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from hsmtoll.sandbox.pki import eseal_authority, pem
from hsmtoll.x509.certificate import Certificate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hsmtoll.hsm.device import Device

Key = (
    rsa.RSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
)

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)
ORGID = "NTRSE-5566778899"

_serials = itertools.count(0x1000)

_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@lru_cache
def ec_key(number: int = 0) -> ec.EllipticCurvePrivateKey:
    """A P-256 key: fast, for CAs."""
    del number
    return ec.generate_private_key(ec.SECP256R1())


@lru_cache
def rsa_key(number: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    """An RSA key: for leaves, and for CAs where RSA is the point."""
    del number
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def name(
    common: str | None = None,
    *,
    org: str | None = None,
    orgids: Iterable[str] = (),
    country: str | None = None,
    serial: str | None = None,
    kind: _ASN1Type = _ASN1Type.UTF8String,
) -> x509.Name:
    """A name of the attributes given, in the order of ETSI's examples."""
    attributes = [
        *([x509.NameAttribute(NameOID.COUNTRY_NAME, country)] if country else []),
        *([x509.NameAttribute(NameOID.ORGANIZATION_NAME, org, kind)] if org else []),
        *(x509.NameAttribute(NameOID.ORGANIZATION_IDENTIFIER, value, kind) for value in orgids),
        *([x509.NameAttribute(NameOID.SERIAL_NUMBER, serial, kind)] if serial else []),
        *([x509.NameAttribute(NameOID.COMMON_NAME, common, kind)] if common else []),
    ]
    return x509.Name(attributes)


def usage(*allowed: str) -> x509.KeyUsage:
    """KeyUsage with these bits, by cryptography's names."""
    bits: dict[str, bool] = {bit: bit in allowed for bit in _USAGES}
    return x509.KeyUsage(**bits)


def issue(
    subject: x509.Name,
    key: Key,
    issuer: x509.Name,
    issuer_key: Key,
    *,
    ca: bool | None = False,
    path_length: int | None = None,
    key_usage: x509.KeyUsage | None = None,
    start: datetime = NOW - 100 * DAY,
    end: datetime = NOW + 300 * DAY,
    extensions: Iterable[tuple[x509.ExtensionType, bool]] = (),
    digest: hashes.HashAlgorithm | None = None,
    pss: bool = False,
    key_ids: bool = True,
    serial: int | None = None,
) -> Certificate:
    """One certificate; *ca* None leaves basicConstraints out."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(next(_serials) if serial is None else serial)
        .not_valid_before(start)
        .not_valid_after(end)
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, path_length), critical=True)
    if key_usage is not None:
        builder = builder.add_extension(key_usage, critical=True)
    if key_ids:
        public, above = key.public_key(), issuer_key.public_key()
        ski = x509.SubjectKeyIdentifier.from_public_key(public)
        aki = x509.AuthorityKeyIdentifier.from_issuer_public_key(above)
        builder = builder.add_extension(ski, critical=False).add_extension(aki, critical=False)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    edwards = isinstance(issuer_key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    hashing: Any = None if edwards else (digest or hashes.SHA256())
    rsa_padding = padding.PSS(padding.MGF1(hashing), 32) if pss else None
    signed = builder.sign(issuer_key, hashing, rsa_padding=rsa_padding)
    return Certificate.load(signed.public_bytes(Encoding.DER))


def authority(
    common: str,
    key: Key,
    issuer: str | None = None,
    issuer_key: Key | None = None,
    **options: Any,
) -> Certificate:
    """A CA by its common name; without *issuer* it is self-signed."""
    merged: dict[str, Any] = {"ca": True, "key_usage": usage("key_cert_sign", "crl_sign")} | options
    return issue(name(common), key, name(issuer or common), issuer_key or key, **merged)


def leaf(
    issuer: str = "Inter",
    issuer_key: Key | None = None,
    *,
    key: Key | None = None,
    subject: x509.Name | None = None,
    **options: Any,
) -> Certificate:
    """An eSeal leaf under the CA named."""
    usual = usage("digital_signature", "content_commitment")
    merged: dict[str, Any] = {"key_usage": usual} | options
    return issue(
        subject or name("Example AB", org="Example AB", orgids=[ORGID], country="SE"),
        key or rsa_key(),
        name(issuer),
        issuer_key or ec_key(1),
        **merged,
    )


def good() -> tuple[Certificate, Certificate, Certificate]:
    """Leaf, intermediate and root, all as they should be."""
    return (
        leaf("Inter", ec_key(1)),
        authority("Inter", ec_key(1), "Root", ec_key(0), path_length=0),
        authority("Root", ec_key(0)),
    )


def spki(key: Key) -> bytes:
    """SubjectPublicKeyInfo of the key's public half."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def chain_for(device: Device) -> bytes:
    """A fresh eSeal for the device's key with its chain, root first, as PEM."""
    public = device.key().public
    assert public is not None
    authority = eseal_authority()
    return pem(*reversed(authority.chain), authority.issue(public.spki()))
