"""`hsmtoll doctor`."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from hsmtoll import doctor as checks
from hsmtoll.cli.framework import command
from hsmtoll.cli.options import EXISTING_FILE, GlobalOptions, complete_apis, final_try_option
from hsmtoll.cli.streams import to_json
from hsmtoll.errors import ConfigurationError, UsageError
from hsmtoll.settings import load

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.settings import Settings

__all__ = ["doctor"]


@command(
    needs="nothing, it checks what is set; network with --online alone",
    examples=(
        "hsmtoll doctor",
        "hsmtoll doctor --online --scope road",
        "hsmtoll doctor --all-profiles --strict    # on a signing host",
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Every check, for a program.")
@click.option(
    "--sign", is_flag=True, help="Make one signature as well, over a text of a grant's size."
)
@click.option("--online", is_flag=True, help="Ask the services as well: clock, grants.")
@click.option("--scope", "--api", "scopes", multiple=True, metavar="S",
              shell_complete=complete_apis,
              help="With --online: ask for a grant of this as well.")  # fmt: skip
@click.option("--crl", type=EXISTING_FILE, help="Check the leaf against this revocation list.")
@click.option("--evidence", is_flag=True, help="A JSON report for an auditor.")
@click.option("--policy-profile", metavar="P",
              help="Check this signing host, and profile P of its policy.")  # fmt: skip
@click.option("--all-profiles", is_flag=True,
              help="Check this signing host, and every profile of its policy.")  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit with 3 if there are warnings and no failure.")
@final_try_option
@click.pass_obj
def doctor(
    options: GlobalOptions,
    *,
    as_json: bool,
    sign: bool,
    online: bool,
    scopes: tuple[str, ...],
    crl: Path | None,
    evidence: bool,
    policy_profile: str | None,
    all_profiles: bool,
    strict: bool,
) -> int:
    """
    Check settings, device, certificates and services.

    Checks that depend on a failed one are skipped. Exits with 0, or with the code of the first
    failure. On a signing host, --policy-profile and --all-profiles check the policy, the audit log,
    the TLS files and the clock as well. Without --online nothing is sent, and without --sign or
    --online nothing is signed. Only --online shows whether Maskinporten trusts the issuer of the
    certificate.
    """
    if all_profiles and (policy_profile or evidence):
        other = "--policy-profile" if policy_profile else "--evidence"
        raise UsageError(f"doctor: --all-profiles and {other}: one of them at a time")

    def examined(settings: Settings) -> checks.Report:
        with contextlib.closing(options.app(settings=settings)) as app:
            return checks.run(app, online=online, signing=sign, scopes=scopes, crl=crl)

    try:
        settings = options.settings()
    except ConfigurationError as exc:
        if evidence:
            # The evidence would list defaults as if they were the settings.
            raise
        report = checks.report_settings_error(exc)
    else:
        if policy_profile or all_profiles:
            report = checks.run_on_host(
                settings,
                profile=policy_profile,
                load=partial(load, config=options.config, profile=options.profile),
                examined=examined,
            )
        else:
            report = examined(settings)
    report = replace(report, strict=strict)
    output = report.evidence() if evidence else report.as_json() if as_json else None
    if output is not None:
        click.echo(to_json(output))
    else:
        click.echo("\n".join(report.lines()))
    return report.exit_code
