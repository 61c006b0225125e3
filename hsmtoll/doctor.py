"""
What Maskinporten and Customs will say, foretold from the device outward.

    gather (App, device, files, services) ──► Facts ──► checks, pure ──► Report

A check has a name; what it found has a stable code. The first broken link ends the way: what
hangs on it is skipped. No PIN is spent beyond the one login that signing needs, nothing is
signed offline, and no secret enters a report.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from hsmtoll import apis, exchange, jws
from hsmtoll import chain as chains
from hsmtoll.clock import MAX_SKEW, offset_of
from hsmtoll.errors import (
    CertificateError,
    ClockError,
    ConfigurationError,
    DeviceError,
    HsmTollError,
    NetworkError,
    foreign,
)
from hsmtoll.grant import Grant
from hsmtoll.signer import readable
from hsmtoll.tokens import TokenRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from hsmtoll.apis import Identity
    from hsmtoll.app import App
    from hsmtoll.certificate import Certificate
    from hsmtoll.hsm.device import KeyFacts
    from hsmtoll.hsm.inspect import ModuleFacts, TokenFacts
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.revocation import Status
    from hsmtoll.settings import Settings
    from hsmtoll.wire import Wire

__all__ = ["CHECKS", "Check", "Facts", "Report", "Seen", "examine", "run"]

#: Days. A new certificate takes an issuer some weeks (PROTOCOL C25).
WARN_DAYS: Final = 60

#: Seconds. The Date header is whole seconds old and a round trip away (C07).
_NOTICED: Final = 5.0

Verdict = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Check:
    """
    One finding. *check* is which question was asked, *code* what was found: the same word
    where all is well. *exit_code* is that of the error class it would become.
    """

    check: str
    code: str
    verdict: Verdict
    line: str
    hint: str | None = None
    who: str | None = None
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """
    What one key of the list showed. *error* is the first thing that went wrong on the way to
    the key; everything behind it is empty then.
    """

    uri: KeyUri
    module: ModuleFacts | None = None
    token: TokenFacts | None = None
    pin_given: bool = False
    logged_in: bool = False
    key: KeyFacts | None = None
    error: HsmTollError | None = None
    certificates: tuple[Certificate, ...] = ()
    unreadable: int = 0
    spied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """
    What the services answered; an error stands where an answer would.

    *offset*: seconds that Maskinporten's clock is ahead. *consumer* and *amr* are read from
    the token of the self-test, for diagnosis alone. *scopes*: each one asked for, with what
    was said to it, None for yes.
    """

    metadata: dict[str, Any] | HsmTollError | None = None
    offset: float | None = None
    health: int | HsmTollError | None = None
    consumer: str | None = None
    amr: str | None = None
    self_test: HsmTollError | None = None
    scopes: tuple[tuple[str, HsmTollError | None], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """What was learned of one certificate of the chain: a *status*, or why there is none."""

    certificate: Certificate
    status: Status | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """
    Everything a check may look at. *seen* has one entry for each key named; *pem* are the
    certificates of HSMTOLL_HSM__CERTIFICATES, *scopes* words as the user gave them. *answers*
    is None offline, *revocation* where nothing was asked.
    """

    settings: Settings
    now: datetime
    seen: tuple[Seen, ...] = ()
    pem: tuple[Certificate, ...] = ()
    scopes: tuple[str, ...] = ()
    error: HsmTollError | None = None
    answers: Answers | None = None
    revocation: tuple[Revocation, ...] | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order of the way from the device to Customs."""

    checks: tuple[Check, ...]
    facts: Facts = field(repr=False)

    @property
    def exit_code(self) -> int:
        """That of the first failure's class, 0 where nothing fails."""
        return next((each.exit_code for each in self.checks if each.verdict == "fail"), 0)

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return {
            "schema": 1,
            "exit_code": self.exit_code,
            "checks": [
                {
                    "check": each.check,
                    "code": each.code,
                    "verdict": each.verdict,
                    "line": each.line,
                    "hint": each.hint,
                    "who": each.who,
                }
                for each in self.checks
            ],
        }

    def lines(self) -> tuple[str, ...]:
        """For a person: one line a check, its hint below it where something is to be done."""
        told: list[str] = []
        for each in self.checks:
            named = each.code if each.code == each.check else f"{each.check} ({each.code})"
            told.append(f"{each.verdict:4}  {named}: {each.line}")
            if each.hint and each.verdict in ("warn", "fail"):
                told += [f"        {line}" for line in each.hint.splitlines()]
        return tuple(told)


def run(
    app: App,
    *,
    online: bool = False,
    scopes: Sequence[str] = (),
    crl: Path | None = None,
) -> Report:
    """
    Ask everything that can be asked, and judge it. Nothing is sent unless *online*.

    *scopes* are APIs or scopes to be asked for; *crl* is a revocation list in a file. Never
    raises for what is wrong with the setup: that is what it reports.
    """
    facts = gather(app, scopes=tuple(scopes))
    checks = examine(facts)
    chain = signing_chain(facts)
    if chain is not None and (crl is not None or online):
        facts = replace(facts, revocation=_revocation(app, chain, crl=crl, online=online))
        checks = examine(facts)
    if online and not _first_failure(checks):
        facts = replace(facts, answers=_ask(app, facts))
        checks = examine(facts)
    return Report(checks, facts)


# ----- facts ------------------------------------------------------------------------------


def gather(app: App, *, scopes: tuple[str, ...] = ()) -> Facts:
    """What the settings, the devices and the files show."""
    settings = app.settings
    now = datetime.fromtimestamp(app.clock.now().wall, UTC)
    if settings.signer.url:
        return Facts(settings=settings, now=now, scopes=scopes)
    try:
        uris = app.uris()
        pem = app.pem_certificates()
    except HsmTollError as exc:
        return Facts(settings=settings, now=now, scopes=scopes, error=exc)
    seen = tuple(_look(app, uri) for uri in uris)
    return Facts(settings=settings, now=now, seen=seen, pem=pem, scopes=scopes)


