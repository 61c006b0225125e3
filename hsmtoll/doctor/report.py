"""
All checks in order, and their report as lines, JSON or evidence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.doctor import on_certificates, on_device, on_services, on_settings
from hsmtoll.doctor.evidence import evidence
from hsmtoll.doctor.findings import Check, KeyDiagnosis, Verdict, diagnose, failed, ok, skip, warn
from hsmtoll.errors import CertificateError, sanitized

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hsmtoll.doctor.facts import Facts
    from hsmtoll.x509 import path_building

__all__ = ["CHECKS", "Report", "examine", "first_failure", "signing_chain", "signing_key"]

#: In the order in which they run: from the device to the services.
CHECKS: Final[tuple[tuple[str, Callable[[KeyDiagnosis], Check]], ...]] = (
    ("settings", on_settings.check_settings),
    ("signing-host", on_settings.check_host),
    *on_device.CHECKS,
    *on_certificates.CHECKS[:-1],
    ("kid", on_settings.check_kid),
    ("scope", on_settings.check_scopes),
    ("grant", on_settings.check_grant),
    *on_certificates.CHECKS[-1:],
    *on_services.CHECKS,
)


#: The code of a check that was skipped because an earlier one failed.
_NOT_REACHED: Final = "not-reached"


#: The exit code of a report with warnings and without a failure, if warnings count.
_WARNED: Final = 3


@dataclass(frozen=True, slots=True)
class Report:
    """The results of all checks, in order. *strict*: warnings count for the exit code."""

    checks: tuple[Check, ...]
    facts: Facts = field(repr=False)
    strict: bool = False

    @property
    def exit_code(self) -> int:
        """The exit code of the first failure's class; 0, or 3 for a warning if *strict*."""
        if failure := first_failure(self.checks):
            return failure.exit_code
        warned = any(each.verdict == "warn" for each in self.checks)
        return _WARNED if self.strict and warned else 0

    def as_json(self) -> dict[str, Any]:
        """The report as JSON members."""
        return {
            "schema": 1,
            "exit_code": self.exit_code,
            "summary": {**self._counts(), "first": self._first()},
            "checks": [
                {
                    "profile": each.profile,
                    "check": each.check,
                    "code": each.code,
                    "verdict": each.verdict,
                    "line": each.line,
                    "hint": each.hint,
                    "who": each.who,
                    "days": each.days,
                }
                for each in self.checks
            ],
        }

    def evidence(self) -> dict[str, Any]:
        """As `as_json`, with key, chain, device, settings and versions for an auditor."""
        return {**self.as_json(), **evidence(self.facts, signing_chain(self.facts))}

    def lines(self) -> tuple[str, ...]:
        """
        The report as text: one line for each check, with a hint below it if there is something to
        do. Failures follow at the end, above the summary; skipped checks are one line.
        """
        failures = [each for each in self.checks if each.verdict == "fail"]
        unreached = [each for each in self.checks if each.code == _NOT_REACHED]
        lines = [
            line
            for each in self.checks
            if each not in failures and each not in unreached
            for line in _lines(each)
        ]
        for (profile, why), number in Counter((x.profile, x.line) for x in unreached).items():
            what = "1 check" if number == 1 else f"{number} checks"
            lines.append(f"skip  {_of(profile)}{what} {why}")
        lines += [line for each in failures for line in _lines(each)]
        counts = self._counts()
        warnings = "1 warning" if counts["warn"] == 1 else f"{counts['warn']} warnings"
        lines.append(
            f"{counts['ok']} ok, {warnings}, {counts['fail']} failed, {counts['skip']} skipped"
        )
        if first := self._first():
            lines.append(f"first: {first}")
        return tuple(lines)

    def _counts(self) -> dict[str, int]:
        verdicts: tuple[Verdict, ...] = ("ok", "warn", "fail", "skip")
        return {name: sum(each.verdict == name for each in self.checks) for name in verdicts}

    def _first(self) -> str | None:
        """What to do first: the hint of the first failure."""
        failure = first_failure(self.checks)
        if failure is None:
            return None
        return (failure.hint or f"fix {failure.check}: {failure.line}").splitlines()[0]


