"""
The result of one check, and the facts it is based on: one key and the chain it would send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from hsmtoll.doctor.facts import candidates_of, pool_of
from hsmtoll.errors import CertificateError, HsmTollError
from hsmtoll.x509 import leaf_choice, path_building

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hsmtoll.apis import Identity
    from hsmtoll.doctor.facts import Facts, Seen
    from hsmtoll.hsm.facts import KeyFacts
    from hsmtoll.settings import Settings
    from hsmtoll.x509.certificate import Certificate

__all__ = [
    "NO_DEVICE",
    "Check",
    "KeyDiagnosis",
    "Verdict",
    "diagnose",
    "failed",
    "failure_of",
    "ok",
    "skip",
    "warn",
]

Verdict = Literal["ok", "warn", "fail", "skip"]

NO_DEVICE: Final = "a signing host signs, no device of this machine"


@dataclass(frozen=True, slots=True)
class Check:
    """
    The result of one check. *check* is its name, *code* the result, equal to the name if all is
    well. *exit_code* is that of the corresponding error class. *who* must act. *days*: whole days
    until what was checked expires. *profile*: of a signing host's policy.
    """

    check: str
    code: str
    verdict: Verdict
    line: str
    hint: str | None = None
    who: str | None = None
    exit_code: int = 0
    days: int | None = None
    profile: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyDiagnosis:
    """The facts of one key, with the chain that would be sent, or *chain_error*."""

    facts: Facts
    seen: Seen | None
    chain: path_building.Chain | None = None
    chain_error: CertificateError | None = None

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
        return candidates_of(self.facts, self.seen) if self.seen else ()


def diagnose(facts: Facts, seen: Seen | None) -> KeyDiagnosis:
    if seen is None or seen.key is None or facts.settings.kid is not None:
        return KeyDiagnosis(facts=facts, seen=seen)
    hsm = facts.settings.hsm
    try:
        chain = leaf_choice.checked(
            candidates_of(facts, seen),
            pool_of(facts, seen),
            identity=facts.settings.identity or "eseal",
            now=facts.now,
            mode=facts.settings.x5c_mode,
            root_sha256=hsm.root_sha256,
            preferred=frozenset(each.sha256 for each in facts.pem),
            pinned_sha256=hsm.certificate_sha256,
            unread=seen.unread,
        )
    except CertificateError as exc:
        return KeyDiagnosis(facts=facts, seen=seen, chain_error=exc)
    return KeyDiagnosis(facts=facts, seen=seen, chain=chain)


def ok(check: str, line: str, *, days: int | None = None) -> Check:
    return Check(check, check, "ok", line, days=days)


def skip(check: str, line: str, *, code: str | None = None) -> Check:
    return Check(check, code or check, "skip", line)


def warn(check: str, code: str, line: str, hint: str, *, days: int | None = None) -> Check:
    return Check(check, code, "warn", line, _hint(hint.splitlines()), "you", days=days)


def failed(check: str, exc: HsmTollError, *, days: int | None = None) -> Check:
    who = exc.who or "you"
    return Check(check, exc.code, "fail", str(exc), _hint(exc.hints), who, exc.exit_code, days)


def _hint(lines: Iterable[str]) -> str | None:
    """Join *lines*, without the advice to run `hsmtoll doctor`."""
    return "\n".join(line for line in lines if "hsmtoll doctor" not in line) or None


# Code of an error → the check that reports it. Other codes belong to the caller's fallback.
_CHECK_OF_CODE: Final = {
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
    "pin-count-low": "pin",
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
    "chain-broken": "chain",
    "chain-incomplete": "chain",
    "chain-expired": "chain",
    "chain-not-yet-valid": "chain",
    "chain-pin": "chain",
}


def failure_of(diagnosis: KeyDiagnosis, check: str, fallback: str) -> Check | None:
    """The failure of *check*, if the key's first error belongs to it."""
    exc: HsmTollError | None = diagnosis.chain_error
    if diagnosis.seen is not None and diagnosis.seen.error is not None:
        exc = diagnosis.seen.error
    if exc is None or _CHECK_OF_CODE.get(exc.code, fallback) != check:
        return None
    return failed(check, exc)
