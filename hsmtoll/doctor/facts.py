"""
Collects the facts of settings, devices, files and services; the checks judge them.

The PIN is used for one login only, as for signing. Only `query_services` and `revocation_of` use
the network, and they run only at the user's request.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hsmtoll import apis, jws
from hsmtoll.clock import MAX_SKEW, offset_of
from hsmtoll.errors import HsmTollError, NetworkError, sanitized
from hsmtoll.hsm.pin import PinPad
from hsmtoll.jsonio import read_lenient
from hsmtoll.required import missing
from hsmtoll.signing.configured import signing_hosts
from hsmtoll.signing.device_certificates import read_certificates_and_key, readable, unread_of
from hsmtoll.token import NO_REQUIREMENTS, TokenRequest
from hsmtoll.tokens import exchange
from hsmtoll.tokens.single_flight import PendingRenewal
from hsmtoll.x509 import leaf_choice, path_building, revocation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hsmtoll.app import App
    from hsmtoll.hsm.device import Device
    from hsmtoll.hsm.facts import KeyFacts, ModuleFacts, TokenFacts
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.http_messages import HttpResponse
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.settings import Settings
    from hsmtoll.signing.signing_host import HostProbe
    from hsmtoll.transport import HttpClient
    from hsmtoll.x509.certificate import Certificate
    from hsmtoll.x509.leaf_choice import Unread
    from hsmtoll.x509.revocation import Status

__all__ = [
    "Facts",
    "KeyUse",
    "Revocation",
    "Seen",
    "ServiceAnswers",
    "candidates_of",
    "gather",
    "metadata_wrong",
    "pool_of",
    "query_services",
    "revocation_of",
    "scopes_asked",
    "sign",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUse:
    """A registered key: its *kid*, its *first* use on this machine, and the *file* that has it."""

    kid: str
    first: datetime | None
    file: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """
    The facts of one configured key. *error* is the first error on the way to the key; the facts
    that come after it are empty then. *signed*: whether the requested signature was verified, or
    the error; None if none was requested. *spied*: pkcs11-spy logs the calls. *key_use*: of a
    registered key (kid), unless its thumbprint is not known.
    """

    uri: KeyUri
    module: ModuleFacts | None = None
    token: TokenFacts | None = None
    pin_given: bool = False
    logged_in: bool = False
    key: KeyFacts | None = None
    error: HsmTollError | None = None
    certificates: tuple[Certificate, ...] = ()
    unread: tuple[Unread, ...] = ()
    spied: bool = False
    key_use: KeyUse | None = None
    signed: bool | HsmTollError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAnswers:
    """
    The answers of the services, or the errors instead.

    *offset*: seconds by which Maskinporten's clock is ahead. *consumer* and *amr* are read from
    the token of the self-test, for diagnosis only. *scopes*: each requested scope with its
    error, None if granted.
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
    """Revocation of one certificate of the chain: its *status*, or the *problem* instead."""

    certificate: Certificate
    status: Status | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """
    The input of all checks. *seen* has one entry for each configured key; *pem* are the
    certificates of HSMTOLL_HSM__CERTIFICATES, *scopes* as given by the user. *answers* is None
    offline, *revocation* None if not queried. *hosts*: the state of each signing host; *skew*:
    known offset of Maskinporten's clock, in seconds. *unused_proxy*: the environment variable of a
    proxy for Maskinporten that the settings do not use.
    """

    settings: Settings
    now: datetime
    seen: tuple[Seen, ...] = ()
    pem: tuple[Certificate, ...] = ()
    scopes: tuple[str, ...] = ()
    error: HsmTollError | None = None
    answers: ServiceAnswers | None = None
    revocation: tuple[Revocation, ...] | None = None
    hosts: tuple[HostProbe, ...] = ()
    skew: float = 0.0
    unused_proxy: str | None = None


def gather(app: App, *, scopes: tuple[str, ...] = ()) -> Facts:
    """Collect the facts of settings, environment, devices and files."""
    found = _gathered(app, scopes=scopes)
    if missing(app.settings):
        return found
    return replace(found, unused_proxy=app.http_client.unused_proxy(app.endpoints.token))


def _gathered(app: App, *, scopes: tuple[str, ...]) -> Facts:
    settings = app.settings
    now = datetime.fromtimestamp(app.clock.now().wall, UTC)
    if settings.signer.url:
        probes = tuple(host.probe() for host in signing_hosts(settings, app.clock).all)
        skew = app.skew.seconds if settings.environment is not None else 0.0
        return Facts(settings=settings, now=now, scopes=scopes, hosts=probes, skew=skew)
    try:
        uris = app.hsm.uris()
        supplied = app.signers.supplied()
    except HsmTollError as exc:
        return Facts(settings=settings, now=now, scopes=scopes, error=exc)
    try:
        # The App's own devices: later steps need no second login and no second prompt.
        devices = app.devices
    except HsmTollError as exc:
        seen = tuple(Seen(uri=uri, error=exc) for uri in uris)
    else:
        pairs = zip(uris, devices, strict=True)
        seen = tuple(_facts_of_key(app, uri, device) for uri, device in pairs)
    return Facts(settings=settings, now=now, seen=seen, pem=supplied.certificates, scopes=scopes)


