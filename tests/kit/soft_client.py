"""
A client without a device, for rooms where the device is not the question.

`SoftSigner` makes real assertions with a key in memory, and counts them. It belongs to the
tests alone: a signer in software is what the package exists to replace.
"""

from __future__ import annotations

import base64
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll import jws
from hsmtoll.clock import Skew, SystemClock
from hsmtoll.remembered import PersistedText
from hsmtoll.sandbox.pki import Authority, eseal_authority
from hsmtoll.signing.grant import LIFETIME, Grant, SignedGrant
from hsmtoll.tokens.cache import Cache
from hsmtoll.tokens.exchange import Endpoints
from hsmtoll.tokens.rate_limit import RateLimit
from hsmtoll.tokens.renewal import Renewal
from hsmtoll.tokens.stores import MemoryStore, Store
from hsmtoll.tokens.token_service import Counts, TokenService
from hsmtoll.transport import HttpClient

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from hsmtoll.clock import Clock
    from hsmtoll.token import TokenRequest


@lru_cache
def authority() -> Authority:
    """The one authority that the signers of this run are certified by."""
    return eseal_authority()


class SoftSigner:
    """Signs in memory. *hold*, if given, is waited for before each signature."""

    def __init__(
        self, audience: str, *, clock: Clock, skew: Skew, hold: threading.Event | None = None
    ) -> None:
        self._key, self._x5c, self._who = identity()
        self._audience = audience
        self._clock = clock
        self._skew = skew
        self._hold = hold
        self.signed: list[str] = []

    def known_identity(self) -> str | None:
        return self._who if self.signed else None

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        del grant, code
        return False

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        if self._hold is not None:
            assert self._hold.wait(30)
        now = int(self._clock.now().wall + self._skew.seconds)
        grant = Grant("RS256", "acme", self._audience, request, x5c=self._x5c)
        unsigned = grant.unsigned(now=now, jti=jti)
        self.signed.append(jti)
        signature = self._key.sign(unsigned, padding.PKCS1v15(), hashes.SHA256())
        assertion = jws.compact(unsigned, signature)
        return SignedGrant(assertion, jti, request.scope, now, now + LIFETIME, self._who, None)


@lru_cache
def identity(
    key: rsa.RSAPrivateKey | None = None,
) -> tuple[rsa.RSAPrivateKey, tuple[str, ...], str]:
    """A key, the chain that certifies it as x5c carries it, and the leaf's SHA-256."""
    if key is None:
        key = rsa.generate_private_key(65537, 2048)
    leaf = authority().issue(key.public_key())
    chain = (leaf, *authority().chain)
    x5c = tuple(base64.b64encode(each.public_bytes(Encoding.DER)).decode() for each in chain)
    return key, x5c, leaf.fingerprint(hashes.SHA256()).hex()


class Listening(Protocol):
    """As much of a sandbox as an engine needs to know."""

    @property
    def issuer(self) -> str: ...
    @property
    def token_endpoint(self) -> str: ...
    @property
    def customs(self) -> str: ...
    @property
    def ca_file(self) -> Path: ...

    def trust(self, authority: Authority, /) -> None: ...


def endpoints_of(sandbox: Listening) -> Endpoints:
    """Where *sandbox* listens."""
    return Endpoints(sandbox.issuer, sandbox.token_endpoint, sandbox.customs)


def token_service_of(
    sandbox: Listening,
    *,
    clock: Clock | None = None,
    store: Store | None = None,
    skew_file: Path | None = None,
    identity_file: Path | None = None,
    selector: str = "selector",
    background: bool = True,
    cache_deadline: float = 30.0,
    per_hour: int = 1000,
    per_request: int = 2,
    hold: threading.Event | None = None,
    **http_client: Any,
) -> tuple[TokenService, SoftSigner]:
    """An engine that speaks to *sandbox* with a signer of its own; and the signer."""
    sandbox.trust(authority())
    clock = clock or SystemClock()
    store = store if store is not None else MemoryStore()
    skew = Skew(skew_file)
    signer = SoftSigner(sandbox.issuer, clock=clock, skew=skew, hold=hold)
    made = HttpClient(ca_file=sandbox.ca_file, **http_client)
    counts, remembered = Counts(), PersistedText(identity_file)
    renewal = Renewal(
        signer=signer,
        endpoints=endpoints_of(sandbox),
        http_client=made,
        rate_limit=RateLimit(store, clock, per_hour=per_hour),
        clock=clock,
        skew=skew,
        selector=selector,
        remembered=remembered,
        counts=counts,
        per_request=per_request,
    )
    token_service = TokenService(
        lambda: renewal,
        endpoints=endpoints_of(sandbox),
        http_client=lambda: made,
        cache=Cache(
            store,
            clock,
            selector=selector,
            remembered=remembered,
            deadline=cache_deadline,
            background=background,
        ),
        clock=clock,
        skew=skew,
        counts=counts,
        family="eseal",
    )
    return token_service, signer
