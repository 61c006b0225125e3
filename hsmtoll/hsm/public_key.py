"""The public key in a file, for devices that do not show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hsmtoll import files
from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.jws import RsaPublicKey

if TYPE_CHECKING:
    from hsmtoll.settings import Settings

__all__ = ["public_key"]


def public_key(settings: Settings) -> RsaPublicKey | None:
    """The key of HSMTOLL_HSM__PUBLIC_KEY, if set. ConfigurationError if it cannot be read."""
    path = settings.hsm.public_key
    if path is None:
        return None
    try:
        return RsaPublicKey.from_pem(
            files.read(path, "HSMTOLL_HSM__PUBLIC_KEY").decode("utf-8", "replace")
        )
    except ValueError as exc:
        raise ConfigurationError(f"HSMTOLL_HSM__PUBLIC_KEY {sanitized(path)}: {exc}") from exc
