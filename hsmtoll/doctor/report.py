"""
All checks in the order of the way, and what is made of them: lines, JSON, evidence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.doctor import on_certificates, on_device, on_services, on_settings
from hsmtoll.doctor.evidence import evidence
from hsmtoll.doctor.findings import Check, Verdict, Way, failed, ok, skip, warn, way_of
from hsmtoll.errors import CertificateError, foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hsmtoll.doctor.facts import Facts
    from hsmtoll.x509 import path_building

__all__ = ["CHECKS", "Report", "examine", "first_failure", "signing_chain", "signing_key"]

#: The way from the device outward, in order.
CHECKS: Final[tuple[tuple[str, Callable[[Way], Check]], ...]] = (
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


#: The code of a check that hangs on one that failed.
_NOT_REACHED: Final = "not-reached"


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
            "summary": {**self._counts(), "first": self._first()},
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

    def evidence(self) -> dict[str, Any]:
        """As `as_json`, with what an auditor asks for: key, chain, device, settings, versions."""
        return {**self.as_json(), **evidence(self.facts, signing_chain(self.facts))}

    def lines(self) -> tuple[str, ...]:
        """
        For a person: one line a check, its hint below it where something is to be done. The
        failures stand together at the end, above the summary; what they kept from being reached
        is one line.
        """
        failures = [each for each in self.checks if each.verdict == "fail"]
        unreached = [each for each in self.checks if each.code == _NOT_REACHED]
        told = [
            line
            for each in self.checks
            if each not in failures and each not in unreached
            for line in _lines(each)
        ]
        if unreached:
            what = "1 check" if len(unreached) == 1 else f"{len(unreached)} checks"
            told.append(f"skip  {what} {unreached[0].line}")
        told += [line for each in failures for line in _lines(each)]
        counts = self._counts()
        warnings = "1 warning" if counts["warn"] == 1 else f"{counts['warn']} warnings"
        told.append(
            f"{counts['ok']} ok, {warnings}, {counts['fail']} failed, {counts['skip']} skipped"
        )
        if first := self._first():
            told.append(f"first: {first}")
        return tuple(told)

    def _counts(self) -> dict[str, int]:
        verdicts: tuple[Verdict, ...] = ("ok", "warn", "fail", "skip")
        return {name: sum(each.verdict == name for each in self.checks) for name in verdicts}

    def _first(self) -> str | None:
        """What to do before all else."""
        failure = first_failure(self.checks)
        if failure is None:
            return None
        return (failure.hint or f"mend {failure.check}: {failure.line}").splitlines()[0]


def _lines(check: Check) -> tuple[str, ...]:
    named = check.code if check.code == check.check else f"{check.check} ({check.code})"
    hint = check.hint if check.verdict in ("warn", "fail") else None
    return (
        f"{check.verdict:4}  {named}: {check.line}",
        *(f"        {line}" for line in (hint or "").splitlines()),
    )


def examine(facts: Facts) -> tuple[Check, ...]:
    """
    Every check over *facts*. Of several keys, the first usable one is judged in full, as it
    is the one that signs; what keeps the others from it is a warning.
    """
    ways = [way_of(facts, seen) for seen in facts.seen] or [way_of(facts, None)]
    results = [_walk(way) for way in ways]
    chosen = _signing(ways)
    others = [
        _other_key(ways[n], result, before=n < chosen, with_key=ways[chosen])
        for n, result in enumerate(results)
        if n != chosen
    ]
    return (*results[chosen], *(each for each in others if each is not None))


def signing_chain(facts: Facts) -> path_building.Chain | None:
    """The chain of the key that signs; None with a kid, or where no key is usable."""
    ways = [way_of(facts, seen) for seen in facts.seen]
    return ways[_signing(ways)].chain if ways else None


def signing_key(facts: Facts) -> int | None:
    """The place of the key that signs; None where its device or the key has a failure."""
    ways = [way_of(facts, seen) for seen in facts.seen]
    place = _signing(ways)
    if not ways or any(
        each.check == "signature" and each.code == _NOT_REACHED for each in _walk(ways[place])
    ):
        return None
    return place


def _signing(ways: Sequence[Way]) -> int:
    """The place of the first key that has a device and a certificate: it signs."""
    usable = (n for n, way in enumerate(ways) if way.key and (way.kid or way.chain))
    return next(usable, 0)


def _walk(way: Way) -> tuple[Check, ...]:
    found: list[Check] = []
    broken: str | None = None
    for name, judge in CHECKS:
        if broken is not None:
            found.append(skip(name, f"not reached: {broken} comes first", code=_NOT_REACHED))
            continue
        result = judge(way)
        found.append(result)
        if result.verdict == "fail":
            broken = result.check
    return tuple(found) if broken else (*found, *on_services.check_granted(way))


def first_failure(result: Iterable[Check]) -> Check | None:
    return next((each for each in result if each.verdict == "fail"), None)


def _other_key(way: Way, result: tuple[Check, ...], *, before: bool, with_key: Way) -> Check | None:
    named = foreign(way.seen.uri) if way.seen else ""
    failure = first_failure(result)
    if failure is not None:
        what = "passed over" if before else "cannot take over"
        waiting = failure.code == "certificate-not-yet-valid"
        if waiting:
            return ok("other-key", f"{named} waits: {failure.line}")
        return warn(
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
        return failed("other-key", exc)
    return ok("other-key", f"{named} stands by")
