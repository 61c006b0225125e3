"""
One request from its door to the device: policy, stop and quota, the intent on disk, the signature,
the result. Synchronous; every method may be called from any thread.

    look ──► queue for the device ──► decide + intent ──► synced ──► sign ──► result ──► reply
      └─ no ──► refused                  └─ no ──► refused

Bytes to sign never enter, and HTTP stays at the doors.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import uuid
from base64 import b64decode
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

from hsmtoll import jws
from hsmtoll.app import App
from hsmtoll.clock import Skew, SystemClock
from hsmtoll.errors import (
    ClockError,
    ConfigurationError,
    DeviceError,
    HsmTollError,
    PolicyDenied,
    TryAgainLater,
    UsageError,
    foreign,
)
from hsmtoll.host.audit import Audit
from hsmtoll.host.brake import check_stop_directory, needed, stop_file, stopped_by
from hsmtoll.host.policy import Ask, Policy, Verdict, decide
from hsmtoll.host.system import clock_is_synchronised
from hsmtoll.settings import load
from hsmtoll.signer import SecondChoice, readable
from hsmtoll.tokens import TokenRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from hsmtoll.cache import Flight
    from hsmtoll.clock import Clock
    from hsmtoll.host.peers import Peer
    from hsmtoll.host.policy import Mode
    from hsmtoll.renewal import Engine
    from hsmtoll.settings import Settings

__all__ = ["SELF_TEST", "Service"]

_log = logging.getLogger("hsmtoll.host")

#: What is signed before anything else is. Without a dot it is no JWS, so it can be no grant.
SELF_TEST: Final = jws.SigningInput(b"hsmtoll signing host self-test, not a grant")

#: Refusals of one account that are written down in a minute; more are counted, so that nobody
#: who may have nothing can fill the disk that signing depends on.
_REFUSALS: Final = 60
_MINUTE: Final = 60.0

#: How often a caller starts again whose wait was for a renewal that another one was denied.
_TRIES: Final = 4

#: Orders on their way at once for each worker of a device: one is being signed.
_AHEAD: Final = 4

#: Seconds that a caller waits for the first self-test.
_FIRST: Final = 15.0

#: Seconds after which it is worth asking a host again that is stopped by its device or clock.
_SOON: Final = 5.0


@dataclass(slots=True, eq=False)
class _Order:
    """One request on its way. *denied* is what the policy said no with, once it has."""

    peer: Peer
    ask: Ask
    mode: Mode
    gone: Callable[[], bool]
    verdict: Verdict | None = None
    policy_sha256: str = ""
    denied: HsmTollError | None = None

    def members(self) -> dict[str, Any]:
        """What every record about it says."""
        ask, verdict = self.ask, self.verdict
        options = {"mode": self.mode, "consumer_org": ask.consumer_org, "resource": ask.resource}
        return {
            "caller": (verdict and verdict.caller) or self.peer.account,
            "profile": foreign(ask.profile),
            "scope": (verdict and verdict.scope) or foreign(ask.scope),
            "options": options,
            "policy_sha256": self.policy_sha256,
        }


@dataclass(frozen=True, slots=True)
class _Signed:
    """An assertion and what the audit says of it."""

    assertion: str
    jti: str
    exp: int
    seq: int
    head: str


@dataclass(slots=True, eq=False)
class _House:
    """
    What one profile, *table* in the policy, signs with. *gate* is its device's door; *lane* is
    before it, for a few more, whose records are on the way to the disk while the device signs.
    """

    name: str
    table: Mapping[str, Any]
    app: App
    engine: Engine
    lane: threading.BoundedSemaphore
    gate: threading.BoundedSemaphore
    proven: bool = False
    leaf: str | None = None
    why: str = "the self-test has not been done yet"


class _Uncorrected(Skew):
    """The host never corrects its clock: one that is wrong is the custodian's to mend."""

    def learn(self, offset: float) -> bool:
        """Nothing is learned."""
        del offset
        return False


class _Withdrawn(UsageError):
    """
    The caller who led a renewal was denied. A usage error, because the cache remembers none: those
    who waited with it have rights of their own.
    """


