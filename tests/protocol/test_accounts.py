"""Accounts as services have them: without a home, or with one that is another's."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from hsmtoll.app import App
from hsmtoll.settings import load
from tests.kit.accounts import OTHER, importable, is_root

# Everything is imported before: this Python may lie where the account cannot look.
_AS_ANOTHER = """
import os, sys
from pathlib import Path
import platformdirs
from tests.kit.accounts import become, import_all
from hsmtoll.app import App
from hsmtoll.errors import HsmTollError
from hsmtoll.host.emergency_stop import check_stop_directory, stopped_by
from hsmtoll.hsm.module import check_path
from hsmtoll.settings import load
platformdirs.user_state_dir("hsmtoll")
platformdirs.user_cache_dir("hsmtoll")
import_all()
os.chdir("/")
if uid := int(sys.argv[3]):
    become(uid)
place = Path(sys.argv[1])
try:
    exec(sys.argv[2])
except HsmTollError as exc:
    print(type(exc).__name__, exc)
"""


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A directory that its owner alone, or nobody at all, can look into."""
    place = tmp_path / "locked"
    (place / ".config" / "hsmtoll").mkdir(parents=True)
    (place / ".config" / "hsmtoll" / "hsmtoll.toml").write_text("secret_of_another = 1\n")
    (place / "module.so").touch()
    for each in tmp_path.parents:
        if each != each.parent and not each.stat().st_mode & 0o001:
            each.chmod(each.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    place.chmod(0o700 if is_root() else 0)
    return place


def printed(place: Path, code: str, **environ: str) -> str:
    """
    What *code* printed as another account, or as this one where it cannot become another; an
    error that is not ours is a failure.
    """
    plain = {"PATH": os.environ["PATH"], "HSMTOLL_ENVIRONMENT": "sandbox", **importable()}
    done = subprocess.run(
        [sys.executable, "-c", _AS_ANOTHER, str(place), code, str(OTHER if is_root() else 0)],
        env=plain | environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_home_that_is_anothers_has_no_settings_for_this_account(locked: Path) -> None:
    code = "print(load().environment)"
    assert printed(locked, code, HOME=str(locked)) == "sandbox"
    assert printed(locked, code, XDG_CONFIG_HOME=str(locked / ".config")) == "sandbox"
    # The control: once it can be looked into, it counts.
    locked.chmod(0o755)
    assert "secret_of_another" in printed(locked, code, HOME=str(locked))


def test_a_file_that_was_named_and_cannot_be_seen_is_an_error_of_one_line(locked: Path) -> None:
    named = str(locked / ".config" / "hsmtoll" / "hsmtoll.toml")
    assert printed(locked, "load()", HSMTOLL_CONFIG=named) == (
        f"ConfigurationError configuration file {named}: cannot be read (Permission denied)"
    )
    assert printed(locked, "check_path(place / 'module.so')") == (
        f"ConfigurationError the PKCS#11 module '{locked}/module.so' cannot be looked at"
        " (Permission denied)"
    )


def test_a_stop_file_that_cannot_be_seen_is_a_stop_and_no_mistake(locked: Path) -> None:
    code = "check_stop_directory(place / 'run' / 'stop'); print(stopped_by(place / 'run' / 'stop'))"
    assert printed(locked, code) == "the stop file cannot be read (Permission denied)"


@pytest.mark.needs_root
def test_an_account_without_a_home_is_told_what_to_set(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    output = printed(tmp_path, "print(App(load()).state)")
    assert output.startswith("ConfigurationError HSMTOLL_STATE: not set"), output


def test_the_state_is_where_it_was_set_or_below_the_home(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    code = "print(App(load()).state)"
    assert printed(tmp_path, code, HSMTOLL_STATE="/var/lib/x") == "/var/lib/x"
    assert printed(tmp_path, code, HOME="/nonexistent") == "/nonexistent/.local/state/hsmtoll"


@pytest.mark.parametrize(
    ("name", "code", "below"),
    [
        ("STATE_DIRECTORY", "print(App(load()).state)", ""),
        ("RUNTIME_DIRECTORY", "print(App(load(), one_shot=True).store._directory)", "/hsmtoll"),
        ("XDG_RUNTIME_DIR", "print(App(load(), one_shot=True).store._directory)", "/hsmtoll"),
    ],
)
def test_a_directory_of_the_system_that_is_relative_is_none(
    tmp_path: Path, name: str, code: str, below: str
) -> None:
    tmp_path.chmod(0o755)
    home = {"HOME": str(tmp_path)}

    assert printed(tmp_path, code, **{name: "here"}, **home) == printed(tmp_path, code, **home)
    assert printed(tmp_path, code, **{name: "/there"}, **home) == f"/there{below}"


@pytest.mark.needs_root
def test_a_runtime_directory_and_a_home_of_another_account_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `su` and `sudo -E` leave the variables."""
    theirs = tmp_path / "theirs"
    (theirs / "run").mkdir(parents=True)
    for each in (theirs, theirs / "run"):
        os.chown(each, OTHER + 1, OTHER + 1)
    for each in tmp_path.parents:
        if each != each.parent and not each.stat().st_mode & 0o001:
            each.chmod(each.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    show = "app = App(load(), one_shot=True); print(app.store._directory); print(app.state)"
    output = printed(tmp_path, show, XDG_RUNTIME_DIR=str(theirs / "run"), HOME="/")
    assert str(theirs) not in output, output
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(theirs))
    home = Path(pwd.getpwuid(os.geteuid()).pw_dir)
    assert App(load()).state == home / ".local" / "state" / "hsmtoll"
    # The control: their own.
    mine = tmp_path / "mine"
    (mine / "run").mkdir(parents=True)
    for each in (mine, mine / "run"):
        os.chown(each, OTHER, OTHER)
    variables = {"XDG_RUNTIME_DIR": str(mine / "run"), "HOME": str(mine)}
    assert printed(tmp_path, show, **variables).splitlines() == [
        str(mine / "run" / "hsmtoll"),
        str(mine / ".local" / "state" / "hsmtoll"),
    ]
