"""A token that is in the cache is printed without a device, and without what a device takes."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.testing.faults import Faults

PROGRAM = """
import sys
from hsmtoll.cli import hard_exit, run
code = run(["token", "road"])
print(*sorted(sys.modules), file=sys.stderr, flush=True)
hard_exit(code)
"""
HEAVY = {
    "asn1crypto",
    "cryptography",
    "httpx",
    "hsmtoll.hsm.in_process",
    "hsmtoll.signing.local",
    "pkcs11",
}


def modules() -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.count(".") == 2
    return set(done.stderr.split())


@pytest.mark.usefixtures("toll_settings")
def test_a_warm_command_imports_nothing_that_speaks_to_a_device_or_a_network(
    toll_faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HSMTOLL_CACHE", f"file://{tmp_path}/tokens")

    # The control: the first one needs them all.
    assert modules() >= HEAVY
    asked = toll_faults.count("C_SignInit"), toll_faults.count("C_Initialize")
    assert asked == (1, 1)
    assert not modules() & HEAVY
    assert (toll_faults.count("C_SignInit"), toll_faults.count("C_Initialize")) == asked
