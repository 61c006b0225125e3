"""
One finding, and the way that leads to it: the facts of one key with the chain it would send.
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
    "Verdict",
    "Way",
    "broken_at",
    "failed",
    "ok",
    "skip",
    "warn",
    "way_of",
]

Verdict = Literal["ok", "warn", "fail", "skip"]

NO_DEVICE: Final = "a signing host signs, no device of this machine"


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
class Way:
    """The facts of one key, with the chain that would be sent or the error instead."""

    facts: Facts
    seen: Seen | None
    chain: path_building.Chain | None = None
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
        return candidates_of(self.facts, self.seen) if self.seen else ()


def way_of(facts: Facts, seen: Seen | None) -> Way:
    if seen is None or seen.key is None or facts.settings.kid is not None:
        return Way(facts=facts, seen=seen)
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
        return Way(facts=facts, seen=seen, trouble=exc)
    return Way(facts=facts, seen=seen, chain=chain)


def ok(check: str, line: str) -> Check:
    return Check(check, check, "ok", line)


def skip(check: str, line: str, *, code: str | None = None) -> Check:
    return Check(check, code or check, "skip", line)


def warn(check: str, code: str, line: str, hint: str) -> Check:
    return Check(check, code, "warn", line, _hint(hint.splitlines()), "you")


def failed(check: str, exc: HsmTollError) -> Check:
    who = exc.who or "you"
    return Check(check, exc.code, "fail", str(exc), _hint(exc.hints), who, exc.exit_code)


def _hint(lines: Iterable[str]) -> str | None:
    """Without the advice to ask the doctor, which is asked already."""
    return "\n".join(line for line in lines if "hsmtoll doctor" not in line) or None


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


def broken_at(way: Way, check: str, fallback: str) -> Check | None:
    """The failure that belongs to *check*, if the way broke there."""
    exc: HsmTollError | None = way.trouble
    if way.seen is not None and way.seen.error is not None:
        exc = way.seen.error
    if exc is None or _ANSWERS.get(exc.code, fallback) != check:
        return None
    return failed(check, exc)
