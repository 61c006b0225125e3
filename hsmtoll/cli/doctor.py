"""`hsmtoll doctor`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from hsmtoll import doctor as checks
from hsmtoll.cli.framework import command
from hsmtoll.cli.options import EXISTING_FILE, GlobalOptions, complete_apis, final_try_option
from hsmtoll.cli.streams import to_json
from hsmtoll.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["doctor"]


@command(
    needs="nothing, it checks what is set; network with --online alone",
    examples=("hsmtoll doctor", "hsmtoll doctor --online --scope road"),
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
) -> int:
    """
    Check settings, device, certificates and services.

    Checks that depend on a failed one are skipped. Exits with 0, or with the code of the first
    failure. Without --online nothing is sent, and without --sign or --online nothing is signed.
    Only --online shows whether Maskinporten trusts the issuer of the certificate.
    """
    try:
        app = options.app()
    except ConfigurationError as exc:
        if evidence:
            # The evidence would list defaults as if they were the settings.
            raise
        report = checks.report_settings_error(exc)
    else:
        with contextlib.closing(app):
            report = checks.run(app, online=online, signing=sign, scopes=scopes, crl=crl)
    output = report.evidence() if evidence else report.as_json() if as_json else None
    if output is not None:
        click.echo(to_json(output))
    else:
        click.echo("\n".join(report.lines()))
    return report.exit_code
