"""Half a minute of the soak that `scripts/soak devices` runs for an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(300)
def test_callers_with_a_living_token_notice_nothing_of_faults_at_the_device() -> None:
    program = Path(__file__).parents[1] / "soak" / "devices.py"
    done = subprocess.run(
        [sys.executable, str(program), "24", "6"], capture_output=True, text=True, check=False
    )
    figures = json.loads(done.stdout or "{}")
    assert figures, done.stderr
    for isolation in ("none", "process"):
        seen = figures["clients"][isolation]
        assert seen["calls"] > 0
        assert seen["failed_with_a_living_token"] == 0, seen
        assert seen["faults"], seen
        assert seen["sign_inits_at_the_device"] > 0
        assert (seen["exit_code"], seen["processes_left"]) == (0, 0), seen
