"""What the README shows is run, in order, at the sandbox, and says what the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from hsmtoll.testing.identity import eseal, introduce
from hsmtoll.testing.softhsm import SoftHsm

if TYPE_CHECKING:
    from hsmtoll.sandbox.server import Sandbox

README: Final = Path(__file__).parents[2] / "README.md"


def fences(kind: str) -> list[str]:
    """The blocks of one kind, in the README's order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)  # noqa: FURB167 - short, on one line


def sessions(block: str) -> list[tuple[str, str]]:
    """(command, what it shows) of a console block."""
    found = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    return list(zip(found[1::2], found[2::2], strict=True))


def shows(output: str, expected: str) -> bool:
    """Whether *output* is *expected*, where ``…`` stands for anything: in a line, or as lines."""
    lines = (
        r"(?:.*\n)*"
        if line == "…"
        else "[^\n]*".join(re.escape(part) for part in line.split("…")) + r"\n"
        for line in expected.splitlines()
    )
    # A body is printed as it came, which may be without a line's end.
    whole = f"{output}\n" if output and not output.endswith("\n") else output
    return re.fullmatch("".join(lines), whole) is not None


@pytest.fixture
def readers_shell(toll_sandbox: Sandbox, tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who set hsmtoll up as the README says."""
    reader = eseal(SoftHsm.create(tmp_path / "softhsm"))
    introduce(toll_sandbox, reader)
    return {
        **os.environ,
        **reader.environ(),
        **toll_sandbox.environ(),
        "HSMTOLL_STATE": str(tmp_path / "state"),
        "COLUMNS": "80",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def test_every_command_of_the_readme_shows_what_the_readme_says(
    readers_shell: dict[str, str], tmp_path: Path
) -> None:
    ran = 0
    for block in fences("console"):
        for command, expected in sessions(block):
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=readers_shell, check=False, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert shows(done.stdout, expected), f"$ {command}\n{done.stdout}\nis not\n{expected}"
            ran += 1
    assert ran >= 10


@pytest.mark.parametrize("number", range(len(fences("python"))))
def test_every_program_of_the_readme_runs(
    readers_shell: dict[str, str], tmp_path: Path, number: int
) -> None:
    program = fences("python")[number]
    path = tmp_path / "test_readme_example.py"
    path.write_text(program, encoding="utf-8")
    # An example for pytest is run by it: in a project of its own, as its reader would.
    as_test = ["-m", "pytest", "-q", f"--rootdir={tmp_path}", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *(as_test if "def test_" in program else []), path],
        cwd=tmp_path, env=readers_shell, check=False, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nc\n", "a\nb\n", False),
        ("a\nb\nc\n", "a\nb\n", False),
        ("1. CN=x (until)\n", "1. CN=x…\n", True),
        ("2. CN=x\n", "1. CN=x…\n", False),
        ("a\nb\nc\n", "a\n…\nc\n", True),
        ("a\nb\nd\n", "a\n…\nc\n", False),
        ("a\nx\n", "a…\n", False),
    ],
)
def test_the_comparison_takes_what_fits_and_nothing_else(
    output: str, expected: str, same: bool
) -> None:
    assert shows(output, expected) is same
