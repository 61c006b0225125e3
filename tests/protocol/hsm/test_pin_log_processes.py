"""The record of refused PINs among processes: one tries, and whoever dies frees it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from hsmtoll.hsm.pin import Pin
from hsmtoll.hsm.pin_log import PinLog, TokenUser
from tests.unit.hsm.test_pin_log import PLACE, WRONG

if TYPE_CHECKING:
    from pathlib import Path


_TRY = """
import sys
from pathlib import Path
from hsmtoll.errors import DeviceError, PinNotTried
from hsmtoll.hsm.pin_log import PinLog, TokenUser
from hsmtoll.hsm.pin import Pin
pin = Pin("wrong", source="SETTING")
try:
    with PinLog(Path(sys.argv[1])).held(TokenUser("m", "m", "s", "l")) as page:
        page.intend(pin, count_low=False)
        print("C_Login")
        page.refuse(pin)
except PinNotTried as error:
    print(error.code)
"""


def test_of_twenty_processes_at_once_one_tries(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", _TRY, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(20)
    ]
    outputs = sorted(process.communicate()[0].decode().strip() for process in running)
    assert outputs == ["C_Login"] + ["pin-refused"] * 19


_TAKE = """
import fcntl, sys
try: fcntl.flock(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: print("held")
else: print("free")
"""


def another_finds(state: Path) -> str:
    """Whether another process finds the one lock in *state* held or free."""
    (lock,) = (state / "pin").glob("*.lock")
    argv = [sys.executable, "-c", _TAKE, str(lock)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def test_a_forked_child_holds_nothing_that_its_parent_holds(tmp_path: Path) -> None:
    wait, end = os.pipe()
    pin_log = PinLog(tmp_path)
    with pin_log.held(PLACE):
        child = os.fork()
        if child == 0:
            os.close(end)
            os.read(wait, 1)
            os._exit(0)
        # The parent's own is not touched by what the child lets go of.
        assert another_finds(tmp_path) == "held"
    assert another_finds(tmp_path) == "free"
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    for each in (wait, end):
        os.close(each)
    os.waitpid(child, 0)


def test_who_was_forked_while_it_held_the_record_closes_nobodys_file_at_the_end(
    tmp_path: Path,
) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(PinLog(tmp_path).held(PLACE))
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                # It gets the number that the lock had.
                other = os.open(os.devnull, os.O_RDONLY)
                stack.close()
                os.fstat(other)
                with PinLog(tmp_path / "other").held(PLACE):
                    code = 0
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_users_of_one_device_take_turns_and_have_a_record_each(tmp_path: Path) -> None:
    pin_log, signing = PinLog(tmp_path), replace(PLACE, user="signing")
    with pin_log.held(signing) as pin_record:
        pin_record.intend(WRONG, count_low=False)
        assert another_finds(tmp_path) == "held"
        pin_record.refuse(WRONG)
    with pin_log.held(PLACE):
        # One lock for the two of them.
        assert another_finds(tmp_path) == "held"
    assert pin_log.refusals(signing) == (1, 0)
    assert pin_log.refusals(PLACE) == (0, 0)
    with pin_log.held(replace(PLACE, serial="0043")):
        assert len(list((tmp_path / "pin").glob("*.lock"))) == 2


def test_a_killed_process_frees_the_record(tmp_path: Path) -> None:
    program = _TRY.replace('print("C_Login")', "import os, signal; os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -9
    owner = TokenUser("m", "m", "s", "l")
    assert PinLog(tmp_path).refusals(owner) == (0, 1)
    with PinLog(tmp_path).held(owner) as pin_record:
        pin_record.intend(Pin("1234", source="SETTING"), count_low=False)
