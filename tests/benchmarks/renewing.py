"""
A caller on a device that takes 300 ms: calls while its token is renewed, and as many with a fresh
one, in turns. A process of its own, because its device is another module than the others'.

Prints a JSON: of each call when it began and how long it took, in seconds, and whether a renewal
was under way.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import hsmtoll
from hsmtoll import records

_RENEWALS = 20


def main() -> None:
    calls: list[tuple[float, float, bool]] = []
    with hsmtoll.connect(cache="memory:") as toll, toll.api("road") as road:
        engine = toll._engine
        request = engine.request("road")
        for _ in range(20):
            road.get("test-auth")

        def call(*, renewing: bool) -> None:
            began = time.perf_counter()
            road.get("test-auth")
            calls.append((began, time.perf_counter() - began, renewing))

        for _ in range(_RENEWALS):
            token = toll.token("road")
            now = engine.clock.now()
            ago = token.lifetime - 30.0
            then = now._replace(wall=now.wall - ago, boot=now.boot - ago)
            stale = replace(token, asked=then)
            key = engine.key(request)
            engine.cache._store.put(key, records.token(key, stale), ttl=30.0)
            engine.cache._tokens[request] = stale
            count = 0
            while engine.cache.held(request) is None:
                call(renewing=True)
                count += 1
            for _ in range(count):
                call(renewing=False)
    began = calls[0][0]
    print(json.dumps([(at - began, took, renewing) for at, took, renewing in calls]))


if __name__ == "__main__":
    main()
