"""
A strict local simulator of Maskinporten and Customs, as documented by the services.

It uses `cryptography`, aiohttp and the standard library, and shares no code with the client that
it tests: a common error would cancel out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsmtoll.sandbox.pki import Authority, eseal_authority, norwegian_authority, unrelated_ca
    from hsmtoll.sandbox.serve import run
    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.sandbox.settings import Profile, Settings
    from hsmtoll.sandbox.state import Client

__all__ = [
    "Authority",
    "Client",
    "Profile",
    "Sandbox",
    "Settings",
    "eseal_authority",
    "norwegian_authority",
    "run",
    "unrelated_ca",
]

_MODULES = {
    "Authority": "pki",
    "Client": "state",
    "Profile": "settings",
    "Sandbox": "server",
    "Settings": "settings",
    "eseal_authority": "pki",
    "norwegian_authority": "pki",
    "run": "serve",
    "unrelated_ca": "pki",
}


def __getattr__(name: str) -> Any:
    # Imported lazily: whoever only issues certificates needs no web server.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
