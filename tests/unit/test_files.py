"""Who may change a file: the rule in its three roles, for each setting that is a path."""

from __future__ import annotations

import os
import stat
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from hsmtoll.errors import ConfigurationError
from hsmtoll.files import check_own, check_trusted, read, replace
from hsmtoll.hsm.pin import PinFile
from hsmtoll.settings import Settings
from tests.kit.accounts import OTHER
from tests.kit.path_settings import table

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

ROLES: Final = ("trust", "secret", "own")


def paths_of(group: type[BaseModel], prefix: str = "HSMTOLL_") -> set[str]:
    """The variables of all settings that are a path."""
    found = set()
    for name, field in group.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is not None:
            found |= paths_of(field.annotation, f"{prefix}{name.upper()}__")  # type: ignore[arg-type] # a group
        elif "Path" in repr(field.annotation):
            found.add(f"{prefix}{name.upper()}")
    return found


def test_every_setting_that_is_a_path_has_a_role() -> None:
    roles, paths = table(), paths_of(Settings)
    assert len(paths) > 15
    assert {"HSMTOLL_STATE", "HSMTOLL_HOST__CLIENT_CA"} <= paths
    assert {name: roles.get(name) for name in paths if roles.get(name) not in ROLES} == {}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory of ours."""
    folder = tmp_path / "place"
    folder.mkdir(0o755)
    return folder


def put(place: Path, content: bytes = b"", mode: int = 0o600) -> Path:
    path = place / "file"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refused(check: Callable[[], object]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check()
    assert caught.value.code in {"unsafe-file", "pin-file-writable"}
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o606, 0o644, 0o666, 0o620])
def test_a_secret_that_others_may_read_or_write_is_refused(place: Path, mode: int) -> None:
    path = put(place, mode=mode)
    assert "others may" in refused(lambda: read(path, "key", secret=True))
    path.chmod(0o400)
    assert read(path, "key", secret=True) == b""


def test_a_directory_on_the_way_that_others_may_write_makes_any_file_theirs(place: Path) -> None:
    path = put(place)
    for check in (check_trusted, partial(read, secret=True), check_own):
        place.chmod(0o777)
        assert str(place) in refused(lambda check=check: check(path, "it"))  # type: ignore[misc] # bound
        place.chmod(0o755)
        check(path, "it")


def test_what_is_missing_is_judged_by_the_directory_that_it_would_be_made_in(place: Path) -> None:
    missing = place / "a" / "b"
    check_own(missing, "state")
    place.chmod(0o777)
    assert str(place) in refused(lambda: check_own(missing, "state"))


def test_a_shells_open_pipe_is_taken_for_a_pin_file() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"1234\n")
        os.close(writer)
        path = Path(f"/proc/self/fd/{reader}")
        assert PinFile(path).read(device="lab").reveal() == "1234"
    finally:
        os.close(reader)


@pytest.mark.needs_root
def test_a_pipe_of_another_account_is_no_pin_file(place: Path) -> None:
    path = place / "pipe"
    os.mkfifo(path, 0o600)
    os.chown(path, OTHER, OTHER)
    refused(lambda: PinFile(path, timeout=0.1).read(device="lab"))
    os.chown(path, 0, 0)
    with pytest.raises(ConfigurationError, match="not all of it came"):
        PinFile(path, timeout=0.1).read(device="lab")


# ------------------------------------------------------------------ the PIN command


# ------------------------------------------------------------------ what is ours


@pytest.mark.needs_root
def test_a_group_with_others_in_it_may_not_write_where_state_is_kept(place: Path) -> None:
    place.chmod(0o775)
    os.chown(place, 0, OTHER)
    refused(lambda: check_own(place / "state", "state"))
    place.chmod(0o755)
    check_own(place / "state", "state")


# ------------------------------------------------------------------ replacing a file


def test_a_reader_finds_the_old_file_or_the_new_one_and_never_half_of_one(place: Path) -> None:
    path = place / "file"
    contents = {bytes([letter]) * 300_000 for letter in b"ab"}
    replace(path, b"a" * 300_000)

    def write() -> None:
        for number in range(40):
            replace(path, b"ab"[number % 2 : number % 2 + 1] * 300_000, fsync=number % 3 == 0)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for each in writers:
        each.start()
    seen = {path.read_bytes()}
    while any(each.is_alive() for each in writers):
        seen.add(path.read_bytes())
    assert seen <= contents
    assert [each.name for each in place.iterdir()] == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("fails_at", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    path = put(place, b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os if fails_at == "fsync" else Path, fails_at, full)
        with pytest.raises(OSError, match="No space left"):
            replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in place.iterdir()] == ["file"]
    replace(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_link_is_replaced_and_what_it_leads_to_stays(place: Path) -> None:
    path, link = put(place, b"old"), place / "link"
    link.symlink_to(path)
    replace(link, b"new")
    assert (path.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"old", b"new", False)


def test_what_is_no_regular_file_is_never_replaced(place: Path) -> None:
    """As root, a marker of /dev/null would else leave the machine without one."""
    pipe, folder, link = place / "pipe", place / "folder", place / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to("/dev/null")
    for each in (pipe, folder, link):
        with pytest.raises(OSError, match="not a regular file"):
            replace(each, b"new")
    assert sorted(each.name for each in place.iterdir()) == ["folder", "link", "pipe"]
