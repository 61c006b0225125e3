"""Files as the kubelet and systemd lay them for an account that is not root."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hsmtoll.errors import ConfigurationError, PinNotTried
from hsmtoll.files import exposed, first_untrusted_component
from hsmtoll.hsm.pin_log import PinLog, TokenUser
from hsmtoll.tokens.redis_store import read_key
from hsmtoll.tokens.stores import FileStore
from tests.kit.accounts import NEEDS_NAMESPACES, NEEDS_ROOT, OTHER, importable, is_root

if TYPE_CHECKING:
    from collections.abc import Callable

needs_root = pytest.mark.skipif(not is_root(), reason=NEEDS_ROOT)
PLACE = TokenUser("maker", "model", "1", "label", "user")
OURS = 43210


@pytest.fixture
def as_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supplementary group, as fsGroup gives it."""
    monkeypatch.setattr(os, "getgroups", lambda: [OURS])


@pytest.mark.usefixtures("as_member")
@pytest.mark.parametrize(
    ("uid", "gid", "mode", "words"),
    [
        (0, OURS, 0o440, None),
        (0, 0, 0o440, None),
        (0, OURS, 0o400, None),
        (0, OURS + 1, 0o440, "others may read it"),
        (0, OURS, 0o460, "others may read or change it"),
        (0, OURS, 0o640, "others may read it"),
        (0, OURS, 0o444, "others may read it"),
        (OTHER, OURS, 0o400, "another account"),
    ],
)
def test_a_secret_may_be_roots_for_a_group_of_ours(
    uid: int, gid: int, mode: int, words: str | None
) -> None:
    seen = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, uid, gid, 32, 0, 0, 0))
    problem = exposed(seen)
    assert (problem is None) if words is None else (problem is not None and words in problem)


@needs_root
@pytest.mark.usefixtures("as_member")
def test_a_cache_key_from_a_secret_is_taken_and_one_that_all_may_read_is_not(
    tmp_path: Path,
) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    os.chown(key, 0, OURS)
    key.chmod(0o440)
    assert read_key(key) == bytes(range(32))
    key.chmod(0o444)
    with pytest.raises(ConfigurationError, match=r"others may read it \(mode 0444\)") as caught:
        read_key(key)
    assert "fsGroup" in (caught.value.hint or "")


def given_to_the_group(place: Path) -> None:
    """As the kubelet does with a volume that has fsGroup."""
    for each in (place, *place.rglob("*")):
        mode = each.stat().st_mode
        each.chmod(mode | (0o2770 if each.is_dir() else 0o660))


def test_state_and_cache_of_ours_are_taken_back_from_fsgroup(tmp_path: Path) -> None:
    state, cache = tmp_path / "state", tmp_path / "cache"
    for _ in range(2):
        # A program each: the volume is given to the group before one starts.
        store, pin_log = FileStore(cache), PinLog(state)
        store.put("ab", b"token", ttl=60)
        kept = store.get("ab")
        assert kept is not None
        assert kept.value == b"token"
        with pin_log.held(PLACE):
            pass
        modes = {stat.S_IMODE(each.stat().st_mode) for each in (cache, state, state / "pin")}
        assert modes == {0o700}
        assert {stat.S_IMODE(f.stat().st_mode) for f in cache.glob("*.json")} == {0o600}
        given_to_the_group(state)
        given_to_the_group(cache)


def mode(bits: int) -> Callable[[Path], None]:
    return lambda place: place.chmod(bits)


@pytest.mark.parametrize(
    ("bits", "words"),
    [(0o2777, "change"), (0o770, "change"), (0o750, "read"), (0o755, "read")],
)
def test_what_was_opened_otherwise_is_refused_by_what_others_can_do(
    tmp_path: Path, bits: int, words: str
) -> None:
    state, cache = tmp_path / "state", tmp_path / "cache"
    (state / "pin").mkdir(parents=True, mode=0o700)
    state.chmod(0o700)
    cache.mkdir()
    cache.chmod(bits)
    with pytest.raises(ConfigurationError, match=f"others can {words} it") as caught:
        FileStore(cache).get("ab")
    assert f"file://{cache}/hsmtoll" in (caught.value.hint or "")
    (state / "pin").chmod(bits)
    with pytest.raises(PinNotTried, match=f"others can {words} it") as refused:
        PinLog(state).held(PLACE).__enter__()
    assert "below its root" in (refused.value.hint or "")


