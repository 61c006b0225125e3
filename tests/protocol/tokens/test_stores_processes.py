"""Stores that processes leave behind: killed, forked, or out of room."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hsmtoll.tokens.stores import (
    FileStore,
    StoredValue,
)
from tests.kit.accounts import importable
from tests.unit.tokens.test_stores import KEY

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "cache")


def test_a_draft_left_by_a_killed_process_is_no_obstacle(store: FileStore, tmp_path: Path) -> None:
    store.put(KEY, b"old", ttl=1)
    kill_while_writing = (
        "import os, sys, signal; from pathlib import Path;"
        "from hsmtoll.tokens.stores import FileStore;"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "FileStore(Path(sys.argv[1])).put(sys.argv[2], b'torn', ttl=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", kill_while_writing, tmp_path / "cache", KEY],
        check=False, env=os.environ | importable(),
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert store.get(KEY) == StoredValue(b"old")
    store.put(KEY, b"new", ttl=1)
    assert store.get(KEY) == StoredValue(b"new")


def test_a_full_disk_keeps_the_old_value_and_fails_nobody(tmp_path: Path) -> None:
    """In a process of its own, whose files may hold four bytes."""
    code = f"""
import resource, signal, pathlib
from hsmtoll.tokens.stores import FileStore
store = FileStore(pathlib.Path({str(tmp_path / "cache")!r}))
store.put({KEY!r}, b"old", ttl=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))
store.put({KEY!r}, b"far too long", ttl=1)
print(store.get({KEY!r}).value.decode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "old\n"
    assert "could not be stored" in done.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 1
