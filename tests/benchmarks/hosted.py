"""Signatures by more than one worker, and what a signing host adds to them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hsmtoll.testing.faults import Faults
from tests.benchmarks.stage import Row, Series, per_second, turns
from tests.kit import signing_host
from tests.soak.measure import children

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hsmtoll.app import App
    from tests.benchmarks.stage import Stage

CALLERS: Final = 32
SECONDS: Final = 4.0
_ACCOUNT: Final = 42_000

_NOTHING: Final = """
import asyncio, json, sys
from aiohttp import web

async def answer(request):
    await request.json()
    return web.json_response({})

async def main():
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.UnixSite(runner, sys.argv[1]).start()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def workers(stage: Stage) -> list[Row | Series]:
    """Isolated workers against as many processes of the C loop; two are the row."""
    mine, theirs = {}, {}
    for count in (1, 2, 3, 4):
        app = stage.app(hsm={"isolation": "process"}, host={"workers": count})
        mine[count], theirs[count] = turns(
            partial(_of_threads, app, count),
            partial(stage.bare_signatures, SECONDS, count),
            rounds=5 if count == 2 else 3,
        )
        app.close()
    return [
        Row(
            "assertions of two isolated workers", "two C loops", "/s", mine[2], theirs[2], "≥ 0.80"
        ),
        Series("workers", "assertions of isolated workers", tuple(mine.items())),
        Series("workers", "C loops", tuple(theirs.items())),
    ]


def _of_threads(app: App, count: int) -> float:
    """Assertions a second of as many threads as there are workers."""
    signer, request = app.signer, app.token_service.request("road")
    signer.sign(request, jti="1")
    rates: list[float] = []
    every = [
        threading.Thread(
            target=lambda: rates.append(per_second(lambda: signer.sign(request, jti="1"), SECONDS))
        )
        for _ in range(count)
    ]
    for each in every:
        each.start()
    for each in every:
        each.join()
    return sum(rates)


def _ask(path: Path, request: bytes) -> bool:
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(str(path))
        one.sendall(request)
        reply = b""
        while part := one.recv(65536):
            reply += part
    return reply.startswith(b"HTTP/1.1 200")


def _crowd(
    path: Path,
    request: bytes,
    *,
    callers: int = CALLERS,
    rate: float = 0.0,
    seconds: float = SECONDS,
) -> tuple[float, list[float]]:
    """
    Replies a second and how long each took, of *callers* that are accounts of their own; each as
    fast as it is answered, or all together *rate* times a second at random.
    """
    reading = []
    for number in range(callers):
        ours, theirs = os.pipe()
        if os.fork() == 0:
            took = []
            try:
                os.setgroups([])
                os.setgid(_ACCOUNT + number)
                os.setuid(_ACCOUNT + number)
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    if rate:
                        time.sleep(random.expovariate(rate / callers))
                    began = time.perf_counter()
                    if _ask(path, request):
                        took.append(time.perf_counter() - began)
            finally:
                with os.fdopen(theirs, "w") as pipe:
                    json.dump(took, pipe)
                os._exit(0)
        os.close(theirs)
        reading.append(ours)
    every: list[float] = []
    for each in reading:
        with os.fdopen(each) as pipe:
            every += json.load(pipe)
    for _ in reading:
        os.wait()
    return len(every) / seconds, every


