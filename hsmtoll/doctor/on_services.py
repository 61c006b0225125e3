"""
Checks of the answers of Maskinporten and Customs, which are compared with the settings.
"""

from __future__ import annotations

from typing import Final

from hsmtoll import apis
from hsmtoll.clock import MAX_SKEW
from hsmtoll.doctor.facts import metadata_wrong
from hsmtoll.doctor.findings import Check, KeyDiagnosis, failed, ok, skip, warn
from hsmtoll.errors import ClockError, ConfigurationError, HsmTollError, sanitized

__all__ = ["CHECKS", "check_granted"]

#: Seconds of clock skew before a warning: a Date header has whole seconds and is a round trip
#: old (C07).
_WARN_SKEW: Final = 5.0
_OFFLINE: Final = "checked with --online"


def check_proxy(diagnosis: KeyDiagnosis) -> Check:
    """A proxy in the environment that hsmtoll does not use may be the one that is needed."""
    answers = diagnosis.facts.answers
    unused = diagnosis.facts.unused_proxy
    if diagnosis.settings.proxy is not None:
        return ok("proxy", "HSMTOLL_PROXY is set")
    if unused is None:
        return ok("proxy", "none is set")
    line = f"{unused} is set and not used"
    if answers is not None and not isinstance(answers.metadata, HsmTollError):
        return ok("proxy", f"{line}; Maskinporten answers without it")
    return warn("proxy", "proxy-unused", line, "HSMTOLL_PROXY=environment uses it")


def check_metadata(diagnosis: KeyDiagnosis) -> Check:
    """The metadata has exactly the endpoints of the settings (RFC 8414, M51)."""
    answers = diagnosis.facts.answers
    if answers is None:
        return skip("metadata", _OFFLINE)
    if isinstance(answers.metadata, HsmTollError):
        return failed("metadata", answers.metadata)
    wrong = metadata_wrong(diagnosis.settings, answers.metadata or {})
    if wrong is None:
        return ok("metadata", "Maskinporten's metadata has the endpoints of the settings")
    exc = ConfigurationError(
        f"Maskinporten's metadata says {wrong}",
        hint="check HSMTOLL_ENDPOINTS__ISSUER, slash included; for test or prod, please report it",
        code="metadata-differs",
    )
    return failed("metadata", exc)


def check_clock(diagnosis: KeyDiagnosis) -> Check:
    """This machine's clock and Maskinporten's agree (C07)."""
    answers = diagnosis.facts.answers
    if answers is None:
        return skip("clock", _OFFLINE)
    offset = answers.offset
    if offset is None:
        return ok("clock", "the answers carry no Date to compare with")
    line = (
        f"this machine is {abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} Maskinporten"
    )
    if abs(offset) > MAX_SKEW:
        hint = f"synchronise the clock (NTP); up to {MAX_SKEW:.0f} s would have been corrected"
        return failed("clock", ClockError(line, hint=hint, code="clock-skew"))
    if abs(offset) > _WARN_SKEW:
        return warn(
            "clock", "clock-differs", f"{line}; grants are corrected", "synchronise it (NTP)"
        )
    return ok("clock", "agrees with Maskinporten's")


def check_health(diagnosis: KeyDiagnosis) -> Check:
    """Maskinporten's health endpoint answers 200."""
    answers = diagnosis.facts.answers
    if answers is None:
        return skip("health", _OFFLINE)
    if answers.health == 200:
        return ok("health", "Maskinporten's health endpoint answers 200")
    if isinstance(answers.health, HsmTollError):
        return warn("health", "health-unknown", str(answers.health), "see status.digdir.no")
    line = f"Maskinporten's health answers {answers.health}"
    return warn("health", "health-bad", line, "try again later; see status.digdir.no")


def check_self_test(diagnosis: KeyDiagnosis) -> Check:
    """One real grant without access to any API; shows the identity that Maskinporten sees (C27)."""
    answers = diagnosis.facts.answers
    if answers is None:
        return skip("self-test", _OFFLINE)
    if diagnosis.identity != "eseal":
        return skip("self-test", f"{apis.SELF_TEST_SCOPE} is for eSeals")
    if diagnosis.settings.signer.mode == "token":
        return skip(
            "self-test", "the signing host signs grants for itself, and returns tokens only"
        )
    if answers.self_test is not None and answers.self_test.code == "policy-denied":
        tried = ", ".join(scope for scope, _ in answers.scopes) or "nothing: name one with --scope"
        return skip("self-test", f"{answers.self_test}; tried instead: {tried}")
    if answers.self_test is not None:
        return failed("self-test", answers.self_test)
    took = f"consumer.ID {sanitized(answers.consumer)}, client_amr {sanitized(answers.amr)}"
    leaf = diagnosis.chain.leaf if diagnosis.chain else None
    predicted = (
        (leaf.consumer_id(diagnosis.identity), leaf.client_amr(diagnosis.identity))
        if leaf
        else None
    )
    if predicted is not None and predicted != (answers.consumer, answers.amr):
        return warn(
            "self-test",
            "prediction-differs",
            f"granted, with {took}; predicted: {sanitized(predicted[0])} and {predicted[1]}",
            "the grant is valid; please report the subject and QCStatements of the certificate",
        )
    return ok("self-test", f"granted, with {took}")


def check_granted(diagnosis: KeyDiagnosis) -> tuple[Check, ...]:
    """One check for each requested scope: granted by both services, or who must act."""
    answers = diagnosis.facts.answers
    if answers is None:
        return ()
    return tuple(
        ok(
            f"scope {scope}",
            f"granted by Maskinporten{'' if scope == apis.SELF_TEST_SCOPE else ' and by Customs'}",
        )
        if error is None
        else failed(f"scope {scope}", error)
        for scope, error in answers.scopes
    )


CHECKS: Final = (
    ("proxy", check_proxy),
    ("metadata", check_metadata),
    ("clock", check_clock),
    ("health", check_health),
    ("self-test", check_self_test),
)
