"""
One request from its door to the device: policy, stop and quota, the intent on disk, the signature,
the result.

    desk: look ──► a place at the device? ──► decide, intent ──► synced ──► the device's thread
            └─ no: refused     └─ no: wait                                      │ sign
                                          reply ◄── synced ◄── desk: result ◄───┘

What is decided and written is done in steps at the desk, one after the other. Bytes to sign never
enter, and HTTP stays at the doors.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.app import App
from hsmtoll.clock import Skew, SystemClock
from hsmtoll.errors import (
    AuditBroken,
    CertificateError,
    ClockError,
    ConfigurationError,
    DeviceError,
    HsmTollError,
    PinIncorrect,
    PinNotTried,
    PolicyDenied,
    TryAgainLater,
    UsageError,
    foreign,
)
from hsmtoll.host.audit import Audit
from hsmtoll.host.brake import check_stop_directory, needed, stop_file, stopped_by
from hsmtoll.host.desk import Desk
from hsmtoll.host.policy import Ask, Policy, Verdict, decide
from hsmtoll.host.system import clock_is_synchronised
from hsmtoll.hsm.device import SELF_TEST
from hsmtoll.settings import load
from hsmtoll.signer import new_jti, readable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from hsmtoll.cache import Flight
    from hsmtoll.clock import Clock
    from hsmtoll.engine import Engine
    from hsmtoll.errors import Scope
    from hsmtoll.grant import SignedGrant
    from hsmtoll.host.desk import Then
    from hsmtoll.host.peers import Peer
    from hsmtoll.host.policy import Mode
    from hsmtoll.settings import Settings
    from hsmtoll.tokens import AccessToken, TokenRequest

    Reply = dict[str, Any]

__all__ = ["SELF_TEST", "Service"]

_log = logging.getLogger("hsmtoll.host")

#: What is signed before anything else is. Without a dot it is no JWS, so it can be no grant.

#: Refusals of one account that are written down in a minute; more are counted, so that nobody
#: who may have nothing can fill the disk that signing depends on.
_REFUSALS: Final = 60
_MINUTE: Final = 60.0

#: How often a caller starts again whose wait was for a renewal that another one was denied.
_TRIES: Final = 4

#: Orders that have a place at a device for each of its workers: one is being signed, the others'
#: records are on the way to the disk meanwhile. What is decided about them is not looked at again.
_PLACES: Final = 4

#: Threads that fetch tokens from Maskinporten and Customs: one for each caller that may wait.
_FETCHING: Final = 144

#: Seconds that a reload waits for the self-test of what takes over: longer, and whoever the new
#: policy takes something away from would keep it.
_TAKING_OVER: Final = 10.0

#: Seconds between two self-tests of a device that failed: at first, and at the most.
_REST: Final = 5.0
_LONGEST_REST: Final = 60.0

#: What says that the device, its PIN or its certificate is not as it was when it proved itself.
_OF_DEVICE: Final = (CertificateError, DeviceError, PinIncorrect, PinNotTried)

#: Why a profile of the real services waits; /ready and the log say it to the custodian.
_CLOCK: Final = (
    "the clock is not synchronised: let NTP keep it, or set HSMTOLL_HOST__CLOCK=unchecked where "
    "the kernel does not know that something does"
)

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
        options: dict[str, Any] = {
            "mode": self.mode,
            "consumer_org": ask.consumer_org,
            "resource": ask.resource,
        }
        if ask.authorization_details:
            options["authorization_details"] = ask.authorization_details
        return {
            "caller": (verdict and verdict.caller) or self.peer.account,
            "profile": foreign(ask.profile),
            "scope": (verdict and verdict.scope) or foreign(ask.scope),
            "options": options,
            "policy_sha256": self.policy_sha256,
        }


@dataclass(slots=True, eq=False)
class _Errand:
    """
    One signature for an order, on its way to the device and back: until *until* (boot clock) it
    may wait for its turn there, which is *signing*. *again*: the device's first signature showed
    which certificate is its own.
    """

    house: _House
    order: _Order
    request: TokenRequest
    until: float
    reply: Future[Reply]
    jti: str = ""
    grant: SignedGrant | None = None
    signing: Future[None] | None = None
    again: bool = False


@dataclass(slots=True, eq=False)
class _House:
    """
    What one profile, *table* in the policy, signs with: *hands* are its threads, one for each
    worker of the device. *at_device* have one of its *places*; the others wait in order. Both are
    looked at in the critical section, and so is *retired*: the last one who leaves closes it.
    *proving* is held for a self-test, so that no two are signed at once. *ill*: why the device
    failed since, if it did. One that failed, or signed a self-test in vain, is tested again from
    *again* (boot clock) on, and after *rest*.
    """

    name: str
    table: Mapping[str, Any]
    app: App
    engine: Engine
    hands: ThreadPoolExecutor
    workers: int
    at_device: set[_Errand] = field(default_factory=set)
    waiting: deque[_Errand] = field(default_factory=deque)
    proving: threading.Lock = field(default_factory=threading.Lock)
    proven: bool = False
    retired: bool = False
    leaf: str | None = None
    why: str = "the self-test has not been done yet"
    ill: str | None = None
    again: float = 0.0
    rest: float = _REST

    @property
    def works(self) -> bool:
        """Whether it signed when it was asked last."""
        return self.proven and self.ill is None

    @property
    def places(self) -> int:
        """How many may be on their way to the device at once."""
        return _PLACES * self.workers


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
    lie above them. *synchronised* says whether the clock is kept, *clock* is for tests. *progress*
    is called often while the audit is read.

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
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        host = settings.host
        self.clock = clock or SystemClock()
        # A clock of its own, as a test sets it, is none that the device's process could compare.
        self._timed = clock is None
        self._load = partial(load, config=config, profile=profile)
        self._path = needed(host.policy, "policy")
        self._stop_file = stop_file(settings)
        self._synchronised = synchronised if host.clock == "synchronised" else lambda: True
        self._deadline = settings.deadline
        self._ending = False
        self._lock = threading.Lock()
        self._refusals: dict[str, tuple[float, int]] = {}
        self._was_stopped: str | None = None
        self._fetching = ThreadPoolExecutor(_FETCHING, "hsmtoll-fetch")
        self.signatures = 0
        policy, houses = self._read({})
        self._rules = (policy, houses)
        self.audit = Audit(
            needed(host.audit_dir, "audit_dir"),
            needed(host.audit_key, "audit_key"),
            now=lambda: self.clock.now().wall,
            noted=noted_checkpoint(settings),
            progress=progress,
        )
        self.audit.write("start", policy_sha256=policy.sha256, outcome="started")
        # A log without a seal is believed as long as there is nothing else in it.
        self.audit.seal()
        self._underway: set[Future[Reply]] = set()
        self._desk = Desk(self.audit, company=lambda: len(self._underway))

    def on_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """
        From now on what follows is run by *loop*, whose thread calls this and asks for grants;
        ``None``: by threads again. Nothing else about it changes.
        """
        self._desk.follow = loop.call_soon_threadsafe if loop is not None else None

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
            if house is not None and house.table == table:
                if house.app.certificate_file is not None:
                    house.app.certificate_file(afresh=True)
                houses[name] = house
            else:
                houses[name] = self._house(name, table)
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
            app = App(settings, clock=self.clock)
            app.skew = _Uncorrected()
            if app.family == "norwegian" and settings.iss is None:
                raise ConfigurationError("iss is required with identity = norwegian")
            app.module(app.uris()[0])
            app.isolated_in = {
                "program": "hsmtoll.host.worker",
                "rules": {
                    "policy": str(self._path.absolute()),
                    "profile": name,
                    "audience": app.endpoints.issuer,
                    "issuer": settings.iss,
                    "kid": settings.kid,
                    "certificate_sha256": settings.hsm.certificate_sha256,
                    "timed": self._timed,
                },
            }
            house = _House(
                name,
                table,
                app,
                engine=app.engine,
                hands=ThreadPoolExecutor(settings.host.workers, "hsmtoll-device"),
                workers=settings.host.workers,
            )
        except HsmTollError as exc:
            raise ConfigurationError(
                f"policy {self._path}: profile {foreign(name)}: {exc}", hint=exc.hint, code=exc.code
            ) from exc
        return house

    def reload(self) -> str | None:
        """
        Read the policy again; why the old one goes on, if it does: something is wrong with the
        new one, or the audit cannot be written. What takes over from a profile that works signs
        the self-test before, if it can soon.
        """
        known = self._rules[1]
        try:
            policy, houses = self._read(known)
        except HsmTollError as exc:
            return self._kept(exc)
        fresh = [house for name, house in houses.items() if known.get(name) is not house]
        self._prove_soon([each for each in fresh if each.name in known and known[each.name].works])
        try:
            with self.audit.held():
                seq, _ = self.audit.append("policy", policy_sha256=policy.sha256, outcome="loaded")
                self._rules = (policy, houses)
            self.audit.sync(seq)
        except AuditBroken as exc:
            # Nothing is signed any more, whichever of the two it would be with.
            return self._kept(exc)
        finally:
            used = self._rules[1]
            for house in (*known.values(), *fresh):
                if used.get(house.name) is not house:
                    self._desk.put(partial(self._retired, house), _unheard)
        _log.info("policy reloaded: %s", policy.sha256)
        return None

    def _kept(self, exc: HsmTollError) -> str:
        _log.error("policy not reloaded, the old one goes on: %s", exc)
        with contextlib.suppress(HsmTollError):
            sha256 = self._rules[0].sha256
            self.audit.write("policy", policy_sha256=sha256, outcome=f"kept: {exc}")
        return str(exc)

    def _prove_soon(self, houses: list[_House]) -> None:
        """
        Nobody is sent away who comes while they are proven, and who waits for the others' sake
        waits as long as that is soon. What takes longer goes on by itself.
        """
        if self.stopped() is None:
            proofs = [
                house.hands.submit(self._prove_house, house)
                for house in houses
                if self._clock_is_right(house)
            ]
            wait(proofs, min(self._deadline, _TAKING_OVER))

    # ------------------------------------------------------------------ requests

    def grant(self, peer: Peer, ask: Ask, *, gone: Callable[[], bool]) -> Future[Reply]:
        """The reply to /v1/grant; its exception is what the doors turn into an error reply."""
        order, reply = _Order(peer, ask, "grant", gone), self._begun()

        def asked() -> Then | None:
            errand = self._errand(*self._looked_at(order), order, reply)
            # Decided in this very section: not a second time.
            return self._written(errand) if self._is_placed(errand) else None

        self._desk.put(asked, reply.set_exception)
        return reply

    def _begun(self) -> Future[Reply]:
        reply = _promised()
        self._underway.add(reply)
        reply.add_done_callback(self._underway.discard)
        return reply

    def token(self, peer: Peer, ask: Ask, *, gone: Callable[[], bool]) -> Future[Reply]:
        """The reply to /v1/token: held, or renewed once for all who wait."""
        order, reply = _Order(peer, ask, "token", gone), self._begun()

        def asked() -> Then:
            house, request = self._looked_at(order)
            token = house.engine.cache.held(request)
            if token is not None:
                return self._released(order, token, reply)

            def never(task: Future[None]) -> None:
                if task.cancelled():
                    reply.set_exception(_ending())

            def fetch() -> None:
                task = self._fetching.submit(self._fetch, house, order, request, reply)
                # At the end, who has not got a thread will get none.
                task.add_done_callback(never)

            return fetch

        self._desk.put(asked, reply.set_exception)
        return reply

    def _fetch(
        self, house: _House, order: _Order, request: TokenRequest, reply: Future[Reply]
    ) -> None:
        """A token that is not held; in a thread that may wait."""

        def landed() -> Then:
            self._decide(order, of="given")
            if self._rules[1].get(order.ask.profile) is not house:
                # Had with another key, or for another scope, than its record would say.
                raise _changed()
            return self._released(order, token, reply)

        try:
            house, token = self._fetched(house, order, request)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the caller is told
            reply.set_exception(exc)
        else:
            self._desk.put(landed, reply.set_exception)

    def _fetched(
        self, house: _House, order: _Order, request: TokenRequest
    ) -> tuple[_House, AccessToken]:
        """A token, and whose it is: who starts again may find another house by that name."""
        for _ in range(_TRIES):
            try:
                return house, house.engine.cache.get(request, partial(_Audited, self, house, order))
            except _Withdrawn:
                if order.denied is not None:
                    raise order.denied from None
            with self.audit.held():
                house, request = self._looked_at(order)
        raise _busy("another caller's renewal was denied again and again")

    def _released(self, order: _Order, token: AccessToken, reply: Future[Reply]) -> Then:
        """A step's: that *order* is given *token*."""
        left = int(token.remaining(self.clock.now()))
        seq, head = self.audit.append(
            "release",
            **order.members(),
            exp=int(token.expires_at.timestamp()),
            token_sha256=_sha256(token.value),
            outcome="released",
        )
        said = {
            "access_token": token.value,
            "token_type": token.token_type,
            "expires_in": max(0, left),
            "scope": token.scope,
            "audit": {"seq": seq, "head": head},
        }
        return partial(self._handed_over, reply, said)

    def refuse(self, exc: HsmTollError, account: str) -> None:
        """Have written down that somebody was turned away before it could be asked who may what."""

        def note() -> None:
            self._note(account, {"caller": account, "policy_sha256": self._rules[0].sha256}, exc)

        self._desk.put(note, _unheard)

    # ------------------------------------------------------------------ deciding

    def _looked_at(self, order: _Order) -> tuple[_House, TokenRequest]:
        """A first look, so that nobody waits for the device who will be refused there."""
        verdict = self._decide(order, of="either" if order.mode == "grant" else "given")
        house = self._rules[1].get(order.ask.profile)
        if house is None:
            raise _changed()
        if not house.proven:
            raise DeviceError(
                f"profile {foreign(order.ask.profile)}: not ready, {house.why}",
                hint="it is tried again by itself",
                code="not-ready",
                retry_after=_SOON,
            )
        ask = order.ask
        return house, ask.request(verdict.scope)

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
                signed=False,
                scope="caller",
            )
        if not verdict.allowed:
            return PolicyDenied(
                verdict.why,
                hint="ask who keeps the signing host's policy; `hsmtoll policy test` explains it",
                code="policy",
                signed=False,
                scope="caller",
            )
        if self._ending:
            return _ending()
        if not self._clock_is_right(self._rules[1].get(order.ask.profile)):
            return _clock_is_wrong()
        return _gone() if order.gone() else None

    def _clock_is_right(self, house: _House | None) -> bool:
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

    # ------------------------------------------------------------------ signing: the desk's steps

    def _errand(
        self, house: _House, request: TokenRequest, order: _Order, reply: Future[Reply]
    ) -> _Errand:
        return _Errand(house, order, request, self.clock.now().boot + self._deadline, reply)

    def _entered(self, errand: _Errand) -> Then | None:
        return self._decided(errand) if self._is_placed(errand) else None

    def _is_placed(self, errand: _Errand) -> bool:
        """
        At the device, if there is a place, else in the row before it. A place is its own until it
        is answered, whatever the answer is.
        """
        house = errand.house
        errand.reply.add_done_callback(lambda _: self._left(errand))
        if len(house.at_device) >= house.places:
            house.waiting.append(errand)
            return False
        house.at_device.add(errand)
        return True

    def _left(self, errand: _Errand) -> None:
        """Who waits longest has its place."""
        house = errand.house
        with self.audit.held():
            house.at_device.discard(errand)
            if house.retired:
                self._close_if_idle(house)
            elif house.waiting and len(house.at_device) < house.places:
                following = house.waiting.popleft()
                house.at_device.add(following)
                self._desk.put(partial(self._decided, following), following.reply.set_exception)

    def _decided(self, errand: _Errand) -> Then:
        """What is decided now is what counts, however long the wait was."""
        house, order = errand.house, errand.order
        if self.clock.now().boot > errand.until:
            raise self._none_free()
        self._decide(order, of="either" if order.mode == "grant" else "signed")
        if self._rules[1].get(order.ask.profile) is not house:
            raise _changed()
        return self._written(errand)

    def _written(self, errand: _Errand) -> Then:
        """The intent; the device is asked when it is on disk."""
        errand.jti = new_jti()
        self.audit.append("intent", **errand.order.members(), jti=errand.jti)
        return partial(self._sent, errand)

    def _sent(self, errand: _Errand) -> None:
        errand.signing = errand.house.hands.submit(self._sign, errand)

    def _resulted(self, errand: _Errand, outcome: SignedGrant | Exception) -> Then:
        """What came of it, on disk before anybody has it."""
        told = errand.order.members() | {"jti": errand.jti}
        if isinstance(outcome, Exception):
            code = "unexpected"
            if isinstance(outcome, HsmTollError):
                code = outcome.code or type(outcome).__name__
            self.audit.append("result", **told, outcome=code)
            if isinstance(outcome, _OF_DEVICE) and outcome.scope != "attempt":
                errand.house.ill = str(outcome)
            if code == "leaf-guessed" and not errand.again:
                errand.again = True
                return partial(
                    self._desk.put, partial(self._decided, errand), errand.reply.set_exception
                )
            return partial(errand.reply.set_exception, outcome)
        errand.grant = outcome
        # With a kid there is no certificate to name.
        told["cert_sha256"] = leaf = outcome.identity if outcome.not_after else None
        house = errand.house
        house.ill, house.rest = None, _REST
        if leaf is not None and leaf != house.leaf:
            house.leaf = leaf
            self.audit.append("certificate", profile=house.name, cert_sha256=leaf, outcome="used")
        seq, head = self.audit.append(
            "result",
            **told,
            iat=outcome.issued_at,
            exp=outcome.expires_at,
            assertion_sha256=_sha256(outcome.assertion),
            outcome="signed" if self.stopped() is None else "signed, and withheld: stopped",
        )
        reply = {
            "assertion": outcome.assertion,
            "expires_in": max(0, outcome.expires_at - int(self.clock.now().wall)),
            "jti": errand.jti,
            "audit": {"seq": seq, "head": head},
        }
        return partial(self._handed_over, errand.reply, reply)

    def _handed_over(self, reply: Future[Reply], value: Reply) -> None:
        """What was recorded, unless a stop came while it was signed, fetched or recorded."""
        stopped = self.stopped()
        if stopped is None:
            reply.set_result(value)
        else:
            reply.set_exception(_stopped(stopped))

    def _retired(self, house: _House) -> None:
        """The policy has another one by its name. What is on its way is still signed."""
        house.retired = True
        self._emptied(house, _changed)
        self._close_if_idle(house)

    def _close_if_idle(self, house: _House) -> None:
        if not house.at_device:
            house.hands.submit(house.app.close)

    def _emptied(self, house: _House, why: Callable[[], HsmTollError]) -> None:
        """Nobody waits for it any more."""
        while house.waiting:
            house.waiting.popleft().reply.set_exception(why())

    def _let_go(self, house: _House) -> None:
        """
        Have it abandoned behind those whom earlier steps send there, and also where records
        cannot be written.
        """
        abandon = partial(self._abandon, house)
        self._desk.put(lambda: abandon, lambda _: abandon())

    def _abandon(self, house: _House) -> None:
        """The device is asked for nothing more; what it is at is told when it is done."""
        with self.audit.held():
            self._emptied(house, _ending)
            for errand in tuple(house.at_device):
                self._give_up(errand, _ending())

    def _hurry(self) -> None:
        """Who has waited too long is told, and asks the device for nothing."""
        now = self.clock.now().boot
        for house in self._rules[1].values():
            for errand in [each for each in house.waiting if now > each.until]:
                house.waiting.remove(errand)
                errand.reply.set_exception(self._none_free())
            for errand in [each for each in house.at_device if now > each.until]:
                self._give_up(errand, self._none_free())

    def _give_up(self, errand: _Errand, why: HsmTollError) -> None:
        """Unless it has its turn already: that one ends by itself."""
        if errand.signing is not None and errand.signing.cancel():
            with contextlib.suppress(AuditBroken):
                told = errand.order.members() | {"jti": errand.jti}
                self.audit.append("result", **told, outcome=why.code)
            errand.reply.set_exception(why)

    def _none_free(self) -> HsmTollError:
        return _busy(f"no device was free within {self._deadline:g} s")

    # ------------------------------------------------------------------ signing: at the device

    def _sign(self, errand: _Errand) -> None:
        """In a thread of the device. A stop is obeyed by those too who have their place already."""
        try:
            outcome: SignedGrant | Exception = self._signed(errand)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is written down and told
            outcome = exc
        self._desk.put(partial(self._resulted, errand, outcome), errand.reply.set_exception)

    def _signed(self, errand: _Errand) -> SignedGrant:
        stopped = self.stopped()
        if stopped is not None:
            raise _stopped(stopped)
        if errand.order.gone():
            # Denied, as by the policy: who waits for the same renewal has not left.
            errand.order.denied = _gone()
            raise errand.order.denied
        self.signatures += 1
        return errand.house.app.signer.sign(errand.request, jti=errand.jti)

    def grant_for(self, house: _House, order: _Order, request: TokenRequest) -> SignedGrant:
        """For a renewal on behalf of *order*."""
        errand = self._errand(house, request, order, _promised())
        self._desk.put(partial(self._entered, errand), errand.reply.set_exception)
        errand.reply.result()
        if errand.grant is None:
            raise AssertionError  # a reply is given to none without it
        return errand.grant

    # ------------------------------------------------------------------ state

    def prove(self) -> None:
        """
        Sign the self-test with every profile that has not yet, or whose device failed since: with
        any key of its list. What stands in the way is told by `not_ready`, and tried again with
        the next call; one that failed, or whose signature was none, is left in peace for ever
        longer, until it signs a grant: each try may cost one.
        """
        if self.stopped() is not None:
            return
        for house in list(self._rules[1].values()):
            if not house.works and self._clock_is_right(house):
                self._prove_house(house)

    def _prove_house(self, house: _House) -> None:
        with house.proving:
            # Another thread may have done it meanwhile, or have tried.
            if house.works or self.clock.now().boot < house.again:
                return
            if house.proven:
                self._left_in_peace(house)
            in_vain, why = False, None
            for device in house.app.devices:
                try:
                    self._prove(house.app, device)
                except HsmTollError as exc:
                    in_vain, why = in_vain or exc.code == "signature-wrong", why or exc
                else:
                    house.proven, house.ill = True, None
                    return
            if in_vain and not house.proven:
                self._left_in_peace(house)
            if why is not None:
                house.why = str(why)

    def _left_in_peace(self, house: _House) -> None:
        house.again = self.clock.now().boot + house.rest
        house.rest = min(2 * house.rest, _LONGEST_REST)

    def _prove(self, app: App, device: Any) -> None:
        signer = app.local_signer(device)
        if app.settings.kid is None:
            signer.chain()
        pool = [*readable(device.certificates(near=True)), *app.supplied().certificates]
        candidates = tuple({each.public_key for each in pool if each.public_key is not None})
        public = device.key(candidates=candidates).public
        keys = (public,) if public is not None else candidates
        alg = app.settings.alg
        self.signatures += 1
        signature = device.self_test(alg, candidates=keys)
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
            if not self._clock_is_right(house):
                why.append(f"profile {foreign(name)}: {_CLOCK}")
            elif not house.proven:
                why.append(f"profile {foreign(name)}: {foreign(house.why)}")
            elif house.ill is not None:
                why.append(f"profile {foreign(name)}: {foreign(house.ill)}")
        return why

    def look_after(self) -> None:
        """What a timer does: seals, ends waits, and notes when the stop came and went."""
        self._desk.put(self._hurry, _unheard)
        self.audit.seal_if_due()
        now = self.stopped()
        if now != self._was_stopped:
            self._was_stopped = now
            said = "resumed" if now is None else f"stopped: {now}"
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
        """Returns as long as the desk is there, and nothing holds the critical section for good."""
        with self.audit.held():
            if not self._desk.alive:
                raise RuntimeError("the desk is not there any more")

    def end(self) -> None:
        """From now on nothing new is signed; what is being signed goes on."""
        self._ending = True

    def close(self) -> None:
        """Let go of the devices, answer who still waits, and seal the audit."""
        houses = tuple(self._rules[1].values())
        self._ending = True
        for house in houses:
            self._let_go(house)
        self._desk.close()
        self._fetching.shutdown(wait=False, cancel_futures=True)
        for house in houses:
            house.hands.shutdown(wait=False, cancel_futures=True)
            house.app.close()
        with contextlib.suppress(HsmTollError):
            self.audit.write("stop", policy_sha256=self._rules[0].sha256, outcome="ended")
        self.audit.close()


