"""The bearer: on Customs' own origin, and nowhere else."""

from __future__ import annotations

import asyncio
import logging
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx
import httpx2
import pytest
import trio
from prometheus_client import CollectorRegistry, generate_latest

from hsmtoll import metrics
from hsmtoll.client import AsyncTollClient, TollClient
from hsmtoll.errors import ConfigurationError, HsmTollError, UsageError
from hsmtoll.metrics import Status
from tests.kit.soft_client import token_service_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.clock import SettableClock


@pytest.fixture
def client(toll_sandbox: Sandbox) -> TollClient:
    return TollClient(token_service_of(toll_sandbox)[0])


def test_both_colours_reach_the_api(toll_sandbox: Sandbox, client: TollClient) -> None:
    async def call() -> int:
        async with (
            AsyncTollClient(token_service_of(toll_sandbox)[0]) as other,
            other.api("road") as api,
        ):
            return (await api.get("test-auth")).status_code

    with client.api("road") as api:
        assert api.get("test-auth").status_code == 200
    assert asyncio.run(call()) == 200


@pytest.mark.parametrize("library", [httpx, httpx2], ids=lambda library: library.__name__)
def test_programs_on_httpx_and_on_its_successor_get_the_same_bearer(
    toll_sandbox: Sandbox, toll_clock: SettableClock, library: Any
) -> None:
    address = f"{toll_sandbox.customs}/api/movement/road/v2/test-auth"
    context = ssl.create_default_context(cafile=toll_sandbox.ca_file)
    service, signer = token_service_of(toll_sandbox, clock=toll_clock)
    auth = TollClient(service).auth("road")
    other = AsyncTollClient(service).auth("road")

    async def in_a_task() -> int:
        async with library.AsyncClient(auth=other, verify=context) as client:
            response = await client.get(address)
            with pytest.raises(ConfigurationError, match="token is for"):
                await client.get("https://elsewhere.invalid/")
            return int(response.status_code)

    with library.Client(auth=auth, verify=context) as client:
        assert client.get(address).status_code == 200
        with pytest.raises(ConfigurationError, match="token is for"):
            client.get("https://elsewhere.invalid/")
        with pytest.raises(UsageError, match="Authorization"):
            client.get(address, headers={"Authorization": "Bearer mine"})
        assert asyncio.run(in_a_task()) == 200
        assert len(signer.signed) == 1
        # An old token that Customs refuses is renewed once, and the call is made again.
        toll_clock.advance(60)
        toll_sandbox.fault("401", "api", times=1)
        assert client.post(address, content=b"{}").status_code != 401
        assert len(signer.signed) == 2
        # A streamed body is gone after the first attempt.
        toll_clock.advance(60)
        toll_sandbox.fault("401", "api", times=1)
        assert client.post(address, content=iter([b"{}"])).status_code == 401


def test_tasks_of_another_library_are_told_what_to_use(toll_sandbox: Sandbox) -> None:
    service, _ = token_service_of(toll_sandbox)

    async def cold() -> None:
        await AsyncTollClient(service).token("road")

    async def called() -> None:
        await AsyncTollClient(service).call("GET", "/api/movement/road/v2/test-auth")

    for each in (cold, called):
        with pytest.raises(UsageError, match="no event loop of asyncio") as caught:
            trio.run(each)
        assert "trio.to_thread" in str(caught.value.hint)

    async def in_a_thread() -> str:
        return (await trio.to_thread.run_sync(TollClient(service).token, "road")).value

    assert trio.run(in_a_thread)


def test_an_auth_of_either_client_works_in_a_client_of_the_other_colour(
    toll_sandbox: Sandbox,
) -> None:
    address = f"{toll_sandbox.customs}/api/movement/road/v2/test-auth"
    context = ssl.create_default_context(cafile=toll_sandbox.ca_file)

    async def crossed() -> int:
        with TollClient(token_service_of(toll_sandbox)[0]) as made:
            async with httpx.AsyncClient(auth=made.auth("road"), verify=context) as used:
                # The guard of the origin is on as well.
                with pytest.raises(ConfigurationError, match="token is for"):
                    await used.get("https://elsewhere.invalid/")
                return (await used.get(address)).status_code

    assert asyncio.run(crossed()) == 200
    auth = AsyncTollClient(token_service_of(toll_sandbox)[0]).auth("road")
    with httpx.Client(auth=auth, verify=context) as used:
        with pytest.raises(ConfigurationError, match="token is for"):
            used.get("https://elsewhere.invalid/")
        assert used.get(address).status_code == 200


