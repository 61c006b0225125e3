"""
Customs tokens, signed with a key that never leaves its device.

`connect` and `aconnect` return a client; `Settings` lists the settings that they accept; all errors
are subclasses of `HsmTollError`. Names that are not in ``__all__`` are internal.
`hsmtoll/docs/architecture.md` (`hsmtoll help architecture`) is a map of the whole.
"""

from __future__ import annotations

import atexit
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from hsmtoll.errors import (
    ApiRefused,
    AuditBroken,
    CertificateError,
    ClockError,
    ConfigurationError,
    DeviceError,
    ExchangeRefused,
    GrantRefused,
    HsmTollError,
    NetworkError,
    OutcomeUnknown,
    PinIncorrect,
    PinNotTried,
    PolicyDenied,
    ScopeNotGranted,
    SubmissionFailed,
    TryAgainLater,
    UsageError,
)

if TYPE_CHECKING:
    from hsmtoll.app import aconnect, connect
    from hsmtoll.auth import AsyncTollAuth, TollAuth
    from hsmtoll.client import AsyncTollClient, TollClient
    from hsmtoll.settings import Settings
    from hsmtoll.token import AccessToken

# Imported when asked for: a command that only reads its cache does not pay for HTTP.
_LATER = {
    "AccessToken": "hsmtoll.token",
    "AsyncTollAuth": "hsmtoll.auth",
    "AsyncTollClient": "hsmtoll.client",
    "Settings": "hsmtoll.settings",
    "TollAuth": "hsmtoll.auth",
    "TollClient": "hsmtoll.client",
    "aconnect": "hsmtoll.app",
    "connect": "hsmtoll.app",
}

__all__ = [
    "AccessToken",
    "ApiRefused",
    "AsyncTollAuth",
    "AsyncTollClient",
    "AuditBroken",
    "CertificateError",
    "ClockError",
    "ConfigurationError",
    "DeviceError",
    "ExchangeRefused",
    "GrantRefused",
    "HsmTollError",
    "NetworkError",
    "OutcomeUnknown",
    "PinIncorrect",
    "PinNotTried",
    "PolicyDenied",
    "ScopeNotGranted",
    "Settings",
    "SubmissionFailed",
    "TollAuth",
    "TollClient",
    "TryAgainLater",
    "UsageError",
    "aconnect",
    "connect",
]


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


#: Seconds that interpreter exit waits for our threads.
_AT_EXIT = 5.0


@atexit.register
def _at_exit() -> None:
    # Registered here and not where the devices are, which is imported late: what a program
    # registers itself runs before this, and may want a signature still.
    left = _AT_EXIT
    if "hsmtoll.tokens.single_flight" in sys.modules:
        left = sys.modules["hsmtoll.tokens.single_flight"].join_renewal_threads(left)
    if "hsmtoll.hsm.module" in sys.modules:
        sys.modules["hsmtoll.hsm.module"].PKCS11_LOCK.end(left)
