"""A program that ends while the device looks at its PIN: what became of the try is known."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults

#: Its own last words need the device, in another thread, as those of a queue that is emptied.
LAST_WORDS = """
import atexit, threading
import hsmtoll

def work():
    over.wait()
    print(toll.token("road", renew=True).scope)

over, worker = threading.Event(), threading.Thread(target=work, daemon=True)
atexit.register(lambda: (over.set(), worker.join()))
toll = hsmtoll.connect(deadline=5)
toll.token("road")
worker.start()
"""

COMMAND = (sys.executable, "-m", "hsmtoll", "token", "road", "--renew")

#: Nobody closes the client: its thread is in the login when the program comes to its end.
PROGRAM = """
import pathlib, sys, time
import hsmtoll

toll = hsmtoll.connect()
toll.keep_fresh("road")
place = pathlib.Path(sys.argv[1])
while not any(b'"intents": ["' in each.read_bytes() for each in place.glob("*")):
    time.sleep(0.01)
"""

#: What a command that put everything away prints last. One that is cut off prints nothing.
ENDED = {signal.SIGINT: b"hsmtoll: interrupted", signal.SIGTERM: b"hsmtoll: terminated"}


@pytest.fixture
def slow_login(toll_faults: Faults, toll_settings: Settings) -> Path:
    """A device that takes its time, and the directory where a try is written down before it."""
    toll_faults.set("slow", function="C_Login", ms=1500)
    assert toll_settings.hsm.pin_file is not None
    return Path(os.environ["HSMTOLL_STATE"]) / "pin"


def tries(place: Path) -> int:
    """How many are written down of which nothing is known yet."""
    records = [each for each in place.glob("*") if not each.suffix]
    return sum(len(json.loads(each.read_bytes()).get("intents", ())) for each in records)


def ended_by(number: signal.Signals, place: Path) -> int:
    before = tries(place)
    with subprocess.Popen(COMMAND, stderr=subprocess.PIPE, text=True) as command:
        while tries(place) == before:
            assert command.poll() is None
            time.sleep(0.01)
        command.send_signal(number)
        _, errors = command.communicate(timeout=30)
    assert "Traceback" not in errors
    return command.returncode


def next_one(faults: Faults) -> int:
    faults.clear()
    return subprocess.run(COMMAND, capture_output=True, check=False, timeout=60).returncode


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_ended_hears_what_became_of_its_pin(
    slow_login: Path, toll_faults: Faults, number: signal.Signals, code: int
) -> None:
    assert [ended_by(number, slow_login) for _ in range(2)] == [code, code]
    assert next_one(toll_faults) == 0


def test_a_program_that_closes_nothing_hears_it_too(slow_login: Path, toll_faults: Faults) -> None:
    for _ in range(2):
        argv = (sys.executable, "-c", PROGRAM, str(slow_login))
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    assert next_one(toll_faults) == 0


@pytest.mark.usefixtures("toll_settings")
def test_what_a_program_does_at_its_end_may_want_the_device_still() -> None:
    argv = (sys.executable, "-c", LAST_WORDS)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stderr, len(done.stdout.split())) == ("", 1)


def test_of_one_that_was_killed_nobody_knows(slow_login: Path, toll_faults: Faults) -> None:
    """The control: a PIN whose fate is unknown twice is not tried a third time."""
    assert [ended_by(signal.SIGKILL, slow_login) for _ in range(2)] == [-9, -9]
    assert next_one(toll_faults) == 21


def typing(*command: str) -> tuple[int, int]:
    """The process that runs *command* and waits for a PIN to be typed, and its terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "hsmtoll", *command])  # noqa: S606 - the child of a pty
    asked = b""
    while b"PIN of" not in asked:
        asked += os.read(terminal, 100)
    assert not shows(terminal)
    return pid, terminal


def printed(terminal: int) -> bytes:
    """What was printed there and nobody has read yet."""
    os.set_blocking(terminal, False)
    seen = b""
    # EIO: nobody has the other side open any more.
    with contextlib.suppress(OSError):
        while more := os.read(terminal, 1000):
            seen += more
    return seen


def shows(terminal: int) -> bool:
    """Whether what is typed there can be seen."""
    return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)


@pytest.fixture
def typed(toll_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PIN that is asked for at the terminal."""
    del toll_settings
    monkeypatch.delenv("HSMTOLL_HSM__PIN_FILE")
    monkeypatch.setenv("HSMTOLL_HSM__PIN_PROMPT", "terminal")


# `token` asks in a thread that renews, `sign` in the main one.
@pytest.mark.parametrize("command", [("token", "road", "--renew"), ("sign", "road")])
@pytest.mark.parametrize("isolation", ["none", "process"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("typed")
def test_a_pin_that_is_being_typed_is_not_waited_for_and_the_terminal_shows_again(
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    isolation: str,
    number: signal.Signals,
    code: int,
) -> None:
    monkeypatch.setenv("HSMTOLL_HSM__ISOLATION", isolation)
    pid, terminal = typing(*command)
    os.kill(pid, number)
    # Nothing is typed, ever: one that waited for it would not end, or be cut off without a word.
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    assert shows(terminal)
    assert ENDED[number] in printed(terminal)
    os.close(terminal)


@pytest.mark.usefixtures("typed")
def test_one_that_is_killed_leaves_a_terminal_that_shows_nothing() -> None:
    """The control: the terminal does not do it by itself."""
    pid, terminal = typing("sign", "road")
    # Somebody has it open, as a shell would: it is not made anew.
    held = os.open(Path(f"/proc/{pid}/fd/0").readlink(), os.O_RDWR | os.O_NOCTTY)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not shows(held)
    os.close(held)
    os.close(terminal)


@pytest.mark.parametrize("stuck", ["module", "reader"])
def test_sigterm_ends_a_command_that_does_not_come_back_after_a_while(
    toll_faults: Faults, toll_settings: Settings, stuck: str
) -> None:
    del toll_settings
    reading, writing = os.pipe()
    argv = [sys.executable, "-m", "hsmtoll", "apis"]
    if stuck == "module":
        toll_faults.set("hang", function="C_Sign")
        argv[-1:] = ["sign", "road"]
    else:
        os.set_blocking(writing, False)
        for size in (4096, 1):
            while not filled(writing, size):
                pass
        os.set_blocking(writing, True)
    with subprocess.Popen(argv, stdout=writing, stderr=writing) as command:
        stuck_for_good(command)
        command.send_signal(signal.SIGTERM)
        time.sleep(1)
        # The control: nothing but the time ends it.
        assert command.poll() is None
        assert command.wait(60) == 143
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        # The control of those that wait for a PIN: this end is told from theirs.
        assert ENDED[signal.SIGTERM] not in pipe.read()


def stuck_for_good(command: subprocess.Popen[bytes]) -> None:
    """Wait until it obeys SIGTERM, and has slept for a second without a moment of work."""
    process = Path(f"/proc/{command.pid}")
    seen: tuple[str, ...] = ()
    still = 0
    while still < 20:
        assert command.poll() is None
        time.sleep(0.05)
        words = (process / "stat").read_text().rpartition(")")[2].split()
        # State, and the time that it has worked, in user mode and for the system.
        now = (words[0], *words[11:13])
        # What has not begun to work sleeps as well.
        caught = re.search(r"^SigCgt:\s*(\w+)", (process / "status").read_text(), re.MULTILINE)
        obeys = caught is not None and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1
        still = still + 1 if obeys and now == seen and now[0] == "S" else 0
        seen = now


def filled(pipe: int, size: int) -> bool:
    try:
        os.write(pipe, bytes(size))
    except BlockingIOError:
        return True
    return False
