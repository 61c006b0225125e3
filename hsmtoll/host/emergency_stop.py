"""
The emergency stop: signing is stopped while a file exists in a directory of the custodian.

If the file cannot be checked, signing is stopped. Permissions of the file system alone decide
who may stop and resume; there is no request for it.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.files import check_own, sync_directory
from hsmtoll.host.required import needed

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.settings import Settings

__all__ = [
    "check_stop_directory",
    "resume",
    "stop",
    "stop_file",
    "stopped_by",
]


def stop_file(settings: Settings) -> Path:
    """HSMTOLL_HOST__STOP_FILE; ``stop`` beside the policy if it is not set."""
    host = settings.host
    return host.stop_file or needed(host.policy, "policy").parent / "stop"


def stopped_by(path: Path) -> str | None:
    """Why signing is stopped, or ``None``. Two system calls: cheap enough for every request."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        return f"the stop file cannot be read ({exc.strerror})"
    else:
        return "the stop file is there"
    try:
        # The file is missing as well if its directory is: that is a stop.
        path.parent.stat()
    except OSError as exc:
        return f"the directory of the stop file cannot be read ({exc.strerror})"
    return None


def check_stop_directory(path: Path) -> None:
    """
    ConfigurationError if other accounts may write the directory. A missing or unreadable
    directory is no error here, but a stop.
    """
    with contextlib.suppress(PermissionError):
        if path.parent.exists():
            check_own(path.parent, "directory of HSMTOLL_HOST__STOP_FILE")


def stop(path: Path) -> bool:
    """Create the file and sync it to disk. Returns whether it did not exist before."""
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
            sync_directory(path.parent)
            return True
    except OSError as exc:
        raise _not_allowed(path, "stop", exc) from exc
    return False


def resume(path: Path) -> bool:
    """Remove the file. Returns whether it existed."""
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
        f"{doing}: {sanitized(path)} cannot be changed ({exc.strerror})",
        hint="run it as the account that owns the directory; not that of the host",
    )
