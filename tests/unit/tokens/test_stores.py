"""Stores: what others may not touch, what survives a crash, and how a key file looks."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import pytest

from hsmtoll.app import App
from hsmtoll.errors import ConfigurationError, TryAgainLater, install_extra
from hsmtoll.settings import load
from hsmtoll.testing.clock import SettableClock
from hsmtoll.tokens.rate_limit import RateLimit
from hsmtoll.tokens.redis_store import read_key
from hsmtoll.tokens.stores import FileStore, MemoryStore, Store, StoredValue, name_of
from tests.kit.accounts import OTHER

KEY = name_of("a key")


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "cache")


@pytest.fixture(params=["memory", "file"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else FileStore(tmp_path / "cache")


def test_what_was_put_is_got_and_nothing_else(any_store: Store) -> None:
    assert any_store.get(KEY) is None
    any_store.put(KEY, b"value", ttl=10)
    assert any_store.get(KEY) == StoredValue(b"value")
    any_store.put(KEY, b"newer", ttl=10)
    assert any_store.get(KEY) == StoredValue(b"newer")
    assert any_store.get(name_of("another")) is None


def test_a_lock_excludes_and_is_freed(any_store: Store) -> None:
    with any_store.lock(KEY, timeout=1) as held:
        assert held
        with any_store.lock(KEY, timeout=0.05) as second:
            assert not second
        with any_store.lock(name_of("another"), timeout=0.05) as other:
            assert other
    with any_store.lock(KEY, timeout=1) as again:
        assert again


def test_a_lock_is_freed_when_its_holder_fails(any_store: Store) -> None:
    with pytest.raises(ValueError, match="a bug"), any_store.lock(KEY, timeout=1):
        raise ValueError("a bug")
    with any_store.lock(KEY, timeout=0.05) as held:
        assert held


def test_directory_and_files_are_for_the_user_alone(store: FileStore, tmp_path: Path) -> None:
    store.put(KEY, b"v", ttl=1)
    with store.lock(KEY, timeout=1):
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()}
    assert modes == {f"{KEY}.json": 0o600, f"{KEY}.lock": 0o600}
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_may_use_is_refused(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache").chmod(0o750)
    with pytest.raises(ConfigurationError, match="others can read it"):
        store.get(KEY)
    with pytest.raises(ConfigurationError, match="others can read it"):
        store.put(KEY, b"v", ttl=1)
    with pytest.raises(ConfigurationError, match="0750"), store.lock(KEY, timeout=1):
        pass


def test_a_directory_that_is_a_link_is_refused(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="is not a file or directory of this program"):
        store.get(KEY)


def test_a_file_that_others_may_read_is_refused(store: FileStore, tmp_path: Path) -> None:
    store.put(KEY, b"v", ttl=1)
    (tmp_path / "cache" / f"{KEY}.json").chmod(0o644)
    with pytest.raises(ConfigurationError, match="0644"):
        store.get(KEY)


def test_a_file_that_is_a_link_is_refused(store: FileStore, tmp_path: Path) -> None:
    store.put(KEY, b"v", ttl=1)
    path = tmp_path / "cache" / f"{KEY}.json"
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(ConfigurationError, match="is a link"):
        store.get(KEY)


def test_a_pipe_in_its_place_blocks_nobody(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "cache" / f"{KEY}.json", 0o600)
    with pytest.raises(ConfigurationError, match="is not a file or directory of this program"):
        store.get(KEY)


def test_what_belongs_to_another_user_is_refused(tmp_path: Path) -> None:
    # Only root can give something away, and only to others does root's own directory belong.
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(directory, 4711, -1)
    else:
        directory = Path("/")
    with pytest.raises(ConfigurationError, match="belongs to another account"):
        FileStore(directory).get(KEY)


def test_what_is_too_large_is_a_miss(store: FileStore) -> None:
    store.put(KEY, b"x" * (256 * 1024 + 1), ttl=1)
    assert store.get(KEY) is None


def test_a_place_that_cannot_be_a_directory_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        FileStore(tmp_path / "file" / "cache").get(KEY)


SECRET = bytes(range(100, 132))


@pytest.mark.parametrize(
    "content",
    [
        SECRET,
        SECRET.hex().encode(),
        SECRET.hex().upper().encode() + b"\n",
        base64.b64encode(SECRET) + b"\n",
    ],
)
def test_a_key_is_32_bytes_as_they_are_or_as_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    assert read_key(path) == SECRET


@pytest.mark.parametrize("content", [b"", SECRET[:31], SECRET + b"x", b"not a key", b"g" * 64])
def test_anything_else_is_no_key(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="32 bytes") as caught:
        read_key(path)
    assert "not a key" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_bytes(SECRET)
    path.chmod(mode)
    if os.geteuid() == 0:
        # Root may hand a key to a group of ours, as its own is.
        os.chown(path, -1, OTHER)
    with pytest.raises(ConfigurationError, match="others may read"):
        read_key(path)


def test_a_key_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_key(tmp_path / "key")


def test_names_are_unambiguous_and_tell_nothing() -> None:
    assert name_of("ab", "c") != name_of("a", "bc")
    assert set(name_of("secret")) <= set("0123456789abcdef")


def test_a_budget_is_counted_by_identity_and_by_hour(any_store: Store) -> None:
    clock = SettableClock(1_800_000_000.0)
    limit = RateLimit(any_store, clock, per_hour=3)
    for _ in range(3):
        limit.acquire("me")
        clock.advance(600)
    with pytest.raises(TryAgainLater, match="3 signatures in the last hour") as caught:
        limit.acquire("me")
    assert caught.value.retry_after == pytest.approx(1800)
    limit.acquire("another")
    clock.advance(1801)
    limit.acquire("me")
    with pytest.raises(TryAgainLater):
        limit.acquire("me")


def test_a_budget_is_shared_by_all_who_share_the_store(any_store: Store) -> None:
    clock = SettableClock(1_800_000_000.0)
    for _ in range(3):
        RateLimit(any_store, clock, per_hour=3).acquire("me")
    with pytest.raises(TryAgainLater):
        RateLimit(any_store, clock, per_hour=3).acquire("me")


@pytest.mark.parametrize("raw", [b"", b"{}", b"[null, 1e999]", b"torn", b"[" * 9999])
def test_a_count_that_was_lost_is_kept_by_this_process(any_store: Store, raw: bytes) -> None:
    limit = RateLimit(any_store, SettableClock(1_800_000_000.0), per_hour=2)
    for _ in range(2):
        limit.acquire("me")
        any_store.put(name_of("budget", "me"), raw, ttl=3600)
    with pytest.raises(TryAgainLater):
        limit.acquire("me")


@pytest.mark.parametrize("back", [200, 7200])
def test_a_clock_set_back_frees_no_signature(any_store: Store, back: int) -> None:
    clock = SettableClock(1_800_000_000.0)
    limit = RateLimit(any_store, clock, per_hour=2)
    limit.acquire("me")
    limit.acquire("me")
    clock.set_wall(1_800_000_000.0 - back)
    with pytest.raises(TryAgainLater):
        limit.acquire("me")


def test_signatures_of_a_clock_that_was_ahead_are_free_an_hour_after_it_was_put_right(
    any_store: Store,
) -> None:
    clock = SettableClock(1_800_000_000.0)
    limit = RateLimit(any_store, clock, per_hour=2)
    limit.acquire("me")
    limit.acquire("me")
    clock.set_wall(1_800_000_000.0 - 7 * 86_400)
    for _ in range(3):
        # Asked again and again, it says each time what is left, and not an hour.
        with pytest.raises(TryAgainLater) as caught:
            limit.acquire("me")
        wait = caught.value.retry_after or 0.0
        clock.advance(1199)
    assert wait == pytest.approx(3600 - 2 * 1199)
    clock.advance(4)
    limit.acquire("me")


def test_a_directory_in_its_place_is_refused_and_leaks_nothing(
    store: FileStore, tmp_path: Path
) -> None:
    store.put(KEY, b"value", ttl=10)
    path = next((tmp_path / "cache").glob("*.json"))
    path.unlink()
    path.mkdir(mode=0o700)
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir()))
    with pytest.raises(ConfigurationError):
        store.get(KEY)
    assert len(list(opened.iterdir())) == before


def test_a_redis_cache_without_its_library_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file = tmp_path / "key"
    key_file.touch(mode=0o600)
    key_file.write_bytes(os.urandom(32))
    url = f"unix://{tmp_path}/nobody"
    settings = load(cache=url, cache_key_file=key_file)
    # The control: a server that is not there is a miss.
    assert App(settings).store.get(KEY) is None

    monkeypatch.delitem(sys.modules, "hsmtoll.tokens.redis_store")
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigurationError, match="not installed") as caught:
        _ = App(settings).store
    assert caught.value.code == "extra-missing"
    assert caught.value.hint == install_extra("redis")
