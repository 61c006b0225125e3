"""The routing feed on the command line: line by line, from marker to marker, killed and not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hsmtoll.sandbox.playground import ROUTING
from tests.kit.commands import hsmtoll

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox

pytestmark = pytest.mark.usefixtures("toll_settings")

ORG = "NTRSE-5566778899"
COMMAND = (sys.executable, "-m", "hsmtoll", "routing")


def run(*argv: str) -> tuple[int, list[str], str]:
    """Code, the ids that were printed, and stderr."""
    done = hsmtoll("routing", *argv)
    return done.returncode, ids(done.stdout), done.stderr


def ids(printed: str) -> list[str]:
    return [json.loads(line)["routingResult"]["id"] for line in printed.splitlines()]


def test_the_playgrounds_list_is_printed_one_line_a_signal(toll_sandbox: Sandbox) -> None:
    del toll_sandbox
    static = [each["routingResult"]["id"] for each in ROUTING]
    assert run() == (0, static, "")
    # Without a marker it begins anew.
    assert run()[1] == static


def test_the_marker_says_where_to_go_on_from(toll_sandbox: Sandbox, tmp_path: Path) -> None:
    sent = [toll_sandbox.signal(ORG) for _ in range(1200)]
    marker = str(tmp_path / "marker")
    assert run("--marker", marker, "--limit", "3")[1] == sent[:3]
    assert run("--marker", marker, "--limit", "1000")[1] == sent[3:1003]
    assert run("--marker", marker)[1] == sent[1003:]
    assert run("--marker", marker) == (0, [], "")
    sent.append(toll_sandbox.signal(ORG, "TO_CONTROL"))
    assert run("--marker", marker)[1] == sent[-1:]


@pytest.mark.parametrize("limit", ["0", "-1", "x"])
def test_a_limit_is_a_number_of_signals(limit: str) -> None:
    assert run("--limit", limit)[0] == 2


def test_a_marker_that_cannot_be_written_is_told_after_what_was_printed(
    toll_sandbox: Sandbox, tmp_path: Path
) -> None:
    sent = [toll_sandbox.signal(ORG) for _ in range(2)]
    code, printed, errors = run("--marker", str(tmp_path / "nowhere" / "marker"))
    assert (code, printed) == (2, sent)
    assert "marker" in errors


@pytest.mark.parametrize("lines", [0, 1, 999, 1000, 1001, 2100])
def test_a_command_that_is_killed_loses_nothing(
    toll_sandbox: Sandbox, tmp_path: Path, lines: int
) -> None:
    sent = [toll_sandbox.signal(ORG) for _ in range(2200)]
    marker = tmp_path / "marker"
    printed: list[str] = []
    with subprocess.Popen(
        [*COMMAND, "--marker", str(marker)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for _ in range(lines):
            printed += ids(child.stdout.readline())
        os.kill(child.pid, signal.SIGKILL)
        # What is in the pipe was printed, but for a line that was cut off.
        rest = child.stdout.read()
        printed += ids(rest[: rest.rfind("\n") + 1])
    code, again, _ = run("--marker", str(marker))
    assert code == 0
    # Some come twice, none is left out, and the order holds.
    assert list(dict.fromkeys([*printed, *again])) == sent
    assert run("--marker", str(marker))[1] == []