def _look(app: App, uri: KeyUri) -> Seen:
    found: dict[str, Any] = {"uri": uri}
    try:
        path = app.module(uri)
        found["spied"] = "pkcs11-spy" in Path(path).name or bool(os.environ.get("PKCS11SPY"))
        from hsmtoll.hsm.inspect import inspect  # noqa: PLC0415 - only here is a module loaded

        with app.device(uri) as device:
            pin = app.pin(uri)
            found["pin_given"] = pin is not None
            stored = device.certificates()
            certificates = tuple(readable(stored))
            found["certificates"] = certificates
            found["unreadable"] = len(stored) - len(certificates)
            module = inspect(Path(path), ledger=app.ledger, lock_timeout=app.settings.deadline)
            found["module"] = module
            found["token"] = _token(module, uri)
            found["logged_in"] = device.login()
            candidates = {c.public_key for c in certificates if c.public_key is not None}
            found["key"] = device.key(candidates=candidates)
    except HsmTollError as exc:
        found["error"] = exc
    return Seen(**found)


def _token(module: ModuleFacts, uri: KeyUri) -> TokenFacts | None:
    fitting = [
        each
        for each in module.tokens
        if uri.matches(
            token=each.uri.token,
            manufacturer=each.uri.manufacturer,
            model=each.uri.model,
            serial=each.uri.serial,
            slot_id=each.slot_id,
            slot_description=each.slot_description,
        )
    ]
    return next((each for each in fitting if each.initialized), None)


def _ask(app: App, facts: Facts) -> Answers:
    """Ask the services what they say; nothing that they answer is obeyed."""
    wire, issuer = app.wire(), app.endpoints.issuer
    base = issuer if issuer.endswith("/") else f"{issuer}/"
    found: dict[str, Any] = {}
    sent = app.clock.now()
    try:
        answer = wire.get(f"{base}.well-known/oauth-authorization-server", leg="Maskinporten")
        found["offset"] = offset_of(answer.headers, sent=sent, received=app.clock.now())
        found["metadata"] = _object(answer)
    except HsmTollError as exc:
        return Answers(metadata=exc)
    try:
        found["health"] = wire.get(f"{base}health", leg="Maskinporten").status
    except HsmTollError as exc:
        found["health"] = exc
    if app.family == "eseal":
        try:
            subject = _granted(app, wire, apis.SELF_TEST_SCOPE)
            found["consumer"], found["amr"] = _consumer(subject.value)
        except HsmTollError as exc:
            found["self_test"] = exc
            return Answers(**found)
    found["scopes"] = tuple((scope, _tried(app, wire, scope)) for scope in _asked(facts))
    return Answers(**found)


def _object(answer: exchange.Answer) -> dict[str, Any]:
    try:
        read = json.loads(answer.body)
    except (ValueError, RecursionError):
        read = None
    if answer.status != 200 or not isinstance(read, dict):
        raise NetworkError(
            f"Maskinporten's metadata: {answer.status}, and not a JSON object",
            hint="something between may have answered: check HSMTOLL_PROXY and the endpoints",
            code="metadata",
        )
    return read


def _granted(app: App, wire: Wire, scope: str) -> exchange.Issued:
    """One real grant: a signature of the budget, and leg one."""
    app.budget.spend(app.signer.identity())
    settings = app.settings
    request = TokenRequest(scope, settings.resource, settings.consumer_org)
    post = exchange.grant_post(app.endpoints, app.signer.assertion(request))
    return exchange.read_subject(wire.post(post), post)


def _tried(app: App, wire: Wire, scope: str) -> HsmTollError | None:
    try:
        subject = _granted(app, wire, scope)
        if scope != apis.SELF_TEST_SCOPE:
            post = exchange.exchange_post(app.endpoints, subject)
            exchange.read_issued(wire.post(post), post)
    except HsmTollError as exc:
        return exc
    return None


def _consumer(token: str) -> tuple[str | None, str | None]:
    """``consumer.ID`` and ``client_amr`` of a token. *Not verified*, and opaque to all but us."""
    try:
        claims = jws.read_unverified(token)[1]
    except ValueError:
        return None, None
    consumer = claims.get("consumer")
    named = consumer.get("ID") if isinstance(consumer, dict) else None
    amr = claims.get("client_amr")
    return (named if isinstance(named, str) else None, amr if isinstance(amr, str) else None)


def _revocation(
    app: App, chain: chains.Chain, *, crl: Path | None, online: bool
) -> tuple[Revocation, ...]:
    """What the issuers say of the certificates below the root."""
    now = datetime.fromtimestamp(app.clock.now().wall, UTC)
    pairs = list(itertools.pairwise(chain.certificates))
    if crl is not None:
        return tuple(_by_file(crl, pairs, now))
    wire = app.wire() if online else None
    return tuple(_by_asking(app, wire, *pair, now) for pair in pairs) if wire else ()


def _by_file(
    path: Path, pairs: list[tuple[Certificate, Certificate]], now: datetime
) -> Iterator[Revocation]:
    from hsmtoll import revocation  # noqa: PLC0415 - 35 ms, and seldom needed

    try:
        with path.open("rb") as file:
            data = file.read(revocation.MAX_BYTES + 1)
    except OSError as exc:
        why = f"the list {foreign(path)} cannot be read: {exc.strerror}"
        yield Revocation(certificate=pairs[0][0], problem=why)
        return
    problem = ""
    found = False
    for certificate, issuer in pairs:
        try:
            status = revocation.by_crl(data, certificate, issuer, now=now)
        except ValueError as exc:
            problem = problem or f"the list {foreign(path)}: {exc}"
        else:
            found = True
            yield Revocation(certificate=certificate, status=status)
    if not found:
        yield Revocation(certificate=pairs[0][0], problem=problem)


