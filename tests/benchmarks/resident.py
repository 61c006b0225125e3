"""What processes hold at rest, and whether many requests add to it."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Final

from tests.benchmarks import proxied
from tests.benchmarks.stage import Row
from tests.kit import signing_host
from tests.kit.own_device import free_port
from tests.soak import measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.stage import Stage

_STEPS: Final = 10

#: Calls of an API, as many as each line of its input says.
_CLIENT: Final = """
import sys, httpx, hsmtoll
url, ca = sys.argv[1:3]
toll = hsmtoll.connect(cache="memory:")
with toll, httpx.Client(auth=toll.auth("road"), verify=ca) as http:
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            http.get(url).raise_for_status()
        print("done", flush=True)
"""


def memory(stage: Stage) -> list[Row]:
    """A client, `hsmtoll proxy`, a signing host and its worker, each as a process of its own."""
    requests = int(os.environ.get("TOLL_BENCH_REQUESTS", "100000"))
    with proxied.customs(stage) as origin:
        return [
            *_client(stage, origin, requests),
            *_proxy(origin, requests),
            *_host(stage, requests),
        ]


def _client(stage: Stage, origin: str, requests: int) -> list[Row]:
    with subprocess.Popen(
        [sys.executable, "-c", _CLIENT, origin + proxied.PATH, str(stage.sandbox.ca_file)],
        env=os.environ | {"HSMTOLL_ENDPOINTS__CUSTOMS": origin},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        given, printed = process.stdin, process.stdout
        assert printed.readline() == "ready\n"

        def ask(count: int) -> None:
            given.write(f"{count}\n")
            given.flush()
            assert printed.readline() == "done\n"

        rows = _rows(ask, requests, {"a client": process.pid})
        given.close()
    return rows


def _proxy(origin: str, requests: int) -> list[Row]:
    port = free_port()
    listen = ("-m", "hsmtoll", "proxy", "--listen", f"127.0.0.1:{port}")
    with (
        proxied.running(*listen, HSMTOLL_ENDPOINTS__CUSTOMS=origin) as process,
        closing(http.client.HTTPConnection("127.0.0.1", port)) as connection,
    ):

        def ask(count: int) -> None:
            for _ in range(count):
                connection.request("GET", proxied.PATH)
                response = connection.getresponse()
                assert response.status == http.client.OK, response.read()
                response.read()

        return _rows(ask, requests, {"hsmtoll proxy": process})


def _host(stage: Stage, requests: int) -> list[Row]:
    with signing_host.make_host(stage.environ) as host:
        # Not forked from a process that has imported more than a host needs.
        host.start(program=[sys.executable, "-m", "hsmtoll", "serve"])
        assert host.process is not None
        (worker,) = measure.children(host.process.pid)
        with closing(host.connect()) as connection:

            def ask(count: int) -> None:
                for _ in range(count):
                    reply = signing_host.exchange(
                        connection, "POST", "/v1/grant", json=signing_host.ROAD
                    )
                    assert reply.status == http.client.OK, reply.body

            measured = {"a signing host": host.process.pid, "its worker": worker}
            return _rows(ask, requests, measured)


def _rows(ask: Callable[[int], None], requests: int, measured: dict[str, int]) -> list[Row]:
    """
    Of each process by its id. At rest is after one request; the bytes of a request are those of
    the nine tenths after the first, in which pools and caches are filled.
    """
    ask(1)
    rest = {who: measure.memory(process) for who, process in measured.items()}
    points: dict[str, list[tuple[float, float]]] = {who: [] for who in measured}
    for step in range(1, _STEPS + 1):
        ask(requests // _STEPS)
        for who, process in measured.items():
            points[who].append((step * (requests // _STEPS), measure.memory(process)))
    return [
        Row(
            f"memory of {who} after {requests:,} requests, "
            f"{measure.slope(points[who]):.1f} bytes a request",
            "at rest", "MiB", points[who][-1][1] / 1024**2, rest[who] / 1024**2, "level",
        )
        for who in measured
    ]  # fmt: skip
