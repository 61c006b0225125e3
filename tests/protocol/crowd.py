"""
One process of a crowd: gets a token through a shared store and says which.

    python crowd.py '{"environ": {…}, "step": null, "fork": false}'

It signs with a key in memory and tells each signature on stdout as a line ``signed``, the
token's hash as ``token …``. *step* is where it stops for good and says ``at STEP``: locked,
signed, granted, exchanged. With *fork* it leaves a child there, as servers do.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from hsmtoll import jws
from hsmtoll.client import TollClient
from hsmtoll.clock import Skew, SystemClock
from hsmtoll.errors import HsmTollError
from hsmtoll.remembered import PersistedText
from hsmtoll.signing.grant import LIFETIME, Grant, SignedGrant
from hsmtoll.tokens.cache import Cache
from hsmtoll.tokens.exchange import Endpoints
from hsmtoll.tokens.rate_limit import RateLimit
from hsmtoll.tokens.redis_store import RedisStore
from hsmtoll.tokens.renewal import Renewal
from hsmtoll.tokens.stores import FileStore, Store
from hsmtoll.tokens.token_service import Counts, TokenService
from hsmtoll.transport import HttpClient

if TYPE_CHECKING:
    from hsmtoll.http_messages import HttpResponse, Post
    from hsmtoll.token import TokenRequest

ORDER: dict[str, Any] = json.loads(sys.argv[1])


def reached(step: str) -> None:
    """Stop here for good, if this is the step that was ordered."""
    if ORDER.get("step") != step:
        return
    if ORDER.get("fork"):
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        say(f"child {child}")
    say(f"at {step}")
    time.sleep(600)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Signer:
    """As SoftSigner, with the key and the chain that it was given."""

    def __init__(self, skew: Skew, clock: SystemClock) -> None:
        self._skew = skew
        self._clock = clock

    def known_identity(self) -> str | None:
        return None

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        del grant, code
        return False

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        reached("locked")
        key = serialization.load_pem_private_key(ORDER["key"].encode(), None)
        assert isinstance(key, rsa.RSAPrivateKey)
        say("signed")
        grant = Grant("RS256", "acme", ORDER["issuer"], request, x5c=tuple(ORDER["x5c"]))
        now = int(self._clock.now().wall + self._skew.seconds)
        unsigned = grant.unsigned(now=now, jti=jti)
        signature = key.sign(unsigned, padding.PKCS1v15(), hashes.SHA256())
        reached("signed")
        assertion, who = jws.compact(unsigned, signature), str(ORDER["identity"])
        return SignedGrant(assertion, jti, request.scope, now, now + LIFETIME, who, None)


class Stopping(HttpClient):
    """The real wire, which may stop after a token request."""

    def post(self, post: Post) -> HttpResponse:
        answer = super().post(post)
        reached({"Maskinporten": "granted", "Customs": "exchanged"}[post.server])
        return answer


def store(clock: SystemClock) -> Store:
    url = ORDER["cache"]
    if url.startswith("file://"):
        return FileStore(Path(url.removeprefix("file://")))
    return RedisStore.at(url, key_file=Path(ORDER["cache_key_file"]), ca_file=None, clock=clock)


def main() -> int:
    clock, skew = SystemClock(), Skew()
    kept = store(clock)
    http_client = Stopping(ca_file=Path(ORDER["ca_file"]))
    endpoints = Endpoints(ORDER["issuer"], ORDER["token"], ORDER["customs"])
    selector, counts = ORDER.get("selector", "selector"), Counts()
    remembered = PersistedText(Path(ORDER["state"]))
    renewal = Renewal(
        signer=Signer(skew, clock),
        endpoints=endpoints,
        http_client=http_client,
        rate_limit=RateLimit(kept, clock, per_hour=1000),
        clock=clock,
        skew=skew,
        selector=selector,
        remembered=remembered,
        counts=counts,
    )
    token_service = TokenService(
        lambda: renewal,
        endpoints=endpoints,
        http_client=lambda: http_client,
        cache=Cache(
            kept,
            clock,
            selector=selector,
            remembered=remembered,
            deadline=ORDER.get("deadline", 60),
            background=False,
        ),
        clock=clock,
        skew=skew,
        counts=counts,
        family="eseal",
    )
    say("ready")
    if ORDER.get("wait"):
        sys.stdin.readline()
    try:
        token = TollClient(token_service).token("road")
    except HsmTollError as exc:
        say(f"failed {exc.exit_code} {exc}")
        return exc.exit_code
    say(f"token {hashlib.sha256(token.value.encode()).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
