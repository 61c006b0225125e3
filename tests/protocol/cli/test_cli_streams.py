"""Where stdin, stdout or stderr is closed, full or abandoned, the code still says what happened."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hsmtoll.cli.log import say
from tests.kit.customs_messages import message

ROAD = "/api/movement/road/v2"
NO_ROOM = "No space left on device"
CLOSED = "Bad file descriptor"


def shell(command: str) -> tuple[int, str, str]:
    """Code, stdout and stderr of a line of bash; ``{dead}`` is a pipe that nobody reads."""
    reading, dead = os.pipe()
    os.close(reading)
    done = subprocess.run(
        ["bash", "-c", command.replace("{dead}", str(dead))],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        pass_fds=[dead],
    )
    os.close(dead)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def transport(ship: str) -> str:
    """A message as a word of the shell. The same one again is a FAILURE."""
    return f"'{json.dumps(message('transport', ship))}'"


@pytest.mark.usefixtures("toll_settings")
@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2>&{dead}"])
def test_an_error_that_cannot_be_told_keeps_its_code_and_goes_nowhere_else(where: str) -> None:
    assert shell(f"hsmtoll token raod {where}") == (2, "", "")

    # The control: it is told where it can be.
    code, out, errors = shell("hsmtoll token raod")
    assert (code, out) == (2, "")
    assert "did you mean road?" in errors


@pytest.mark.usefixtures("toll_settings")
def test_files_that_are_opened_do_not_take_the_place_of_a_stderr_that_is_closed(
    tmp_path: Path,
) -> None:
    code, out, _ = shell("hsmtoll -vv token road 2>&-")

    assert code == 0
    assert len(out.splitlines()) == 1
    files = [path.read_bytes() for path in tmp_path.parent.rglob("*") if path.is_file()]
    assert files
    assert not [text for text in files if b"hsmtoll: " in text]


@pytest.mark.usefixtures("toll_settings")
@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2>&{dead}"])
def test_a_submission_keeps_its_outcome_where_stderr_takes_nothing(where: str) -> None:
    ship = transport("FULL1")
    first = shell(f"hsmtoll submit road POST transport {ship} {where}")
    second = shell(f"hsmtoll submit road POST transport {ship} {where}")

    assert first[0] == 0
    assert first[1].startswith("SUCCESS ")
    assert second[:2] == (72, "")


@pytest.mark.usefixtures("toll_settings")
@pytest.mark.parametrize(("where", "why"), [(">/dev/full", NO_ROOM), (">&-", CLOSED)])
@pytest.mark.parametrize("command", ["token road", "apis", "--help", "doctor --json"])
def test_a_result_that_cannot_be_written_is_an_error_that_says_why(
    command: str, where: str, why: str
) -> None:
    code, _, errors = shell(f"hsmtoll {command} {where}")

    assert code == 10
    if "--json" in command:
        error = json.loads(errors)
        assert (error["error"], error["exit_code"]) == ("result-unwritten", 10)
        assert error["message"] == f"the result cannot be written ({why})"
    else:
        first, *hints = errors.splitlines()
        assert first == f"hsmtoll: result-unwritten: the result cannot be written ({why})"
        assert [line[:6] for line in hints] == ["hint: "]
    # The control.
    assert shell(f"hsmtoll {command}")[0] == 0


@pytest.mark.usefixtures("toll_settings")
def test_what_was_sent_is_not_to_be_repeated_because_its_result_cannot_be_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "invoice.txt").write_text("Invoice 4711\n")
    sending = (
        f"submit road POST transport {transport('FULL2')}",
        f"upload 123456789-01092026-1 {tmp_path}/invoice.txt --type invoice",
        f"call POST {ROAD}/transport --json-data {transport('FULL3')}",
    )
    for command in sending:
        code, _, errors = shell(f"hsmtoll {command} >/dev/full")
        assert code == 73, errors
        assert f"was sent, and the result cannot be written ({NO_ROOM})" in errors
        assert "do not repeat it" in errors


@pytest.mark.usefixtures("toll_settings")
def test_a_refusal_stays_one_where_its_reasons_cannot_be_written() -> None:
    code, _, errors = shell(f"hsmtoll call POST {ROAD}/transport --json-data '{{}}' >/dev/full")

    assert code == 71
    assert "was sent" not in errors


@pytest.mark.parametrize("command", ["apis", "--help", "token --help"])
def test_a_reader_that_has_left_is_no_error(command: str) -> None:
    assert shell(f"hsmtoll {command} >&{{dead}}") == (0, "", "")


@pytest.mark.usefixtures("toll_settings")
@pytest.mark.parametrize("where", ["stdout", "stderr"])
def test_a_slow_reader_gets_all_of_it_though_somebody_set_the_pipe_to_be_non_blocking(
    where: str,
) -> None:
    # What belongs to another program as well, such as node's stdio, is often set so.
    command = ["doctor", "--json"] if where == "stdout" else ["-vv", "token", "road", "--renew"]
    argv = [sys.executable, "-m", "hsmtoll", *command]
    reading, writing = os.pipe()
    # The control: as much as this pipe can hold is not enough.
    room = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, False)
    if where == "stderr":
        os.write(writing, bytes(room))
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, where: writing}
    with subprocess.Popen(argv, stdout=streams["stdout"], stderr=streams["stderr"]) as program:
        os.close(writing)
        time.sleep(3)
        assert program.poll() is None
        with os.fdopen(reading, "rb") as reader:
            output = reader.read()
        assert program.wait(30) == 0
    assert len(output) > room
    assert where == "stderr" or json.loads(output)["schema"] == 1


@pytest.mark.usefixtures("toll_settings")
@pytest.mark.parametrize(
    "command",
    [
        "exchange",
        "submit road POST transport",
        f"call POST {ROAD}/transport --data @-",
    ],
)
def test_a_stdin_that_is_closed_is_told_as_that(command: str) -> None:
    code, out, errors = shell(f"hsmtoll {command} <&-")

    assert (code, out) == (2, "")
    assert f"stdin cannot be read ({CLOSED})" in errors


def test_a_line_is_written_at_once_so_that_threads_do_not_mix_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Writes(io.StringIO):
        seen: list[str] = []  # noqa: RUF012 - of the one instance there is

        def write(self, text: str, /) -> int:
            self.seen.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Writes())
    say("one line")

    assert Writes.seen == ["hsmtoll: one line\n"]