class Service:
    """
    One host. *profile* and *config* are those that the settings came from; profiles of the policy
    lie above them. *synchronised* says whether the clock is kept, *clock* is for tests.

    Raises ConfigurationError for a policy that cannot be used, AuditBroken for an audit that
    cannot be continued.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        config: str | os.PathLike[str] | None = None,
        profile: str | None = None,
        clock: Clock | None = None,
        synchronised: Callable[[], bool] = clock_is_synchronised,
    ) -> None:
        host = settings.host
        self.clock = clock or SystemClock()
        self._load = partial(load, config=config, profile=profile)
        self._path = needed(host.policy, "policy")
        self._stop_file = stop_file(settings)
        self._synchronised = synchronised if host.clock == "synchronised" else lambda: True
        self._deadline = settings.deadline
        self._ending = False
        self._here = threading.local()
        self._lock = threading.Lock()
        self._refusals: dict[str, tuple[float, int]] = {}
        self._was_stopped: str | None = None
        self._looked = threading.Event()
        self.signatures = 0
        policy, houses = self._read({})
        self._rules = (policy, houses)
        self.audit = Audit(
            needed(host.audit_dir, "audit_dir"),
            needed(host.audit_key, "audit_key"),
            now=lambda: self.clock.now().wall,
        )
        self.audit.write("start", policy_sha256=policy.sha256, outcome="started")

    # ------------------------------------------------------------------ rules

    def _read(self, known: Mapping[str, _House]) -> tuple[Policy, dict[str, _House]]:
        policy = Policy.load(self._path)
        if os.geteuid() != 0 and os.access(self._path, os.W_OK):
            _log.warning(
                "policy %s: this daemon's own account may change it; let another one own it",
                foreign(self._path),
            )
        check_stop_directory(self._stop_file)
        houses = {}
        for name, table in policy.profiles.items():
            house = known.get(name)
            same = house is not None and house.table == table
            houses[name] = house if house and same else self._house(name, table)
        return policy, houses

    def _house(self, name: str, table: Mapping[str, Any]) -> _House:
        try:
            for each in ("scope", "consumer_org", "resource"):
                if each in table:
                    raise ConfigurationError(
                        f"{each} is a caller's to name, and its entry's to allow"
                    )
            settings = self._load(**table)
            if settings.signer.url:
                raise ConfigurationError("HSMTOLL_SIGNER__URL is for callers: this is the host")
            if "isolation" not in settings.hsm.model_fields_set:
                hsm = settings.hsm.model_copy(update={"isolation": "process"})
                settings = settings.model_copy(update={"hsm": hsm})
            app = App(settings, clock=self.clock, new_jti=lambda: str(self._here.jti))
            app.skew = _Uncorrected()
            if app.family == "norwegian" and settings.iss is None:
                raise ConfigurationError("iss is required with identity = norwegian")
            app.module(app.uris()[0])
            _ = app.endpoints
            house = _House(
                name,
                table,
                app,
                engine=app.engine_with(lambda: _Audited(self, house)),
                lane=threading.BoundedSemaphore(_AHEAD * settings.host.workers),
                gate=threading.BoundedSemaphore(settings.host.workers),
            )
        except HsmTollError as exc:
            raise ConfigurationError(
                f"policy {self._path}: profile {foreign(name)}: {exc}", hint=exc.hint, code=exc.code
            ) from exc
        return house

    def reload(self) -> str | None:
        """Read the policy again; what is wrong with it, if it is: then the old one goes on."""
        before, known = self._rules
        try:
            policy, houses = self._read(known)
        except HsmTollError as exc:
            _log.error("policy not reloaded, the old one goes on: %s", exc)
            with contextlib.suppress(HsmTollError):
                self.audit.write("policy", policy_sha256=before.sha256, outcome=f"kept: {exc}")
            return str(exc)
        with self.audit.held():
            seq, _ = self.audit.append("policy", policy_sha256=policy.sha256, outcome="loaded")
            self._rules = (policy, houses)
        self.audit.sync(seq)
        for name, house in known.items():
            if houses.get(name) is not house:
                house.app.close()
        _log.info("policy reloaded: %s", policy.sha256)
        return None

    # ------------------------------------------------------------------ requests

    def grant(self, peer: Peer, ask: Ask, *, gone: Callable[[], bool]) -> dict[str, Any]:
        """The reply to /v1/grant; raises what the doors turn into an error reply."""
        order = _Order(peer, ask, "grant", gone)
        house, request = self._look(order)
        try:
            signed = self._signed(house, order, request)
        except DeviceError as exc:
            if exc.code != "leaf-guessed":
                raise
            # The signature showed which certificate it is; the next one is for that.
            signed = self._signed(house, order, request)
        return {
            "assertion": signed.assertion,
            "expires_in": max(0, signed.exp - int(self.clock.now().wall)),
            "jti": signed.jti,
            "audit": {"seq": signed.seq, "head": signed.head},
        }

    def token(self, peer: Peer, ask: Ask, *, gone: Callable[[], bool]) -> dict[str, Any]:
        """The reply to /v1/token: held, or renewed once for all who wait."""
        order = _Order(peer, ask, "token", gone)
        for _ in range(_TRIES):
            house, request = self._look(order)
            cache = house.engine.cache
            try:
                token = cache.held(request) or cache.get(
                    request, _Source(self, house, order, request)
                )
            except _Withdrawn:
                if order.denied is not None:
                    raise order.denied from None
                continue
            break
        else:
            raise _busy("another caller's renewal was denied again and again")
        left = int(token.remaining(self.clock.now()))
        with self.audit.held():
            self._decide(order, of="given")
            seq, head = self.audit.append(
                "release",
                **order.members(),
                exp=int(token.expires_at.timestamp()),
                token_sha256=_sha256(token.value),
                outcome="released",
            )
        self.audit.sync(seq)
        return {
            "access_token": token.value,
            "token_type": token.token_type,
            "expires_in": max(0, left),
            "scope": token.scope,
            "audit": {"seq": seq, "head": head},
        }

    def refuse(self, exc: HsmTollError, account: str) -> None:
        """Write down that somebody was turned away before it could be asked who may what."""
        self._note(account, {"caller": account, "policy_sha256": self._rules[0].sha256}, exc)

    # ------------------------------------------------------------------ deciding

    def _look(self, order: _Order) -> tuple[_House, TokenRequest]:
        """A first look, so that nobody queues for the device who will be refused there."""
        verdict = self._decide(order, of="either" if order.mode == "grant" else "given")
        house = self._rules[1].get(order.ask.profile)
        if house is None:
            raise _busy("the policy is being changed")
        if not house.proven:
            # Who comes to a socket that the manager holds is there before the first self-test.
            self._looked.wait(_FIRST)
        if not house.proven:
            raise DeviceError(
                f"profile {foreign(order.ask.profile)}: not ready, {house.why}",
                hint="it is tried again by itself",
                code="not-ready",
                retry_after=_SOON,
            )
        ask = order.ask
        return house, TokenRequest(verdict.scope, ask.resource, ask.consumer_org)

    def _decide(self, order: _Order, *, of: Any) -> Verdict:
        """The verdict, if it is yes; otherwise the refusal, which is written down and raised."""
        with self.audit.held():
            policy = self._rules[0]
            profile = order.ask.profile
            names = order.peer.names & policy.callers.keys()
            counts = {name: self.audit.counts(name, profile, of=of) for name in names}
            verdict = decide(policy, order.peer, order.ask, order.mode, counts)
            order.verdict, order.policy_sha256 = verdict, policy.sha256
            denied = self._denied(policy, order, verdict)
            if denied is None:
                return verdict
        order.denied = denied
        self._note(order.peer.account, order.members(), denied)
        raise denied

    def _denied(self, policy: Policy, order: _Order, verdict: Verdict) -> HsmTollError | None:
        stopped = self.stopped()
        if stopped is not None:
            return _stopped(stopped)
        if verdict.quota:
            entry = policy.callers[verdict.caller].profiles[order.ask.profile]
            wait = self.audit.free_in(
                verdict.caller, order.ask.profile, minute=entry.per_minute, day=entry.per_day
            )
            return TryAgainLater(
                f"{verdict.caller}: {verdict.why}",
                hint=f"the next is free in {wait:.0f} s",
                code="quota",
                retry_after=wait,
            )
        if not verdict.allowed:
            return PolicyDenied(
                verdict.why,
                hint="ask who keeps the signing host's policy; `hsmtoll policy test` explains it",
                code="policy",
            )
        if self._ending:
            return _busy("the host is ending")
        if not self._clock_is_right(order.ask.profile):
            return _clock_is_wrong()
        return _left() if order.gone() else None

    def _clock_is_right(self, profile: str) -> bool:
        house = self._rules[1].get(profile)
        throw_away = house is not None and house.app.settings.environment == "sandbox"
        return throw_away or self._synchronised()

    def stopped(self) -> str | None:
        """Why nothing may be signed or released: the stop file, or that nobody can tell."""
        return stopped_by(self._stop_file)

    def _note(self, account: str, members: dict[str, Any], exc: HsmTollError) -> None:
        now = self.clock.now().boot
        with self._lock:
            if len(self._refusals) > 10 * _REFUSALS:
                self._refusals = {
                    who: seen for who, seen in self._refusals.items() if now < seen[0] + _MINUTE
                }
            since, count = self._refusals.get(account, (now, 0))
            left_out = 0
            if now >= since + _MINUTE:
                left_out, since, count = max(0, count - _REFUSALS), now, 0
            self._refusals[account] = (since, count + 1)
            if count >= _REFUSALS:
                return
        more = f" ({left_out} more before were not written down)" if left_out else ""
        # Not waited for on disk: nothing follows from it, and the critical section may be around.
        self.audit.append("refused", **members, outcome=f"{exc.code}: {exc}{more}")

    # ------------------------------------------------------------------ signing

    def _signed(self, house: _House, order: _Order, request: TokenRequest) -> _Signed:
        """
        One signature, with its intent before and its result after. The lane comes first: what is
        decided then is what counts, however long the wait was.
        """
        if not house.lane.acquire(timeout=self._deadline):
            raise _busy(f"no device was free within {self._deadline:g} s")
        try:
            jti = str(uuid.uuid4())
            with self.audit.held():
                self._decide(order, of="either" if order.mode == "grant" else "signed")
                seq, _ = self.audit.append("intent", **order.members(), jti=jti)
            self.audit.sync(seq)
            return self._asked(house, order, request, jti)
        finally:
            house.lane.release()

    def _asked(self, house: _House, order: _Order, request: TokenRequest, jti: str) -> _Signed:
        told = order.members() | {"jti": jti}
        outcome = "unexpected"
        try:
            assertion = self._sign(house, order, request, jti)
            outcome = "signed"
        except HsmTollError as exc:
            outcome = exc.code or type(exc).__name__
            raise
        finally:
            if outcome != "signed":
                self.audit.write("result", **told, outcome=outcome)
        header, claims, _ = assertion.split(".")
        leaf = _leaf_sha256(header)
        told["cert_sha256"] = leaf
        if leaf is not None and leaf != house.leaf:
            house.leaf = leaf
            self.audit.append("certificate", profile=house.name, cert_sha256=leaf, outcome="used")
        said = jws.read_segment(claims)
        seq, head = self.audit.write(
            "result",
            **told,
            iat=said["iat"],
            exp=said["exp"],
            assertion_sha256=_sha256(assertion),
            outcome="signed",
        )
        return _Signed(assertion, jti, said["exp"], seq, head)

    def _sign(self, house: _House, order: _Order, request: TokenRequest, jti: str) -> str:
        """The device's part. A stop is obeyed by those too who wait at its door already."""
        if not house.gate.acquire(timeout=self._deadline):
            raise _busy(f"no device was free within {self._deadline:g} s")
        try:
            stopped = self.stopped()
            if stopped is not None:
                raise _stopped(stopped)
            if order.gone():
                raise _left()
            self._here.jti = jti
            self.signatures += 1
            return house.app.signer.assertion(request)
        finally:
            house.gate.release()

    def assertion_for(self, house: _House, request: TokenRequest) -> str:
        """For a renewal: the order is that of the thread."""
        return self._signed(house, self._here.order, request).assertion

    def renew(self, house: _House, order: _Order, request: TokenRequest, flight: Flight) -> Any:
        """A new token, on behalf of *order*."""
        self._here.order = order
        try:
            return house.engine.renewed(request, flight)
        except HsmTollError as exc:
            if exc is order.denied:
                raise _Withdrawn("another caller's renewal was denied") from None
            raise
        finally:
            self._here.order = None

    # ------------------------------------------------------------------ state

    def prove(self) -> None:
        """
        Sign the self-test with every profile that has not yet: with any key of its list. What
        stands in the way is told by `not_ready`, and tried again with the next call.
        """
        try:
            self._prove_all()
        finally:
            self._looked.set()

    def _prove_all(self) -> None:
        if self.stopped() is not None:
            return
        for house in list(self._rules[1].values()):
            if house.proven or not self._clock_is_right(house.name):
                continue
            why: HsmTollError | None = None
            for device in house.app.devices:
                try:
                    self._prove(house.app, device)
                except HsmTollError as exc:
                    why = why or exc
                else:
                    house.proven = True
                    break
            if why is not None and not house.proven and house.why != str(why):
                house.why = str(why)
                _log.warning("profile %s: not ready: %s", foreign(house.name), why)

    def _prove(self, app: App, device: Any) -> None:
        signer = app.local_signer(device)
        if app.settings.kid is None:
            signer.chain()
        pool = [*readable(device.certificates()), *app.pem_certificates()]
        candidates = tuple({each.public_key for each in pool if each.public_key is not None})
        public = device.key(candidates=candidates).public
        keys = (public,) if public is not None else candidates
        alg = app.settings.alg
        self.signatures += 1
        signature = device.sign(alg, SELF_TEST, candidates=keys)
        if not any(key.verify(alg, SELF_TEST, signature) for key in keys):
            raise DeviceError(
                "self-test: the device's signature verifies with no public key that is known",
                hint="run `hsmtoll doctor`",
                code="signature-wrong",
            )

    def not_ready(self) -> list[str]:
        """Why grants are not to be had now, a line each; none if they are."""
        why = []
        stopped = self.stopped()
        if stopped is not None:
            why.append(f"stopped: {stopped}")
        if self.audit.broken is not None:
            why.append(f"audit: {self.audit.broken}")
        if self._ending:
            why.append("ending")
        for name, house in self._rules[1].items():
            if not self._clock_is_right(name):
                why.append(f"profile {foreign(name)}: the clock is not synchronised")
            elif not house.proven:
                why.append(f"profile {foreign(name)}: {foreign(house.why)}")
        return why

    def look_after(self) -> None:
        """What a timer does: seals, and notes when the stop came and went."""
        self.audit.seal_if_due()
        now = self.stopped()
        if now != self._was_stopped:
            self._was_stopped = now
            said = "resumed" if now is None else f"stopped: {now}"
            _log.warning("signing %s", said)
            self.audit.write("stop", policy_sha256=self._rules[0].sha256, outcome=said)

    def numbers(self) -> dict[str, float]:
        """For the metrics: name and value."""
        return {
            "ready": float(not self.not_ready()),
            "stopped": float(self.stopped() is not None),
            "audit_seq": float(self.audit.seq),
            "audit_writable": float(self.audit.broken is None),
            "clock_synchronised": float(self._synchronised()),
            "signatures_total": float(self.signatures),
        }

    def alive(self) -> None:
        """Returns as long as nothing holds the critical section for good."""
        with self.audit.held():
            pass

    def end(self) -> None:
        """From now on nothing new is signed; what is being signed goes on."""
        self._ending = True

    def close(self) -> None:
        """Let go of the devices, and seal the audit."""
        for house in self._rules[1].values():
            house.app.close()
        with contextlib.suppress(HsmTollError):
            self.audit.write("stop", policy_sha256=self._rules[0].sha256, outcome="ended")
        self.audit.close()


