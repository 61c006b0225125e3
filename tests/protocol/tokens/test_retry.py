"""What is tried again, how often, and what an answer may cost in signatures."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from hsmtoll.client import AsyncTollClient, TollClient
from hsmtoll.errors import (
    ExchangeRefused,
    GrantRefused,
    HsmTollError,
    NetworkError,
    ScopeNotGranted,
    TryAgainLater,
)
from hsmtoll.tokens.stores import FileStore
from tests.kit.raw_services import BEARER, SUBJECT, RawServices, http_reply
from tests.kit.soft_client import token_service_of

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.clock import SettableClock


def jtis(sandbox: Sandbox) -> list[str]:
    """Of the grants that came in."""
    claims = [each.claims for each in sandbox.received if each.kind == "grant"]
    return [str(each["jti"]) for each in claims if each]


@pytest.mark.parametrize("fault", ["503", "502", "500", "reset", "truncated"])
@pytest.mark.parametrize("endpoint", ["token", "exchange"])
def test_trouble_of_a_moment_is_tried_once_more_from_the_grant_on(
    toll_sandbox: Sandbox, fault: str, endpoint: str
) -> None:
    token_service, signer = token_service_of(toll_sandbox)
    toll_sandbox.fault(fault, endpoint, times=1)
    assert TollClient(token_service).token("road").value
    assert len(signer.signed) == 2
    assert len(set(signer.signed)) == 2, "a new jti for every attempt"


def test_a_grant_whose_answer_was_lost_is_not_sent_again(toll_sandbox: Sandbox) -> None:
    """It took effect: the same jti would be a replay (MP-012)."""
    token_service, _ = token_service_of(toll_sandbox)
    toll_sandbox.fault("reset-after", "token", times=1)
    assert TollClient(token_service).token("road").value
    seen = jtis(toll_sandbox)
    assert len(seen) == len(set(seen)) == 2


def test_a_lasting_outage_costs_the_budget_of_a_request_and_no_more(
    toll_sandbox: Sandbox,
) -> None:
    token_service, signer = token_service_of(toll_sandbox)
    toll_sandbox.fault("503", "token")
    for _ in range(5):
        with pytest.raises(NetworkError) as caught:
            TollClient(token_service).token("road")
    assert caught.value.exit_code == 80
    assert len(signer.signed) == 2, "the others were told while it rested"


def test_less_scope_than_was_asked_for_is_refused_once_and_never_exchanged(tmp_path: Path) -> None:
    with RawServices(tmp_path) as services:
        token = {"access_token": SUBJECT, "token_type": "Bearer", "expires_in": 600}
        services.token = lambda *_: http_reply({**token, "scope": "toll:eu/movement/air"})
        token_service, signer = token_service_of(services)
        client = TollClient(token_service)
        for _ in range(3):
            with pytest.raises(ScopeNotGranted, match="toll:eu/movement/road/v2"):
                client.token("road")
        assert (len(signer.signed), services.exchanges) == (1, [])
        # The control: what it grants is had.
        assert client.token("air").value == BEARER


@pytest.mark.parametrize("rule", ["html", "newline-token", "401", "redirect"])
@pytest.mark.parametrize("endpoint", ["token", "exchange"])
def test_what_a_new_grant_cannot_cure_is_not_tried_again(
    toll_sandbox: Sandbox, rule: str, endpoint: str
) -> None:
    token_service, signer = token_service_of(toll_sandbox)
    toll_sandbox.fault(rule, endpoint)
    with pytest.raises((GrantRefused, ExchangeRefused, NetworkError)):
        TollClient(token_service).token("road")
    assert len(signer.signed) == 1


def test_a_refused_grant_is_remembered_by_50_programs_for_30_s(
    toll_sandbox: Sandbox, toll_clock: SettableClock, tmp_path: Path
) -> None:
    signed = 0

    def run() -> str | None:
        nonlocal signed
        token_service, signer = token_service_of(
            toll_sandbox,
            clock=toll_clock,
            store=FileStore(tmp_path / "cache"),
            identity_file=tmp_path / "identity",
            background=False,
        )
        with pytest.raises(GrantRefused) as caught:
            TollClient(token_service).token("road")
        signed += len(signer.signed)
        return caught.value.code

    toll_sandbox.fault("401", "token")
    codes = {run() for _ in range(50)}
    assert signed == 1
    assert len(codes) == 1
    # The control: after 30 s the answer is asked for again.
    toll_clock.advance(31)
    run()
    assert signed == 2


def test_throttling_is_honoured_when_it_is_short(toll_sandbox: Sandbox) -> None:
    token_service, signer = token_service_of(toll_sandbox)
    toll_sandbox.fault("429-retry-after", "token", times=1, seconds=1)
    assert TollClient(token_service).token("road").value
    assert len(signer.signed) == 2


def test_and_told_when_it_is_long(toll_sandbox: Sandbox) -> None:
    token_service, signer = token_service_of(toll_sandbox)
    toll_sandbox.fault("429-retry-after", "token", times=1, seconds=90)
    for _ in range(3):
        with pytest.raises(TryAgainLater) as caught:
            TollClient(token_service).token("road")
    assert caught.value.exit_code == 75
    assert caught.value.retry_after == pytest.approx(90, abs=2)
    assert len(signer.signed) == 1


def test_the_hours_budget_is_one_for_all_programs(
    toll_sandbox: Sandbox, toll_clock: SettableClock, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "cache")
    machine: dict[str, Any] = {"clock": toll_clock, "identity_file": tmp_path / "identity"}
    spent = 0
    for _ in range(3):
        token_service, signer = token_service_of(toll_sandbox, store=store, per_hour=5, **machine)
        client = TollClient(token_service)
        for _ in range(3):
            toll_clock.advance(1)
            with contextlib.suppress(TryAgainLater):
                client.token("road", renew=True)
        spent += len(signer.signed)
    assert spent == 5
    toll_clock.advance(3600)
    token_service, signer = token_service_of(toll_sandbox, store=store, per_hour=5, **machine)
    TollClient(token_service).token("road", renew=True)
    assert len(signer.signed) == 1


def test_1000_refusals_in_a_row_by_an_api_cost_two_signatures_a_minute(
    toll_sandbox: Sandbox,
    toll_clock: SettableClock,
) -> None:
    token_service, signer = token_service_of(toll_sandbox, clock=toll_clock)
    toll_sandbox.fault("401", "api")
    with TollClient(token_service).api("road") as api:
        for _ in range(1000):
            assert api.get("test-auth").status_code == 401
            toll_clock.advance(0.0599)
    assert len(signer.signed) <= 2


def test_an_old_token_that_is_refused_is_renewed_once_and_the_call_succeeds(
    toll_sandbox: Sandbox,
    toll_clock: SettableClock,
) -> None:
    token_service, signer = token_service_of(toll_sandbox, clock=toll_clock)
    with TollClient(token_service).api("road") as api:
        assert api.get("test-auth").status_code == 200
        toll_clock.advance(40)
        toll_sandbox.fault("401", "api", times=1)
        assert api.get("test-auth").status_code == 200
        assert len(signer.signed) == 2
        # The control: a young one is not, and the caller sees the 401.
        toll_sandbox.fault("401", "api", times=1)
        assert api.get("test-auth").status_code == 401
    assert len(signer.signed) == 2


def test_1000_refusals_at_once_cost_one_renewal(
    toll_sandbox: Sandbox, toll_clock: SettableClock
) -> None:
    """Every flow holds the same token when its 401 arrives; httpx itself is left out."""
    token_service, signer = token_service_of(toll_sandbox, clock=toll_clock)
    client = AsyncTollClient(token_service)
    url = f"{toll_sandbox.customs}/api/movement/road/v2/test-auth"

    async def refused() -> tuple[str, str]:
        request = httpx.Request("GET", url)
        flow = client.auth("road").async_auth_flow(request)
        first = (await anext(flow)).headers["authorization"]
        sent.append(first)
        await all_sent.wait()
        again = await flow.asend(httpx.Response(401, request=request))
        return first, again.headers["authorization"]

    async def crowd() -> set[tuple[str, str]]:
        await client.token("road")
        toll_clock.advance(40)
        tasks = [asyncio.create_task(refused()) for _ in range(1000)]
        while len(sent) < 1000:  # noqa: ASYNC110 - a count has no event
            await asyncio.sleep(0)
        all_sent.set()
        return set(await asyncio.gather(*tasks))

    sent: list[str] = []
    all_sent = asyncio.Event()
    pairs = asyncio.run(crowd())
    assert len(pairs) == 1
    before, after = pairs.pop()
    assert before != after
    assert len(signer.signed) == 2


def test_a_body_that_streams_is_not_sent_again(
    toll_sandbox: Sandbox, toll_clock: SettableClock
) -> None:
    token_service, signer = token_service_of(toll_sandbox, clock=toll_clock)

    def calls() -> int:
        return len([each for each in toll_sandbox.received if each.kind == "call"])

    with TollClient(token_service).api("road") as api:
        api.get("test-auth")
        toll_clock.advance(40)
        toll_sandbox.fault("401", "api", times=2)
        before = calls()
        body = itertools.repeat(b"{}", 3)
        assert api.post("house-consignment", content=body).status_code == 401
        assert (calls() - before, len(signer.signed)) == (1, 1)
        # The control: bytes are.
        assert api.post("house-consignment", content=b"{}").status_code != 401
        assert (calls() - before, len(signer.signed)) == (3, 2)


def test_a_renewal_that_fails_leaves_the_living_token_to_the_callers(
    toll_sandbox: Sandbox,
    toll_clock: SettableClock,
) -> None:
    token_service, _ = token_service_of(toll_sandbox, clock=toll_clock)
    client = TollClient(token_service)
    first = client.token("road")
    toll_clock.advance(first.lifetime - 30)
    toll_sandbox.fault("503", "token")
    with pytest.raises(HsmTollError):
        client.token("road", renew=True)
    assert [client.token("road").value for _ in range(20)] == [first.value] * 20
    toll_clock.advance(31)
    with pytest.raises(NetworkError):
        client.token("road")


def test_the_log_has_one_line_a_leg_and_no_secret(
    toll_sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    token_service, signer = token_service_of(toll_sandbox)
    with caplog.at_level("DEBUG", logger="hsmtoll"):
        token = TollClient(token_service).token("road")
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("server=")]
    assert [line.split()[0] for line in lines] == ["server=Maskinporten", "server=Customs"]
    assert all("status=200" in line and "ms=" in line and "trace=" in line for line in lines)
    assert f"jti={signer.signed[0]}" in lines[0]
    assert token.value not in caplog.text
    assert "eyJ" not in caplog.text


def test_status_says_what_happened(toll_sandbox: Sandbox) -> None:
    token_service, _ = token_service_of(toll_sandbox)
    client = TollClient(token_service)
    before = client.status()
    assert (before.signatures, before.seconds_until_expiry, before.waiting) == (0, None, 0)
    token = client.token("road")
    client.token("road")
    status = client.status()
    assert status.signatures == 1
    assert status.requests == {("Maskinporten", "200"): 1, ("Customs", "200"): 1}
    assert status.hits == {"fresh": 1, "stale": 0, "stored": 0, "fetched": 1}
    assert status.seconds_until_expiry == pytest.approx(token.lifetime, abs=5)
    assert threading.active_count() < 50
