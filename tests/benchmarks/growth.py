"""What a call costs while a token is renewed, as users grow, and where the device is slow."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.sandbox.server import Sandbox
from hsmtoll.testing.faults import Faults
from hsmtoll.testing.identity import introduce
from tests.benchmarks.stage import ROUNDS, Row, Series
from tests.lab import listens

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.stage import Stage

#: Seconds of a run with renewals that the plot shows.
_SHOWN: Final = 1.4

_ONE: Final = """
import json, sys, time
import hsmtoll
settings = json.loads(sys.argv[1])
client = hsmtoll.connect(**settings)
began = time.process_time()
client.token("road")
first = time.process_time() - began
began = time.process_time()
for _ in range(5000):
    client.token("road")
print(json.dumps([first * 1e3, (time.process_time() - began) / 5000 * 1e6]))
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
    same two requests by hand.
    """
    with Faults(stage.device.module, stage.folder / "renewal-faults") as faults:
        faults.set("slow", function="C_SignInit", ms=300)
        argv = [sys.executable, "-m", "tests.benchmarks.renewing"]
        done = subprocess.run(
            argv, env={**os.environ, **faults.environ()}, check=True, capture_output=True, text=True
        )
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
    """What one of many programs pays for a token that another one has put into the cache."""
    rows = []
    key = stage.folder / "cache.key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    socket = stage.folder / "redis.sock"
    argv = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", ""]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, cwd=stage.folder) as redis:
        while not listens(socket):
            time.sleep(0.05)
        for kind, told, counts in (
            ("file", {"cache": f"file://{stage.folder}/shared"}, (1, 8, 64)),
            ("Redis", {"cache": f"unix://{socket}", "cache_key_file": str(key)}, (1, 8)),
        ):
            rows += _shared(stage, kind, told, counts)
        redis.terminate()
    return rows


def _shared(stage: Stage, kind: str, told: dict[str, Any], counts: tuple[int, ...]) -> list[Row]:
    del stage
    argv = [sys.executable, "-c", _ONE, json.dumps(told)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    rows: list[Row] = []
    alone = 0.0
    for count in counts:
        said = []
        # One by itself is one sample: as many of them as rounds elsewhere.
        for _ in range(ROUNDS if count == 1 else 1):
            running = [
                subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(count)
            ]
            said += [json.loads(each.communicate()[0]) for each in running]
        first = statistics.median(each[0] for each in said)
        alone = alone or first
        name = f"first token from one {kind} cache, {count} process(es), CPU"
        rows.append(Row(name, "one process", "ms", first, alone, "flat"))
    return rows


def slow_device(stage: Stage) -> Row:
    """Fifty programs on a device of one signature a second, with tokens that live 20 s."""
    seconds = float(os.environ.get("TOLL_BENCH_SECONDS", "600"))
    cache = f"file://{stage.folder}/slow"
    with (
        Sandbox(lifetime=20) as sandbox,
        Faults(stage.device.module, stage.folder / "slow-faults") as faults,
    ):
        introduce(sandbox, stage.who)
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
