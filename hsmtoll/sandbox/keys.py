"""
The sandbox's signing keys, cached in the process and in the user's cache directory.

They sign the sandbox's tokens only, so a file is secure enough. If it cannot be read or written,
keys are generated again, which is slower.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from hsmtoll import files

__all__ = ["signing_key"]


@lru_cache
def signing_key(name: str, bits: int) -> rsa.RSAPrivateKey:
    """The key called *name* with *bits*: from this process, from the cache, or new."""
    path = _folder() / f"{name}-{bits}.pem"
    with suppress(OSError, ValueError):
        found = path.stat()
        if found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077:
            # This program made it: to prove its primes once more takes half a second.
            key = load_pem_private_key(path.read_bytes(), None, unsafe_skip_rsa_key_validation=True)
            if isinstance(key, rsa.RSAPrivateKey) and key.key_size == bits:
                return key
    key = rsa.generate_private_key(public_exponent=65537, key_size=bits)
    with suppress(OSError):
        _keep(path, key)
    return key


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (
        Path(base) if base.startswith("/") else Path("~/.cache").expanduser()
    ) / "hsmtoll-sandbox"


def _keep(path: Path, key: rsa.RSAPrivateKey) -> None:
    files.make_directory(path.parent)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files.replace(path, pem, fsync=False)
