"""
What Maskinporten and Customs will say, foretold from the device outward.

    facts ──► Way of each key ──► on_settings, on_device, on_certificates, on_services ──► Report

A check has a name; what it found has a stable code. The first broken link ends the way: what
hangs on it is skipped. No PIN is spent beyond the one login that signing needs, nothing is
signed offline unless the user asks for it, and no secret enters a report.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hsmtoll.doctor.facts import Facts, Seen, ask, gather, revocation_of, sign
from hsmtoll.doctor.findings import Check
from hsmtoll.doctor.report import Report, examine, first_failure, signing_chain, signing_key
from hsmtoll.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hsmtoll.app import App
    from hsmtoll.errors import ConfigurationError

__all__ = ["Check", "Facts", "Report", "Seen", "examine", "run", "unsettled"]


def run(
    app: App,
    *,
    online: bool = False,
    signing: bool = False,
    scopes: Sequence[str] = (),
    crl: Path | None = None,
) -> Report:
    """
    Ask everything that can be asked, and judge it. Nothing is sent unless *online*.

    *signing*: the key makes one signature, over what is no grant. *scopes* are APIs or scopes
    to be asked for; *crl* is a revocation list in a file. Never
    raises for what is wrong with the setup: that is what it reports.
    """
    facts = gather(app, scopes=tuple(scopes))
    if signing and (place := signing_key(facts)) is not None:
        facts = sign(app, facts, place)
    checks = examine(facts)
    chain = signing_chain(facts)
    if chain is not None and (crl is not None or online):
        facts = replace(facts, revocation=revocation_of(app, chain, crl=crl, online=online))
        checks = examine(facts)
    if online and not first_failure(checks):
        facts = replace(facts, answers=ask(app, facts))
        checks = examine(facts)
    return Report(checks, facts)


def unsettled(problem: ConfigurationError) -> Report:
    """The report where *problem* keeps the settings from being read: that and no more."""
    facts = Facts(settings=Settings.model_construct(), now=datetime.now(UTC), error=problem)
    return Report(examine(facts), facts)