class _Audited:
    """The signer of a profile's renewals: no assertion without its records."""

    def __init__(self, service: Service, house: _House) -> None:
        self._service = service
        self._house = house

    def identity(self) -> str:
        """As Signer.identity; no signature is spent."""
        return self._house.app.signer.identity()

    def assertion(self, request: TokenRequest) -> str:
        """As Signer.assertion."""
        return self._service.assertion_for(self._house, request)

    @property
    def certificate_ends(self) -> datetime | None:
        """As of the signer behind."""
        return getattr(self._house.app.signer, "certificate_ends", None)

    @property
    def pin_state(self) -> str | None:
        """As of the signer behind."""
        return getattr(self._house.app.signer, "pin_state", None)

    def refused(self, code: str) -> bool:
        """As SecondChoice.refused."""
        signer = self._house.app.signer
        return isinstance(signer, SecondChoice) and signer.refused(code)

    def refused_lately(self) -> bool:
        """As SecondChoice.refused_lately."""
        signer = self._house.app.signer
        return isinstance(signer, SecondChoice) and signer.refused_lately()


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the cache gets a token from, on behalf of one caller."""

    service: Service
    house: _House
    order: _Order
    request: TokenRequest

    def key(self) -> str:
        """Of the store."""
        return self.house.engine.key(self.request)

    def fetch(self, flight: Flight) -> Any:
        """A new one."""
        return self.service.renew(self.house, self.order, self.request, flight)


def _sha256(value: str | bytes) -> str:
    raw = value.encode("ascii") if isinstance(value, str) else value
    return hashlib.sha256(raw).hexdigest()


@lru_cache(maxsize=32)
def _leaf_sha256(header: str) -> str | None:
    # The same kilobytes from grant to grant.
    x5c = jws.read_segment(header).get("x5c")
    return _sha256(b64decode(x5c[0])) if x5c else None


def _stopped(why: str) -> PolicyDenied:
    return PolicyDenied(
        f"signing is stopped: {why}",
        hint="its custodian has to resume it: `hsmtoll resume`",
        code="stopped",
    )


def _busy(why: str) -> TryAgainLater:
    return TryAgainLater(f"busy: {why}", hint="try again", code="busy", retry_after=1.0)


def _left() -> TryAgainLater:
    return _busy("the caller left")


def _clock_is_wrong() -> ClockError:
    return ClockError(
        "clock: the signing host's clock is not synchronised",
        hint="on the host: let NTP keep it; nothing is signed before",
        code="clock-unsynchronised",
        retry_after=_SOON,
    )
