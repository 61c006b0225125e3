"""Two devices that are called the same, with the same settings, in one store: never mixed up."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from hsmtoll.sandbox.server import Sandbox
from hsmtoll.testing.identity import TemporaryIdentity, eseal
from hsmtoll.testing.softhsm import SoftHsm
from tests.kit.own_device import listens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)


@dataclass
class Twins:
    """Devices of one label, keys of one label, one PIN, one state directory."""

    sandbox: Sandbox
    devices: tuple[TemporaryIdentity, TemporaryIdentity]
    common: dict[str, str]

    def token(self, which: int, cache: str) -> str:
        variables = {**os.environ, **self.common, **self.devices[which].environ()}
        # All settings are the same but the module's own variable.
        variables["HSMTOLL_HSM__PIN_FILE"] = self.common["HSMTOLL_HSM__PIN_FILE"]
        variables["HSMTOLL_CACHE"] = cache
        done = subprocess.run(
            [sys.executable, "-m", "hsmtoll", "token", "road", "--json"],
            env=variables, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["access_token"])

    def grants(self) -> int:
        return len([each for each in self.sandbox.received if each.kind == "grant"])


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[Twins]:
    devices = []
    for name in ("one", "two"):
        device = SoftHsm.create(tmp_path / name, label="customs", pin="4711471147")
        devices.append(eseal(device, label="acme"))
    with Sandbox() as sandbox:
        for each in devices:
            assert each.authority is not None
            sandbox.trust(each.authority)
        key = tmp_path / "cache-key"
        key.write_bytes(secrets.token_bytes(32))
        key.chmod(0o600)
        common = {
            **sandbox.environ(),
            "HSMTOLL_STATE": str(tmp_path / "state"),
            "HSMTOLL_CACHE_KEY_FILE": str(key),
            "HSMTOLL_HSM__PIN_FILE": str(devices[0].device.pin_file),
        }
        yield Twins(sandbox, (devices[0], devices[1]), common)


def proven(twins: Twins, cache: str) -> None:
    first = twins.token(0, cache)
    # The two are one organisation, and Customs' token has no jti: of one second they are alike.
    made = int(time.time())
    while int(time.time()) == made:
        time.sleep(0.02)
    second = twins.token(1, cache)
    assert first != second
    assert twins.grants() == 2
    # The control: each gets its own again, and nothing is signed.
    assert (twins.token(0, cache), twins.token(1, cache)) == (first, second)
    assert twins.grants() == 2


def test_in_one_directory(twins: Twins, tmp_path: Path) -> None:
    proven(twins, f"file://{tmp_path}/tokens")


def test_on_one_redis(twins: Twins, tmp_path: Path) -> None:
    socket = tmp_path / "redis.sock"
    server = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", ""],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not listens(socket):
            assert server.poll() is None
            time.sleep(0.02)
        proven(twins, f"unix://{socket}")
    finally:
        server.kill()
        server.wait(10)
