"""The required settings of a signing host, with a hint for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hsmtoll.settings import not_set, variable

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.settings import Host

__all__ = ["check_complete", "needed"]

_WHY = {
    "socket": "a path such as /run/hsmtoll/host.sock; or HSMTOLL_HOST__LISTEN, for TLS",
    "policy": "the host's settings are those of --config FILE, or of /etc/hsmtoll/hsmtoll.toml",
    "audit_dir": "a directory of the host's own account, 0700",
    "audit_key": "make one: openssl genpkey -algorithm ed25519 -out FILE",
    "cert": "the host's TLS certificate, PEM: TCP is served over TLS only",
    "key": "the key of HSMTOLL_HOST__CERT, in PEM",
    "client_ca": "the CA that issues the callers' certificates, PEM: over TCP it is required",
}


def check_complete(host: Host, *, sockets: bool) -> None:
    """
    ConfigurationError that names all missing settings, with one line of the hint for each.
    *sockets*: the service manager has passed the sockets.
    """
    names = ["policy", "audit_dir", "audit_key"]
    if not (sockets or host.socket or host.listen):
        names.insert(0, "socket")
    if host.listen and not sockets:
        names += ["cert", "key", "client_ca"]
    lacking = {variable("host", each): _WHY[each] for each in names if getattr(host, each) is None}
    if lacking:
        raise not_set(lacking)


def needed(value: Path | None, name: str) -> Path:
    """Return *value* of the HOST setting *name*; ConfigurationError if it is not set."""
    if value is None:
        raise not_set({variable("host", name): _WHY[name]})
    return value
