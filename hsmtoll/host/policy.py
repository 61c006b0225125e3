"""
Authorization policy: a TOML file, default deny, and the verdict on one request with its reason.

The verdict is a pure function of policy, peer, request and usage counts.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from hsmtoll import apis, files
from hsmtoll.errors import ConfigurationError, HsmTollError, PolicyDenied, UsageError, sanitized
from hsmtoll.host.peers import Peer
from hsmtoll.token import TokenRequest, details_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Counts", "Entry", "GrantRequest", "Mode", "Policy", "Verdict", "decide", "explain"]

Mode = Literal["grant", "token"]

_CALLER: Final = re.compile(r"(?:uid|gid):(0|[1-9][0-9]{0,9})|san:(?:dns|uri):[!-~]+")
_MODES: Final = ("grant", "token")
_OPTIONS: Final = frozenset(
    {
        "scopes",
        "mode",
        "consumer_org",
        "resource",
        "authorization_details",
        "per_minute",
        "per_day",
    }
)


@dataclass(frozen=True, slots=True)
class GrantRequest:
    """The members of a request to /v1/grant or /v1/token."""

    profile: str
    scope: str
    consumer_org: str | None = None
    resource: tuple[str, ...] = ()
    authorization_details: str = ""

    def token_request(self, scope: str) -> TokenRequest:
        """The request to Maskinporten, with *scope* in full."""
        return TokenRequest(scope, self.resource, self.consumer_org, self.authorization_details)


@dataclass(frozen=True, slots=True)
class Counts:
    """Usage of a profile by one caller in the last minute and day, counted from the audit."""

    minute: int = 0
    day: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """
    The permissions of one caller for one profile; *line* is its line in the file. An object of
    *authorization_details* permits every object that has all its members with the same values.
    """

    scopes: frozenset[str]
    mode: frozenset[str]
    consumer_org: frozenset[str]
    resource: frozenset[str]
    authorization_details: tuple[Mapping[str, Any], ...]
    per_minute: int | None
    per_day: int | None
    line: int


@dataclass(frozen=True, slots=True)
class Caller:
    """One ``[caller."…"]`` table."""

    profiles: Mapping[str, Entry]
    line: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    *allowed*, *why* in a sentence, the *line* that decided (0: none), the full *scope*, the
    *caller* as named in the policy. *quota*: refused by the quota alone, so only for now.
    """

    allowed: bool
    why: str
    line: int = 0
    scope: str = ""
    caller: str = ""
    quota: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """A parsed policy file; *sha256* is the hash of its bytes."""

    profiles: Mapping[str, Mapping[str, Any]]
    callers: Mapping[str, Caller]
    revoked: frozenset[str]
    sha256: str

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read *path*. ConfigurationError if it is invalid, or if others may change it."""
        return cls.parse(files.read(path, "HSMTOLL_HOST__POLICY"), str(path))

    @classmethod
    def parse(cls, raw: bytes, name: str = "policy") -> Policy:
        """As `load`, from the file's bytes."""
        try:
            text = raw.decode()
            tables = tomllib.loads(text)
        except (ValueError, RecursionError) as exc:
            at = re.search(r"\(at .*\)", str(exc))
            # `from None`: the parser may quote a line, and a profile may hold a PIN.
            raise _wrong(name, f"not valid TOML {at[0] if at else ''}".rstrip()) from None
        return _Reader(name, text).policy(tables, hashlib.sha256(raw).hexdigest())

    def identity(self, profile: str) -> apis.Identity:
        """eseal or norwegian."""
        found: apis.Identity = self.profiles[profile]["identity"]
        return found


def _wrong(name: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"policy {name}: {what}",
        hint="`hsmtoll policy test` shows what a policy says",
        code="policy-wrong",
    )


