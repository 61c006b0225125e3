"""What a call costs while a token is renewed, as users grow, and where the device is slow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsmtoll.sandbox.pki import issue_tls, pem
from hsmtoll.sandbox.server import Sandbox
from hsmtoll.testing.faults import Faults
from hsmtoll.testing.identity import register_identity
from tests.benchmarks.stage import ROUNDS, Row, Series
from tests.kit.own_device import listens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.benchmarks.stage import Stage

#: Seconds of a run with renewals that the plot shows.
_SHOWN: Final = 1.4

_ONE: Final = """
import hashlib, json, os, statistics, sys, threading, time
import hsmtoll

def by_hand():
    # In a thread, as there: who waits for a token has a deadline.
    reader = threading.Thread(target=read)
    reader.start()
    reader.join()

def read():
    for _ in range(4):
        os.stat(path), os.listdir(os.path.dirname(path))
        with open(path, "rb") as file:
            hashlib.sha256(file.read()).hexdigest()
        json.loads(json.dumps({str(number): [number] * 5 for number in range(20)}))

settings, path, ours, bare = json.loads(sys.argv[1]), sys.argv[2], [], []
for _ in range(20):
    with hsmtoll.connect(**settings) as client:
        for work, took in ((lambda: client.token("road"), ours), (by_hand, bare)):
            began = time.process_time()
            work()
            took.append(time.process_time() - began)
print(json.dumps([statistics.median(ours) * 1e3, statistics.median(bare) * 1e3]))
"""

_CALLER: Final = """
import sys, time
import hsmtoll
client = hsmtoll.connect(cache=sys.argv[1], budget__per_hour=100000, deadline=120)
until, calls = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < until:
    client.token("road")
    calls += 1
    time.sleep(0.05)
