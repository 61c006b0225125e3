"""
TLS contexts with the system's trusted CAs and those that the user adds.

They are created only here, so that no library's default applies (key log, older TLS version,
unverified certificate).
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
    A context with the system's roots and *ca_file*: TLS 1.2 or newer, certificate and host name
    verified.

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
    A context for connections to a signing host: TLS 1.3, certificate and host name verified, with a
    client certificate.

    If *ca_file* is given, only its CAs are trusted; otherwise the system's roots and *more*
    (HSMTOLL_CA_FILE). *key* ``None``: the key is in the file *certificate*. Raises
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
        # With a password argument OpenSSL does not prompt on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError) as exc:
        where = f"HSMTOLL_SIGNER__CLIENT_CERT {sanitized(certificate)}"
        if key is not None:
            where += f" with HSMTOLL_SIGNER__CLIENT_KEY {sanitized(key)}"
        raise ConfigurationError(
            f"{where}: cannot be used as a certificate and its key",
            hint="both must be PEM, and the key that of the certificate and not encrypted",
            code="client-certificate",
        ) from exc
    return context


def _empty() -> ssl.SSLContext:
    """A context without trusted CAs."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _trust(context: ssl.SSLContext, ca_file: Path, name: str) -> None:
    files.read(ca_file, name, code="ca-file")
    try:
        context.load_verify_locations(cafile=ca_file)
        # The user may name an intermediate CA without its root: trust it as well.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    except (OSError, ssl.SSLError) as exc:
        raise ConfigurationError(
            f"{name} {sanitized(ca_file)}: cannot be read as PEM certificates",
            hint="it must be a file with one or more -----BEGIN CERTIFICATE----- blocks",
            code="ca-file",
        ) from exc