def _by_asking(
    app: App, wire: Wire, certificate: Certificate, issuer: Certificate, now: datetime
) -> Revocation:
    from hsmtoll import revocation  # noqa: PLC0415 - see above

    public = app.settings.environment != "sandbox"
    problem = "it names no OCSP responder and no revocation list"
    asked = [(url, True) for url in certificate.ocsp_urls[:2]]
    asked += [(url, False) for url in certificate.crl_urls[:2]]
    for url, is_ocsp in asked:
        if not url.lower().startswith(("http://", "https://")) or len(url) > 2000:
            continue
        where = revocation.ocsp_url(url, certificate, issuer) if is_ocsp else url
        judge = revocation.by_ocsp if is_ocsp else revocation.by_crl
        try:
            answer = wire.get(where, leg="revocation", public=public)
            if answer.status != 200:
                problem = f"{foreign(url)} answered {answer.status}"
                continue
            status = judge(answer.body, certificate, issuer, now=now)
        except HsmTollError as exc:
            problem = str(exc)
        except ValueError as exc:
            problem = f"{foreign(url)}: {exc}"
        else:
            return Revocation(certificate=certificate, status=status)
    return Revocation(certificate=certificate, problem=problem)


# ----- checks -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """The facts of one key, with the chain that would be sent or the error instead."""

    facts: Facts
    seen: Seen | None
    chain: chains.Chain | None = None
    trouble: CertificateError | None = None

    @property
    def settings(self) -> Settings:
        return self.facts.settings

    @property
    def identity(self) -> Identity:
        return self.settings.identity or "eseal"

    @property
    def kid(self) -> bool:
        return self.settings.kid is not None

    @property
    def key(self) -> KeyFacts | None:
        return self.seen.key if self.seen else None

    @property
    def candidates(self) -> tuple[Certificate, ...]:
        """The certificates of the key, as `LocalSigner` takes them."""
        return _candidates(self.facts, self.seen) if self.seen else ()


def _pool(facts: Facts, seen: Seen) -> tuple[Certificate, ...]:
    return (*seen.certificates, *facts.pem)


def _candidates(facts: Facts, seen: Seen) -> tuple[Certificate, ...]:
    pool = _pool(facts, seen)
    public: RsaPublicKey | None = seen.key.public if seen.key else None
    if public is not None:
        return chains.for_key(pool, public)
    return tuple(each for each in pool if each.public_key is not None)


def _way(facts: Facts, seen: Seen | None) -> _Way:
    if seen is None or seen.key is None or facts.settings.kid is not None:
        return _Way(facts=facts, seen=seen)
    hsm = facts.settings.hsm
    try:
        chain = chains.checked(
            _candidates(facts, seen),
            _pool(facts, seen),
            identity=facts.settings.identity or "eseal",
            now=facts.now,
            mode=facts.settings.x5c,
            root_sha256=hsm.root_sha256,
            preferred=frozenset(each.sha256 for each in facts.pem),
            pinned_sha256=hsm.certificate_sha256,
        )
    except CertificateError as exc:
        return _Way(facts=facts, seen=seen, trouble=exc)
    return _Way(facts=facts, seen=seen, chain=chain)


def _ok(check: str, line: str) -> Check:
    return Check(check, check, "ok", line)


def _skip(check: str, line: str) -> Check:
    return Check(check, check, "skip", line)


def _warn(check: str, code: str, line: str, hint: str) -> Check:
    return Check(check, code, "warn", line, hint, "you")


def _failed(check: str, exc: HsmTollError) -> Check:
    who = exc.who or "you"
    return Check(check, exc.code or check, "fail", str(exc), exc.hint, who, exc.exit_code)


def check_settings(way: _Way) -> Check:
    """Environment, identity and the options belong together (PROTOCOL A.4, A.5, C17)."""
    settings = way.settings
    problem: ConfigurationError | None = None
    if way.facts.error is not None:
        return _failed("settings", way.facts.error)
    if settings.environment is None or settings.identity is None:
        name = "HSMTOLL_ENVIRONMENT" if settings.environment is None else "HSMTOLL_IDENTITY"
        problem = ConfigurationError(
            f"{name}: required, and not set",
            hint="test, prod or sandbox" if "ENV" in name else "eseal or norwegian",
            code="setting-missing",
        )
    elif settings.identity == "eseal" and settings.kid is not None:
        problem = ConfigurationError(
            "HSMTOLL_KID: an eSeal has no client that keys could be registered on",
            hint="unset HSMTOLL_KID, or set HSMTOLL_IDENTITY=norwegian",
            code="kid-eseal",
        )
    elif settings.identity == "norwegian" and settings.iss is None:
        problem = ConfigurationError(
            "HSMTOLL_ISS: required with HSMTOLL_IDENTITY=norwegian",
            hint="set it to the client id from Samarbeidsportalen",
            code="setting-missing",
        )
    elif settings.environment == "sandbox" and not all(settings.endpoints.model_dump().values()):
        problem = ConfigurationError(
            "HSMTOLL_ENDPOINTS__ISSUER, __TOKEN and __CUSTOMS: required with the sandbox",
            hint="`hsmtoll sandbox` prints the values to export",
            code="setting-missing",
        )
    if problem is not None:
        return _failed("settings", problem)
    how = "a registered key (kid)" if way.kid else "certificates (x5c)"
    return _ok("settings", f"{settings.identity} in {settings.environment}, known by {how}")


# Codes of the device → the check that they answer. What is not named answers the check *key*.
_ANSWERS: Final = {
    "setting-missing": "module",
    "module-path": "module",
    "module-load": "module",
    "forked": "module",
    "device-missing": "device",
    "device-ambiguous": "device",
    "device-gone": "device",
    "device-failed": "device",
    "device-busy": "device",
    "session-lost": "device",
    "pin-incorrect": "pin",
    "pin-locked": "pin",
    "pin-final-try": "pin",
    "pin-refused": "pin",
    "pin-unresolved": "pin",
    "pin-state": "pin",
    "pin-source": "pin",
    "ledger": "pin",
    "not-logged-in": "pin",
    "key-type": "key-type",
    "key-size": "key-size",
    "key-sign": "key-usage",
    "key-exportable": "key-protection",
    "certificate-missing": "certificate",
    "certificate-pin": "certificate",
    "certificate-key": "certificate-key",
    "certificate-kind": "certificate-kind",
    "certificate-orgid": "consumer-id",
    "certificate-usage": "certificate-usage",
    "certificate-critical": "certificate-critical",
    "certificate-expired": "certificate-validity",
    "certificate-not-yet-valid": "certificate-validity",
}