@dataclass(frozen=True, slots=True)
class _Audited:
    """The signer of a renewal on behalf of one caller: no grant without its records."""

    service: Service
    house: _House
    order: _Order

    def known_identity(self) -> str | None:
        """As of the signer behind."""
        return self.house.app.signer.known_identity()

    def sign(self, request: TokenRequest, *, jti: str) -> SignedGrant:
        """As Signer.sign; the jti is the one that the audit's intent names."""
        del jti
        return self.service.grant_for(self.house, self.order, request)

    def rejected(self, grant: SignedGrant, code: str) -> bool:
        """As of the signer behind."""
        return self.house.app.signer.rejected(grant, code)

    def renew(self, request: TokenRequest, flight: Flight) -> AccessToken:
        """A new token, on behalf of *order*."""
        try:
            return self.house.app.renewal_by(self).renew(request, flight)
        except HsmTollError as exc:
            if exc is self.order.denied:
                raise _Withdrawn("another caller's renewal was denied") from None
            raise


def noted_checkpoint(settings: Settings) -> Path:
    """Where a host notes the last checkpoint of its audit: outside of the log's directory."""
    directory = needed(settings.host.audit_dir, "audit_dir").absolute()
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return App(settings).state / f"audit-{name}.json"


def _sha256(value: str | bytes) -> str:
    raw = value.encode("ascii") if isinstance(value, str) else value
    return hashlib.sha256(raw).hexdigest()


