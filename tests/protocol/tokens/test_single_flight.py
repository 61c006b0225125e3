"""However many ask at once, one signature, one grant, one exchange."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from typing import TYPE_CHECKING

import httpx

from hsmtoll.client import AsyncTollClient, TollClient
from hsmtoll.errors import NetworkError
from tests.kit.soft_client import token_service_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.sandbox.server import Sandbox


def requests(sandbox: Sandbox) -> tuple[int, int]:
    """Grants and exchanges that came in; what only releases a hold carries no grant."""
    received = sandbox.received
    grants = [each for each in received if each.kind == "grant" and each.claims]
    return len(grants), len([each for each in received if each.kind == "exchange"])


def release(sandbox: Sandbox) -> None:
    """The second request that a hold of two waits for; it asks for nothing."""
    httpx.post(sandbox.token_endpoint, verify=_context(sandbox), data={})


def _context(sandbox: Sandbox) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=sandbox.ca_file)


def wait_for(come: Callable[[], bool]) -> None:
    while not come():
        time.sleep(0.005)


def test_10_000_tasks_on_a_cold_cache_cost_one_of_each(toll_sandbox: Sandbox) -> None:
    token_service, signer = token_service_of(toll_sandbox)
    client = AsyncTollClient(token_service)
    toll_sandbox.fault("hold", "token", callers=2)

    async def crowd() -> set[str]:
        tasks = [asyncio.create_task(client.token("road")) for _ in range(10_000)]
        while client.status().waiting < 10_000:  # noqa: ASYNC110 - a count has no event
            await asyncio.sleep(0.01)
        await asyncio.to_thread(release, toll_sandbox)
        return {token.value for token in await asyncio.gather(*tasks)}

    assert len(asyncio.run(crowd())) == 1
    assert len(signer.signed) == 1
    assert requests(toll_sandbox) == (1, 1)
    assert client.status().waiting == 0


def test_400_threads_on_a_cold_cache_cost_one_of_each(toll_sandbox: Sandbox) -> None:
    token_service, signer = token_service_of(toll_sandbox)
    client = TollClient(token_service)
    toll_sandbox.fault("hold", "token", callers=2)
    got: list[str] = []
    threads = [
        threading.Thread(target=lambda: got.append(client.token("road").value)) for _ in range(400)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: client.status().waiting == 400)
    release(toll_sandbox)
    for thread in threads:
        thread.join(30)
    assert (len(got), len(set(got))) == (400, 1)
    assert len(signer.signed) == 1
    assert requests(toll_sandbox) == (1, 1)


def test_without_the_flight_each_of_them_costs_its_own(toll_sandbox: Sandbox) -> None:
    """The control: every caller with a client of its own, and the hold waits for all of them."""
    parts = [token_service_of(toll_sandbox) for _ in range(12)]
    toll_sandbox.fault("hold", "token", callers=12)
    threads = [
        threading.Thread(target=TollClient(token_service).token, args=("road",))
        for token_service, _ in parts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(len(signer.signed) for _, signer in parts) == 12
    assert requests(toll_sandbox) == (12, 12)


def test_two_scopes_fly_apart(toll_sandbox: Sandbox) -> None:
    token_service, signer = token_service_of(toll_sandbox)
    client = TollClient(token_service)
    values = {client.token(name).value for name in ("road", "air", "road", "air")}
    assert len(values) == 2
    assert len(signer.signed) == 2


def test_a_failed_flight_is_one_failure_for_everybody(toll_sandbox: Sandbox) -> None:
    token_service, signer = token_service_of(toll_sandbox, per_request=1)
    client = AsyncTollClient(token_service)
    toll_sandbox.fault("500", "token")

    async def crowd() -> list[object]:
        tasks = [client.token("road") for _ in range(500)]
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    got = asyncio.run(crowd())
    assert {type(each) for each in got} == {NetworkError}
    assert len(signer.signed) == 1
