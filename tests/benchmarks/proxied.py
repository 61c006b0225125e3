"""`hsmtoll proxy` against a bare reverse proxy of the same libraries, before the same server."""

from __future__ import annotations

import contextlib
import http.client
import os
import statistics
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsmtoll.sandbox import pki
from tests.benchmarks.stage import ROUNDS, Row
from tests.kit.own_device import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.benchmarks.stage import Stage

CALLERS: Final = 8
SECONDS: Final = 2.0
UPLOAD: Final = 10 * 1024 * 1024
PATH: Final = "/api/movement/road/v2/test-auth"

#: Customs, as far as a token and a call need one, in a process of its own.
_CUSTOMS: Final = """
import asyncio, ssl, sys
from aiohttp import web

async def answer(request):
    async for _ in request.content.iter_any():
        pass
    if request.path.endswith("/oauth/token"):
        issued = {"access_token": "x" * 800, "token_type": "Bearer", "expires_in": 3600}
        return web.json_response(issued)
    return web.json_response({})

async def main():
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[2])
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1]), ssl_context=context).start()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

#: The same two libraries, streaming both ways, with a fixed bearer and no rules.
_BARE: Final = """
import asyncio, sys
import httpx
from aiohttp import web

async def main():
    client = httpx.AsyncClient(verify=sys.argv[3], limits=httpx.Limits(max_connections=20))

    async def answer(request):
        hop = (b"host", b"connection")
        headers = [(n, v) for n, v in request.raw_headers if n.lower() not in hop]
        headers.append((b"Authorization", b"Bearer " + b"x" * 800))
        body = request.content.iter_any() if request.body_exists else None
        url = sys.argv[2] + request.raw_path
        sent = httpx.Request(request.method, url, headers=headers, content=body)
        answer = await client.send(sent, stream=True)
        given = [(n.decode(), v.decode()) for n, v in answer.headers.raw]
        response = web.StreamResponse(status=answer.status_code, headers=given)
        await response.prepare(request)
        async for part in answer.aiter_raw():
            await response.write(part)
        await response.write_eof()
        await answer.aclose()
        return response

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.contextmanager
def customs(stage: Stage) -> Iterator[str]:
    """The address of Customs, in a process of its own."""
    certificate, key = pki.issue_tls()
    pem = stage.folder / "customs.pem"
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem.write_bytes(pki.pem(certificate) + secret)
    port = free_port()
    with running("-c", _CUSTOMS, str(port), str(pem)):
        yield f"https://localhost:{port}"


def proxy(stage: Stage) -> list[Row]:
    """Requests a second and their 99th percentile, and a large upload."""
    with contextlib.ExitStack() as stack:
        ours, bare = free_port(), free_port()
        origin = stack.enter_context(customs(stage))
        ca = str(stage.sandbox.ca_file)
        stack.enter_context(running("-c", _BARE, str(bare), origin, ca))
        listen = ("-m", "hsmtoll", "proxy", "--listen", f"127.0.0.1:{ours}")
        stack.enter_context(running(*listen, HSMTOLL_ENDPOINTS__CUSTOMS=origin))
        for port in (ours, bare):
            _calls(port, 0.5)
        rates: dict[int, list[float]] = {ours: [], bare: []}
        slowest: dict[int, list[float]] = {ours: [], bare: []}
        uploads: dict[int, list[float]] = {ours: [], bare: []}
        for _ in range(ROUNDS):
            for port in (ours, bare):
                took = _calls(port, SECONDS)
                rates[port].append(len(took) / SECONDS)
                slowest[port].append(statistics.quantiles(took, n=100)[98] * 1000)
                uploads[port].append(_upload(port))
    middle = statistics.median
    what, against = f"hsmtoll proxy, GET, {CALLERS} callers", "a bare reverse proxy"
    return [
        Row(what, against, "/s", middle(rates[ours]), middle(rates[bare]), "≥ 0.80"),
        Row(f"{what}: p99", against, "ms", middle(slowest[ours]), middle(slowest[bare]), "≤ 1.5"),
        Row(
            "hsmtoll proxy, upload of 10 MiB", against, "MiB/s",
            middle(uploads[ours]), middle(uploads[bare]), "≥ 0.80",
        ),
    ]  # fmt: skip


@contextlib.contextmanager
def running(*argv: str, **environ: str) -> Iterator[int]:
    """The id of a Python process that says when it listens, until the end of the block."""
    with subprocess.Popen(
        [sys.executable, *argv], env=os.environ | environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "ready" in line or "listening" in line:
                    break
            else:
                raise RuntimeError(f"{argv[:2]} ended before it listened")
            # A log that nobody reads would stop its writer.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield process.pid
        finally:
            process.kill()


def _calls(port: int, seconds: float) -> list[float]:
    """Seconds of each call of all callers, each on a connection of its own."""
    took: list[float] = []
    until = time.perf_counter() + seconds

    def caller() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        with contextlib.closing(connection):
            while (began := time.perf_counter()) < until:
                connection.request("GET", PATH)
                response = connection.getresponse()
                assert response.status == http.client.OK, response.read()
                response.read()
                took.append(time.perf_counter() - began)

    threads = [threading.Thread(target=caller) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def _upload(port: int) -> float:
    """MiB a second of one large body."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        began = time.perf_counter()
        connection.request("POST", PATH, b"x" * UPLOAD)
        response = connection.getresponse()
        assert response.status == http.client.OK, response.read()
        response.read()
        return UPLOAD / 1024**2 / (time.perf_counter() - began)
