"""
Figures that a sceptical reader can repeat: ours against something bare, in one run, as ratios.

The two sides of a row take turns and medians are compared, because machines are noisy and a
ratio is less so. Nothing here is a test: a goal that is missed is shown and fails nothing.
Signatures are counted as C_SignInit, which is what a device is asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import ssl
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsmtoll.sandbox.server import Sandbox
from tests.benchmarks import bounds, growth, hosted, plots, proxied, resident
from tests.benchmarks.stage import (
    HERE,
    ROUNDS,
    Row,
    Series,
    Stage,
    per_second,
    seconds_of,
    table,
    turns,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.token import AccessToken, TokenRequest


def assertions(stage: Stage) -> Row:
    """A whole assertion: claims, x5c of three, signature, its check, compact form."""
    app = stage.app()
    signer, request = app.signer, app.token_service.request("road")
    signer.sign(request, jti="1")
    ours, bare = turns(
        lambda: per_second(lambda: signer.sign(request, jti="1"), 1.5),
        lambda: stage.bare_signatures(1.5),
    )
    app.close()
    return Row(
        "full assertions, one thread", "a C loop on the same key", "/s", ours, bare, "≥ 0.90"
    )


def held_token(stage: Stage) -> Row:
    """What a call pays for a token that is held."""
    with stage.app().client() as client:
        client.token("road")
        known = {"road": client.token("road")}
        many = 20_000

        def ours() -> float:
            return seconds_of(lambda: [client.token("road") for _ in range(many)]) / many * 1e6

        def bare() -> float:
            return seconds_of(lambda: [known["road"] for _ in range(many)]) / many * 1e6

        mine, theirs = turns(ours, bare)
    return Row("client.token(), held", "a dict look-up", "µs", mine, theirs, "≤ 3 µs")


def bearing(stage: Stage) -> list[Row]:
    """
    A request with our auth against the same client with a fixed header, in both colours: as a
    user makes it, over TLS to this machine, and with nothing at the other end.
    """
    import httpx

    url = f"{stage.sandbox.customs}/api/movement/road/v2/test-auth"
    ca = ssl.create_default_context(cafile=stage.sandbox.ca_file)

    def nothing(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"].startswith("Bearer ")
        return httpx.Response(200)

    async def anothing(request: httpx.Request) -> httpx.Response:
        return nothing(request)

    def of_threads(calls: int, **options: Any) -> tuple[float, float]:
        with stage.app().client() as toll:
            fixed = {"authorization": f"Bearer {toll.token('road').value}"}
            own = httpx.Client(auth=toll.auth("road"), **options)
            bare = httpx.Client(headers=fixed, **options)
            assert own.get(url).status_code == bare.get(url).status_code == httpx.codes.OK

            def with_client(client: httpx.Client) -> Callable[[], float]:
                many = range(calls)
                return lambda: seconds_of(lambda: [client.get(url) for _ in many]) / calls * 1e6

            return turns(with_client(own), with_client(bare), rounds=5 * ROUNDS)

    async def of_tasks(calls: int, **options: Any) -> tuple[float, float]:
        async with stage.app().aclient() as toll:
            fixed = {"authorization": f"Bearer {(await toll.token('road')).value}"}
            own = httpx.AsyncClient(auth=toll.auth("road"), **options)
            bare = httpx.AsyncClient(headers=fixed, **options)
            pairs = []
            for _ in range(5 * ROUNDS):
                took = []
                for client in (own, bare):
                    began = time.perf_counter()
                    for _ in range(calls):
                        await client.get(url)
                    took.append((time.perf_counter() - began) / calls * 1e6)
                pairs.append(took)
            return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)

    against = "the same client with a fixed header"
    return [
        Row("a call with httpx.Auth", against, "µs", *of_threads(50, verify=ca), "≤ 1.03"),
        Row(
            "a call with httpx.Auth, async",
            against,
            "µs",
            *asyncio.run(of_tasks(50, verify=ca)),
            "≤ 1.03",
        ),
        Row(
            "the same without a server",
            against,
            "µs",
            *of_threads(300, transport=httpx.MockTransport(nothing)),
            "reported",
        ),
        Row(
            "the same without a server, async",
            against,
            "µs",
            *asyncio.run(of_tasks(300, transport=httpx.MockTransport(anothing))),
            "reported",
        ),
    ]


def _single(stage: Stage) -> float:
    """Seconds that a single caller waits for a cold token."""
    return seconds_of(lambda: stage.app(cache="memory:").client().token("road"))


def crowd_of_tasks(stage: Stage) -> Row:
    """Tasks on a cold token against as many on one bare future of a single caller's length."""
    count = 10_000

    async def cold() -> tuple[float, int]:
        async with stage.app(cache="memory:").aclient() as toll:
            began = time.perf_counter()
            await asyncio.gather(*(toll.token("road") for _ in range(count)))
            return time.perf_counter() - began, toll.status().signatures

    async def bare(single: float) -> float:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(single, future.set_result, None)

        async def wait() -> None:
            await asyncio.shield(future)

        began = time.perf_counter()
        await asyncio.gather(*(wait() for _ in range(count)))
        return time.perf_counter() - began

    spent = set()

    def ours() -> float:
        took, signatures = asyncio.run(cold())
        spent.add(signatures)
        return took

    pair = turns(ours, lambda: asyncio.run(bare(_single(stage))), rounds=2 * ROUNDS)
    name = f"{count:,} tasks on a cold token ({max(spent)} signature)"
    return Row(name, "as many on one bare future", "s", *pair, "≤ 1.3")


