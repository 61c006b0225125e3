"""
A Signer backed by signing hosts; every grant is verified before use.

    first host that works ──► verification: claims, signature, owner ──► grant

Neither keys nor PINs are used here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hsmtoll.backoff import Backoff
from hsmtoll.errors import HsmTollError, sanitized
from hsmtoll.signing.signing_host import audit_place, object_in, request_body
from hsmtoll.signing.verification import Expected, verification_error, verify_grant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hsmtoll.clock import Clock, Skew
    from hsmtoll.signing.grant import SignedGrant
    from hsmtoll.signing.signing_host import SigningHost
    from hsmtoll.token import TokenRequest

__all__ = ["FailoverHosts", "RemoteSigner"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Scopes of errors after which the next host is tried: not after a refusal (policy, stop, quota),
#: and not after a host failed authentication or verification, which needs attention.
_FAILOVER_SCOPES: Final = ("device", "service", "attempt")

#: Seconds for which a host that failed is tried after the others: 1, 2, 4, … 10.
_MIN_BACKOFF: Final = 1.0
_MAX_BACKOFF: Final = 10.0


class FailoverHosts:
    """
    Several hosts in order of preference: the first one that works is used. A host that failed is
    tried after the others until its back-off has passed. If all have failed they are still tried:
    the token cache has the back-off for all. Logs one line for each change of host.
    """

    def __init__(self, hosts: Sequence[SigningHost], clock: Clock) -> None:
        self.all = tuple(hosts)
        self._clock = clock
        self._guard = threading.Lock()
        self._backoffs = [Backoff(_MIN_BACKOFF, _MAX_BACKOFF) for _ in self.all]
        self._in_use = 0

    def first(self, ask: Callable[[SigningHost], _T]) -> _T:
        """The result of *ask* for the first host that works; raises the first error if none."""
        now = self._clock.now().boot
        order = sorted(range(len(self.all)), key=lambda n: now < self._backoffs[n].until)
        failed: dict[int, HsmTollError] = {}
        for number in order:
            try:
                answer = ask(self.all[number])
            except HsmTollError as exc:
                if exc.scope not in _FAILOVER_SCOPES:
                    exc.signed |= any(each.signed for each in failed.values())
                    self._works(number, failed)
                    raise
                failed[number] = exc
                self._failed(number)
            else:
                self._works(number, failed)
                return answer
        first = failed[min(failed)]
        first.signed = any(each.signed for each in failed.values())
        raise first

    def _failed(self, number: int) -> None:
        with self._guard:
            self._backoffs[number].failed(self._clock.now().boot)

    def _works(self, number: int, failed: Mapping[int, HsmTollError]) -> None:
        with self._guard:
            self._backoffs[number].worked()
            changed, self._in_use = self._in_use != number, number
        if changed:
            why = failed[min(failed)] if failed else None
            _log.warning(
                "%s (%d of %d) signs now%s",
                self.all[number].name,
                number + 1,
                len(self.all),
                f": {why}" if why else "",
            )

    def provisional_identity(self) -> str:
        """
        A hash that identifies the signer in the cache while its certificate is not known: of the
        boot id and the sockets, so that tokens of other machines are never used here.
        """
        parts = [self._clock.now().boot_id]
        for host in self.all:
            if host.place is not None:
                with contextlib.suppress(OSError):
                    seen = host.place.parent.stat()
                    parts.append(f"{seen.st_dev}:{seen.st_ino}")
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class RemoteSigner:
    """
    Grants from signing hosts, each verified before it is returned.

    *hosts*: in order of preference. *skew*: difference to Maskinporten's clock. All hosts must sign
    for the same organisation while the process lives.
    """

    def __init__(
        self, hosts: FailoverHosts, *, profile: str, expected: Expected, clock: Clock, skew: Skew
    ) -> None:
        self.hosts = hosts
        self._profile = profile
        self._expected = expected
        self._clock = clock
        self._skew = skew
        self._guard = threading.Lock()
        self._identity: str | None = None
        self._organization: str | None = None
        self._used: deque[str] = deque(maxlen=1000)

    def known_identity(self) -> str | None:
        """The signer of the last verified grant; ``None`` before the first."""
        return self._identity

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """
        Request a grant and verify it. The host chooses the jti; *jti* is not sent. Raises as
        `SigningHost.ask` and `verify_grant`.
        """
        del jti
        return self.hosts.first(partial(self._verified_grant, request))

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """False: the host chooses the certificate."""
        del grant, code
        return False

    def _verified_grant(self, request: TokenRequest, host: SigningHost) -> SignedGrant:
        sent = self._clock.now()
        answer = host.ask("grant", request_body(self._profile, request))
        received = self._clock.now()
        body = object_in(answer)
        skew = self._skew.seconds
        grant, organization = verify_grant(
            body.get("assertion"),
            request,
            self._expected,
            # Measured with the boot clock: the wall clock may be set during the request.
            sent=received.wall + skew - max(0.0, received.boot - sent.boot),
            received=received.wall + skew,
            name=host.name,
        )
        self._accept(host, grant, organization, body)
        _log.info("%s signed jti=%s audit=%s", host.name, sanitized(grant.jti), audit_place(body))
        return grant

    def _accept(
        self,
        host: SigningHost,
        grant: SignedGrant,
        organization: str | None,
        body: Mapping[str, Any],
    ) -> None:
        with self._guard:
            known = self._organization
            if known is not None and organization not in (None, known):
                raise verification_error(
                    host.name,
                    f"it is signed for {sanitized(organization)}, grants before it for "
                    f"{sanitized(known)}; set HSMTOLL_SIGNER__ORGANIZATION to the right one",
                    "grant-organization",
                )
            if grant.jti in self._used or body.get("jti", grant.jti) != grant.jti:
                raise verification_error(
                    host.name, "its jti was used before, or is not the one it names", "grant-jti"
                )
            self._used.append(grant.jti)
            self._identity, self._organization = grant.identity, organization
