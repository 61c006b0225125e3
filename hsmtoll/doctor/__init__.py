"""
Checks the setup, from the device to the services, and predicts their answers.

    facts ──► KeyDiagnosis ──► on_settings, on_device, on_certificates, on_services ──► Report

Each check has a name, each result a stable code. After the first failure the checks that depend
on it are skipped. The PIN is used for one login only, as for signing. Offline nothing is signed
unless the user asks for it. No secret enters a report.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hsmtoll.doctor.facts import Facts, Seen, gather, query_services, revocation_of, sign
from hsmtoll.doctor.findings import Check
from hsmtoll.doctor.report import Report, examine, first_failure, signing_chain, signing_key
from hsmtoll.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hsmtoll.app import App
    from hsmtoll.errors import ConfigurationError

__all__ = ["Check", "Facts", "Report", "Seen", "examine", "report_settings_error", "run"]


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


def report_settings_error(problem: ConfigurationError) -> Report:
    """The report if the settings cannot be read because of *problem*."""
    facts = Facts(settings=Settings.model_construct(), now=datetime.now(UTC), error=problem)
    return Report(examine(facts), facts)