def crowd_of_threads(stage: Stage) -> Row:
    """As crowd_of_tasks, with threads."""
    count = 400
    spent = set()

    def crowd(wait: Callable[[], object]) -> float:
        everybody = [threading.Thread(target=wait) for _ in range(count)]

        def run() -> None:
            for each in everybody:
                each.start()
            for each in everybody:
                each.join()

        return seconds_of(run)

    def ours() -> float:
        client = stage.app(cache="memory:").client()
        took = crowd(lambda: client.token("road"))
        spent.add(client.status().signatures)
        return took

    def bare() -> float:
        event = threading.Event()
        threading.Timer(_single(stage), event.set).start()
        return crowd(event.wait)

    pair = turns(ours, bare, rounds=2 * ROUNDS)
    name = f"{count:,} threads on a cold token ({max(spent)} signature)"
    return Row(name, "as many on one bare event", "s", *pair, "≤ 1.3")


def crowds(stage: Stage) -> list[Row]:
    """Everybody on a cold token."""
    return [crowd_of_tasks(stage), crowd_of_threads(stage)]


def commands(stage: Stage) -> list[Row]:
    """The command line, warm and cold."""
    python = sys.executable
    cache = {"HSMTOLL_CACHE": f"file://{stage.folder}/cache"}
    stage.command(python, "-m", "hsmtoll", "token", "road", **cache)
    stage.command(python, "-c", "import click, pydantic_settings")
    warm = turns(
        lambda: stage.command(python, "-m", "hsmtoll", "token", "road", **cache) * 1000,
        lambda: stage.command(python, "-c", "import click, pydantic_settings") * 1000,
        rounds=3 * ROUNDS,
    )
    by_hand = HERE / "by_hand.py"
    cold = turns(
        lambda: (
            stage.command(python, "-m", "hsmtoll", "token", "road", HSMTOLL_CACHE="memory:") * 1000
        ),
        lambda: stage.command(python, str(by_hand), stage.who.key_label) * 1000,
        rounds=3 * ROUNDS,
    )
    return [
        Row("hsmtoll token, warm", "import click, pydantic_settings", "ms", *warm, "≤ 1.25"),
        Row("hsmtoll token, cold", "the same calls by hand", "ms", *cold, "≤ 1.15"),
    ]