def _cpu(process: int) -> float:
    """Seconds of CPU of a process and its children."""
    ticks = 0
    for each in (process, *children(process)):
        fields = Path(f"/proc/{each}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        # utime and stime are 14 and 15 of proc(5), counted from the state, which is 3.
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def network(stage: Stage) -> list[Row]:
    """
    A device of 10 ms that signs in parallel, as an HSM in the network does: with as many workers
    as C loops that ask it directly.
    """
    if os.geteuid() != 0:
        print("network: callers of 32 accounts need root; left out", file=sys.stderr)
        return []
    entries = [signing_host.entry(f"uid:{_ACCOUNT + number}") for number in range(CALLERS)]
    rows = []
    with Faults(stage.device.module, stage.folder / "network-faults") as faults:
        faults.set("slow", function="C_Sign", ms=10)
        environ = stage.environ | faults.environ()
        for count in (1, 4, 8):
            with signing_host.make_host(environ, *entries, faults=faults) as running:
                running.start(HSMTOLL_HOST__WORKERS=str(count))
                running.open_to_all()
                grant = signing_host.raw_request()
                mine, bare = turns(
                    lambda: _crowd(running.socket, grant)[0],  # noqa: B023 - used at once
                    partial(stage.bare_signatures, SECONDS, count, faults),
                    rounds=3,
                )
            rows.append(
                Row(
                    f"signing host, device of 10 ms, workers: {count}",
                    f"C loops: {count}", "/s", mine, bare, "≥ 0.90",
                )
            )  # fmt: skip
    return rows


def host(stage: Stage) -> list[Row]:
    """Grants and tokens over the Unix socket, policy and audit on."""
    if os.geteuid() != 0:
        print("host: callers of 32 accounts need root; left out", file=sys.stderr)
        return []
    entries = [signing_host.entry(f"uid:{_ACCOUNT + number}") for number in range(CALLERS)]
    rows = []
    with Faults(stage.device.module, stage.folder / "host-faults") as faults:
        for count in (1, 2):
            with signing_host.make_host(stage.environ, *entries, faults=faults) as running:
                running.start(HSMTOLL_HOST__WORKERS=str(count))
                running.open_to_all()
                grant = signing_host.raw_request()
                assert running.process is not None
                before = _cpu(running.process.pid)
                runs = [_crowd(running.socket, grant) for _ in range(3)]
                spent = _cpu(running.process.pid) - before
                mine = statistics.median(rate for rate, _ in runs)
                bare = statistics.median(stage.bare_signatures(SECONDS, count) for _ in range(3))
                rows.append(
                    Row(
                        f"signing host, {('one worker', 'two workers')[count - 1]}, "
                        f"{CALLERS} callers, grants",
                        ("one C loop", "two C loops")[count - 1],
                        "/s",
                        mine,
                        bare,
                        "reported",
                    )
                )
                if count == 1:
                    grants = sum(len(took) for _, took in runs)
                    rows.append(
                        Row("its CPU for a grant", "a signature of the C loop", "ms",
                            spent / grants * 1000, 1000 / bare, "reported")
                    )  # fmt: skip
                    _, took = _crowd(running.socket, grant, callers=1, rate=1.0, seconds=20.0)
                    rows.append(
                        Row("its median at one grant a second", "a signature of the C loop", "ms",
                            statistics.median(took) * 1000, 1000 / bare, "reported")
                    )  # fmt: skip
                    load = [_crowd(running.socket, grant, rate=0.8 * mine)[1] for _ in range(3)]
                    rows.append(
                        Row(
                            "its p99 at 80 % load",
                            "its median",
                            "ms",
                            statistics.median(sorted(took)[len(took) * 99 // 100] for took in load)
                            * 1000,
                            statistics.median(statistics.median(took) for took in load) * 1000,
                            "≤ 5",
                        )
                    )
                    rows += _tokens(stage, running.socket, *entries)
    return rows


@contextlib.contextmanager
def _empty_handler(stage: Stage) -> Iterator[Path]:
    """The socket of a server that does nothing, of the library that the signing host uses."""
    where = stage.folder / "nothing.sock"
    argv = [sys.executable, "-c", _NOTHING, str(where)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as empty:
        assert empty.stdout is not None
        empty.stdout.readline()
        yield where
        empty.terminate()


def _tokens(stage: Stage, path: Path, *entries: str) -> list[Row]:
    """Held tokens, for callers of which each one connects anew."""
    # Both sides close after a reply, as the signing host does by itself.
    plain = signing_host.raw_request("/v1/token")
    request = plain.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    stage.folder.chmod(0o755)
    what = "signing host, held tokens, releases audited"
    return _releases(
        stage, path, entries, lambda each: _crowd(each, request, callers=8)[0], what, "reported"
    )


def kept(stage: Stage) -> list[Row]:
    """Held tokens as a program on curl's library asks for them: one connection, one by one."""
    if shutil.which("curl") is None:
        print("kept: needs curl; left out", file=sys.stderr)
        return []
    requests = int(os.environ.get("TOLL_BENCH_REQUESTS", "1000"))
    what = "signing host, held tokens, curl on one kept connection"
    with signing_host.make_host(stage.environ) as running:
        running.start()
        one = partial(_curl, stage, requests=requests)
        return _releases(stage, running.socket, (), one, what, "≥ 0.50")


def _curl(stage: Stage, path: Path, *, requests: int) -> float:
    """Replies a second to one curl, with its start, which all sides pay."""
    config = stage.folder / "curl.conf"
    config.write_text('url = "http://localhost/v1/token"\noutput = "/dev/null"\n' * requests)
    argv = [
        *("curl", "-sS", "-K", str(config), "--unix-socket", str(path)),
        *("-H", "Content-Type: application/json", "-d", json.dumps(signing_host.ROAD)),
        *("-w", "%{http_code} %{num_connects}\n"),
    ]
    began = time.perf_counter()
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    took = time.perf_counter() - began
    assert done.stdout == "200 1\n" + "200 0\n" * (requests - 1), done.stdout[:200]
    return requests / took


def _releases(
    stage: Stage,
    path: Path,
    entries: Sequence[str],
    rate: Callable[[Path], float],
    what: str,
    goal: str,
) -> list[Row]:
    """
    Held tokens, with each release written down, against a server that does nothing and against the
    same host with a log that is in memory: the audit has no switch. *rate* is measured of a socket.
    """
    with (
        _empty_handler(stage) as where,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
        signing_host.make_host(stage.environ, *entries) as other,
    ):
        where.chmod(0o666)
        other.start(HSMTOLL_HOST__AUDIT_DIR=f"{memory}/audit")
        other.open_to_all()
        for each in (path, other.socket):
            rate(each)
        rates = [[rate(each) for each in (path, where, other.socket)] for _ in range(3)]
    mine, nothing, unsynced = (statistics.median(each) for each in zip(*rates, strict=True))
    return [
        Row(what, "an empty aiohttp handler", "/s", mine, nothing, goal),
        Row(what, "the same with the audit in memory", "/s", mine, unsynced, "reported"),
    ]
