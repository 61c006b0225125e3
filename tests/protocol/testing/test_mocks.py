"""A user's tests, with HTTP mocked by the libraries that people use, beside the real sandbox."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx
import pytest
import respx

from hsmtoll import HsmTollError

if TYPE_CHECKING:
    from pytest_httpx import HTTPXMock

    from hsmtoll.client import TollClient
    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.clock import SettableClock

#: Where the sandbox is: the two names of the README.
SANDBOX = ("localhost", "127.0.0.1")
#: Something else that the user's program calls.
ORDERS = "https://orders.example.org/open"
#: What a token endpoint that is mocked as well answers, at both services.
TOKEN = {
    "access_token": "mocked",
    "token_type": "Bearer",
    "expires_in": 600,
    "scope": "toll:eu/movement/road/v2",
}


def asked(sandbox: Sandbox) -> int:
    return len(sandbox.received)


@pytest.mark.parametrize("way", ["httpcore", "httpx"])
def test_respx_answers_for_others_and_lets_the_sandbox_through(
    toll_client: TollClient, toll_sandbox: Sandbox, way: str
) -> None:
    with respx.mock(using=way) as router:
        router.route(host__in=SANDBOX).pass_through()
        others = router.get(ORDERS).respond(json={"open": 3})
        assert httpx.get(ORDERS).json() == {"open": 3}
        with toll_client.api("road") as api:
            assert api.get("test-auth").status_code == 200
    assert others.call_count == 1
    assert asked(toll_sandbox) == 3


@pytest.mark.parametrize("way", ["httpcore", "httpx"])
def test_respx_answers_for_the_token_endpoints_as_well(
    toll_client: TollClient, toll_sandbox: Sandbox, way: str
) -> None:
    with respx.mock(using=way) as router:
        tokens = router.post(host__in=SANDBOX).respond(json=TOKEN)
        assert toll_client.token("road").value == "mocked"
    assert (tokens.call_count, asked(toll_sandbox)) == (2, 0)


@pytest.mark.parametrize("way", ["httpcore", "httpx"])
def test_respx_that_knows_no_answer_fails_the_test_and_nothing_is_sent(
    toll_client: TollClient, toll_sandbox: Sandbox, toll_clock: SettableClock, way: str
) -> None:
    with respx.mock(using=way), pytest.raises(AssertionError, match="not mocked"):
        toll_client.token("road")
    assert asked(toll_sandbox) == 0
    # After the pause that follows every failure the client goes on.
    toll_clock.advance(60)
    assert toll_client.token("road").value


@pytest.mark.parametrize("way", ["httpcore", "httpx"])
def test_respx_answers_for_customs_behind_the_auth_in_a_users_own_clients(
    toll_client: TollClient, toll_sandbox: Sandbox, way: str
) -> None:
    address = f"{toll_sandbox.customs}/api/movement/road/v2/test-auth"

    async def call() -> int:
        async with httpx.AsyncClient(auth=toll_client.auth("road")) as users:
            return (await users.get(address)).status_code

    with respx.mock(using=way) as router:
        customs = router.get(address).respond(418)
        router.post(host__in=SANDBOX).pass_through()
        with httpx.Client(auth=toll_client.auth("road")) as users:
            assert users.get(address).status_code == 418
        assert asyncio.run(call()) == 418
    bearers = {call.request.headers["authorization"] for call in customs.calls}
    assert bearers == {f"Bearer {toll_client.token('road').value}"}
    # A token, by a grant and its exchange; Customs itself was not asked.
    assert asked(toll_sandbox) == 2


@pytest.mark.httpx_mock(should_mock=lambda request: request.url.host not in SANDBOX)
def test_pytest_httpx_answers_for_others_and_lets_the_sandbox_through(
    toll_client: TollClient, toll_sandbox: Sandbox, httpx_mock: HTTPXMock
) -> None:
    httpx_mock.add_response(url=ORDERS, json={"open": 3})
    assert httpx.get(ORDERS).json() == {"open": 3}
    with toll_client.api("road") as api:
        assert api.get("test-auth").status_code == 200
    assert len(httpx_mock.get_requests()) == 1
    assert asked(toll_sandbox) == 3


def test_pytest_httpx_answers_for_the_token_endpoints_as_well(
    toll_client: TollClient, toll_sandbox: Sandbox, httpx_mock: HTTPXMock
) -> None:
    httpx_mock.add_response(method="POST", json=TOKEN, is_reusable=True)
    assert toll_client.token("road").value == "mocked"
    assert (len(httpx_mock.get_requests()), asked(toll_sandbox)) == (2, 0)


@pytest.mark.httpx_mock(assert_all_requests_were_expected=False)
def test_pytest_httpx_that_knows_no_answer_is_named_and_nothing_is_sent(
    toll_client: TollClient, toll_sandbox: Sandbox, httpx_mock: HTTPXMock
) -> None:
    with pytest.raises(HsmTollError) as caught:
        toll_client.token("road")
    assert caught.value.code == "mocked"
    # Once: a mock gives no other answer to a second try.
    assert len(httpx_mock.get_requests()) == 1
    assert asked(toll_sandbox) == 0


def test_a_mock_transport_answers_for_customs_and_the_token_is_the_sandboxs(
    toll_client: TollClient, toll_sandbox: Sandbox
) -> None:
    address = f"{toll_sandbox.customs}/api/movement/road/v2/test-auth"
    bearers: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bearers.append(request.headers["authorization"])
        return httpx.Response(418)

    async def call() -> int:
        async with httpx.AsyncClient(transport=transport, auth=toll_client.auth("road")) as users:
            return (await users.get(address)).status_code

    transport = httpx.MockTransport(answer)
    with httpx.Client(transport=transport, auth=toll_client.auth("road")) as users:
        assert users.get(address).status_code == 418
    assert asyncio.run(call()) == 418
    assert bearers == [f"Bearer {toll_client.token('road').value}"] * 2
    assert asked(toll_sandbox) == 2
    # Without the mock it is the sandbox that answers.
    with toll_client.api("road") as api:
        assert api.get("test-auth").status_code == 200
    assert asked(toll_sandbox) == 3
