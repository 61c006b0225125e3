"""What one renewal does about its signature: rate limit, who signed, what is given back."""

from __future__ import annotations

import pytest

from hsmtoll.clock import Skew
from hsmtoll.errors import (
    CertificateError,
    DeviceError,
    HsmTollError,
    PinIncorrect,
    TryAgainLater,
    from_data,
)
from hsmtoll.remembered import PersistedText
from hsmtoll.signing.grant import SignedGrant
from hsmtoll.testing.clock import SettableClock
from hsmtoll.token import TokenRequest
from hsmtoll.tokens.exchange import TEST
from hsmtoll.tokens.rate_limit import RateLimit
from hsmtoll.tokens.renewal import Renewal
from hsmtoll.tokens.stores import MemoryStore
from hsmtoll.tokens.token_service import Counts
from hsmtoll.transport import HttpClient

ROAD = TokenRequest("toll:eu/movement/road/v2")


class Answering:
    """A signer that signs for *identity*, or says *why* it does not."""

    def __init__(self, *, identity: str = "me", why: HsmTollError | None = None) -> None:
        self.why = why
        self.identity = identity
        self.signed = 0

    def known_identity(self) -> str | None:
        return self.identity if self.signed else None

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        if self.why is not None:
            raise self.why
        self.signed += 1
        return SignedGrant("a.b.c", jti, request.scope, 0, 120, self.identity, None)

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        del grant, code
        return False


def renewal_of(signer: Answering, limit: RateLimit, clock: SettableClock) -> Renewal:
    return Renewal(
        signer=signer,
        endpoints=TEST,
        http_client=HttpClient(),
        rate_limit=limit,
        clock=clock,
        skew=Skew(),
        selector="settings",
        remembered=PersistedText(),
        counts=Counts(),
    )


@pytest.mark.parametrize(
    ("why", "spent"),
    [
        (TryAgainLater("no", code="quota", signed=False), False),
        (PinIncorrect("no"), False),
        (CertificateError("no"), False),
        (DeviceError("no", code="device-busy", signed=False), False),
        (DeviceError("no", code="a-code-of-tomorrow"), True),
        (from_data({"class": "DeviceError", "code": "device-busy"}), True),
    ],
)
def test_an_error_that_says_that_nothing_was_signed_spends_nothing(
    why: HsmTollError, *, spent: bool
) -> None:
    clock = SettableClock(1_800_000_000.0)
    limit = RateLimit(MemoryStore(), clock, per_hour=1)
    signer = Answering(why=why)
    renewal = renewal_of(signer, limit, clock)
    with pytest.raises(type(why)):
        renewal.sign(ROAD)
    signer.why = None
    if spent:
        with pytest.raises(TryAgainLater, match="the limit"):
            renewal.sign(ROAD)
    else:
        assert renewal.sign(ROAD).identity == "me"
    assert renewal.counts.signatures == 1


def test_what_was_signed_before_it_was_known_who_signs_is_counted_for_who_it_was() -> None:
    clock, store = SettableClock(1_800_000_000.0), MemoryStore()
    for _ in range(3):
        limit = RateLimit(store, clock, per_hour=3)
        renewal_of(Answering(), limit, clock).sign(ROAD)
    # Who remembers nothing is counted by the settings …
    with pytest.raises(TryAgainLater, match="3 signatures in the last hour"):
        renewal_of(Answering(), RateLimit(store, clock, per_hour=3), clock).sign(ROAD)
    # … and who signs with other settings by the same certificate finds them counted as well.
    with pytest.raises(TryAgainLater, match="3 signatures in the last hour"):
        RateLimit(store, clock, per_hour=3).acquire("me")
    # The control: another certificate has its own.
    RateLimit(store, clock, per_hour=3).acquire("another")
