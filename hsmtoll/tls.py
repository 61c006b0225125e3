"""
The one TLS context of ours: whom this machine trusts, and what the user adds.

Made by hand and in one place, so that no library's default (a key log, an older version, a
certificate that is not checked) slips in.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from hsmtoll.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["client_context"]


def client_context(ca_file: Path | None) -> ssl.SSLContext:
    """
    The system's roots and *ca_file*, TLS 1.2 or newer, certificate and host name verified.

    ``ssl.create_default_context`` would write session keys to wherever SSLKEYLOGFILE points.
    Raises ConfigurationError for a file that holds no certificates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_default_certs()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigurationError(
                f"HSMTOLL_CA_FILE {ca_file}: cannot be read as PEM certificates",
                hint="it is a file with one or more -----BEGIN CERTIFICATE----- blocks",
            ) from exc
    return context