def two_hundred(stage: Stage) -> Row:
    """The chain out of 200 certificates against openssl on the same set."""
    from datetime import UTC, datetime

    from cryptography.hazmat.primitives.serialization import Encoding

    from hsmtoll.sandbox import pki
    from hsmtoll.x509 import leaf_choice
    from hsmtoll.x509.certificate import Certificate

    others = [pki.unrelated_ca(f"Rot {number}") for number in range(197)]
    every = [*others[:100], *stage.who.chain, *others[100:]]
    ders = [each.public_bytes(Encoding.DER) for each in every]
    pems = b"".join(each.public_bytes(Encoding.PEM) for each in every)
    (stage.folder / "all.pem").write_bytes(pems)
    (stage.folder / "leaf.pem").write_bytes(stage.who.chain[0].public_bytes(Encoding.PEM))
    (stage.folder / "root.pem").write_bytes(stage.who.chain[2].public_bytes(Encoding.PEM))
    now = datetime.now(UTC)
    leaf = Certificate.load(stage.who.chain[0].public_bytes(Encoding.DER))

    def ours() -> float:
        pool = [Certificate.load(der) for der in ders]
        return (
            seconds_of(lambda: leaf_choice.checked([leaf], pool, identity="eseal", now=now)) * 1000
        )

    def bare() -> float:
        return stage.command(
            "openssl", "verify", "-CAfile", str(stage.folder / "root.pem"),
            "-untrusted", str(stage.folder / "all.pem"), str(stage.folder / "leaf.pem"),
        ) * 1000  # fmt: skip

    return Row(
        "the chain out of 200 certificates", "openssl verify", "ms", *turns(ours, bare), "≤ 50 ms"
    )


def scopes(stage: Stage) -> list[Row]:
    """Cost of a held token as more of them are held."""
    rows = []
    with stage.app().client() as client:
        token = client.token("road")
        token_service = client._token_service
        held = token_service.cache._tokens
        alone = dict(held)

        def one(of: dict[TokenRequest, AccessToken]) -> float:
            held.clear()
            held.update(of)
            return seconds_of(lambda: [client.token("road") for _ in range(5000)]) / 5000 * 1e6

        for count in (10, 100, 1000):
            more = [token_service.request(f"toll:eu/movement/x{number}") for number in range(count)]
            many = alone | dict.fromkeys(more, token)
            both = turns(partial(one, many), partial(one, alone), rounds=2 * ROUNDS)
            rows.append(Row(f"client.token() among {count} held", "alone", "µs", *both, "flat"))
    return rows


def main() -> int:
    """Run what was asked for; write the JSON and print the table."""
    every: dict[str, Callable[[Stage], Any]] = {
        "assertions": assertions,
        "held": held_token,
        "auth": bearing,
        "crowds": crowds,
        "commands": commands,
        "chain": two_hundred,
        "scopes": scopes,
        "workers": hosted.workers,
        "host": hosted.host,
        "network": hosted.network,
        "kept": hosted.kept,
        "proxy": proxied.proxy,
        "renewal": growth.renewal,
        "signatures": growth.signatures,
        "processes": growth.processes,
        "audit": bounds.audit,
        "costs": bounds.costs,
    }
    # Many minutes: only where it is named.
    long: dict[str, Callable[[Stage], Any]] = {
        "slow-device": growth.slow_device,
        "audit-large": bounds.audit_large,
        "partition": bounds.partition,
        "memory": resident.memory,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *every, *long],
                        metavar="NAME", help=f"of {', '.join([*every, *long])}; none means all "
                        f"but {', '.join(long)}")  # fmt: skip
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE")
    given = parser.parse_args()
    # Minutes of measuring are not lost for a folder that is not there.
    given.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    series: list[Series] = []
    with tempfile.TemporaryDirectory() as folder, Sandbox(lifetime=7200) as sandbox:
        stage = Stage(Path(folder), sandbox)
        for name in given.names or every:
            print(f"{name} …", file=sys.stderr, flush=True)
            made = (every | long)[name](stage)
            for each in made if isinstance(made, list) else [made]:
                (rows if isinstance(each, Row) else series).append(each)
    results = {
        "schema": 1,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "rounds": ROUNDS,
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        "series": [asdict(each) for each in series],
    }
    given.json.write_text(
        json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    for drawn in plots.draw(series, given.json.with_suffix("")):
        print(f"drawn: {drawn}", file=sys.stderr)
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
