"""What a token costs: calls of the device, reads of the store, checks of its directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll import TollClient
    from hsmtoll.testing.clock import SettableClock
    from hsmtoll.testing.faults import Faults

pytestmark = pytest.mark.usefixtures("toll_settings")

# Runs a command of hsmtoll, and says what it asked of the store.
PROGRAM = """
import json, sys
from hsmtoll import files
from hsmtoll.tokens import stores
from hsmtoll.cli import hard_exit, run

reads, checks = [], []
real_get, real_loose = stores.FileStore.get, files.first_untrusted_component

def get(store, key):
    reads.append(key)
    return real_get(store, key)

def loose(path, **more):
    checks.append(str(path))
    return real_loose(path, **more)

stores.FileStore.get, files.first_untrusted_component = get, loose
directory = sys.argv.pop(1)
code = run(sys.argv[1:])
# Those of the rate limit are another matter: a renewal counts its signature.
print(json.dumps([reads, checks.count(directory)]), file=sys.stderr, flush=True)
hard_exit(code)
"""


@dataclass(frozen=True)
class Cost:
    """
    PKCS#11 *calls* by name, keys that were *read* from the store, *checks* of its directory.
    """

    calls: dict[str, int]
    reads: list[str]
    checks: int


class Bench:
    """Commands, one after the other, with a cache in files."""

    def __init__(self, faults: Faults, directory: Path) -> None:
        self._faults = faults
        self.directory = directory

    def run(self, *command: str) -> Cost:
        self._faults.reset_counts()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(self.directory), *command],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.count(".") == 2
        reads, checks = json.loads(done.stderr.splitlines()[-1])
        return Cost(self._faults.calls(), reads, checks)


@pytest.fixture
def bench(toll_faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("HSMTOLL_CACHE", f"file://{tmp_path}/tokens")
    return Bench(toll_faults, tmp_path / "tokens")


def test_a_cold_token_asks_the_device_for_one_grant_and_for_nothing_else(bench: Bench) -> None:
    grant = bench.run("sign", "road")
    assert (grant.calls["C_Login"], grant.calls["C_SignInit"]) == (1, 1)
    cold = bench.run("token", "road")
    assert cold.calls == grant.calls
    assert cold.checks == 1


def test_a_warm_token_asks_no_device_and_reads_once(bench: Bench) -> None:
    bench.run("token", "road")
    warm = bench.run("token", "road")
    assert (warm.calls, len(warm.reads), warm.checks) == ({}, 1, 1)


def test_a_cold_token_of_a_known_identity_is_looked_for_before_the_lock_and_under_it(
    bench: Bench,
) -> None:
    bench.run("token", "road")
    key = bench.run("token", "road").reads[0]
    shutil.rmtree(bench.directory)
    cold = bench.run("token", "road")
    assert cold.reads.count(key) == 2
    # The other read is of the rate limit.
    assert len(cold.reads) == 3
    assert cold.checks == 1


def test_a_renewed_token_costs_a_new_program_what_a_cold_one_does(bench: Bench) -> None:
    cold = bench.run("token", "road")
    renewed = bench.run("token", "road", "--renew")
    assert renewed.calls == cold.calls
    assert (len(renewed.reads), renewed.checks) == (3, 1)


def test_a_renewed_token_costs_a_program_that_runs_one_signature(
    toll_client: TollClient, toll_clock: SettableClock, toll_faults: Faults
) -> None:
    toll_client.token("road")
    # Within the minute in which certificates are not read again.
    toll_clock.advance(1)
    toll_faults.reset_counts()
    toll_client.token("road", renew=True)
    # python-pkcs11 asks how long the signature is, and then for it.
    assert toll_faults.calls() == {"C_SignInit": 1, "C_Sign": 2}