def _broken(way: _Way, check: str, fallback: str) -> Check | None:
    """The failure that belongs to *check*, if the way broke there."""
    exc: HsmTollError | None = way.trouble
    if way.seen is not None and way.seen.error is not None:
        exc = way.seen.error
    if exc is None or _ANSWERS.get(exc.code or "", fallback) != check:
        return None
    return _failed(check, exc)


def check_module(way: _Way) -> Check:
    """The module loads."""
    if way.seen is None:
        return _skip("module", "a signing host signs, not a device of this machine")
    if broken := _broken(way, "module", "key"):
        return broken
    module = way.seen.module
    if module is None:
        return _ok("module", "loads")
    made = f"{foreign(module.description)} {module.version[0]}.{module.version[1]}".strip()
    return _ok("module", f"{foreign(module.path)} loads ({made})")


def check_spy(way: _Way) -> Check:
    """Nothing between us and the device writes the PIN to a log."""
    if way.seen is None:
        return _skip("module-spy", "no device of this machine")
    if not way.seen.spied:
        return _ok("module-spy", "no pkcs11-spy between hsmtoll and the device")
    line = "pkcs11-spy is between hsmtoll and the device: it writes every PIN to its log"
    hint = "unset PKCS11SPY, and name the device's own module in HSMTOLL_HSM__MODULE"
    if way.settings.environment == "sandbox":
        return _warn("module-spy", "module-spy", line, hint)
    return _failed("module-spy", ConfigurationError(line, hint=hint, code="module-spy"))


def check_device(way: _Way) -> Check:
    """The p11_token that the URI names is there."""
    if way.seen is None:
        return _skip("device", "no device of this machine")
    if broken := _broken(way, "device", "key"):
        return broken
    token = way.seen.token
    if token is None:
        return _ok("device", f"{foreign(way.seen.uri.device_only())} is there")
    firmware = ".".join(map(str, token.firmware))
    return _ok("device", f"{foreign(token.uri)} is there, firmware {firmware}")


_PIN_WARNINGS: Final = {
    "count-low": ("pin-count-low", "a wrong PIN was given since the last login"),
    "to-be-changed": ("pin-to-be-changed", "the device wants the PIN to be changed"),
}


def check_pin(way: _Way) -> Check:
    """The PIN is there, accepted, and not about to be locked."""
    if way.seen is None:
        return _skip("pin", "no device of this machine")
    if broken := _broken(way, "pin", "key"):
        return broken
    token = way.seen.token
    if token is not None and token.pin_state in _PIN_WARNINGS:
        code, line = _PIN_WARNINGS[token.pin_state]
        hint = "see that no other program has an old PIN; two more wrong ones may lock the device"
        return _warn("pin", code, line, hint)
    if token is not None and not token.login_required:
        return _ok("pin", "the device wants none")
    if not way.seen.logged_in:
        return _ok("pin", "logged in by other code of this process; this PIN was not proven")
    return _ok("pin", "accepted")


def check_key(way: _Way) -> Check:
    """There is one private key of that name, and its public half is known."""
    if way.seen is None:
        return _skip("key", "no device of this machine")
    if broken := _broken(way, "key", "key"):
        return broken
    key = way.key
    if key is not None and key.public is None:
        return _warn(
            "key",
            "public-key-hidden",
            f"{foreign(key.uri)} is there, but the device hides its public half: whether key and "
            "certificate belong together shows at the first grant",
            "set HSMTOLL_HSM__PUBLIC_KEY to a PEM file with the public key",
        )
    return _ok("key", f"{foreign(key.uri)} is there" if key else "there")


def check_key_type(way: _Way) -> Check:
    """RSA, because Maskinporten takes RS256, RS384 and RS512 alone (M20)."""
    if way.seen is None:
        return _skip("key-type", "no device of this machine")
    return _broken(way, "key-type", "key") or _ok(
        "key-type", f"RSA, which {way.settings.alg} needs"
    )


def check_key_size(way: _Way) -> Check:
    """2048 bits or more (M33)."""
    if way.seen is None:
        return _skip("key-size", "no device of this machine")
    bits = way.key.bits if way.key else None
    return _broken(way, "key-size", "key") or _ok(
        "key-size", f"{bits} bits" if bits else "not told; the certificate's is checked below"
    )


def check_key_usage(way: _Way) -> Check:
    """The device lets the key sign, and the PIN for each signature is there."""
    if way.seen is None:
        return _skip("key-usage", "no device of this machine")
    if broken := _broken(way, "key-usage", "key"):
        return broken
    if way.key is not None and way.key.always_authenticate and not way.seen.pin_given:
        return _failed(
            "key-usage",
            DeviceError(
                f"the key {foreign(way.key.uri)} wants a PIN for every signature",
                hint="give it: HSMTOLL_HSM__SIGNING_PIN_FILE",
                code="signing-pin",
            ),
        )
    return _ok("key-usage", "it may sign")


