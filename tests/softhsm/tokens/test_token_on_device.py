"""The whole way on a real device: crowds, refused grants and clocks cost what they may."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hsmtoll.app import App
from hsmtoll.errors import HsmTollError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.client import TollClient
    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.settings import Settings

pytestmark = pytest.mark.timeout(300)


def grants(sandbox: Sandbox) -> int:
    return len([each for each in sandbox.received if each.kind == "grant"])


def runs(count: int, *arguments: str) -> list[tuple[int, str]]:
    """So many `hsmtoll` at once: exit code and output of each."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "hsmtoll", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        for _ in range(count)
    ]
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=200)
        ended.append((process.returncode, out or err))
    return ended


def all_fine(ended: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """SoftHSM rewrites its files at a login; who starts at that moment looks once more."""
    assert {code for code, _ in ended} == {0}, ended
    return ended


@pytest.fixture
def file_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HSMTOLL_CACHE", f"file://{tmp_path}/tokens")
    return tmp_path / "tokens"


@pytest.fixture
def sign_inits(
    toll_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], int]:
    """
    Puts OpenSC's spy before the module of the processes that are started, and counts the
    C_SignInit calls that it saw: what the device was really asked for.
    """
    module = toll_settings.hsm.module
    assert module is not None
    spies = [*Path("/usr/lib").glob("*/pkcs11-spy.so"), Path("/usr/lib/pkcs11-spy.so")]
    log = tmp_path / "spy.log"
    monkeypatch.setenv("HSMTOLL_HSM__MODULE", str(spies[0]))
    monkeypatch.setenv("PKCS11SPY", str(module))
    monkeypatch.setenv("PKCS11SPY_OUTPUT", str(log))
    return lambda: len(re.findall(r"^\d+: C_SignInit$", log.read_text("latin-1"), re.MULTILINE))


_CROWD = """
import asyncio, sys, threading
from hsmtoll.app import App
from hsmtoll.settings import load

async def tasks(count):
    async with App(load()).aclient() as client:
        return await asyncio.gather(*(client.token("road") for _ in range(count)))

def threads(count):
    got = []
    with App(load()).client() as client:
        crowd = [
            threading.Thread(target=lambda: got.append(client.token("road"))) for _ in range(count)
        ]
        for each in crowd: each.start()
        for each in crowd: each.join()
    return got

kind, count = sys.argv[1], int(sys.argv[2])
got = asyncio.run(tasks(count)) if kind == "tasks" else threads(count)
print(len(got), len({token.value for token in got}))
"""


@pytest.mark.parametrize(("kind", "count"), [("tasks", 10_000), ("threads", 400)])
def test_a_crowd_asks_the_device_for_one_signature(
    sign_inits: Callable[[], int], kind: str, count: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CROWD, kind, str(count)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [str(count), "1"], done.stderr
    assert sign_inits() == 1


@pytest.mark.usefixtures("file_cache")
def test_command_lines_ask_the_device_for_one_signature(sign_inits: Callable[[], int]) -> None:
    all_fine(runs(10, "token", "road"))
    assert sign_inits() == 1
    # The control: the spy counts what is asked for.
    assert runs(1, "token", "road", "--renew")[0][0] == 0
    assert sign_inits() == 2


def test_10_000_tasks_cost_one_grant(toll_settings: Settings, toll_sandbox: Sandbox) -> None:
    async def crowd() -> set[str]:
        async with App(toll_settings).aclient() as client:
            tokens = await asyncio.gather(*(client.token("road") for _ in range(10_000)))
            assert client.status().signatures == 1
            return {token.value for token in tokens}

    assert len(asyncio.run(crowd())) == 1
    assert grants(toll_sandbox) == 1


@pytest.mark.usefixtures("toll_settings", "file_cache")
def test_cold_command_lines_share_one_signature(toll_sandbox: Sandbox) -> None:
    ended = all_fine(runs(12, "token", "road"))
    assert len({out for _, out in ended}) == 1
    assert grants(toll_sandbox) == 1


@pytest.mark.usefixtures("toll_settings", "file_cache")
def test_command_lines_against_a_refused_grant_spend_one(toll_sandbox: Sandbox) -> None:
    toll_sandbox.fault("401", "token")
    ended = [each for _ in range(3) for each in runs(4, "token", "road")]
    assert {code for code, _ in ended} == {60}, ended
    assert grants(toll_sandbox) == 1


@pytest.mark.usefixtures("toll_settings", "file_cache")
def test_renew_and_min_life_at_the_command_line(toll_sandbox: Sandbox) -> None:
    assert runs(1, "token", "road")[0][0] == 0
    assert runs(1, "token", "road", "--min-life", "10")[0][0] == 0
    assert grants(toll_sandbox) == 1
    assert runs(1, "token", "road", "--renew")[0][0] == 0
    assert grants(toll_sandbox) == 2
    code, output = runs(1, "token", "road", "--min-life", "90000")[0]
    assert (code, grants(toll_sandbox)) == (2, 2), output


def test_a_token_outlives_a_device_that_is_gone(
    toll_client: TollClient, toll_sandbox: Sandbox
) -> None:
    assert toll_client.status().certificate_days is None
    token = toll_client.token("road")
    assert 300 < (toll_client.status().certificate_days or 0) < 800
    toll_client.close()
    assert toll_client.token("road") is token
    toll_sandbox.fault("500", "token")
    with pytest.raises(HsmTollError):
        toll_client.token("air")
