"""A program that ends while the device looks at its PIN: what became of the try is known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults

COMMAND = (sys.executable, "-m", "hsmtoll", "token", "road", "--renew")

#: Nobody closes the client: its thread is in the login when the program comes to its end.
PROGRAM = """
import pathlib, sys, time
import hsmtoll

toll = hsmtoll.connect()
toll.keep_fresh("road")
while not [each for each in pathlib.Path(sys.argv[1]).glob("*") if not each.suffix]:
    time.sleep(0.01)
"""


@pytest.fixture
def slow_login(toll_faults: Faults, toll_settings: Settings) -> Path:
    """A device that takes its time, and the directory where a try is written down before it."""
    toll_faults.set("slow", function="C_Login", ms=1500)
    assert toll_settings.hsm.pin_file is not None
    return Path(os.environ["HSMTOLL_STATE"]) / "pin"


def tries(place: Path) -> int:
    """How many are written down of which nothing is known yet."""
    records = [each for each in place.glob("*") if not each.suffix]
    return sum(len(json.loads(each.read_bytes())["intents"]) for each in records)


def ended_by(number: signal.Signals, place: Path) -> int:
    before = tries(place)
    with subprocess.Popen(COMMAND, stderr=subprocess.PIPE, text=True) as command:
        while tries(place) == before:
            assert command.poll() is None
            time.sleep(0.01)
        command.send_signal(number)
        _, told = command.communicate(timeout=30)
    assert "Traceback" not in told
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


def test_of_one_that_was_killed_nobody_knows(slow_login: Path, toll_faults: Faults) -> None:
    """The control: a PIN whose fate is unknown twice is not tried a third time."""
    assert [ended_by(signal.SIGKILL, slow_login) for _ in range(2)] == [-9, -9]
    assert next_one(toll_faults) == 21