def check_key_protection(way: _Way) -> Check:
    """The device says that the key cannot leave it, and never was outside (DESIGN 4.7)."""
    if way.seen is None:
        return _skip("key-protection", "no device of this machine")
    if broken := _broken(way, "key-protection", "key"):
        return broken
    key = way.key
    if key is not None and not key.protected:
        return _warn(
            "key-protection",
            "key-exportable-allowed",
            "the device does not say that the key stays inside it, and the settings allow that",
            "generate a key on the device and unset HSMTOLL_HSM__ALLOW_EXPORTABLE_KEY",
        )
    if key is not None and "key-imported" in key.warnings:
        return _warn(
            "key-protection",
            "key-imported",
            "the key was outside the device, or the device does not say that it never was",
            "copies may exist: `hsmtoll key generate` makes one that never leaves",
        )
    return _ok("key-protection", "made on the device, never extractable, as the module reports")


def check_mechanism(way: _Way) -> Check:
    """The device can sign with HSMTOLL_ALG, whole or from a DigestInfo."""
    if way.key is None:
        return _skip("mechanism", "no device of this machine")
    alg = way.settings.alg
    whole = f"SHA{alg.removeprefix('RS')}_RSA_PKCS"
    if whole in way.key.mechanisms:
        return _ok("mechanism", f"the device has {whole} for {alg}")
    if "RSA_PKCS" in way.key.mechanisms:
        return _ok("mechanism", f"the device has RSA_PKCS: {alg} by a DigestInfo made here")
    return _failed(
        "mechanism",
        DeviceError(
            f"the device has neither {whole} nor RSA_PKCS: {alg} cannot be signed",
            hint="`hsmtoll objects` shows what the device can do",
            code="mechanism",
        ),
    )


_NO_CERTIFICATE: Final = "a key registered with a kid needs no certificate"


def _certified(
    check: str,
) -> Callable[[Callable[[_Way, Certificate], Check]], Callable[[_Way], Check]]:
    """A check of the leaf: skipped with a kid, failed where the way to the chain broke on it."""

    def decorated(judge: Callable[[_Way, Certificate], Check]) -> Callable[[_Way], Check]:
        def asked(way: _Way) -> Check:
            if way.kid:
                return _skip(check, _NO_CERTIFICATE)
            if way.seen is None:
                return _skip(check, "no device of this machine")
            if broken := _broken(way, check, "chain"):
                return broken
            leaf = way.chain.leaf if way.chain else _nearest(way)
            return judge(way, leaf) if leaf else _skip(check, "no certificate to look at")

        asked.__doc__ = judge.__doc__
        return asked

    return decorated


def _nearest(way: _Way) -> Certificate | None:
    """The leaf meant where its chain does not hold."""
    hsm = way.settings.hsm
    try:
        return chains.choose(
            way.candidates,
            identity=way.identity,
            now=way.facts.now,
            pinned_sha256=hsm.certificate_sha256,
        )
    except CertificateError:
        found = sorted(way.candidates, key=lambda each: each.not_before, reverse=True)
        return found[0] if found else None


@_certified("certificate")
def check_certificate(way: _Way, leaf: Certificate) -> Check:
    """There is a certificate for the key, and why this one of several."""
    why = "; ".join(way.chain.notes) if way.chain else ""
    told = f"{leaf.subject} (sha256 {leaf.sha256[:16]}) belongs to the key"
    return _ok("certificate", f"{told}; {why}" if why else told)


@_certified("certificate-key")
def check_certificate_key(way: _Way, leaf: Certificate) -> Check:
    """Its key is RSA and large enough (M33)."""
    del way
    return _ok("certificate-key", f"RSA, {leaf.key_bits} bits")


@_certified("certificate-kind")
def check_certificate_kind(way: _Way, leaf: Certificate) -> Check:
    """It is not self-signed and not a CA's (M34)."""
    del way
    return _ok("certificate-kind", f"issued by {leaf.issuer}")


@_certified("consumer-id")
def check_consumer(way: _Way, leaf: Certificate) -> Check:
    """Whom Maskinporten will name in ``consumer.ID`` (M74, M75, M85, M86)."""
    return _ok("consumer-id", f"Maskinporten will say {foreign(leaf.consumer_id(way.identity))}")


@_certified("certificate-usage")
def check_certificate_usage(way: _Way, leaf: Certificate) -> Check:
    """keyUsage lets it sign (PROTOCOL B.1, B.4)."""
    del way
    usage = leaf.key_usage
    return _ok("certificate-usage", ", ".join(sorted(usage)) if usage else "no keyUsage, so any")


@_certified("certificate-critical")
def check_certificate_critical(way: _Way, leaf: Certificate) -> Check:
    """No critical extension that Maskinporten does not know (M35)."""
    del way, leaf
    return _ok("certificate-critical", "no critical extension that Maskinporten does not know")


@_certified("certificate-validity")
def check_validity(way: _Way, leaf: Certificate) -> Check:
    """It is valid now, and for how long (M29, C25)."""
    now = way.facts.now
    days = leaf.days_left(now)
    until = f"valid until {leaf.not_after:%Y-%m-%d}, {days} days left"
    waiting = _next(way, leaf)
    if days >= WARN_DAYS or waiting is not None:
        return _ok("certificate-validity", until)
    return _warn(
        "certificate-validity",
        "certificate-ends-soon",
        until,
        "order the next one now, for this key or a new one, and import it beside this one",
    )


def _next(way: _Way, leaf: Certificate) -> Certificate | None:
    """The certificate that takes over from *leaf* by itself, of this key or the next ones."""
    facts = way.facts
    later = [
        each
        for seen in facts.seen
        for each in _candidates(facts, seen)
        if each.not_after > leaf.not_after
        and each.consumer_id(way.identity) == leaf.consumer_id(way.identity)
        and each.not_before <= leaf.not_after
        and not chains.leaf_faults(each, identity=way.identity, now=max(each.not_before, facts.now))
    ]
    pinned = facts.settings.hsm.certificate_sha256
    if pinned is not None:
        later = [each for each in later if each.sha256 == pinned and each != leaf]
    return min(later, key=lambda each: each.not_before, default=None)