def _facts_of_key(app: App, uri: KeyUri, device: Device) -> Seen:
    found: dict[str, Any] = {"uri": uri}
    try:
        path = app.hsm.module(uri)
        found["spied"] = "pkcs11-spy" in path.name or bool(os.environ.get("PKCS11SPY"))
        source = app.hsm.signing_pin(uri)
        # Nobody can enter a PIN at a pinpad for every signature.
        found["pin_given"] = source is not None and not isinstance(source, PinPad)

        stored = device.certificates()
        certificates = tuple(readable(stored))
        found["certificates"] = certificates
        found["unread"] = unread_of(stored, app.signers.supplied())
        module = device.inspect(log_in=False)
        found["module"] = module
        found["token"] = _token(module, uri)
        found["logged_in"] = device.pin_accepted
        supplied = app.signers.supplied()
        for stored, key in read_certificates_and_key(device, supplied.certificates):
            certificates = tuple(readable(stored))
            unread = unread_of(stored, supplied, key)
            found |= {"key": key, "certificates": certificates, "unread": unread}
            if app.settings.kid is not None:
                found["key_use"] = _key_use(app, key)
                break
            if key.public is None:
                break
            if leaf_choice.for_key((*certificates, *supplied.certificates), key.public):
                break
    except HsmTollError as exc:
        found["error"] = exc
    return Seen(**found)


def _key_use(app: App, key: KeyFacts) -> KeyUse | None:
    kid = app.settings.kid
    if kid == "thumbprint":
        kid = key.public.thumbprint() if key.public is not None else None
    if kid is None or missing(app.settings):
        return None
    uses = app.key_uses
    return KeyUse(kid=kid, first=uses.first(kid), file=uses.path(kid))


def sign(app: App, facts: Facts, index: int) -> Facts:
    """*facts* with the result of one signature by key *index*, over data that is not a grant."""
    seen = facts.seen[index]
    publics = [seen.key.public] if seen.key else []
    publics += [each.public_key for each in candidates_of(facts, seen)]
    candidates = tuple(dict.fromkeys(each for each in publics if each is not None))
    signed: bool | HsmTollError
    try:
        by = app.devices[index].self_test(app.settings.alg, candidates=candidates)
        signed = by is not None
    except HsmTollError as exc:
        signed = exc
    done = replace(seen, signed=signed)
    return replace(facts, seen=(*facts.seen[:index], done, *facts.seen[index + 1 :]))


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


def query_services(app: App, facts: Facts) -> ServiceAnswers:
    """Query the services; their answers are only reported, no setting is changed by them."""
    http_client, issuer = app.http_client, app.endpoints.issuer
    base = issuer if issuer.endswith("/") else f"{issuer}/"
    found: dict[str, Any] = {}
    sent = app.clock.now()
    try:
        answer = http_client.get(
            f"{base}.well-known/oauth-authorization-server", server="Maskinporten"
        )
        found["offset"] = offset_of(answer.headers, sent=sent, received=app.clock.now())
        found["metadata"] = _object(answer)
    except HsmTollError as exc:
        return ServiceAnswers(metadata=exc)
    far_off = abs(found["offset"] or 0.0) > MAX_SKEW
    if far_off or metadata_wrong(app.settings, found["metadata"]) is not None:
        # Further answers would add nothing, and a grant must go to the right Maskinporten only.
        return ServiceAnswers(**found)
    try:
        found["health"] = http_client.get(f"{base}health", server="Maskinporten").status
    except HsmTollError as exc:
        found["health"] = exc
    if app.family == "eseal" and app.settings.signer.mode == "grant":
        try:
            subject = _granted(app, http_client, apis.SELF_TEST_SCOPE)
            found["consumer"], found["amr"] = _consumer_of(subject.value)
        except HsmTollError as exc:
            found["self_test"] = exc
            # A signing host's policy may deny the self-test and permit the requested scopes.
            if exc.code != "policy-denied":
                return ServiceAnswers(**found)
    found["scopes"] = tuple(
        (scope, _try_scope(app, http_client, scope)) for scope in scopes_asked(facts)
    )
    return ServiceAnswers(**found)


def metadata_wrong(settings: Settings, metadata: dict[str, Any]) -> str | None:
    """The first value of *metadata* that differs from the settings (RFC 8414 section 3.3, M51)."""
    expected = {"test": exchange.TEST, "prod": exchange.PROD}.get(settings.environment or "")
    issuer = expected.issuer if expected else settings.endpoints.issuer
    token = expected.token if expected else settings.endpoints.token
    algs = metadata.get("token_endpoint_auth_signing_alg_values_supported", [settings.alg])
    if metadata.get("issuer") != issuer:
        return f"issuer {sanitized(metadata.get('issuer'))}, not {issuer}"
    if metadata.get("token_endpoint") != token:
        return f"token_endpoint {sanitized(metadata.get('token_endpoint'))}, not {token}"
    if not isinstance(algs, list) or settings.alg not in algs:
        return f"no {settings.alg} among its algorithms"
    return None


