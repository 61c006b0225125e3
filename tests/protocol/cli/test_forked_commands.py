"""A command that the tests fork is the command that a user starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.kit.commands import hsmtoll

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.usefixtures("toll_settings")
@pytest.mark.parametrize(
    ("argv", "stdin", "changes"),
    [
        (("apis", "--json"), "", {}),
        (("tokn",), "", {}),
        (("chain",), "", {}),
        (("token", "road", "--scope", "air"), "", {}),
        (("submit", "road", "POST", "transport", "@-"), '{"a": 1, "a": 2}', {}),
        (("sign", "road"), "", {"HSMTOLL_HSM__MODULE": "/nowhere/module.so"}),
        (("token", "Ž\udcff"), "", {"PYTHONIOENCODING": "latin-1"}),
        (("help", "nothing"), "", {"HSMTOLL_CONFIG": "", "HOME": "/nowhere"}),
    ],
)
def test_it_prints_and_ends_as_one_that_python_starts(
    tmp_path: Path, argv: tuple[str, ...], stdin: str, changes: dict[str, str]
) -> None:
    environ = {**os.environ, **changes}
    started = subprocess.run(
        [sys.executable, "-m", "hsmtoll", *argv], input=stdin, env=environ, cwd=tmp_path,
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    forked = hsmtoll(*argv, stdin=stdin, env=environ, cwd=tmp_path)
    assert (forked.returncode, forked.stdout, forked.stderr) == (
        started.returncode, started.stdout, started.stderr,
    )  # fmt: skip


def test_each_one_begins_with_nothing_of_another_and_a_signal_is_told() -> None:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("HSMTOLL_")}
    assert "HSMTOLL_SCOOP" in hsmtoll("token", env=quiet | {"HSMTOLL_SCOOP": "1"}).stderr
    assert "HSMTOLL_SCOOP" not in hsmtoll("token", env=quiet).stderr
    # It kills itself by the number that it learns from its own child.
    killed = hsmtoll("sandbox", "--", "sh", "-c", "kill -KILL $PPID; sleep 60", env=quiet)
    assert killed.returncode == -signal.SIGKILL