class _Reader:
    """Validates the tables of a policy file; every error names the file."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._lines = text.splitlines()

    def policy(self, tables: dict[str, Any], sha256: str) -> Policy:
        unknown = sorted(tables.keys() - {"profile", "caller", "revoked_sha256"})
        if unknown:
            raise self._bad(f"{sanitized(unknown[0])}: there is no such key")
        profiles = self._table(tables.get("profile", {}), "profile")
        for name, profile in profiles.items():
            self._profile(name, self._table(profile, f"profile.{name}"))
        revoked = set(self._texts(tables.get("revoked_sha256", []), "revoked_sha256"))
        callers = {}
        for name, table in self._table(tables.get("caller", {}), "caller").items():
            # A key written below a table belongs to that table in TOML: accept it there, too.
            given = dict(self._table(table, f"caller.{name}"))
            revoked |= set(self._texts(given.pop("revoked_sha256", []), "revoked_sha256"))
            callers[name] = self._caller(name, given, profiles)
        bare = {each.replace(":", "").lower() for each in revoked}
        wrong = [each for each in bare if not re.fullmatch(r"[0-9a-f]{64}", each)]
        if wrong:
            raise self._bad(f"revoked_sha256: {sanitized(wrong[0])} is not a SHA-256")
        return Policy(profiles, callers, frozenset(bare), sha256)

    def _profile(self, name: str, profile: dict[str, Any]) -> None:
        if profile.get("identity") not in ("eseal", "norwegian"):
            raise self._bad(f"profile {sanitized(name)}: identity must be eseal or norwegian")
        if profile.get("environment") not in ("test", "prod", "sandbox"):
            raise self._bad(f"profile {sanitized(name)}: environment must be test, prod or sandbox")
        named = {key.partition("__")[0] for key in profile}
        if {"host", "signer"} & named:
            raise self._bad(f"profile {sanitized(name)}: a profile cannot set host or signer")
        # The file and its table are options of the command, and no settings.
        for each in sorted({"config", "profile"} & named):
            raise self._bad(f"profile {sanitized(name)}: {each}: there is no such setting")

    def _caller(self, name: str, table: dict[str, Any], profiles: Mapping[str, Any]) -> Caller:
        if not _names_a_caller(name):
            raise self._bad(_invalid_caller(name))
        if table.keys() - {"profile"}:
            raise self._bad(f"caller {name}: only profile.NAME is expected in it")
        line = self._line(rf"\[\s*caller\s*\.\s*[\"']{re.escape(name)}[\"']")
        entries = {}
        for profile, entry in self._table(table.get("profile", {}), "profile").items():
            if profile not in profiles:
                raise self._bad(f"caller {name}: there is no profile {sanitized(profile)}")
            given = self._table(entry, f"caller {name}: profile.{profile}")
            entries[profile] = self._entry(
                name, given, profiles[profile]["identity"], line, profile
            )
        return Caller(entries, line)

    def _entry(
        self, caller: str, given: dict[str, Any], identity: apis.Identity, line: int, profile: str
    ) -> Entry:
        where = f"caller {caller}, profile {profile}"
        unknown = sorted(given.keys() - _OPTIONS)
        if unknown:
            raise self._bad(f"{where}: there is no option {sanitized(unknown[0])}")
        modes = self._texts(given.get("mode", []), f"{where}: mode")
        if not set(modes) <= set(_MODES):
            raise self._bad(f"{where}: mode is grant or token")
        try:
            scopes = frozenset(
                apis.scope_of(each, identity)
                for each in self._texts(given.get("scopes", []), f"{where}: scopes")
            )
        except HsmTollError as exc:
            raise self._bad(f"{where}: {exc}") from exc
        quotas = []
        for name in ("per_minute", "per_day"):
            value = given.get(name)
            if value is not None and (type(value) is not int or value < 0):
                raise self._bad(f"{where}: {name} must be a whole number")
            quotas.append(value)
        return Entry(
            scopes,
            frozenset(modes),
            frozenset(self._texts(given.get("consumer_org", []), f"{where}: consumer_org")),
            frozenset(self._texts(given.get("resource", []), f"{where}: resource")),
            self._details(given.get("authorization_details", []), where),
            quotas[0],
            quotas[1],
            self._line(rf"\s*(?:profile\s*\.\s*)?[\"']?{re.escape(profile)}[\"']?\s*=", line)
            or line,
        )

    def _line(self, pattern: str, after: int = 0) -> int:
        for number, text in enumerate(self._lines[after:], after + 1):
            if re.match(pattern, text):
                return number
        return 0

    def _table(self, value: object, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._bad(f"{sanitized(what)}: a table is expected")
        return value

    def _details(self, value: object, where: str) -> tuple[Mapping[str, Any], ...]:
        try:
            text = details_text(value)
        except UsageError as exc:
            raise self._bad(f"{where}: {exc}") from exc
        return tuple(TokenRequest("", authorization_details=text).details)

    def _texts(self, value: object, what: str) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._bad(f"{sanitized(what)}: a list of strings is expected")
        return value

    def _bad(self, what: str) -> ConfigurationError:
        return _wrong(self._name, what)


def decide(
    policy: Policy,
    peer: Peer,
    request: GrantRequest,
    mode: str,
    counts: Counts | Mapping[str, Counts],
) -> Verdict:
    """
    Decide on *request* of *peer*. *counts*: of this caller, or a mapping by the caller's name.

    Exactly one caller entry must match; more than one is refused as an error of the policy.
    """
    if peer.certificate_sha256 in policy.revoked:
        return Verdict(False, "the caller's certificate is revoked")
    matching = sorted(peer.names & policy.callers.keys())
    if not matching:
        return Verdict(False, "no caller entry matches")
    if len(matching) > 1:
        line = policy.callers[matching[1]].line
        return Verdict(False, f"more than one caller entry matches: {', '.join(matching)}", line)
    name = matching[0]
    caller = policy.callers[name]
    entry = caller.profiles.get(request.profile)
    if entry is None:
        why = f"{name} has no profile {sanitized(request.profile)}"
        return Verdict(False, why, caller.line, caller=name)
    try:
        scope = apis.scope_of(request.scope, policy.identity(request.profile))
    except HsmTollError as exc:
        return Verdict(False, str(exc), entry.line, caller=name)
    seen = counts if isinstance(counts, Counts) else counts.get(name, Counts())
    refusal = _refusal(entry, request, scope, mode)
    if refusal is not None:
        return Verdict(False, refusal, entry.line, scope, name)
    for had, limit, span in (
        (seen.minute, entry.per_minute, "minute"),
        (seen.day, entry.per_day, "day"),
    ):
        if limit is not None and had >= limit:
            why = f"the quota of {limit} per {span} is used up"
            return Verdict(False, why, entry.line, scope, name, quota=True)
    return Verdict(True, f"{name} may have {scope} of {request.profile}", entry.line, scope, name)


def allows(policy: Policy, request: GrantRequest) -> bool:
    """Whether any caller is permitted *request* (with the full scope), in any mode."""
    return any(
        _refusal(entry, request, request.scope, mode) is None
        for caller in policy.callers.values()
        for name, entry in caller.profiles.items()
        if name == request.profile
        for mode in entry.mode
    )


def _refusal(entry: Entry, request: GrantRequest, scope: str, mode: str) -> str | None:
    if mode not in entry.mode:
        return f"mode {sanitized(mode)} is not allowed"
    if scope not in entry.scopes:
        return f"scope {sanitized(scope)} is not allowed"
    if request.consumer_org is not None and request.consumer_org not in entry.consumer_org:
        return f"consumer_org {sanitized(request.consumer_org)} is not allowed"
    for each in request.resource:
        if each not in entry.resource:
            return f"resource {sanitized(each)} is not allowed"
    for details in request.token_request(scope).details:
        if not any(_covers(allowed, details) for allowed in entry.authorization_details):
            return f"authorization_details {sanitized(details)} are not allowed"
    return None


def _covers(allowed: object, asked: object) -> bool:
    """Whether *asked* has every member of *allowed*, with the same value."""
    if isinstance(allowed, dict) and isinstance(asked, dict):
        return all(name in asked and _covers(allowed[name], asked[name]) for name in allowed)
    return type(allowed) is type(asked) and allowed == asked


def _names_a_caller(name: str) -> bool:
    """Whether *name* is a valid caller name; a uid or gid must fit 32 bits."""
    fits = _CALLER.fullmatch(name)
    return fits is not None and int(fits[1] or 0) < 2**32


def _invalid_caller(name: str) -> str:
    return f"caller {sanitized(name)}: uid:N, gid:N, san:dns:NAME or san:uri:URI is expected"


def explain(path: Path, profile: str, caller: str, scope: str) -> dict[str, tuple[bool, str]]:
    """For each mode: whether *caller* (``uid:1001``) is permitted *scope*, and why."""
    policy = Policy.load(path)
    if not _names_a_caller(caller):
        raise ConfigurationError(_invalid_caller(caller))
    kind, _, number = caller.partition(":")
    if kind != "san":
        try:
            Peer.local(int(number))
        except PolicyDenied as exc:
            return dict.fromkeys(_MODES, (False, f"denied: {exc} ({path}: default deny)"))
    explained = {}
    for mode in _MODES:
        verdict = decide(
            policy, Peer(frozenset({caller})), GrantRequest(profile, scope), mode, Counts()
        )
        place = f"{path}:{verdict.line}" if verdict.line else f"{path}: default deny"
        word = "allowed" if verdict.allowed else "denied"
        explained[mode] = (verdict.allowed, f"{word}: {verdict.why} ({place})")
    return explained
