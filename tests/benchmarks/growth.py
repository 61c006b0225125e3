"""What a call costs while a token is renewed, as users grow, and where the device is slow."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.sandbox.server import Sandbox
from hsmtoll.testing.faults import Faults
from hsmtoll.testing.identity import introduce
from tests.benchmarks.stage import Row
from tests.lab import listens

if TYPE_CHECKING:
    from tests.benchmarks.stage import Stage

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


def renewal(stage: Stage) -> Row:
    """Calls over TLS while a stale token is renewed in the background, and with a fresh one."""
    during: list[float] = []
    fresh: list[float] = []
    with stage.app(cache="memory:").client() as toll, toll.api("road") as road:
        engine = toll._engine
        request = engine.request("road")
        road.get("test-auth")
        for _ in range(30):
            token = toll.token("road")
            now = engine.clock.now()
            ago = token.lifetime - 30.0
            then = now._replace(wall=now.wall - ago, boot=now.boot - ago)
            stale = replace(token, asked=then)
            engine.cache._tokens[request] = stale
            count = 0
            while engine.cache.held(request) is None:
                began = time.perf_counter()
                road.get("test-auth")
                during.append(time.perf_counter() - began)
                count += 1
            for _ in range(count):
                began = time.perf_counter()
                road.get("test-auth")
                fresh.append(time.perf_counter() - began)
    slowest = [sorted(each)[int(len(each) * 0.99)] * 1000 for each in (during, fresh)]
    name = f"p99 of {len(during)} calls during renewals"
    return Row(name, "as many with a fresh token", "ms", slowest[0], slowest[1], "the same")


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
        running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        said = [json.loads(each.communicate()[0]) for each in running]
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
