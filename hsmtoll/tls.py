"""
TLS contexts with the system's trusted CAs and those that the user adds.

Made by hand and in one place, so that no library's default (a key log, an older version, a
certificate that is not checked) slips in.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from hsmtoll import files
from hsmtoll.errors import ConfigurationError, sanitized

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["client_context", "host_context"]


def client_context(ca_file: Path | None) -> ssl.SSLContext:
    """
    The system's roots and *ca_file*, TLS 1.2 or newer, certificate and host name verified.

    ``ssl.create_default_context`` would write session keys to wherever SSLKEYLOGFILE points.
    Raises ConfigurationError for a file that holds no certificates.
    """
    context = _empty()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_default_certs()
    if ca_file is not None:
        _trust(context, ca_file, "HSMTOLL_CA_FILE")
    return context


def host_context(
    *, ca_file: Path | None, more: Path | None, certificate: Path, key: Path | None
) -> ssl.SSLContext:
    """
    For a signing host: TLS 1.3, certificate and host name verified, our own certificate shown.

    *ca_file* alone is trusted where it is given; without it, the system's roots and *more*
    (HSMTOLL_CA_FILE). *key* ``None`` means that it lies in *certificate*'s file. Raises
    ConfigurationError for files that cannot be used.
    """
    if ca_file is None:
        context = client_context(more)
    else:
        context = _empty()
        _trust(context, ca_file, "HSMTOLL_SIGNER__CA_FILE")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    code = "client-certificate"
    files.read(certificate, "HSMTOLL_SIGNER__CLIENT_CERT", secret=key is None, code=code)
    if key is not None:
        files.read(key, "HSMTOLL_SIGNER__CLIENT_KEY", secret=True, code=code)
    try:
        # A password of ours, so that OpenSSL asks for none on a terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as exc:
        where = f"HSMTOLL_SIGNER__CLIENT_CERT {sanitized(certificate)}"
        if key is not None:
            where += f" with HSMTOLL_SIGNER__CLIENT_KEY {sanitized(key)}"
        raise ConfigurationError(
            f"{where}: cannot be used as a certificate and its key",
            hint="both are PEM, the key is the certificate's own and not encrypted",
            code="client-certificate",
        ) from exc
    return context


def _empty() -> ssl.SSLContext:
    """One that trusts nobody yet."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _trust(context: ssl.SSLContext, ca_file: Path, name: str) -> None:
    files.read(ca_file, name, code="ca-file")
    try:
        context.load_verify_locations(cafile=ca_file)
        # A company may give its issuing CA alone: what a person names is trusted, root or not.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    except (OSError, ssl.SSLError) as exc:
        raise ConfigurationError(
            f"{name} {sanitized(ca_file)}: cannot be read as PEM certificates",
            hint="it is a file with one or more -----BEGIN CERTIFICATE----- blocks",
            code="ca-file",
        ) from exc