def _of(profile: str | None) -> str:
    return "" if profile is None else f"{sanitized(profile)}: "


def _lines(check: Check) -> tuple[str, ...]:
    named = check.code if check.code == check.check else f"{check.check} ({check.code})"
    named = _of(check.profile) + named
    hint = check.hint if check.verdict in ("warn", "fail") else None
    return (
        f"{check.verdict:4}  {named}: {check.line}",
        *(f"        {line}" for line in (hint or "").splitlines()),
    )


def examine(facts: Facts) -> tuple[Check, ...]:
    """
    Run every check on *facts*. If there are several keys, the first usable one signs, and all of
    its checks are reported; the errors of the others are warnings.
    """
    diagnoses = [diagnose(facts, seen) for seen in facts.seen] or [diagnose(facts, None)]
    results = [_run_checks(diagnosis) for diagnosis in diagnoses]
    chosen = _index_of_signing_key(diagnoses)
    others = [
        _other_key(diagnoses[n], result, before=n < chosen, with_key=diagnoses[chosen])
        for n, result in enumerate(results)
        if n != chosen
    ]
    return (*results[chosen], *(each for each in others if each is not None))


def signing_chain(facts: Facts) -> path_building.Chain | None:
    """The chain of the key that signs; None with a kid, or if no key is usable."""
    diagnoses = [diagnose(facts, seen) for seen in facts.seen]
    return diagnoses[_index_of_signing_key(diagnoses)].chain if diagnoses else None


def signing_key(facts: Facts) -> int | None:
    """The index of the key that signs; None if the device or the key has a failure."""
    diagnoses = [diagnose(facts, seen) for seen in facts.seen]
    index = _index_of_signing_key(diagnoses)
    if not diagnoses or any(
        each.check == "signature" and each.code == _NOT_REACHED
        for each in _run_checks(diagnoses[index])
    ):
        return None
    return index


def _index_of_signing_key(diagnoses: Sequence[KeyDiagnosis]) -> int:
    """The index of the first key with a device and a certificate: the one that signs."""
    usable = (
        n
        for n, diagnosis in enumerate(diagnoses)
        if diagnosis.key and (diagnosis.kid or diagnosis.chain)
    )
    return next(usable, 0)


def _run_checks(diagnosis: KeyDiagnosis) -> tuple[Check, ...]:
    found: list[Check] = []
    broken: str | None = None
    for name, judge in CHECKS:
        if broken is not None:
            found.append(skip(name, f"not reached: {broken} comes first", code=_NOT_REACHED))
            continue
        result = judge(diagnosis)
        found.append(result)
        if result.verdict == "fail":
            broken = result.check
    return tuple(found) if broken else (*found, *on_services.check_granted(diagnosis))


def first_failure(result: Iterable[Check]) -> Check | None:
    return next((each for each in result if each.verdict == "fail"), None)


def _other_key(
    diagnosis: KeyDiagnosis, result: tuple[Check, ...], *, before: bool, with_key: KeyDiagnosis
) -> Check | None:
    named = sanitized(diagnosis.seen.uri) if diagnosis.seen else ""
    failure = first_failure(result)
    if failure is not None:
        what = "passed over" if before else "cannot take over"
        waiting = failure.code == "certificate-not-yet-valid"
        if waiting:
            return ok("other-key", f"{named} waits: {failure.line}")
        return warn(
            "other-key", "key-unusable", f"{named} {what}: {failure.line}", failure.hint or ""
        )
    used, other = (each.chain.leaf if each.chain else None for each in (with_key, diagnosis))
    if (
        used
        and other
        and used.consumer_id(diagnosis.identity) != other.consumer_id(diagnosis.identity)
    ):
        exc = CertificateError(
            f"{named} belongs to {sanitized(other.consumer_id(diagnosis.identity))}, "
            f"the key that signs to {sanitized(used.consumer_id(diagnosis.identity))}",
            hint="use keys whose certificates have the same organizationIdentifier",
            code="keys-differ",
        )
        return failed("other-key", exc)
    return ok("other-key", f"{named} stands by")
