"""
A caller on a device that takes 300 ms: calls while its token is renewed, as many with a fresh one,
and those while another thread waits as long and makes the same two requests by hand, in turns. A
process of its own, because its device is another module than the others'.

Prints a JSON: of each call when it began and how long it took, in seconds, and what went on.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
import time
from dataclasses import replace

import httpx

from hsmtoll.app import App
from hsmtoll.settings import load
from hsmtoll.tokens import records

_RENEWALS = 20
_DEVICE = 0.3


def _by_hand(assertion: str, context: ssl.SSLContext) -> None:
    time.sleep(_DEVICE)
    with httpx.Client(verify=context) as client:
        form = {
            "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
            "assertion": assertion,
        }
        subject = client.post(os.environ["HSMTOLL_ENDPOINTS__TOKEN"], data=form).json()
        form = {
            "grant_type": "token-exchange",
            "subject_token_type": "access_token",
            "subject_token": subject["access_token"],
        }
        url = f"{os.environ['HSMTOLL_ENDPOINTS__CUSTOMS']}/api/access/external/oauth/token"
        client.post(url, data=form).raise_for_status()


def main() -> None:
    calls: list[tuple[float, float, str]] = []
    context = ssl.create_default_context(cafile=os.environ["HSMTOLL_CA_FILE"])
    app = App(load(cache="memory:"))
    with app.client() as toll, toll.api("road") as road:
        token_service = app.token_service
        request = token_service.request("road")
        for _ in range(20):
            road.get("test-auth")

        def call(meanwhile: str) -> None:
            began = time.perf_counter()
            road.get("test-auth")
            calls.append((began, time.perf_counter() - began, meanwhile))

        for _ in range(_RENEWALS):
            token = toll.token("road")
            now = token_service.clock.now()
            ago = token.lifetime - 30.0
            then = now._replace(wall=now.wall - ago, boot=now.boot - ago)
            stale = replace(token, asked=then)
            identity = app.remembered.read()
            assert identity is not None
            key = token_service.cache.key(request, identity)
            value, ttl = records.written(key, stale, None, now=now)
            token_service.cache._store.put(key, value, ttl=ttl)
            token_service.cache._tokens[request] = stale
            count = 0
            while token_service.cache.fresh_in_memory(request) is None:
                call("renewal")
                count += 1
            for _ in range(count):
                call("nothing")
            work = threading.Thread(
                target=_by_hand, args=(app.signer.sign(request, jti="1").assertion, context)
            )
            work.start()
            while work.is_alive():
                call("by hand")
    began = calls[0][0]
    print(json.dumps([(at - began, took, meanwhile) for at, took, meanwhile in calls]))


if __name__ == "__main__":
    main()
