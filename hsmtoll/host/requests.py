"""
The two requests of a signing host, one coroutine each, and the signature that both need.

    grant ─┐
           ├─► sign: slot ► authorize ► intent ► on disk ► device ► result ► on disk ► not stopped?
    token ─┘    │
      └─ cache ─┴─ renewal, in a thread: sign ► Maskinporten ► Customs

No other request is decided between two awaits. A request that has begun is finished even if its
client disconnects.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hsmtoll.errors import HsmTollError
from hsmtoll.host.authorize import busy
from hsmtoll.signing.signer import new_jti

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from hsmtoll.clock import Clock
    from hsmtoll.host.audit import Audit
    from hsmtoll.host.authorize import Authorization, Authorizer, RequestContext
    from hsmtoll.host.group_commit import GroupCommit
    from hsmtoll.host.measures import Measures
    from hsmtoll.host.profiles import Profile, Profiles
    from hsmtoll.signing.grant import SignedGrant
    from hsmtoll.signing.signer import Signer
    from hsmtoll.token import AccessToken, TokenRequest

    Reply = dict[str, Any]

__all__ = ["Requests"]

_log = logging.getLogger("hsmtoll.host")

#: Seconds that a shutdown waits for requests that are being signed or recorded.
_SHUTDOWN_TIMEOUT: Final = 10.0


class Recorded(NamedTuple):
    """A signed grant, and the position and hash of its audit record."""

    grant: SignedGrant
    seq: int
    head: str


@dataclass(frozen=True, slots=True)
class Requests:
    """
    Serves the requests to one host, on its event loop. *deadline*: seconds that a request may
    wait for a device.
    """

    profiles: Profiles
    authorizer: Authorizer
    audit: Audit
    commit: GroupCommit
    clock: Clock
    deadline: float
    measures: Measures
    _tasks: set[asyncio.Task[Reply]] = field(default_factory=set)

    def begin(self, context: RequestContext) -> asyncio.Task[Reply]:
        """Start serving *context* as a task of its own, whose result is the reply."""
        serve = self.grant if context.mode == "grant" else self.token
        task = asyncio.create_task(serve(context))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Reply]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Retrieve it: after a disconnect nobody awaits the task.
            task.exception()

    # ------------------------------------------------------------------ the two requests

    async def grant(self, context: RequestContext) -> Reply:
        """A signed grant."""
        # A refusal does not wait for a slot; `_sign` authorizes again after the wait.
        authorization = self.authorizer.authorize(context, of="either")
        profile, request = self._profile_of(context, authorization)
        try:
            signed = await self._sign(profile, context, request, new_jti())
        except HsmTollError as exc:
            if not (exc.retryable and exc.scope == "attempt"):
                raise
            # The first signature showed which certificate belongs to the key: sign with that one.
            signed = await self._sign(profile, context, request, new_jti())
        grant, seq, head = signed
        return {
            "assertion": grant.assertion,
            "expires_in": max(0, grant.expires_at - int(self.clock.now().wall)),
            "jti": grant.jti,
            "audit": {"seq": seq, "head": head},
        }

    async def token(self, context: RequestContext) -> Reply:
        """A Customs token, from the cache or by a renewal that all waiting requests share."""
        authorization = self.authorizer.authorize(context, of="given")
        profile, request = self._profile_of(context, authorization)
        token = profile.cache.fresh_in_memory(request)
        if token is None:
            renewal = profile.app.renewal_by(self._audited(profile, context))
            token = await profile.cache.aget(request, lambda: renewal)
            authorization = self.authorizer.authorize(context, of="given")
            # After a reload the token may belong to another key or scope than the profile's.
            self._check_current(profile)
        return await self._release(authorization, token)

    async def _release(self, authorization: Authorization, token: AccessToken) -> Reply:
        """The reply with *token*, after its release was recorded on disk."""
        left = int(token.remaining(self.clock.now()))
        seq, head = self.audit.append(
            "release",
            **authorization.record,
            exp=int(token.expires_at.timestamp()),
            token_sha256=_sha256(token.value),
            outcome="released",
        )
        await self.commit.synced()
        self.authorizer.check_not_stopped()
        return {
            "access_token": token.value,
            "token_type": token.token_type,
            "expires_in": max(0, left),
            "scope": token.scope,
            "audit": {"seq": seq, "head": head},
        }

    def _profile_of(
        self, context: RequestContext, authorization: Authorization
    ) -> tuple[Profile, TokenRequest]:
        profile = self.profiles.get(context.request.profile)
        if profile is None:
            raise _changed()
        profile.check_ready()
        return profile, context.request.token_request(authorization.scope)

    def _check_current(self, profile: Profile) -> None:
        if self.profiles.get(profile.name) is not profile:
            raise _changed()

    # ------------------------------------------------------------------ the signature

    async def _sign(
        self, profile: Profile, context: RequestContext, request: TokenRequest, jti: str
    ) -> Recorded:
        """
        Sign one grant for *context*. It is authorized after the wait for a slot. The intent is on
        disk before the device is called, the result before the grant is returned.
        """
        until = asyncio.get_running_loop().time() + self.deadline
        async with profile.signing_slot(self.deadline):
            authorization = self.authorizer.authorize(
                context, of="either" if context.mode == "grant" else "signed"
            )
            self._check_current(profile)
            record = authorization.record | {"jti": jti}
            self.audit.append("intent", **record)
            await self.commit.synced()
            try:
                grant = await self._at_device(profile, context, request, jti, until)
            except Exception as exc:
                await self._record_failure(profile, record, exc)
                raise
            signed = self._record_grant(profile, record, grant)
            await self.commit.synced()
        self.authorizer.check_not_stopped()
        return signed

    async def _at_device(
        self,
        profile: Profile,
        context: RequestContext,
        request: TokenRequest,
        jti: str,
        until: float,
    ) -> SignedGrant:
        """Sign in a thread of the profile; give up if none is free by *until* (loop time)."""

        def sign() -> SignedGrant:
            self.authorizer.check_still_wanted(context)
            with self.measures.signing_seconds.labels(profile.name).time():
                return profile.app.signer.sign(request, jti=jti)

        try:
            future = profile.executor.submit(sign)
        except RuntimeError:
            # The executor was shut down while the intent was written.
            if not self.authorizer.ending:
                raise
            raise self.authorizer.unavailable(self.deadline) from None
        timer = asyncio.get_running_loop().call_at(until, future.cancel)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                raise
            raise self.authorizer.unavailable(self.deadline) from None
        finally:
            timer.cancel()

    async def _record_failure(
        self, profile: Profile, record: dict[str, Any], exc: Exception
    ) -> None:
        code = "unexpected"
        if isinstance(exc, HsmTollError):
            code = exc.code
            profile.health.failed(exc)
            self.measures.signatures.labels(profile.name).inc(exc.signed)
        _log_result("not signed", record, code)
        self.audit.append("result", **record, outcome=code)
        await self.commit.synced()

    def _record_grant(
        self, profile: Profile, record: dict[str, Any], grant: SignedGrant
    ) -> Recorded:
        self.measures.signatures.labels(profile.name).inc()
        profile.health.signed()
        # With a kid there is no certificate to name.
        leaf = grant.identity if grant.not_after is not None else None
        profile.not_after = grant.not_after
        if leaf is not None and leaf != profile.leaf:
            profile.leaf = leaf
            self.audit.append("certificate", profile=profile.name, cert_sha256=leaf, outcome="used")
        _log_result("signed", record, "ok")
        stopped = self.authorizer.stopped()
        seq, head = self.audit.append(
            "result",
            **record,
            cert_sha256=leaf,
            iat=grant.issued_at,
            exp=grant.expires_at,
            assertion_sha256=_sha256(grant.assertion),
            outcome="signed" if stopped is None else "signed, and withheld: stopped",
        )
        return Recorded(grant, seq, head)

    def _audited(self, profile: Profile, context: RequestContext) -> _AuditedSigner:
        """A signer for a renewal that was started by *context*."""
        return _AuditedSigner(
            profile.app.signer,
            partial(self._sign, profile, context),
            asyncio.get_running_loop(),
        )

    # ------------------------------------------------------------------ shutdown

    async def finish(self) -> None:
        """Refuse new signatures; wait until running requests are answered and recorded."""
        self.authorizer.ending = True
        for profile in self.profiles:
            profile.executor.shutdown(wait=False, cancel_futures=True)
            profile.wake_waiters()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_SHUTDOWN_TIMEOUT)
        left = tuple(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _AuditedSigner:
    """
    A Signer for a renewal's thread; it has each signature authorized and recorded on *loop*.
    """

    signer: Signer
    sign_recorded: Callable[[TokenRequest, str], Coroutine[None, None, Recorded]]
    loop: asyncio.AbstractEventLoop

    def known_identity(self) -> str | None:
        """As the profile's signer."""
        return self.signer.known_identity()

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """As Signer.sign; also raises the errors of authorization, of scope ``caller``."""
        signing = self.sign_recorded(request, jti)
        return asyncio.run_coroutine_threadsafe(signing, self.loop).result().grant

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """As the profile's signer."""
        return self.signer.rejected(grant, code)


def _log_result(event: str, record: dict[str, Any], outcome: str) -> None:
    """At DEBUG: the audit log has each signature, and is made to."""
    names = {name: record[name] for name in ("caller", "profile", "jti")}
    _log.debug(
        "%s: %s, jti %s: %s", event, names["caller"], names["jti"], outcome,
        extra={"event": event.replace(" ", "-"), **names},
    )  # fmt: skip


def _sha256(value: str) -> str:
    return hashlib.sha256(value.encode("ascii")).hexdigest()


def _changed() -> HsmTollError:
    return busy("the policy is being changed", "caller")
