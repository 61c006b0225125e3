"""
Each setting that is a path, with what may lie there instead of what was meant: refused at once,
in one line, by whoever uses it; and what is right, in each form that systems give it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from hsmtoll.errors import (
    AuditBroken,
    ConfigurationError,
    DeviceError,
    NetworkError,
    PinNotTried,
)
from hsmtoll.host.sockets import listen_tcp, listen_unix
from hsmtoll.host.system import given_sockets, watchdog_seconds
from hsmtoll.hsm.module import check_path
from hsmtoll.hsm.pin import PinCommand
from hsmtoll.settings import load
from hsmtoll.signing.host_trust import trusted_at
from hsmtoll.testing.softhsm import find_module
from tests.kit import path_settings
from tests.kit.accounts import NEEDS_NAMESPACES, OTHER, importable, is_root
from tests.kit.path_settings import (
    DIRECTORIES,
    FILES,
    SECRETS,
    Material,
    table,
    users_of_directories,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.timeout(300)

#: Given by another name, and used with the same code as the name on the right.
ALIKE: Final = {
    "HSMTOLL_HSM__SIGNING_PIN_FILE": "HSMTOLL_HSM__PIN_FILE",
    "HSMTOLL_HSM__SIGNING_PIN_COMMAND": "HSMTOLL_HSM__PIN_COMMAND",
}
#: Tested in rooms of their own: the module below, sockets by the tests of the host's doors.
ELSEWHERE: Final = frozenset(
    {"HSMTOLL_HSM__MODULE", "HSMTOLL_HOST__SOCKET", "HSMTOLL_HOST__METRICS", "HSMTOLL_SIGNER__URL"}
)


def test_each_setting_with_a_role_is_tried_here() -> None:
    assert set(table()) - ELSEWHERE - ALIKE.keys() == {*FILES, *DIRECTORIES}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir(mode=0o755)
    return folder


def put(place: Path, content: bytes, mode: int = 0o600) -> Path:
    path = place / "file"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def line(use: Callable[[Path], object], path: Path) -> str:
    """What the error says, and hints: one line each."""
    with pytest.raises((ConfigurationError, AuditBroken, PinNotTried, DeviceError)) as caught:
        use(path)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


# ------------------------------------------------------------------ what is no such file


def pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        # A path of at most 108 bytes.
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def missing(path: Path) -> None:
    assert not path.exists()


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.touch()


def empty(path: Path) -> None:
    path.touch(mode=0o600)


def huge(path: Path) -> None:
    path.touch(mode=0o600)
    os.truncate(path, 1024**3)


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)))
    path.chmod(0o600)


DAMAGES: Final = (
    pipe, device, directory, listening, dangling, loop, missing, below_a_file, empty, huge, noise,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", FILES)
def test_what_is_not_the_file_that_was_meant_is_refused_in_one_line(
    place: Path, made: Material, name: str, damage: Callable[[Path], None]
) -> None:
    path = place / "file"
    damage(path)
    if damage is empty and name in {"HSMTOLL_CONFIG", "HSMTOLL_HOST__POLICY"}:
        # No settings; nobody is allowed anything.
        made.files[name].take(path)
        return
    made.patience = 1.0
    try:
        message = line(made.files[name].take, path)
    finally:
        made.patience = 60.0
    read_at_once = name not in {"HSMTOLL_HSM__PIN_FILE", "HSMTOLL_HSM__PIN_COMMAND"}
    if read_at_once and damage in {pipe, device, directory, listening}:
        assert "not a regular file" in message
    if read_at_once and damage is huge:
        assert "more than 16 MiB" in message


@pytest.mark.parametrize("name", FILES)
def test_what_this_account_cannot_read_is_refused_in_one_line(
    place: Path, made: Material, name: str
) -> None:
    path = put(place, made.files[name].content, 0)
    with as_somebody():
        message = line(made.files[name].take, path)
    assert "Permission denied" in message or "exit code" in message


class as_somebody:  # noqa: N801 - a context manager
    """As an account that is not root, for whom no file is unreadable."""

    def __enter__(self) -> None:
        self.root = os.geteuid() == 0 and is_root()
        if self.root:
            os.seteuid(OTHER)

    def __exit__(self, *_: object) -> None:
        if self.root:
            os.seteuid(0)


# ------------------------------------------------------------------ who may change it


@pytest.mark.parametrize("name", FILES)
def test_what_others_may_change_is_refused_and_what_they_may_not_is_taken(
    place: Path, made: Material, name: str
) -> None:
    content, take = made.files[name].content, made.files[name].take
    path = put(place, content)
    take(path)
    for mode in (0o602, 0o620, 0o666):
        path.chmod(mode)
        assert str(path) in line(take, path)
    path.chmod(0o600)
    place.chmod(0o777)
    assert str(place) in line(take, path)
    # A sticky directory may be on the way, as /tmp is.
    place.chmod(0o1777)
    take(path)
    place.chmod(0o755)
    # A link in a directory of others, to a file that is right; and a link out of ours to theirs.
    shared = place / "shared"
    shared.mkdir()
    (shared / "link").symlink_to(path)
    (place / "out").symlink_to(shared / "file")
    shutil.copy2(path, shared / "file")
    for way in (shared / "link", place / "out", place / "shared/../file"):
        take(way)
    shared.chmod(0o777)
    for way in (shared / "link", place / "out", place / "shared/../file"):
        assert str(shared) in line(take, way)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_others_may_read_is_refused(place: Path, made: Material, name: str) -> None:
    path = put(place, made.files[name].content)
    made.files[name].take(path)
    for mode in (0o604, 0o640, 0o644):
        path.chmod(mode)
        assert "others may read" in line(made.files[name].take, path)


@pytest.mark.needs_root
@pytest.mark.parametrize("name", FILES)
def test_what_another_account_owns_is_refused(place: Path, made: Material, name: str) -> None:
    content, take = made.files[name].content, made.files[name].take
    path = put(place, content)
    os.chown(path, OTHER, OTHER)
    line(take, path)
    os.chown(path, 0, 0)
    take(path)
    os.chown(place, OTHER, OTHER)
    assert str(place) in line(take, path)
    place.chmod(0o1777)
    assert str(place) in line(take, path)
    os.chown(place, 0, 0)
    link = place / "link"
    link.symlink_to(path)
    take(link)
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    assert str(link) in line(take, link)


# ------------------------------------------------------------------ the forms that systems give


def as_kubernetes(place: Path, name: str, content: bytes, mode: int = 0o400) -> Path:
    """A Secret or ConfigMap: the file is behind two links, which are replaced together."""
    version = place / "..2026_12_01_00_00_00.1234567890"
    version.mkdir()
    (version / name).write_bytes(content)
    (version / name).chmod(mode)
    (place / "..data").symlink_to(version.name)
    (place / name).symlink_to(f"..data/{name}")
    return place / name


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_kubernetes_lays_it_is_taken(place: Path, made: Material, name: str) -> None:
    path = as_kubernetes(place, "it", made.files[name].content)
    # Of a Secret since 1.36: sticky.
    place.chmod(0o1777)
    made.files[name].take(path)


@pytest.mark.needs_root
@pytest.mark.parametrize("how", ["ro", "rw"])
def test_what_is_mounted_read_only_is_taken_whatever_its_mode(
    tmp_path: Path, made: Material, how: str
) -> None:
    volume, source = tmp_path / "volume", tmp_path / "source"
    volume.mkdir()
    source.mkdir()
    for name in FILES:
        folder = source / name
        folder.mkdir()
        mode = 0o400 if name in SECRETS else 0o666
        as_kubernetes(folder, "it", made.files[name].content, mode)
        folder.chmod(0o777)
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.kit.path_settings import Material, FILES\n"
        "from hsmtoll.errors import HsmTollError\n"
        "made = Material(Path(sys.argv[1]))\n"
        "for name in FILES:\n"
        "    try: made.files[name].take(Path(sys.argv[2]) / name / 'it'); print(name, 'taken')\n"
        "    except HsmTollError as exc: print(name, exc.code)\n"
    )
    script = (
        'mount --bind "$1" "$2" && mount -o remount,bind,$3 "$2" && exec "$4" -c "$5" "$6" "$2"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", source, volume, how, sys.executable,
         program, tmp_path / "material"],
        check=False, capture_output=True, text=True, env=os.environ | importable(),
    )  # fmt: skip
    if "ermitted" in done.stderr and not done.stdout:
        pytest.skip(NEEDS_NAMESPACES)
    seen = dict(each.split() for each in done.stdout.splitlines())
    assert seen.keys() == {*FILES}, done.stderr
    # The PIN's own code, where it is refused; a PIN file is never taken where others may write it.
    refused = {name for name, word in seen.items() if word in {"unsafe-file", "pin-file-writable"}}
    assert refused == (set(FILES) if how == "rw" else {"HSMTOLL_HSM__PIN_FILE"}), seen


# ------------------------------------------------------------------ directories of ours


@pytest.fixture(scope="module")
def keepers(made: Material) -> dict[str, Callable[[Path], object]]:
    return dict(users_of_directories(made))


@pytest.mark.parametrize("damage", [pipe, device, listening, dangling, loop, empty])
@pytest.mark.parametrize("name", DIRECTORIES)
def test_what_is_no_directory_is_refused_in_one_line(
    place: Path,
    keepers: dict[str, Callable[[Path], Any]],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    damage(place / "it")
    if name == "HSMTOLL_HOST__STOP_FILE":
        # What cannot be looked into is a stop.
        with pytest.raises((AssertionError, ConfigurationError)):
            keepers[name](place / "it")
        return
    line(keepers[name], place / "it")


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_of_ours_is_taken_only_where_nobody_else_can_replace_it(
    place: Path, keepers: dict[str, Callable[[Path], Any]], name: str
) -> None:
    ours = place / "ours"
    ours.mkdir(mode=0o700)
    keepers[name](ours)
    for each in (place, ours):
        before = each.stat().st_mode
        each.chmod(0o777)
        assert str(each) in line(keepers[name], ours)
        each.chmod(before)
    place.chmod(0o1777)
    keepers[name](ours)
    place.chmod(0o755)
    link = place / "link"
    link.symlink_to(ours)
    shared = place / "shared"
    shared.mkdir(mode=0o755)
    (shared / "link").symlink_to(place)
    keepers[name](shared / "link" / "ours")
    shared.chmod(0o777)
    assert str(shared) in line(keepers[name], shared / "link" / "ours")


@pytest.mark.needs_root
@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_below_another_accounts_is_refused(
    place: Path, keepers: dict[str, Callable[[Path], Any]], name: str
) -> None:
    ours = place / "ours"
    ours.mkdir(mode=0o700)
    for mode in (0o755, 0o1777, 0o2777):
        os.chown(place, OTHER, OTHER)
        place.chmod(mode)
        assert str(place) in line(keepers[name], ours)
    os.chown(place, 0, 0)
    place.chmod(0o755)
    keepers[name](ours)
    os.chown(ours, OTHER, OTHER)
    line(keepers[name], ours)


@pytest.mark.parametrize("name", [each for each in DIRECTORIES if "STOP" not in each])
def test_what_is_missing_on_the_way_is_made_for_this_account_alone(
    place: Path, keepers: dict[str, Callable[[Path], Any]], name: str
) -> None:
    before = os.umask(0)
    try:
        keepers[name](place / "a" / "b" / "c")
    finally:
        os.umask(before)
    modes = {each.stat().st_mode & 0o777 for each in (place / "a", place / "a/b", place / "a/b/c")}
    assert modes == {0o700}


# ------------------------------------------------------------------ the module


@pytest.fixture
def library(place: Path) -> Path:
    return Path(shutil.copy(find_module(), place / "module.so"))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_what_is_no_module_is_refused_in_one_line(
    place: Path, damage: Callable[[Path], None]
) -> None:
    damage(place / "file")
    line(path_settings.module, place / "file")


def test_a_module_that_others_may_change_is_not_loaded(library: Path, place: Path) -> None:
    library.chmod(0o755)
    check_path(library)
    for each in (library, place):
        each.chmod(0o757)
        assert str(each) in line(path_settings.module, library)
        each.chmod(0o755)


@pytest.mark.needs_root
def test_nor_is_one_of_another_account(library: Path) -> None:
    os.chown(library, OTHER, OTHER)
    assert str(library) in line(path_settings.module, library)


# ------------------------------------------------------------------ sockets, and odd names


@pytest.mark.parametrize("damage", [pipe, device, directory, loop, dangling, empty])
def test_a_host_makes_no_socket_where_something_else_is(
    place: Path, damage: Callable[[Path], None]
) -> None:
    damage(place / "file")
    before = (place / "file").lstat()
    message = line(lambda path: listen_unix(path, "HSMTOLL_HOST__SOCKET"), place / "file")
    assert "something else is there" in message
    assert (place / "file").lstat().st_ino == before.st_ino
    listen_unix(place / "free", "HSMTOLL_HOST__SOCKET").close()


def test_a_socket_that_is_a_link_to_itself_is_no_signing_host(place: Path) -> None:
    loop(place / "file")
    with pytest.raises(NetworkError, match="too many levels"):
        trusted_at(place / "file", None, "HSMTOLL_SIGNER__URL")
    listen_unix(place / "free", "HSMTOLL_HOST__SOCKET").close()
    assert trusted_at(place / "free", None, "HSMTOLL_SIGNER__URL")


@pytest.mark.parametrize("name", sorted(set(table()) - {"HSMTOLL_CONFIG"}))
def test_a_setting_with_a_nul_in_it_is_refused_where_it_is_read(name: str) -> None:
    argument = name.removeprefix("HSMTOLL_").lower()
    url = {"HSMTOLL_CACHE": "file://", "HSMTOLL_HOST__METRICS": "unix://"}.get(name, "")
    url = "unix://" if name == "HSMTOLL_SIGNER__URL" else url
    if name.endswith("COMMAND"):
        # Words of a command line: it is not started.
        assert "cannot be started" in line(
            lambda path: PinCommand(f"/bin/echo {path}\0", timeout=60).read(device="lab"), Path("a")
        )
        return
    message = line(lambda _: load(config="/dev/null", **{argument: f"{url}/a\0b"}), Path())
    assert argument.replace("__", ".") in message.lower().replace("__", ".")
    if "SIGNER" in name:
        # Half of a group, which is refused for what lacks.
        assert "NUL" in message or "printable" in message
        return
    load(config="/dev/null", **{argument: "memory:" if name == "HSMTOLL_CACHE" else f"{url}/a"})


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:\u00b2", "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1:\u0661",
     f"{'x' * 70}.example:1", "127.0.0.1", ":1", "a..example:1"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(ConfigurationError, match="HSMTOLL_HOST__LISTEN"):
        listen_tcp(address, "HSMTOLL_HOST__LISTEN")
    listen_tcp("127.0.0.1:0", "HSMTOLL_HOST__LISTEN").close()


@pytest.mark.parametrize("number", ["\u00b2", "\u0661", "1 0", "-1", "many"])
def test_what_a_service_manager_counts_in_other_digits_is_no_number(
    monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert watchdog_seconds() == 0.5
    monkeypatch.setenv("WATCHDOG_USEC", number)
    assert watchdog_seconds() is None
    assert given_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": number}) == []
