"""
Checks the setup, from the device to the services, and predicts their answers.

    facts ──► KeyDiagnosis ──► on_settings, on_device, on_certificates, on_services ──► Report
    a signing host: on_host, then the same for each profile of its policy ──────────────► Report

Each check has a name, each result a stable code. After the first failure the checks that depend
on it are skipped. The PIN is used for one login only, as for signing. Offline nothing is signed
unless the user asks for it. No secret enters a report.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hsmtoll.doctor.facts import Facts, Seen, gather, query_services, revocation_of, sign
from hsmtoll.doctor.findings import Check
from hsmtoll.doctor.on_host import HostSetup, examine_host
from hsmtoll.doctor.report import Report, examine, first_failure, signing_chain, signing_key
from hsmtoll.errors import ConfigurationError, HsmTollError, UsageError, sanitized
from hsmtoll.host.policy import Policy
from hsmtoll.host.profiles import profile_settings
from hsmtoll.host.required import needed
from hsmtoll.host.system import clock_is_synchronised
from hsmtoll.settings import Settings
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hsmtoll.app import App

__all__ = [
    "Check",
    "Facts",
    "Report",
    "Seen",
    "examine",
    "report_settings_error",
    "run",
    "run_on_host",
]


def run(
    app: App,
    *,
    online: bool = False,
    signing: bool = False,
    scopes: Sequence[str] = (),
    crl: Path | None = None,
) -> Report:
    """
    Run all checks. Nothing is sent unless *online*.

    *signing*: make one signature, over data that is not a grant. *scopes* are APIs or scopes to
    request; *crl* is a file with a revocation list. Never raises for an error of the setup: it
    is reported.
    """
    facts = gather(app, scopes=tuple(scopes))
    if signing and (index := signing_key(facts)) is not None:
        facts = sign(app, facts, index)
    checks = examine(facts)
    chain = signing_chain(facts)
    if chain is not None and (crl is not None or online):
        facts = replace(facts, revocation=revocation_of(app, chain, crl=crl, online=online))
        checks = examine(facts)
    if online and not first_failure(checks):
        facts = replace(facts, answers=query_services(app, facts))
        checks = examine(facts)
    return Report(checks, facts)


def report_settings_error(problem: HsmTollError) -> Report:
    """The report if the settings cannot be read because of *problem*."""
    facts = Facts(settings=Settings.model_construct(), now=datetime.now(UTC), error=problem)
    return Report(examine(facts), facts)


def run_on_host(
    settings: Settings,
    *,
    profile: str | None,
    load: Callable[..., Settings],
    examined: Callable[[Settings], Report],
    now: datetime | None = None,
    synchronised: Callable[[], bool] = clock_is_synchronised,
) -> Report:
    """
    Check a signing host: its own files, then *profile* of its policy, or every profile.

    *settings* are the host's; *load* returns them with those of a profile as keywords, and
    *examined* is the report on one profile's settings. Without a valid policy no profile is
    checked. Raises UsageError if the policy has no *profile*.
    """
    now = now or datetime.now(UTC)
    reports: dict[str, Report] = {}
    with contextlib.suppress(ConfigurationError):
        tables = Policy.load(needed(settings.host.policy, "policy")).profiles
        if profile is not None and profile not in tables:
            raise UsageError(
                f"policy profile {sanitized(profile)}: the policy has no such profile",
                hint=did_you_mean(profile, tables, f"it has {sanitized(', '.join(tables))}"),
            )
        for name in tables if profile is None else (profile,):
            try:
                reports[name] = examined(profile_settings(tables[name], load))
            except HsmTollError as exc:
                reports[name] = report_settings_error(exc)
    setup = HostSetup(
        settings=settings,
        now=now,
        synchronised=synchronised,
        needs_clock=not reports
        or any(each.facts.settings.environment != "sandbox" for each in reports.values()),
    )
    checks = [*examine_host(setup)]
    for name, each in reports.items():
        checks += [replace(check, profile=name) for check in each.checks]
    facts = next((each.facts for each in reports.values()), Facts(settings=settings, now=now))
    return Report(tuple(checks), facts)
