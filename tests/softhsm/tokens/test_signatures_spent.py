"""What an answer that never satisfies may cost, counted where it does: C_SignInit at the device."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest

from hsmtoll import DeviceError, GrantRefused, HsmTollError, NetworkError, TryAgainLater
from hsmtoll.app import App
from hsmtoll.hsm.module import PKCS11_LOCK
from hsmtoll.sandbox.server import Sandbox
from hsmtoll.settings import load
from hsmtoll.testing.identity import register_identity
from hsmtoll.token import TokenRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hsmtoll import TollClient
    from hsmtoll.auth import AsyncTollAuth
    from hsmtoll.settings import Settings
    from hsmtoll.testing.clock import SettableClock
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity

pytestmark = pytest.mark.timeout(300)


def grants(sandbox: Sandbox) -> int:
    return sum(1 for each in sandbox.received if each.kind == "grant")


def test_1000_times_401_from_an_api_in_a_minute_ask_the_device_twice_at_most(
    toll_client: TollClient, toll_faults: Faults, toll_sandbox: Sandbox, toll_clock: SettableClock
) -> None:
    toll_sandbox.fault("401", "api")
    with toll_client.api("road") as api:
        for _ in range(1000):
            assert api.get("test-auth").status_code == 401
            toll_clock.advance(0.0599)
        assert toll_faults.count("C_SignInit") <= 2
        # The control: it is the time that passed, and nothing that broke.
        before = toll_faults.count("C_SignInit")
        toll_sandbox.clear_faults()
        toll_clock.advance(700)
        assert api.get("test-auth").status_code == 200
        assert toll_faults.count("C_SignInit") == before + 1


@pytest.mark.parametrize(("at_once", "signatures"), [(True, 1), (False, 3)])
def test_1000_times_401_at_once_ask_the_device_once(
    toll_settings: Settings,
    toll_faults: Faults,
    toll_sandbox: Sandbox,
    toll_clock: SettableClock,
    *,
    at_once: bool,
    signatures: int,
) -> None:
    """Every flow holds the same token when its 401 comes; or, the control, each the newest."""
    url = f"{toll_sandbox.customs}/api/movement/road/v2/test-auth"

    async def refused(auth: AsyncTollAuth, all_sent: asyncio.Barrier) -> str:
        request = httpx.Request("GET", url)
        flow = auth.async_auth_flow(request)
        sent = await anext(flow)
        await all_sent.wait()
        again = await flow.asend(httpx.Response(401, request=sent))
        return str(again.headers["authorization"])

    async def crowd() -> list[str]:
        app = App(toll_settings)
        app.clock = toll_clock
        async with app.aclient() as client:
            await client.token("road")
            toll_clock.advance(40)
            toll_faults.reset_counts()
            auth = client.auth("road")
            if at_once:
                all_sent = asyncio.Barrier(1000)
                return await asyncio.gather(*(refused(auth, all_sent) for _ in range(1000)))
            renewed = []
            for _ in range(3):
                renewed.append(await refused(auth, asyncio.Barrier(1)))
                toll_clock.advance(40)
            return renewed

    assert len(set(asyncio.run(crowd()))) == signatures
    assert toll_faults.count("C_SignInit") == signatures


def test_a_crowd_of_calls_that_an_api_refuses_ask_the_device_once(
    toll_settings: Settings, toll_faults: Faults, toll_sandbox: Sandbox, toll_clock: SettableClock
) -> None:
    async def crowd() -> set[int]:
        app = App(toll_settings)
        app.clock = toll_clock
        async with app.aclient() as client:
            await client.token("road")
            toll_clock.advance(40)
            toll_faults.reset_counts()
            toll_sandbox.fault("401", "api")
            async with client.api("road") as api:
                answers = await asyncio.gather(*(api.get("test-auth") for _ in range(200)))
            return {answer.status_code for answer in answers}

    assert asyncio.run(crowd()) == {401}
    assert toll_faults.count("C_SignInit") == 1


def test_a_device_that_is_busy_spends_no_signature_and_one_that_fails_to_sign_does(
    toll_settings: Settings, toll_faults: Faults
) -> None:
    request = TokenRequest("toll:eu/movement/road/v2")
    hourly = toll_settings.budget.model_copy(update={"per_hour": 1})
    settings = toll_settings.model_copy(update={"budget": hourly})
    with contextlib.closing(App(settings.model_copy(update={"deadline": 0.05}))) as hurried:
        with ThreadPoolExecutor(1) as another, PKCS11_LOCK.held(60):
            for _ in range(3):
                asked = another.submit(hurried.renewal_by(hurried.signer).sign, request)
                with pytest.raises(DeviceError) as caught:
                    asked.result()
                assert (caught.value.code, caught.value.signed) == ("device-busy", False)
        # Counted by the settings as long as it is not known who signs.
        hurried.rate_limit.acquire(hurried.selector)
        with pytest.raises(TryAgainLater):
            hurried.rate_limit.acquire(hurried.selector)
    # The control: a signature that was asked for and not given counts.
    with contextlib.closing(App(settings)) as app:
        toll_faults.set("wrong-signature")
        with pytest.raises(DeviceError) as failed:
            app.renewal_by(app.signer).sign(request)
        assert (failed.value.code, failed.value.signed) == ("signature-wrong", True)
        with pytest.raises(TryAgainLater):
            app.rate_limit.acquire(app.selector)


def test_a_device_that_is_away_for_long_spends_no_signature(
    toll_settings: Settings, toll_faults: Faults, toll_clock: SettableClock
) -> None:
    """What is wrong would be hidden behind a limit that is reached without one signature."""
    hourly = toll_settings.budget.model_copy(update={"per_hour": 1, "per_request": 1})
    app = App(toll_settings.model_copy(update={"budget": hourly}))
    app.clock = toll_clock
    with app.client() as client:
        toll_faults.set("token-removed")
        for _ in range(3):
            with pytest.raises(DeviceError) as caught:
                client.token("road")
            assert not caught.value.signed
            toll_clock.advance(120)
        toll_faults.clear()
        assert client.token("road").value
        # The control: that one counts.
        with pytest.raises(TryAgainLater):
            client.token("air")


def _token() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hsmtoll", "token", "road"],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(process: subprocess.Popen[str]) -> int:
    try:
        output = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 60, output
    return process.returncode


@pytest.mark.usefixtures("toll_settings")
def test_50_command_lines_against_a_refused_grant_do_not_ask_the_device_each(
    toll_faults: Faults,
    toll_sandbox: Sandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HSMTOLL_CACHE", f"file://{tmp_path}/tokens")
    toll_sandbox.fault("401", "token")
    _ended(_token())
    assert toll_faults.count("C_SignInit") == 1
    for _ in range(7):
        for process in [_token() for _ in range(7)]:
            _ended(process)
    # A machine that needs longer than 30 s for them asks again after those; none needs 6 minutes.
    assert 1 <= toll_faults.count("C_SignInit") <= 12
    assert toll_faults.count("C_SignInit") == grants(toll_sandbox)
    # The control: programs that share nothing ask each for itself, and the count sees all.
    toll_faults.reset_counts()
    monkeypatch.setenv("HSMTOLL_CACHE", "memory:")
    for _ in range(3):
        _ended(_token())
    assert toll_faults.count("C_SignInit") == 3


@pytest.fixture
def generous(toll_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., App]:
    """An App that may spend five signatures on one request."""
    del toll_settings
    monkeypatch.setenv("HSMTOLL_BUDGET__PER_REQUEST", "5")
    return lambda **parts: App(load(), **parts)


def test_a_replay_that_maskinporten_names_is_tried_once_more_and_no_oftener(
    generous: Callable[..., App],
    toll_faults: Faults,
    toll_sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hsmtoll.tokens.renewal.new_jti", lambda: "always-the-same")
    with generous().client() as client:
        assert client.token("road").value
        before = grants(toll_sandbox)
        toll_faults.reset_counts()
        with pytest.raises(GrantRefused) as caught:
            client.token("road", renew=True)
    assert caught.value.code == "MP-012"
    assert grants(toll_sandbox) - before == 2
    assert toll_faults.count("C_SignInit") == 2


def test_a_grant_that_came_too_late_is_tried_once_more_and_no_oftener(
    generous: Callable[..., App],
    toll_faults: Faults,
    toll_eseal: TemporaryIdentity,
    toll_clock: SettableClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It judges by one clock and names another in Date: there is nothing to learn from.
    late = itertools.cycle((200.0, 0.0))
    with Sandbox(clock=lambda: toll_clock.now().wall + next(late)) as sandbox:
        register_identity(sandbox, toll_eseal)
        for name, value in sandbox.environ().items():
            monkeypatch.setenv(name, value)
        toll_faults.reset_counts()
        with generous(clock=toll_clock).client() as client:
            with pytest.raises(HsmTollError) as caught:
                client.token("road")
            assert client.status().skew == 0
        assert caught.value.code == "MP-130"
        assert [each.refused_by for each in sandbox.received] == ["M57", "M57"]
        assert toll_faults.count("C_SignInit") == 2


@pytest.mark.parametrize(("times", "asked"), [(3, 4), (None, 5)])
def test_an_outage_is_tried_as_often_as_the_budget_of_a_request_allows(
    generous: Callable[..., App],
    toll_faults: Faults,
    toll_sandbox: Sandbox,
    times: int | None,
    asked: int,
) -> None:
    toll_sandbox.fault("503", "token", times=times)
    with generous().client() as client:
        if times is None:
            with pytest.raises(NetworkError):
                client.token("road")
        else:
            assert client.token("road").value
    assert grants(toll_sandbox) == asked
    assert toll_faults.count("C_SignInit") == asked
