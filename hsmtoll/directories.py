"""Default directories for state, cache and temporary files of this account."""

from __future__ import annotations

import contextlib
import os
import pwd
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs

from hsmtoll import files
from hsmtoll.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["keep_temporary_files_private", "runtime_directory", "state_directory"]


def _given(name: str) -> Path | None:
    """The directory in the variable *name*, set by systemd or the login; None if relative."""
    path = Path(os.environ.get(name, "").partition(":")[0])
    return path if path.is_absolute() else None


def state_directory() -> Path:
    """
    The default of HSMTOLL_STATE: $STATE_DIRECTORY, or the user's state directory.

    ConfigurationError if there is neither.
    """
    return _given("STATE_DIRECTORY") or _at_home(platformdirs.user_state_dir, "HSMTOLL_STATE")


def runtime_directory() -> Path:
    """
    The default directory for tokens, cleared at a restart on most systems: $RUNTIME_DIRECTORY,
    $XDG_RUNTIME_DIR, /run/user/UID, or the user's cache directory. ConfigurationError if none.
    """
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        given = _given(name)
        # After su or sudo -E it still is the other account's, where our files would be in the way
        # (XDG Base Directory: it must be owned by the user).
        if given and not _is_foreign(given):
            return given / "hsmtoll"
    run = Path(f"/run/user/{os.geteuid()}")
    if run.is_dir():
        return run / "hsmtoll"
    return _at_home(platformdirs.user_cache_dir, "HSMTOLL_CACHE")


def _is_foreign(path: Path) -> bool:
    """Whether *path*, or its nearest existing parent, belongs to neither this account nor root."""
    for each in (path, *path.parents):
        try:
            return each.stat().st_uid not in {0, os.geteuid()}
        except FileNotFoundError:
            continue
        except OSError:
            # A directory above it is closed to this account.
            return True
    return False


#: Defaults of XDG Base Directory, below the home directory.
_BELOW_HOME: Final = {"HSMTOLL_STATE": ".local/state", "HSMTOLL_CACHE": ".cache"}


def keep_temporary_files_private() -> None:
    """
    Use the user's cache directory for temporary files if others may change the usual one, where PIN
    and CA files would be refused. ConfigurationError if the account has no home directory.
    """
    if files.first_untrusted_component(Path(tempfile.gettempdir())) is not None:
        place = _at_home(platformdirs.user_cache_dir, "HSMTOLL_CACHE")
        files.make_directory(place)
        tempfile.tempdir = str(place)


def _at_home(of: Callable[[str], str], name: str) -> Path:
    """*of* platformdirs, below this account's home. ConfigurationError, naming *name*."""
    try:
        path = Path(of("hsmtoll"))
    except RuntimeError:
        path = Path()
    if _is_foreign(path):
        # HOME is another account's, as after sudo -E, where our files would be in the way.
        with contextlib.suppress(KeyError):
            path = Path(pwd.getpwuid(os.geteuid()).pw_dir) / _BELOW_HOME[name] / "hsmtoll"
    # Older versions of platformdirs may return a path with ~, relative to the working directory.
    if not path.is_absolute():
        raise ConfigurationError(
            f"{name}: not set, and this account has no home directory",
            hint="set HOME, or HSMTOLL_STATE and HSMTOLL_CACHE (memory: keeps nothing)",
            code="setting-missing",
        )
    return path
