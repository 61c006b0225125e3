"""Where files of this account live on this system, where no setting says so."""

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
    """A directory that systemd or the login gives; a relative one would be another each time."""
    path = Path(os.environ.get(name, "").partition(":")[0])
    return path if path.is_absolute() else None


def state_directory() -> Path:
    """Where a machine remembers things, where HSMTOLL_STATE is not set."""
    return _given("STATE_DIRECTORY") or _at_home(platformdirs.user_state_dir, "HSMTOLL_STATE")


def runtime_directory() -> Path:
    """Where a login's files live: gone after a restart where the system does it right."""
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        given = _given(name)
        # After su or sudo -E it is still the other account's: what we made there would be in its
        # way (XDG Base Directory: it must be owned by the user).
        if given and not _anothers(given):
            return given / "hsmtoll"
    run = Path(f"/run/user/{os.geteuid()}")
    if run.is_dir():
        return run / "hsmtoll"
    return _at_home(platformdirs.user_cache_dir, "HSMTOLL_CACHE")


def _anothers(path: Path) -> bool:
    """Whether another account than ours and root's has it, or the place where it would be made."""
    for each in (path, *path.parents):
        try:
            return each.stat().st_uid not in {0, os.geteuid()}
        except FileNotFoundError:
            continue
        except OSError:
            # Somebody closed the way to it, and it was not this account.
            return True
    return False


#: Where XDG Base Directory has these two where nothing is set.
_BELOW_HOME: Final = {"HSMTOLL_STATE": ".local/state", "HSMTOLL_CACHE": ".cache"}


def keep_temporary_files_private() -> None:
    """
    Temporary files of this process lie below the user's cache directory where others may change
    the usual place: a PIN file or a CA file there would be refused.
    """
    if files.first_untrusted_component(Path(tempfile.gettempdir())) is not None:
        place = _at_home(platformdirs.user_cache_dir, "HSMTOLL_CACHE")
        files.make_directory(place)
        tempfile.tempdir = str(place)


def _at_home(of: Callable[[str], str], name: str) -> Path:
    """A directory of this account, which may have no home for it to be in."""
    try:
        path = Path(of("hsmtoll"))
    except RuntimeError:
        path = Path()
    if _anothers(path):
        # HOME is another account's, as after sudo -E: what we made there would be in its way.
        with contextlib.suppress(KeyError):
            path = Path(pwd.getpwuid(os.geteuid()).pw_dir) / _BELOW_HOME[name] / "hsmtoll"
    # Older versions of platformdirs leave the ~ as it is: it would be made below whatever is here.
    if not path.is_absolute():
        raise ConfigurationError(
            f"{name}: not set, and this account has no home directory",
            hint="set HOME, or HSMTOLL_STATE and HSMTOLL_CACHE (memory: keeps nothing)",
            code="setting-missing",
        )
    return path