def test_a_retry_writes_one_line_of_ours_and_none_of_a_library(
    toll_sandbox: Sandbox, client: TollClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    toll_sandbox.faults.set("500", "token", times=1)
    assert client.token("road").value
    assert {record.name.partition(".")[0] for record in caplog.records} <= {
        *("hsmtoll", "httpx", "httpcore", "asyncio", "aiohttp"),
    }
    records = [r for r in caplog.records if "attempt 1 of 2 failed" in r.getMessage()]
    assert [record.levelname for record in records] == ["INFO"]


@pytest.mark.parametrize("read", [True, False])
def test_tokens_come_through_a_transport_that_a_mock_has_replaced(
    client: TollClient, monkeypatch: pytest.MonkeyPatch, *, read: bool
) -> None:
    """respx and pytest-httpx put answers in the place of httpx's transport, some read already."""
    asked = []

    def answer(transport: object, request: httpx.Request) -> httpx.Response:
        del transport
        asked.append(str(request.url))
        request.read()
        response = httpx.Response(
            200,
            json={"access_token": "mocked", "token_type": "Bearer", "expires_in": 600,
                  "scope": "toll:eu/movement/road/v2"},
        )  # fmt: skip
        if not read:
            body = response.content
            response = httpx.Response(200, headers=response.headers, stream=_Stream(body))
        return response

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", answer)
    assert client.token("road").value == "mocked"
    assert len(asked) == 2


class _Stream(httpx.SyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        yield self._body


def test_a_mock_that_knows_no_answer_is_told_as_what_it_is(
    client: TollClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "No response can be found for POST request on https://localhost"
    asked = []

    def answer(transport: object, request: httpx.Request) -> httpx.Response:
        asked.append(transport)
        raise httpx.TimeoutException(message, request=request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", answer)
    with pytest.raises(HsmTollError, match=message) as caught:
        client.token("road")
    assert (caught.value.code, len(asked)) == ("mocked", 1)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/api",
        "https://{host}:1/api",
        "http://{host}:{port}/api",
        "https://{host}.example.org:{port}/api",
        "https://{host}:{port}@example.org/api",
        "https://127.0.0.1:{port}/api",
    ],
)
def test_no_other_origin_gets_it(toll_sandbox: Sandbox, client: TollClient, url: str) -> None:
    customs = httpx.URL(toll_sandbox.customs)
    address = url.format(host=customs.host, port=customs.port)
    with client.api("road") as api, pytest.raises(ConfigurationError, match="token is for"):
        api.get(address)
    assert toll_sandbox.received == [], "no token was even asked for"


@pytest.mark.parametrize("name", ["Authorization", "authorization", "Host"])
def test_a_header_that_would_send_it_astray_is_refused(client: TollClient, name: str) -> None:
    with client.api("road") as api, pytest.raises(UsageError, match="of its own"):
        api.get("test-auth", headers={name: "example.org"})


def test_a_request_may_be_sent_twice(client: TollClient) -> None:
    with client.api("road") as api:
        request = api.build_request("GET", "test-auth")
        assert [api.send(request).status_code for _ in range(2)] == [200, 200]


def test_a_redirect_to_another_host_gets_none(toll_sandbox: Sandbox, client: TollClient) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if len(seen) == 1:
            return httpx.Response(302, headers={"location": "https://elsewhere.invalid/"})
        return httpx.Response(200)

    with httpx.Client(
        auth=client.auth("road"), follow_redirects=True, transport=httpx.MockTransport(answer)
    ) as users:
        users.get(f"{toll_sandbox.customs}/api/movement/road/v2/test-auth")
    assert [request.url.host for request in seen] == ["localhost", "elsewhere.invalid"]
    assert ["authorization" in request.headers for request in seen] == [True, False]


def test_our_own_clients_follow_none(toll_sandbox: Sandbox, client: TollClient) -> None:
    toll_sandbox.fault("redirect", "api", times=1)
    with client.api("road") as api:
        assert api.get("test-auth").status_code == 302


def test_the_users_hooks_see_neither_assertion_nor_subject_token(
    toll_sandbox: Sandbox, client: TollClient
) -> None:
    seen: list[httpx.Request] = []
    options = client._token_service.http_client.options()
    with httpx.Client(
        auth=client.auth("road"), event_hooks={"request": [seen.append]}, **options
    ) as users:
        users.get(f"{toll_sandbox.customs}/api/movement/road/v2/test-auth")
    assert [request.url.path for request in seen] == ["/api/movement/road/v2/test-auth"]


def test_a_403_names_the_scope_that_opens_the_path(
    client: TollClient, toll_sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{toll_sandbox.customs}/api/movement/air/v1/test-auth"
    with caplog.at_level("WARNING"), client.api("road") as api:
        status = api.get(url).status_code
    assert status == 403
    assert "toll:eu/movement/road" in caplog.text
    assert "toll:eu/movement/air" in caplog.text


def test_an_error_of_the_renewal_reaches_the_caller(toll_sandbox: Sandbox) -> None:
    token_service, _ = token_service_of(toll_sandbox, per_request=1)
    toll_sandbox.fault("500", "token")
    with (
        TollClient(token_service).api("road") as api,
        pytest.raises(HsmTollError, match="Maskinporten"),
    ):
        api.get("test-auth")


def test_a_keeper_renews_before_anybody_asks(
    toll_sandbox: Sandbox, toll_clock: SettableClock
) -> None:
    token_service, signer = token_service_of(toll_sandbox, clock=toll_clock)
    client = TollClient(token_service)
    first = client.token("road")
    # Seventy-four seconds before the end: beyond a quarter of the margin on top of it, or close.
    toll_clock.advance(first.lifetime - 62)
    with client.keep_fresh("road") as refresher:
        while not refresher.done:
            pass
    assert len(signer.signed) == 2
    assert client.status().hits["stale"] == 0
    assert client.token("road").asked == toll_clock.now()
    assert refresher.due == refresher.done == 1


def test_a_keeper_refuses_a_scope_that_is_none(client: TollClient) -> None:
    with pytest.raises(UsageError):
        client.keep_fresh("no-such-api")


def test_a_client_that_is_closed_keeps_nothing_fresh(client: TollClient) -> None:
    refresher = client.keep_fresh("road")
    client.close()
    refresher._thread.join(30)
    assert not refresher._thread.is_alive()


def test_metrics_say_what_status_says(toll_sandbox: Sandbox) -> None:
    client = TollClient(token_service_of(toll_sandbox)[0])
    registry = CollectorRegistry()
    metrics.register(registry, client.status)
    assert "hsmtoll_signatures_total 0.0" in generate_latest(registry).decode()
    client.token("road")
    client.token("road")
    text = generate_latest(registry).decode()
    for line in (
        "hsmtoll_signatures_total 1.0",
        'hsmtoll_token_requests_total{outcome="200",server="Maskinporten"} 1.0',
        'hsmtoll_tokens_total{state="fresh"} 1.0',
        'hsmtoll_tokens_total{state="fetched"} 1.0',
        "hsmtoll_waiting_callers 0.0",
        "hsmtoll_clock_skew_seconds 0.0",
    ):
        assert line in text
    assert "hsmtoll_time_to_expiry_seconds" in text


def _status(signatures: int) -> Status:
    return Status(
        waiting=0,
        signatures=signatures,
        requests={("Customs", "200"): 1},
        hits={"fresh": 1},
        seconds_until_expiry=30.0,
        certificate_not_after=datetime(2027, 1, 1, tzinfo=UTC),
        certificate_days=31.0,
        skew=0.0,
        pin="ok",
    )


def _signatures(registry: CollectorRegistry) -> dict[str, float]:
    """The signatures by the label of the client."""
    families = {each.name: each.samples for each in registry.collect()}
    return {each.labels.get("client", ""): each.value for each in families["hsmtoll_signatures"]}


def test_several_clients_of_one_registry_have_labels_and_can_be_taken_off() -> None:
    # As the global one does, it asks each new collector for its names.
    registry = CollectorRegistry(auto_describe=True)
    road = metrics.register(registry, lambda: _status(1), client="road")
    air = metrics.register(registry, lambda: _status(2), client="air")
    plain = metrics.register(registry, lambda: _status(3))
    assert _signatures(registry) == {"road": 1, "air": 2, "": 3}
    text = generate_latest(registry).decode()
    assert text.count("# HELP hsmtoll_signatures_total ") == 1
    assert 'hsmtoll_certificate_not_after_timestamp_seconds{client="air"} 1.7987616e+09' in text
    # Two with the same labels would be one series, of which Prometheus keeps either.
    with pytest.raises(UsageError, match="'client': 'road'"):
        metrics.register(registry, lambda: _status(4), client="road")
    for _ in range(2):
        road()
    assert _signatures(registry) == {"air": 2, "": 3}
    # The place is free again, and the old function takes nobody else off.
    metrics.register(registry, lambda: _status(5), client="road")
    road()
    assert _signatures(registry) == {"road": 5, "air": 2, "": 3}
    air()
    plain()
    assert _signatures(registry) == {"road": 5}


def test_a_registry_without_clients_has_nothing_of_them_left() -> None:
    registry = CollectorRegistry(auto_describe=True)
    metrics.register(registry, lambda: _status(1))()
    assert generate_latest(registry) == b""
    metrics.register(registry, lambda: _status(2))
    assert _signatures(registry) == {"": 2}


@pytest.mark.parametrize("name", ["server", "outcome", "state", "version", "__name__", "årsak"])
def test_a_label_of_the_metrics_themselves_is_none_of_a_client(name: str) -> None:
    registry = CollectorRegistry()
    with pytest.raises(UsageError, match=f"{name} cannot be a label"):
        metrics.register(registry, lambda: _status(1), **{name: "x"})
    assert generate_latest(registry) == b""
