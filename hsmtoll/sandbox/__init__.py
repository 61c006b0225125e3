"""
The strict local Maskinporten and Customs: what the services are documented to do, on this machine.

It shares no code with the client it judges: `cryptography`, aiohttp and the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsmtoll.sandbox.pki import Authority, eseal_authority, norwegian_authority, stranger
    from hsmtoll.sandbox.server import Sandbox, run
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
    "stranger",
]

_ROOMS = {
    "Authority": "pki",
    "Client": "state",
    "Profile": "settings",
    "Sandbox": "server",
    "Settings": "settings",
    "eseal_authority": "pki",
    "norwegian_authority": "pki",
    "run": "server",
    "stranger": "pki",
}


def __getattr__(name: str) -> Any:
    # Late, so that making certificates does not cost the import of a web server.
    import importlib  # noqa: PLC0415 -- see above

    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
