"""The configuration file (TOML): where it is, its profiles, and the check of its keys."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsmtoll import files
from hsmtoll.errors import ConfigurationError, sanitized
from hsmtoll.settings.environment import CONFIG, value_of
from hsmtoll.settings.model import check_names
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["config_path", "profiles", "read_file"]

_log = logging.getLogger("hsmtoll.settings")


def config_path(given: str | os.PathLike[str] | None) -> Path | None:
    """
    The configuration file: *given*, HSMTOLL_CONFIG, the user's, the machine's; None if there is
    none. ConfigurationError if one of the first two does not exist.
    """
    named = given or value_of(CONFIG)
    if named:
        path = Path(named)
        if str(path).startswith("~"):
            raise ConfigurationError(
                f"configuration file {sanitized(path)}: there is no such file",
                hint="~ is not expanded here; write the whole path",
            )
        if str(path) == os.devnull:
            # Stands for no file at all, not even the machine's.
            return None
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigurationError(
                f"configuration file {sanitized(path)}: there is no such file"
            ) from None
        except OSError as exc:
            raise ConfigurationError(
                f"configuration file {sanitized(path)}: cannot be read ({exc.strerror})"
            ) from exc
        return path
    places = [Path("/etc/hsmtoll")]
    # An account may have no home directory.
    with contextlib.suppress(RuntimeError):
        # Relative paths are invalid (XDG Base Directory): they would mean the working directory.
        given_home = Path(os.environ.get("XDG_CONFIG_HOME", ""))
        home = given_home if given_home.is_absolute() else Path.home() / ".config"
        if home.is_absolute():
            places.insert(0, home / "hsmtoll")
    for place in places:
        # After sudo, HOME may be another account's, and unreadable.
        with contextlib.suppress(OSError):
            if (place / "hsmtoll.toml").is_file():
                return place / "hsmtoll.toml"
    return None


def profiles(config: str | os.PathLike[str] | None = None) -> tuple[str, ...]:
    """The names of the profiles in the configuration file. ConfigurationError as by `load`."""
    path = config_path(config)
    return tuple(_tables(path)[1]) if path else ()


def _tables(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Top level of the configuration file, and its profiles by name."""
    raw = files.read(path, "configuration file")
    try:
        values = tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"configuration file {path}: cannot be read") from exc
    except tomllib.TOMLDecodeError as exc:
        # `from None`, and only the position: the parser's message may quote a line with a PIN.
        at = re.search(r"\(at .*\)", str(exc))
        raise ConfigurationError(
            f"configuration file {path}: not valid TOML {at[0] if at else ''}".rstrip()
        ) from None
    named = values.pop("profile", {})
    if not isinstance(named, dict) or not all(isinstance(each, dict) for each in named.values()):
        raise ConfigurationError(f"configuration file {path}: [profile.NAME] tables are expected")
    return values, named


def read_file(path: Path, profile: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Top level of the file, and the table of *profile* (empty if None).

    ConfigurationError if the file cannot be read, has an unknown key or no such profile.
    """
    values, named = _tables(path)
    for group in (values, *named.values()):
        check_names(group, f"configuration file {path}: key")
        _warn_of_exposed_pin(group, path)
    if profile is None:
        return values, {}
    if profile not in named:
        there = f"its profiles: {', '.join(map(sanitized, named))}"
        raise ConfigurationError(
            f"profile {sanitized(profile)}: not in {path}",
            hint=did_you_mean(profile, named, there)
            if named
            else "the file has no [profile.NAME] tables",
        )
    return values, named[profile]


def _warn_of_exposed_pin(values: Mapping[str, Any], path: Path) -> None:
    hsm = values.get("hsm")
    if isinstance(hsm, dict) and {"pin", "signing_pin"} & hsm.keys():
        with contextlib.suppress(OSError):
            if path.stat().st_mode & stat.S_IROTH:
                _log.warning(
                    "configuration file %s: contains a PIN and can be read by everybody: chmod o-r",
                    sanitized(path),
                )
