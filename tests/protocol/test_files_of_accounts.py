"""Files of groups and of other accounts, by processes of theirs; and commands that bring a PIN."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hsmtoll.hsm.pin import PinCommand
from tests.kit.accounts import OTHER, importable
from tests.unit.test_files import refused


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir(0o755)
    return folder


def script(path: Path) -> Path:
    path.write_text("#!/bin/sh\necho 1234\n")
    path.chmod(0o755)
    return path


def pin_of(command: str) -> str | None:
    return PinCommand(command).read(device="lab").reveal()


def test_a_pin_command_that_others_may_change_is_not_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = script(place / "getpin")
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.chdir(place)
    quoted = shlex.quote(str(program))
    answer = place / "answer"
    answer.write_text("1234")
    commands = (
        quoted, "getpin", "./getpin", "sh getpin", "env getpin", "sh -c 'getpin'", "cat answer",
        f"sh {quoted}", f"env A={quoted} sh getpin",
        f"sh -c 'exec {program}'", f"sh -c 'true;{program} </dev/null 2>/dev/null'",
    )  # fmt: skip
    for command in commands:
        for each in (program, answer):
            each.chmod(0o755)
        assert pin_of(command) == "1234", command
        for each in (program, answer):
            each.chmod(0o777)
        refused(lambda command=command: pin_of(command))  # type: ignore[misc] # bound
    for each in (program, answer):
        each.chmod(0o755)
    place.chmod(0o777)
    for command in commands:
        refused(lambda command=command: pin_of(command))  # type: ignore[misc] # bound


@pytest.mark.needs_root
def test_nor_is_a_pin_command_of_another_account(place: Path) -> None:
    program = script(place / "getpin")
    assert pin_of(str(program)) == "1234"
    os.chown(program, OTHER, OTHER)
    refused(lambda: pin_of(str(program)))


@pytest.mark.needs_root
def test_a_group_of_this_account_alone_may() -> None:
    program = (
        "import os, sys; from pathlib import Path;"
        "from tests.kit.accounts import become, import_all;"
        "import_all(); become(int(sys.argv[2]), int(sys.argv[3]));"
        "from hsmtoll import files; "
        "print(files.first_untrusted_component(Path(sys.argv[1]), own=True))"
    )

    def judged(folder: str, group: int) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, folder, str(OTHER), str(group)],
            check=False, capture_output=True, text=True, env=os.environ | importable(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return str(done.stdout).strip()

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o2770)
        os.chown(folder, OTHER, OTHER)
        assert judged(folder, OTHER) == "None"
        assert judged(folder, OTHER + 1) == folder