def _object(answer: HttpResponse) -> dict[str, Any]:
    read = read_lenient(answer.body)
    if answer.status != 200 or not isinstance(read, dict):
        raise NetworkError(
            f"Maskinporten's metadata: {answer.status}, and not a JSON object",
            hint="a proxy or gateway may have answered: check HSMTOLL_PROXY and the endpoints",
            code="metadata",
        )
    return read


def _granted(app: App, http_client: HttpClient, scope: str) -> exchange.Issued:
    """Request one real access token of Maskinporten; counts as a signature of the budget."""
    grant = app.renewal_by(app.signer).sign(_request(app, scope))
    post = exchange.grant_post(app.endpoints, grant.assertion)
    return exchange.read_subject(http_client.post(post), post, scope=scope)


def _request(app: App, scope: str) -> TokenRequest:
    return TokenRequest(scope, app.settings.resource, app.settings.consumer_org)


def _try_scope(app: App, http_client: HttpClient, scope: str) -> HsmTollError | None:
    try:
        if app.settings.signer.gives_tokens:
            app.renewal.renew(
                _request(app, scope), PendingRenewal(app.clock.now().boot, NO_REQUIREMENTS)
            )
            return None
        subject = _granted(app, http_client, scope)
        if scope != apis.SELF_TEST_SCOPE:
            post = exchange.exchange_post(app.endpoints, subject)
            exchange.read_issued(http_client.post(post), post)
    except HsmTollError as exc:
        return exc
    return None


def _consumer_of(token: str) -> tuple[str | None, str | None]:
    """``consumer.ID`` and ``client_amr`` of a token, *not verified*: for the report only."""
    try:
        claims = jws.read_unverified(token)[1]
    except ValueError:
        return None, None
    consumer = claims.get("consumer")
    named = consumer.get("ID") if isinstance(consumer, dict) else None
    amr = claims.get("client_amr")
    return (named if isinstance(named, str) else None, amr if isinstance(amr, str) else None)


def revocation_of(
    app: App, chain: path_building.Chain, *, crl: Path | None, online: bool
) -> tuple[Revocation, ...]:
    """The revocation status of each certificate below the root: by *crl*, else by the issuers."""
    now = datetime.fromtimestamp(app.clock.now().wall, UTC)
    pairs = list(itertools.pairwise(chain.certificates))
    if crl is not None:
        return tuple(_by_file(crl, pairs, now))
    http_client = app.http_client if online else None
    return tuple(_by_issuer(app, http_client, *pair, now) for pair in pairs) if http_client else ()


def _by_file(
    path: Path, pairs: list[tuple[Certificate, Certificate]], now: datetime
) -> Iterator[Revocation]:
    try:
        with path.open("rb") as file:
            data = file.read(revocation.MAX_BYTES + 1)
    except OSError as exc:
        why = f"the list {sanitized(path)} cannot be read: {exc.strerror}"
        yield Revocation(certificate=pairs[0][0], problem=why)
        return
    problem = ""
    found = False
    for certificate, issuer in pairs:
        try:
            status = revocation.by_crl(data, certificate, issuer, now=now)
        except ValueError as exc:
            problem = problem or f"the list {sanitized(path)}: {exc}"
        else:
            found = True
            yield Revocation(certificate=certificate, status=status)
    if not found:
        yield Revocation(certificate=pairs[0][0], problem=problem)


def _by_issuer(
    app: App, http_client: HttpClient, certificate: Certificate, issuer: Certificate, now: datetime
) -> Revocation:
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
            answer = http_client.get(where, server="revocation", public=public)
            if answer.status != 200:
                problem = f"{sanitized(url)} answered {answer.status}"
                continue
            status = judge(answer.body, certificate, issuer, now=now)
        except HsmTollError as exc:
            problem = str(exc)
        except ValueError as exc:
            problem = f"{sanitized(url)}: {exc}"
        else:
            return Revocation(certificate=certificate, status=status)
    return Revocation(certificate=certificate, problem=problem)


def pool_of(facts: Facts, seen: Seen) -> tuple[Certificate, ...]:
    return (*seen.certificates, *facts.pem)


def candidates_of(facts: Facts, seen: Seen) -> tuple[Certificate, ...]:
    pool = pool_of(facts, seen)
    public: RsaPublicKey | None = seen.key.public if seen.key else None
    if public is not None:
        return leaf_choice.for_key(pool, public)
    return tuple(each for each in pool if each.public_key is not None)


def scopes_asked(facts: Facts) -> tuple[str, ...]:
    """The requested scopes, each once. Raises as `apis.scope_of`."""
    settings = facts.settings
    words = [*([settings.scope] if settings.scope else ()), *facts.scopes]
    family = settings.identity or "eseal"
    return tuple(dict.fromkeys(apis.scope_of(word, family) for word in words))