print(calls)
"""


def renewal(stage: Stage) -> list[Row | Series]:
    """
    Calls over TLS while a stale token is renewed in the background, on a device that takes long
    enough for many of them; against those with a fresh token, and those while a thread makes the
    same two requests by hand. The API is not the process that the tokens come from.
    """
    with (
        Faults(stage.device.module, stage.folder / "renewal-faults") as faults,
        _gateway(stage) as customs,
    ):
        faults.set("slow", function="C_SignInit", ms=300)
        argv = [sys.executable, "-m", "tests.benchmarks.renewing"]
        environ = {**os.environ, **faults.environ(), "HSMTOLL_ENDPOINTS__CUSTOMS": customs}
        done = subprocess.run(argv, env=environ, check=True, capture_output=True, text=True)
    calls = json.loads(done.stdout)
    took = {
        kind: sorted(took for _, took, during in calls if during == kind)
        for kind in ("renewal", "nothing", "by hand")
    }
    drawn = [
        Series(
            "renewal",
            name,
            tuple(
                (round(at, 4), round(took * 1000, 3))
                for at, took, during in calls
                if during == kind and at < _SHOWN
            ),
        )
        for kind, name in (("nothing", "with a fresh token"), ("renewal", "while it is renewed"))
    ]
    rows = []
    for name, part in (("median", 0.5), ("p99", 0.99)):
        of = {kind: each[int(len(each) * part)] * 1000 for kind, each in took.items()}
        what = f"{name} of {len(took['renewal']):,} calls during {_renewals(calls)} renewals"
        for kind, against, goal in (
            ("nothing", "with a fresh token", "the same"),
            ("by hand", "while the same two requests are made by hand", "reported"),
        ):
            row = f"of {len(took[kind]):,} {against}"
            rows.append(Row(what, row, "ms", of["renewal"], of[kind], goal))
    return [*rows, *drawn]


@contextlib.contextmanager
def _gateway(stage: Stage) -> Iterator[str]:
    certificate, key = issue_tls()
    own = stage.folder / "gateway.pem"
    own.touch(mode=0o600)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    own.write_bytes(secret + pem(certificate))
    argv = [sys.executable, "-m", "tests.benchmarks.gateway", str(own)]
    argv += [stage.sandbox.customs, str(stage.sandbox.ca_file)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        yield running.stdout.readline().strip()
        running.terminate()


def _renewals(calls: list[tuple[float, float, str]]) -> int:
    kinds = ["", *(kind for _, _, kind in calls)]
    return sum(now == "renewal" != before for before, now in pairwise(kinds))


def signatures(stage: Stage) -> list[Series]:
    """What a cold token costs the device: callers of one client, and each with one of its own."""

    async def cold(count: int) -> None:
        async with stage.app(**quick).aclient() as toll:
            await asyncio.gather(*(toll.token("road") for _ in range(count)))

    def alone(count: int) -> None:
        with stage.app(**quick).client() as toll:
            for _ in range(count):
                toll.token("road", renew=True)

    with Faults(stage.device.module, stage.folder / "spent-faults") as faults:
        # A process of its own, because the real module is loaded in this one.
        quick = {"cache": "memory:", "hsm": {"module": faults.module, "isolation": "process"}}

        def spent(count: int, work: Callable[[int], object]) -> tuple[int, int]:
            faults.reset_counts()
            work(count)
            return count, faults.count("C_SignInit")

        shared = [spent(n, lambda n: asyncio.run(cold(n))) for n in (1, 10, 100, 1000, 10_000)]
        each = [spent(n, alone) for n in (1, 10, 100, 1000)]
    return [
        Series("signatures", "hsmtoll", tuple(shared)),
        Series("signatures", "a grant for each of them", tuple(each)),
    ]


def processes(stage: Stage) -> list[Row]:
    """
    What one of many programs pays for a token that another one has put into the cache, against
    plain work of these programs: with more of them than cores, that costs more as well.
    """
    rows = []
    key = stage.folder / "cache.key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    socket = stage.folder / "redis.sock"
    argv = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", ""]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, cwd=stage.folder) as redis:
        while not listens(socket):
            time.sleep(0.05)
        for kind, arguments, counts in (
            ("file", {"cache": f"file://{stage.folder}/shared"}, (1, 8, 64)),
            ("Redis", {"cache": f"unix://{socket}", "cache_key_file": str(key)}, (1, 8)),
        ):
            rows += _shared(stage, kind, arguments, counts)
        redis.terminate()
    return rows


def _shared(
    stage: Stage, kind: str, arguments: dict[str, Any], counts: tuple[int, ...]
) -> list[Row]:
    read = stage.folder / "read-by-hand" / "file"
    read.parent.mkdir(exist_ok=True)
    read.write_bytes(b"a" * 1500)
    argv = [sys.executable, "-c", _ONE, json.dumps(arguments), str(read)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    rows: list[Row] = []
    for count in counts:
        seconds = []
        # One by itself is one sample: as many of them as rounds elsewhere.
        for _ in range(ROUNDS if count == 1 else 1):
            running = [
                subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(count)
            ]
            seconds += [json.loads(each.communicate()[0]) for each in running]
        ours, bare = (statistics.median(each) for each in zip(*seconds, strict=True))
        name = f"first token of a client, one {kind} cache, {count} process(es), CPU"
        rows.append(Row(name, "files read by hand, as many processes", "ms", ours, bare, "flat"))
    return rows


def slow_device(stage: Stage) -> Row:
    """Fifty programs on a device of one signature a second, with tokens that live 20 s."""
    seconds = float(os.environ.get("TOLL_BENCH_SECONDS", "600"))
    cache = f"file://{stage.folder}/slow"
    with (
        Sandbox(lifetime=20) as sandbox,
        Faults(stage.device.module, stage.folder / "slow-faults") as faults,
    ):
        register_identity(sandbox, stage.who)
        environ = {**os.environ, **stage.who.environ(), **sandbox.environ(), **faults.environ()}
        environ["HSMTOLL_BUDGET__PER_HOUR"] = "100000"
        faults.set("rate", ms=1000)
        faults.reset_counts()
        argv = [sys.executable, "-c", _CALLER, cache, str(seconds)]
        running = [
            subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, text=True)
            for _ in range(50)
        ]
        calls = sum(int(each.communicate()[0]) for each in running)
        signatures = faults.count("C_SignInit")
    name = f"calls of 50 programs in {seconds:g} s on a device of 1 signature a second"
    return Row(name, "signatures spent", "", float(calls), float(signatures), "reported")
