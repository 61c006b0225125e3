"""A tenth of the soak that `scripts/soak` runs in full; it says so in its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(300)
def test_a_hundred_renewals_with_faults_on_and_off_give_no_expired_token() -> None:
    program = Path(__file__).parents[1] / "soak" / "renewals.py"
    done = subprocess.run(
        [sys.executable, str(program), "100"], capture_output=True, text=True, check=False
    )
    figures = json.loads(done.stdout or "{}")
    assert figures, done.stderr
    assert figures["expired"] == 0, figures
    assert figures["due"] == figures["done"] == figures["renewals"] == 100
    assert figures["faults"] == 10
    assert figures["given"] >= 100