def _stopped(why: str) -> PolicyDenied:
    return PolicyDenied(
        f"signing is stopped: {why}",
        hint="its custodian has to resume it: `hsmtoll resume`",
        code="stopped",
        signed=False,
        scope="caller",
    )


def _busy(why: str, scope: Scope = "attempt") -> TryAgainLater:
    return TryAgainLater(
        f"busy: {why}", hint="try again", code="busy", retry_after=1.0, signed=False, scope=scope
    )


def _gone() -> TryAgainLater:
    return _busy("the caller left", "caller")


def _changed() -> TryAgainLater:
    return _busy("the policy is being changed")


def _ending() -> TryAgainLater:
    return _busy("the host is ending")


def _promised() -> Future[Reply]:
    """A reply that is on its way: who waits for it no longer does not take it back."""
    reply: Future[Reply] = Future()
    reply.set_running_or_notify_cancel()
    return reply


def _unheard(exc: Exception) -> None:
    """Nobody asked for it."""
    _log.debug("a step at the desk failed: %s", type(exc).__name__)


def _clock_is_wrong() -> ClockError:
    return ClockError(
        "clock: the signing host's clock is not synchronised",
        hint="on the host: let NTP keep it; nothing is signed before",
        code="clock-unsynchronised",
        retry_after=_SOON,
        signed=False,
    )