_KEEP = """
import os, sys
from pathlib import Path
from tests.kit.accounts import become, import_all
import_all()
become(int(sys.argv[2]), int(sys.argv[3]))
from hsmtoll.errors import ConfigurationError, PinNotTried
from hsmtoll.hsm.pin_log import PinLog, TokenUser
from hsmtoll.tokens.stores import FileStore
at = Path(sys.argv[1])
try:
    FileStore(at / "cache").put("ab", b"token", ttl=60)
    print("kept" if FileStore(at / "cache").get("ab") else "lost")
except ConfigurationError as exc:
    print(exc.code)
try:
    with PinLog(at / "state").held(TokenUser("maker", "model", "1", "label", "user")):
        print("held")
except PinNotTried as exc:
    print(exc.code)
"""


@needs_root
@pytest.mark.parametrize(
    ("owner", "group", "bits", "kept"),
    [
        pytest.param(0, OTHER, 0o2777, True, id="emptyDir with fsGroup"),
        pytest.param(0, OTHER, 0o2775, True, id="disk with fsGroup"),
        pytest.param(0, OTHER, 0o3775, True, id="disk with fsGroup, sticky"),
        pytest.param(0, 0, 0o1777, True, id="tmpfs of Docker, /tmp"),
        pytest.param(OTHER, OTHER, 0o755, True, id="StateDirectory"),
        pytest.param(0, OTHER + 1, 0o777, False, id="emptyDir without fsGroup"),
        pytest.param(0, OTHER + 1, 0o2777, False, id="group of others"),
        pytest.param(OTHER + 1, OTHER, 0o2777, False, id="directory of another account"),
        pytest.param(OTHER + 1, OTHER, 0o1777, False, id="sticky one of another account"),
        pytest.param(OTHER, OTHER, 0o777, False, id="ours, open to everybody"),
    ],
)
def test_state_and_cache_lie_where_nobody_else_can_move_them_away(
    tmp_path: Path, owner: int, group: int, bits: int, kept: bool
) -> None:
    tmp_path.chmod(0o755)
    with tempfile.TemporaryDirectory(dir="/tmp") as outer:
        Path(outer).chmod(0o755)
        volume = Path(outer) / "volume"
        volume.mkdir()
        os.chown(volume, owner, group)
        volume.chmod(bits)
        for name in ("cache", "state"):
            (volume / name).mkdir(mode=0o700)
            os.chown(volume / name, OTHER, OTHER)
        done = subprocess.run(
            [sys.executable, "-c", _KEEP, volume, str(OTHER), str(OTHER)],
            check=False, capture_output=True, text=True, env=os.environ | importable(),
        )  # fmt: skip
    assert done.stdout.split() == (["kept", "held"] if kept else ["cache-unsafe", "ledger"]), (
        done.stderr
    )


@needs_root
def test_the_root_of_a_volume_of_another_account_is_no_cache(tmp_path: Path) -> None:
    os.chown(tmp_path, OTHER, OTHER)
    tmp_path.chmod(0o2777)
    with pytest.raises(ConfigurationError, match="another account") as caught:
        FileStore(tmp_path).get("ab")
    assert str(tmp_path / "hsmtoll") in (caught.value.hint or "")


_READ_AS_ANOTHER = """
import sys
from pathlib import Path
from hsmtoll.files import first_untrusted_component
print(first_untrusted_component(Path(sys.argv[1])))
"""


@needs_root
@pytest.mark.parametrize("read_only", [True, False])
def test_a_volume_that_is_mounted_read_only_can_be_changed_by_nobody(
    tmp_path: Path, *, read_only: bool
) -> None:
    """As a ConfigMap's: its root has 0777 and no sticky bit."""
    script = (
        "mount -t tmpfs -o mode=0777 none {at} && mkdir {at}/..1 && echo a > {at}/..1/f.toml && "
        "ln -s ..1 {at}/..data && ln -s ..data/f.toml {at}/f.toml && "
        "mount -o remount,{how},mode=0777 {at} && exec {python} -c '{look}' {at}/f.toml"
    ).format(
        at=tmp_path, how="ro" if read_only else "rw", python=sys.executable, look=_READ_AS_ANOTHER
    )  # fmt: skip
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if "ermitted" in done.stderr:
        pytest.skip(NEEDS_NAMESPACES)
    assert done.stdout.strip() == ("None" if read_only else str(tmp_path)), done.stderr


def test_a_directory_that_others_may_write_is_still_loose_where_it_can_be_written(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a" / "f"
    file.parent.mkdir()
    file.touch()
    assert first_untrusted_component(file) is None
    file.parent.chmod(0o777)
    assert first_untrusted_component(file) == file.parent