@_certified("roll-over")
def check_roll_over(way: _Way, leaf: Certificate) -> Check:
    """Which certificate takes over next, and when."""
    following = _next(way, leaf)
    if following is None:
        end = f"{leaf.not_after:%Y-%m-%d}"
        return _ok("roll-over", f"no certificate is waiting; this one ends on {end}")
    when = max(following.not_before, way.facts.now)
    return _ok(
        "roll-over", f"sha256 {following.sha256[:16]} takes over at {when:%Y-%m-%d %H:%M} UTC"
    )


@_certified("qualified")
def check_qualified(way: _Way, leaf: Certificate) -> Check:
    """What Maskinporten will say in ``client_amr`` (M85, M87), and QcType (PROTOCOL B.4)."""
    amr = leaf.client_amr(way.identity)
    if way.identity == "eseal":
        kinds = leaf.qc.types
        wrong = leaf.qc.semantics == "natural person" or {"esign", "web"} & set(kinds)
        if leaf.qc.compliance and wrong:
            return _failed(
                "qualified",
                CertificateError(
                    f"'{leaf.subject}' is qualified, but not as an eSeal "
                    f"({foreign(', '.join(kinds) or leaf.qc.semantics)})",
                    hint="order an eSeal of a legal person: signatures and web sites are others",
                    code="certificate-not-eseal",
                    who="issuer",
                ),
            )
    held = ", on a QSCD by its own word" if leaf.qc.qscd else ""
    return _ok("qualified", f"client_amr will be {amr}{held}")


def check_chain(way: _Way) -> Check:
    """The chain is complete, valid and proven (M26 to M28)."""
    if way.kid:
        return _skip("chain", _NO_CERTIFICATE)
    if way.seen is None:
        return _skip("chain", "no device of this machine")
    if broken := _broken(way, "chain", "chain"):
        return broken
    chain = way.chain
    if chain is None:
        return _skip("chain", "no certificate to look at")
    if way.settings.x5c == "leaf":
        return _warn(
            "chain",
            "chain-left-out",
            "HSMTOLL_X5C=leaf sends the certificate alone: seen working, not documented",
            "unset HSMTOLL_X5C",
        )
    if chain.cut_short:
        return _warn(
            "chain",
            "chain-cut-short",
            "proven, but the search among so many certificates was cut short",
            "name the chain in HSMTOLL_HSM__CERTIFICATES",
        )
    end = chain.root.subject if chain.root else "no root"
    sent = len(chain.x5c(way.settings.x5c))
    weakest = chain.weakest_not_after
    if weakest < min(chain.leaf.not_after, way.facts.now + timedelta(days=WARN_DAYS)):
        return _warn(
            "chain",
            "chain-ends-soon",
            f"a CA certificate in it expires on {weakest:%Y-%m-%d}, before the leaf",
            "get the issuer's new CA certificates and name them in HSMTOLL_HSM__CERTIFICATES",
        )
    return _ok("chain", f"{len(chain.certificates)} certificates, proven up to {end}; {sent} sent")


# PROTOCOL B.3: policies that Digdir's validator takes, by environment. An arc that ends in a
# dot stands for everything below it.
_BUYPASS: Final = ("2.16.578.1.26.1.3.2", "2.16.578.1.26.1.3.5")
_POLICIES: Final = {
    "prod": (
        *_BUYPASS,
        "2.16.578.1.29.13.200.",
        "2.16.578.1.29.13.210.",
        "2.16.578.1.29.13.220.",
        "2.16.578.1.29.13.1.1.0",
        "2.16.578.1.29.13.1",
    ),
    "test": (
        *_BUYPASS,
        "2.16.578.1.26.1.0.3.2",
        "2.16.578.1.29.913.200.",
        "2.16.578.1.29.913.210.",
        "2.16.578.1.29.913.220.",
        "2.16.578.1.29.913.1.1.0",
        "2.16.578.1.29.13.1.1.0",
        "2.16.578.1.1.1.1.100",
    ),
}


def _accepted(leaf: Certificate, environment: str) -> bool:
    return any(
        policy == known or (known.endswith(".") and policy.startswith(known))
        for policy in leaf.policies
        for known in _POLICIES[environment]
    )


def _issued_for(leaf: Certificate) -> str | None:
    """The environment that a known Norwegian CA's name tells (PROTOCOL B.3)."""
    name = leaf.issuer.lower()
    if not any(known in name for known in ("buypass class 3", "commfides")):
        return None
    return "test" if "test" in name else "prod"


@_certified("environment")
def check_environment(way: _Way, leaf: Certificate) -> Check:
    """Norwegian certificates fit the environment (M31, M36); eSeals are the same in both (M32)."""
    environment = "prod" if way.settings.environment == "prod" else "test"
    told = _issued_for(leaf)
    if way.identity == "eseal" and told == "test":
        exc = CertificateError(
            f"'{leaf.subject}' is of a test CA, which no EU trusted list knows (MP-120)",
            hint="eSeals use their production certificate in test as well",
            code="certificate-environment",
        )
        return _failed("environment", exc)
    if way.identity == "eseal":
        return _ok("environment", "an eSeal's certificate serves test and prod alike")
    other = "test" if environment == "prod" else "prod"
    if told == other or (not _accepted(leaf, environment) and _accepted(leaf, other)):
        exc = CertificateError(
            f"'{leaf.subject}' is a certificate for {other}, and Norwegian ones are for one "
            f"environment: Maskinporten refuses it in {environment} (MP-120)",
            hint=f"use a {environment} certificate, or set HSMTOLL_ENVIRONMENT={other}",
            code="certificate-environment",
        )
        return _failed("environment", exc)
    if not _accepted(leaf, environment):
        listed = foreign(", ".join(leaf.policies) or "none")
        exc = CertificateError(
            f"'{leaf.subject}' has no policy that Maskinporten accepts (it has {listed})",
            hint="take the enterprise certificate (virksomhetssertifikat) of Buypass or Commfides",
            code="certificate-policy",
        )
        return _failed("environment", exc)
    return _ok("environment", f"a certificate for {environment}")


