"""Customs tokens of a signing host that renews itself (HSMTOLL_SIGNER__MODE=token)."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from hsmtoll.errors import HsmTollError, PolicyDenied, sanitized
from hsmtoll.http_messages import Post
from hsmtoll.signing.signing_host import audit_place, object_in, request_body
from hsmtoll.token import AccessToken
from hsmtoll.tokens.exchange import read_issued
from hsmtoll.tokens.renewal import with_retries

if TYPE_CHECKING:
    from hsmtoll.clock import Clock
    from hsmtoll.signing.remote import FailoverHosts
    from hsmtoll.signing.signing_host import SigningHost
    from hsmtoll.token import TokenRequest
    from hsmtoll.tokens.exchange import Issued
    from hsmtoll.tokens.single_flight import PendingRenewal

__all__ = ["RemoteTokens"]

_log = logging.getLogger(__name__)


class RemoteTokens:
    """
    Customs tokens from a signing host, which does the whole renewal; *attempts* at most.

    A token is opaque and cannot be verified, so only the authenticated connection proves its
    origin.
    """

    def __init__(
        self, hosts: FailoverHosts, *, profile: str, clock: Clock, attempts: int = 2
    ) -> None:
        self.hosts = hosts
        self._profile = profile
        self._clock = clock
        self._attempts = attempts

    def known_identity(self) -> str | None:
        """None: the identity is known only after the first token."""
        return None

    def renew(self, request: TokenRequest, pending: PendingRenewal) -> AccessToken:
        """Obtain a token from a signing host. Raises as `SigningHost.ask`."""
        pending.phase = "the signing host"

        def attempt(_: int) -> AccessToken:
            asked = self._clock.now()
            issued = self.hosts.first(partial(self._asked, request))
            pending.identity = self.hosts.provisional_identity()
            return AccessToken(issued.value, request.scope, asked, issued.expires_in)

        return with_retries(attempt, attempts=self._attempts, clock=self._clock)

    def _asked(self, request: TokenRequest, host: SigningHost) -> Issued:
        answer = host.ask("token", request_body(self._profile, request))
        body = object_in(answer)
        post = Post(host.name, "", {}, "")
        try:
            issued = read_issued(answer, post)
        except HsmTollError as exc:
            raise PolicyDenied(
                str(exc), hint="this is no signing host, or one of a version not known here",
                code="answer-unusable",
            ) from None  # fmt: skip
        if body.get("scope") != request.scope:
            raise PolicyDenied(
                f"{host.name}: its token is for {sanitized(body.get('scope'))}, not "
                f"{sanitized(request.scope)}",
                hint="nothing was sent on; ask the host's custodian",
                code="token-scope",
            )
        _log.info("%s gave a token, audit=%s", host.name, audit_place(body))
        return issued
