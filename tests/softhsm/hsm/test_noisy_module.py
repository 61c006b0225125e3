"""Modules that print: what a program reads on stdout is the result, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.softhsm.conftest import stand_between

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.settings import Settings

NOISE = "module 1.0 (c) maker"

_NOISY = """
static word initialize(void *arguments) {
    puts("%s");
    fflush(stdout);
    return ((word (*)(void *))real->functions[0])(arguments);
}
"""


@pytest.fixture
def noisy(toll_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SoftHSM behind a module that prints its version when it is started, and the settings."""
    del toll_settings
    module = stand_between(tmp_path / "noisy", _NOISY % NOISE, C_Initialize="initialize")
    monkeypatch.setenv("HSMTOLL_HSM__MODULE", str(module))
    return module


def hsmtoll(*arguments: str, line: str = '"$@"') -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "hsmtoll", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_module_that_prints_does_not_touch_the_result(
    noisy: Path, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HSMTOLL_HSM__ISOLATION", isolation)
    signed = hsmtoll("sign", "road")
    assert signed.returncode == 0, signed.stderr
    assert len(signed.stdout.split()) == 1
    assert signed.stdout.count(".") == 2
    seen = hsmtoll("objects", "--json")
    assert json.loads(seen.stdout)["module"] == str(noisy)
    assert isinstance(json.loads(hsmtoll("key", "jwk").stdout), dict)
    # What it says where it runs in this very process is not lost.
    if isolation == "none":
        assert NOISE in signed.stderr
        assert NOISE in seen.stderr


def test_the_module_does_print_where_nobody_stands_between(noisy: Path) -> None:
    program = "import pkcs11, sys; pkcs11.lib(sys.argv[1]); print('result')"
    done = subprocess.run(
        [sys.executable, "-c", program, str(noisy)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == [NOISE, "result", ""]


@pytest.mark.usefixtures("noisy")
def test_where_stderr_is_closed_the_modules_words_go_nowhere() -> None:
    seen = hsmtoll("objects", "--json", line='exec "$@" 2>&-')
    assert json.loads(seen.stdout)["schema"] == 1
    assert NOISE not in seen.stdout + seen.stderr


@pytest.mark.usefixtures("noisy")
def test_a_result_of_many_lines_is_whole_in_a_file_and_a_reader_that_leaves_is_no_error(
    tmp_path: Path,
) -> None:
    path = tmp_path / "out"
    assert hsmtoll("objects", "--json", line=f'"$@" > {path}').returncode == 0
    assert json.loads(path.read_text())["schema"] == 1
    left = hsmtoll("objects", "--json", line='"$@" | true')
    assert "unexpected" not in left.stderr
    assert "Traceback" not in left.stderr


def test_the_command_of_the_sandbox_keeps_the_real_stdout() -> None:
    done = hsmtoll("sandbox", "--", "sh", "-c", "echo result; echo word >&2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "result\n"
    assert "word" in done.stderr