def check_kid(way: _Way) -> Check:
    """What is known of a registered key: not its age (M39)."""
    if not way.kid:
        return _skip("kid", "certificates name the key")
    kid = way.settings.kid
    public = way.key.public if way.key else None
    if kid == "thumbprint" and public is not None:
        kid = public.thumbprint()
    return _ok(
        "kid",
        f"{foreign(kid)}; registered keys live one year from posting, and when it was posted "
        "does not show here",
    )


def check_scopes(way: _Way) -> Check:
    """Scopes belong to the family of the identity (C18, M66, M67)."""
    try:
        named = _asked(way.facts)
    except HsmTollError as exc:
        return _failed("scope", exc)
    if not named:
        return _ok("scope", "none is set; each command names its own")
    return _ok("scope", f"{', '.join(named)}, of the family of {way.identity}")


def _asked(facts: Facts) -> tuple[str, ...]:
    """The scopes asked for, each once; errors as `apis.scope_of`."""
    settings = facts.settings
    words = [*([settings.scope] if settings.scope else ()), *facts.scopes]
    family = settings.identity or "eseal"
    return tuple(dict.fromkeys(apis.scope_of(word, family) for word in words))


def check_grant(way: _Way) -> Check:
    """The claims that the settings make are ones that Maskinporten takes (M50 to M72)."""
    settings = way.settings
    request = TokenRequest("toll:any", settings.resource, settings.consumer_org)
    x5c = way.chain.x5c(settings.x5c) if way.chain else ("",)
    try:
        Grant(
            settings.alg,
            settings.iss or "by the certificate",
            "audience",
            request,
            kid=settings.kid,
            x5c=() if way.kid else x5c,
        )
        own = way.chain.leaf.orgno() if way.chain else None
        if settings.consumer_org is not None and settings.consumer_org == own:
            raise ConfigurationError(
                "HSMTOLL_CONSUMER_ORG is the certificate's own organisation",
                hint="unset it: it names another organisation that is acted for",
                code="consumer-org-own",
            )
    except HsmTollError as exc:
        return _failed("grant", exc)
    return _ok("grant", f"{settings.alg}, the documented claims and no others")


def check_revocation(way: _Way) -> Check:
    """No certificate of the chain was taken back (M30)."""
    learned = way.facts.revocation
    if way.kid or learned is None or way.chain is None:
        return _skip("revocation", _NO_CERTIFICATE if way.kid else "asked with --crl or --online")
    mine = [each for each in learned if each.certificate in way.chain.certificates]
    for each in mine:
        status = each.status
        if status is not None and status.revoked_at is not None:
            why = f" ({foreign(status.reason)})" if status.reason else ""
            exc = CertificateError(
                f"'{each.certificate.subject}' was revoked at "
                f"{status.revoked_at:%Y-%m-%d %H:%M} UTC{why}, says its issuer's {status.source}",
                hint="Maskinporten will refuse it (MP-120): order a new one, with a new key if "
                "this one may be in other hands",
                code="certificate-revoked",
                who="issuer",
            )
            return _failed("revocation", exc)
    for each in mine:
        if each.problem is not None:
            line = f"nothing is known of '{each.certificate.subject}': {each.problem}"
            hint = "fetch the issuer's list by other means and give it with --crl"
            return _warn("revocation", "revocation-unknown", line, hint)
    for each in mine:
        if each.status is not None and each.status.stale:
            line = f"what the issuer said of '{each.certificate.subject}' is out of date"
            return _warn("revocation", "revocation-stale", line, "fetch the newest list")
    sources = ", ".join(sorted({each.status.source for each in mine if each.status}))
    return _ok("revocation", f"{len(mine)} certificates stand, says {sources}")


_OFFLINE: Final = "asked with --online"


def check_metadata(way: _Way) -> Check:
    """Maskinporten calls itself what the settings call it, byte for byte (RFC 8414, M51)."""
    answers = way.facts.answers
    if answers is None:
        return _skip("metadata", _OFFLINE)
    if isinstance(answers.metadata, HsmTollError):
        return _failed("metadata", answers.metadata)
    said = answers.metadata or {}
    settings = way.settings
    expected = {"test": exchange.TEST, "prod": exchange.PROD}.get(settings.environment or "")
    issuer = expected.issuer if expected else settings.endpoints.issuer
    token = expected.token if expected else settings.endpoints.token
    algs = said.get("token_endpoint_auth_signing_alg_values_supported", [settings.alg])
    wrong = (
        f"issuer {foreign(said.get('issuer'))}, not {issuer}" if said.get("issuer") != issuer
        else f"token_endpoint {foreign(said.get('token_endpoint'))}, not {token}"
        if said.get("token_endpoint") != token
        else f"no {settings.alg} among its algorithms" if settings.alg not in algs
        else None
    )  # fmt: skip
    if wrong is None:
        return _ok("metadata", f"{issuer} calls itself so")
    exc = ConfigurationError(
        f"Maskinporten's metadata says {wrong}",
        hint="check HSMTOLL_ENDPOINTS__ISSUER, slash included; if these are test or prod, tell us",
        code="metadata-differs",
    )
    return _failed("metadata", exc)


def check_clock(way: _Way) -> Check:
    """This machine's clock and Maskinporten's agree (A.5, C07)."""
    answers = way.facts.answers
    if answers is None:
        return _skip("clock", _OFFLINE)
    offset = answers.offset
    if offset is None:
        return _ok("clock", "the answers carry no Date to compare with")
    told = (
        f"this machine is {abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} Maskinporten"
    )
    if abs(offset) > MAX_SKEW:
        hint = f"synchronise the clock (NTP); up to {MAX_SKEW:.0f} s would have been corrected"
        return _failed("clock", ClockError(told, hint=hint, code="clock-skew"))
    if abs(offset) > _NOTICED:
        return _warn(
            "clock", "clock-differs", f"{told}; grants are corrected", "synchronise it (NTP)"
        )
    return _ok("clock", "agrees with Maskinporten's")


