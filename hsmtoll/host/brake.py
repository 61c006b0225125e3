"""
The emergency stop: a file whose presence says stop, in a directory that the custodian owns.

What cannot be looked at counts as stopped. Who may create or remove the file is the file
system's to say: the signing socket has no part in it.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from hsmtoll.errors import ConfigurationError, foreign
from hsmtoll.files import check_trusted, sync_directory
from hsmtoll.settings import not_set, variable

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.settings import Host, Settings

__all__ = [
    "check_complete",
    "check_stop_directory",
    "needed",
    "resume",
    "stop",
    "stop_file",
    "stopped_by",
]

_WHY = {
    "socket": "a path such as /run/hsmtoll/host.sock; or HSMTOLL_HOST__LISTEN, for TLS",
    "policy": "the host's settings are those of --config FILE, or of /etc/hsmtoll/hsmtoll.toml",
    "audit_dir": "a directory of the host's own account, 0700",
    "audit_key": "make one: openssl genpkey -algorithm ed25519 -out FILE",
    "cert": "there is no TCP without TLS and certificates of the callers",
    "key": "the key of HSMTOLL_HOST__CERT, in PEM",
    "client_ca": "there is no TCP without certificates of the callers: PEM of who issues them",
}


def check_complete(host: Host, *, sockets: bool) -> None:
    """
    ConfigurationError that names all settings of the host that are missing, a line of the hint
    each. *sockets*: the service manager gave the sockets.
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
    """*value* of the HOST setting *name*; ConfigurationError without one."""
    if value is None:
        raise not_set({variable("host", name): _WHY[name]})
    return value


def stop_file(settings: Settings) -> Path:
    """HSMTOLL_HOST__STOP_FILE; ``stop`` beside the policy if it is not set."""
    host = settings.host
    return host.stop_file or needed(host.policy, "policy").parent / "stop"


def stopped_by(path: Path) -> str | None:
    """Why nothing may be signed, or ``None``: two system calls, so it can be asked each time."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        return f"the stop file cannot be read ({exc.strerror})"
    else:
        return "the stop file is there"
    try:
        # Where its directory is gone, that the file is says nothing.
        os.stat(os.path.dirname(path) or ".")  # noqa: PTH116, PTH120 - asked for every grant
    except OSError as exc:
        return f"the directory of the stop file cannot be read ({exc.strerror})"
    return None


def check_stop_directory(path: Path) -> None:
    """
    ConfigurationError where anybody could resume. A directory that is missing, or that this
    account cannot look into, is a stop.
    """
    with contextlib.suppress(PermissionError):
        if path.parent.exists():
            check_trusted(path.parent, "directory of HSMTOLL_HOST__STOP_FILE")


def stop(path: Path) -> bool:
    """Create the file, for good; whether it was not there before."""
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
            sync_directory(path.parent)
            return True
    except OSError as exc:
        raise _not_allowed(path, "stop", exc) from exc
    return False


def resume(path: Path) -> bool:
    """Remove the file; whether it was there."""
    try:
        path.unlink()
        sync_directory(path.parent)
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise _not_allowed(path, "resume", exc) from exc
    return True


def _not_allowed(path: Path, doing: str, exc: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{doing}: {foreign(path)} cannot be changed ({exc.strerror})",
        hint="run it as the account that owns the directory; not that of the host",
    )
