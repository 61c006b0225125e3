"""The settings that a signature needs, and the error if one is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hsmtoll.settings import not_set, variable

if TYPE_CHECKING:
    from hsmtoll.errors import ConfigurationError
    from hsmtoll.settings import Settings

__all__ = ["ENVIRONMENTS", "IDENTITIES", "KEY", "MODULE", "SANDBOX", "missing"]

ENVIRONMENTS: Final = "test, prod or sandbox; there is no default, lest prod is used by mistake"
IDENTITIES: Final = "eseal for a foreign eSeal, norwegian for a Norwegian client"
SANDBOX: Final = "`hsmtoll sandbox` prints the values to export"
CLIENT_ID: Final = "the client id from Samarbeidsportalen; required with HSMTOLL_IDENTITY=norwegian"
MODULE: Final = "the path of your device's PKCS#11 module, a .so file"
KEY: Final = "an RFC 7512 URI; `hsmtoll objects` prints those of your device"


def missing(
    settings: Settings, *, grant: bool = True, device: bool = True
) -> ConfigurationError | None:
    """
    The error for all missing settings, with one line of the hint for each; ``None`` if none is
    missing. *grant*: check those that a grant needs; *device*: those that select a key.
    """
    hsm, signer, endpoints = settings.hsm, settings.signer.url, settings.endpoints.model_dump()
    sandbox = settings.environment == "sandbox"
    parts = (hsm.token_label, hsm.token_serial, hsm.key_label, hsm.key_id)
    # Invalid URIs are reported when they are parsed.
    named_module = hsm.module or (hsm.key and all("module-path=" in each for each in hsm.key))
    wanted: list[tuple[str, object, str]] = []
    if grant:
        wanted += [
            ("HSMTOLL_ENVIRONMENT", settings.environment, ENVIRONMENTS),
            ("HSMTOLL_IDENTITY", settings.identity, IDENTITIES),
        ]
        wanted += [
            (variable("endpoints", name), value or not sandbox, SANDBOX)
            for name, value in endpoints.items()
        ]
        norwegian = settings.identity == "norwegian" and not signer
        wanted.append(("HSMTOLL_ISS", settings.iss or not norwegian, CLIENT_ID))
    if device:
        wanted += [
            ("HSMTOLL_HSM__MODULE", named_module or signer, MODULE),
            ("HSMTOLL_HSM__KEY", hsm.key or any(parts) or signer, KEY),
        ]
    lacking = {name: why for name, value, why in wanted if not value}
    return not_set(lacking) if lacking else None