def check_health(way: _Way) -> Check:
    """Maskinporten says that it is well."""
    answers = way.facts.answers
    if answers is None:
        return _skip("health", _OFFLINE)
    if answers.health == 200:
        return _ok("health", "Maskinporten says it is well")
    if isinstance(answers.health, HsmTollError):
        return _warn("health", "health-unknown", str(answers.health), "see status.digdir.no")
    line = f"Maskinporten's health answers {answers.health}"
    return _warn("health", "health-bad", line, "try again later; see status.digdir.no")


def check_self_test(way: _Way) -> Check:
    """One real grant that opens nothing, and whom Maskinporten took us for (C27)."""
    answers = way.facts.answers
    if answers is None:
        return _skip("self-test", _OFFLINE)
    if way.identity != "eseal":
        return _skip("self-test", f"{apis.SELF_TEST_SCOPE} is for eSeals")
    if answers.self_test is not None:
        return _failed("self-test", answers.self_test)
    took = f"consumer.ID {foreign(answers.consumer)}, client_amr {foreign(answers.amr)}"
    leaf = way.chain.leaf if way.chain else None
    foretold = (leaf.consumer_id(way.identity), leaf.client_amr(way.identity)) if leaf else None
    if foretold is not None and foretold != (answers.consumer, answers.amr):
        return _warn(
            "self-test",
            "foretold-otherwise",
            f"granted, with {took}; foretold were {foreign(foretold[0])} and {foretold[1]}",
            "nothing is wrong with the grant; tell us what the certificate is",
        )
    return _ok("self-test", f"granted, with {took}")


def check_granted(way: _Way) -> tuple[Check, ...]:
    """Each scope asked for: granted by both services, or who must act."""
    answers = way.facts.answers
    if answers is None:
        return ()
    return tuple(
        _ok(f"scope {scope}", "granted, and exchanged at Customs where that is to be done")
        if error is None
        else _failed(f"scope {scope}", error)
        for scope, error in answers.scopes
    )


#: The way from the device outward, in order.
CHECKS: Final[tuple[tuple[str, Callable[[_Way], Check]], ...]] = (
    ("settings", check_settings),
    ("module", check_module),
    ("module-spy", check_spy),
    ("device", check_device),
    ("pin", check_pin),
    ("key", check_key),
    ("key-type", check_key_type),
    ("key-size", check_key_size),
    ("key-usage", check_key_usage),
    ("key-protection", check_key_protection),
    ("mechanism", check_mechanism),
    ("certificate", check_certificate),
    ("certificate-key", check_certificate_key),
    ("certificate-kind", check_certificate_kind),
    ("consumer-id", check_consumer),
    ("certificate-usage", check_certificate_usage),
    ("certificate-critical", check_certificate_critical),
    ("certificate-validity", check_validity),
    ("qualified", check_qualified),
    ("chain", check_chain),
    ("environment", check_environment),
    ("roll-over", check_roll_over),
    ("kid", check_kid),
    ("scope", check_scopes),
    ("grant", check_grant),
    ("revocation", check_revocation),
    ("metadata", check_metadata),
    ("clock", check_clock),
    ("health", check_health),
    ("self-test", check_self_test),
)


def examine(facts: Facts) -> tuple[Check, ...]:
    """
    Every check over *facts*. Of several keys, the first usable one is judged in full, as it
    is the one that signs; what keeps the others from it is a warning.
    """
    ways = [_way(facts, seen) for seen in facts.seen] or [_way(facts, None)]
    results = [_walk(way) for way in ways]
    chosen = _signing(ways)
    others = [
        _other_key(ways[n], result, before=n < chosen, with_key=ways[chosen])
        for n, result in enumerate(results)
        if n != chosen
    ]
    return (*results[chosen], *(each for each in others if each is not None))


def signing_chain(facts: Facts) -> chains.Chain | None:
    """The chain of the key that signs; None with a kid, or where no key is usable."""
    ways = [_way(facts, seen) for seen in facts.seen]
    return ways[_signing(ways)].chain if ways else None


def _signing(ways: Sequence[_Way]) -> int:
    """The place of the first key whose device and certificate are there, as `FirstUp` takes it."""
    usable = (n for n, way in enumerate(ways) if way.key and (way.kid or way.chain))
    return next(usable, 0)


def _walk(way: _Way) -> tuple[Check, ...]:
    found: list[Check] = []
    broken: str | None = None
    for name, judge in CHECKS:
        if broken is not None:
            found.append(_skip(name, f"not reached: {broken} comes first"))
            continue
        result = judge(way)
        found.append(result)
        if result.verdict == "fail":
            broken = result.check
    return tuple(found) if broken else (*found, *check_granted(way))


def _first_failure(result: Iterable[Check]) -> Check | None:
    return next((each for each in result if each.verdict == "fail"), None)


def _other_key(
    way: _Way, result: tuple[Check, ...], *, before: bool, with_key: _Way
) -> Check | None:
    named = foreign(way.seen.uri) if way.seen else ""
    failure = _first_failure(result)
    if failure is not None:
        what = "passed over" if before else "cannot take over"
        waiting = failure.code == "certificate-not-yet-valid"
        if waiting:
            return _ok("other-key", f"{named} waits: {failure.line}")
        return _warn(
            "other-key", "key-unusable", f"{named} {what}: {failure.line}", failure.hint or ""
        )
    mine, theirs = (each.chain.leaf if each.chain else None for each in (with_key, way))
    if mine and theirs and mine.consumer_id(way.identity) != theirs.consumer_id(way.identity):
        exc = CertificateError(
            f"{named} is of {foreign(theirs.consumer_id(way.identity))}, the key that signs of "
            f"{foreign(mine.consumer_id(way.identity))}",
            hint="all keys of HSMTOLL_HSM__KEY carry the same organizationIdentifier",
            code="keys-differ",
        )
        return _failed("other-key", exc)
    return _ok("other-key", f"{named} stands by")
