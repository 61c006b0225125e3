# ruff: noqa: INP001 -- a program of an image, not part of the package
"""
Makes demonstration certificates for a signing host and one caller, and its audit key, once.

    /var/lib/hsmtoll/tls/host.pem, host.key, ca.pem     the host's own
    /var/lib/hsmtoll/audit.key                          seals the audit (Ed25519)
    /run/callers/ca.pem, app.pem                        for the caller: certificate with its key
    /run/callers/audit.pub                              for whoever verifies the audit

In production the CA and its key are kept away from the host.
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

OWN = Path("/var/lib/hsmtoll")
CALLERS = Path("/run/callers")
PEM = s.Encoding.PEM


def main() -> int:
    """Make the files, unless they exist."""
    if (OWN / "audit.key").exists():
        return 0
    (OWN / "tls").mkdir(mode=0o700, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    ca = certified("hsmtoll demonstration CA", key, key, None)
    for path, name, use in (
        (OWN / "tls" / "host.pem", "host", ExtendedKeyUsageOID.SERVER_AUTH),
        (CALLERS / "app.pem", "app.example", ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        own = ec.generate_private_key(ec.SECP256R1())
        made = certified(name, own, key, ca, use).public_bytes(PEM)
        if path.parent == CALLERS:
            write(path, made + private(own))
        else:
            write(path, made)
            write(path.with_suffix(".key"), private(own))
    for folder in (OWN / "tls", CALLERS):
        write(folder / "ca.pem", ca.public_bytes(PEM))
    audit = Ed25519PrivateKey.generate()
    public = audit.public_key().public_bytes(PEM, s.PublicFormat.SubjectPublicKeyInfo)
    write(CALLERS / "audit.pub", public)
    # Last, because its existence means that all files are there.
    write(OWN / "audit.key", private(audit))
    return 0


def certified(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    by: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate | None,
    use: x509.ObjectIdentifier | None = None,
) -> x509.Certificate:
    """A certificate for *name*; without *ca*, the CA's own."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        ca.subject if ca else subject, subject, key.public_key(), x509.random_serial_number(),
        now - timedelta(hours=1), now + timedelta(days=365),
    )  # fmt: skip
    basic = x509.BasicConstraints(ca=ca is None, path_length=None if ca else 0)
    subject_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
    builder = (
        builder.add_extension(basic, critical=True)
        .add_extension(subject_key, critical=False)
        .add_extension(authority, critical=False)
    )
    if use is not None:
        san = x509.SubjectAlternativeName([x509.DNSName(name)])
        builder = builder.add_extension(san, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    return builder.sign(by, hashes.SHA256())


def private(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """PEM, not encrypted."""
    return key.private_bytes(PEM, s.PrivateFormat.PKCS8, s.NoEncryption())


def write(path: Path, raw: bytes) -> None:
    """Write atomically, with mode 0600."""
    draft = path.with_name(f".{path.name}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(raw)
    draft.replace(path)


if __name__ == "__main__":
    sys.exit(main())
