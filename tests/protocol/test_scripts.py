"""The scripts: callable from anywhere, with --help, and with the lock that they need."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.readers import section

TOP = Path(__file__).parents[2]
SCRIPTS = sorted(
    path
    for path in [*(TOP / "scripts").iterdir(), TOP / ".ci" / "run"]
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_each_prints_its_own_comment_and_does_nothing_else(
    script: Path, word: str, tmp_path: Path
) -> None:
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), script.read_text(encoding="utf-8").splitlines()[1:]
    )
    comment = [line.removeprefix("#").removeprefix(" ") for line in lines]
    assert comment
    # By a relative path from elsewhere, as a newcomer calls it beside the clone.
    done = subprocess.run(
        [os.path.relpath(script, tmp_path), word],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == comment
    assert not list(tmp_path.iterdir())


def test_the_page_of_speed_names_each_part_that_bench_measures_alone() -> None:
    # As wide as the list, which otherwise is cut at hyphens.
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.run", "--help"],
        cwd=TOP, env=os.environ | {"COLUMNS": "1000"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    listed = re.search(r"NAME +of (.+); none means all", done.stdout)
    assert listed is not None, done.stdout
    names = set(listed[1].split(", "))
    assert {"assertions", "audit-large"} <= names
    assert names <= set(re.findall(r"[a-z-]+", section("Speed")))


def test_the_lock_of_tests_and_checks_contains_what_the_demo_installs() -> None:
    def pins(name: str) -> set[str]:
        lock = (TOP / "scripts" / name).read_text()
        return set(re.findall(r"^([a-z0-9-]+==\S+)", lock, re.MULTILINE))

    for name in ("requirements-run.txt", "requirements-build.txt"):
        assert pins(name) <= pins("requirements.txt")
        # The control.
        assert len(pins(name)) > 3


@pytest.mark.parametrize(
    ("script", "packages"),
    [
        ("demo", {"softhsm2"}),
        ("install", {"softhsm2", "opensc", "gcc", "redis-server", "systemd"}),
        ("test", {"softhsm2", "opensc", "gcc", "redis-server", "systemd", "swtpm", "dbus-daemon"}),
    ],
)
def test_what_is_missing_of_the_system_is_named_at_once_with_a_command_that_gets_it(
    script: str, packages: set[str], tmp_path: Path
) -> None:
    """For an ordinary user without sudo, whose PATH has the shell's own tools alone."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "basename", "awk", "readlink", "sort", "grep", "cat"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    for name, answer in (("id", "echo 1000"), ("apt-get", "exit 100")):
        (tools / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tools / name).chmod(0o755)
    python = "#!/bin/sh\nexec " + str(Path(sys.executable).resolve()) + ' "$@"\n'
    (tools / "python3").write_text(python)
    (tools / "python3").chmod(0o755)
    done = subprocess.run(
        ["bash", str(TOP / "scripts" / script)], capture_output=True, text=True, check=False,
        timeout=60, env={"PATH": str(tools), "TOLL_VENV": str(tmp_path / "venv")},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    missing, hint = done.stderr.splitlines()[-2:]
    prefix = "hint: as root: apt-get update && apt-get install -y "
    assert hint.startswith(prefix)
    named = hint.removeprefix(prefix).split()
    assert packages <= set(named)
    assert len(named) == len(set(named))
    assert missing == f"{script}: missing here: {' '.join(named)}"
