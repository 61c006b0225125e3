"""Half a minute of the soak that `scripts/soak host` runs for an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hsmtoll import jws
from tests.kit.signing_host import ME
from tests.soak.host import not_in_the_audit

if TYPE_CHECKING:
    from tests.kit.signing_host import RunningHost


@pytest.mark.timeout(300)
def test_what_a_year_does_to_a_host_loses_no_grant_and_every_metric_tells_of_it() -> None:
    program = Path(__file__).parents[1] / "soak" / "host.py"
    done = subprocess.run(
        [sys.executable, str(program), "24", "3", "40"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    figures = json.loads(done.stdout or "{}")
    assert figures, done.stderr
    assert figures["grants"] > 0
    assert figures["grants_not_in_the_audit"] == []
    assert (figures["audit"], figures["audit_of_the_archive"]) == ("verifies", "verifies")
    assert figures["segments_archived"] > 0
    assert len(figures["events"]) == 6
    assert figures["unexplained"] == {}
    assert figures["metrics_that_should_have"] == []
    assert (figures["exit_code"], done.returncode) == (0, 0)


def test_a_grant_without_its_records_or_under_another_name_is_noticed(
    running_host: RunningHost,
) -> None:
    """The control."""
    jti = jws.read_unverified(running_host.ask().body["assertion"])[1]["jti"]
    granted = [(ME, jti), ("uid:1", jti), (ME, "never")]
    assert not_in_the_audit(granted, running_host.audit) == [jti, "never"]
