"""`hsmtoll token` and `hsmtoll apis`. Few imports: a cached token is printed fast."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import click

from hsmtoll import apis as catalogue
from hsmtoll.cli.framework import command
from hsmtoll.cli.options import (
    NEEDS_ACCESS,
    GlobalOptions,
    as_json_option,
    final_try_option,
    for_whom,
    scope_argument,
)
from hsmtoll.cli.streams import print_json
from hsmtoll.errors import UsageError

if TYPE_CHECKING:
    from hsmtoll.token import ForWhom

__all__ = ["apis", "token"]


@command(
    needs=NEEDS_ACCESS,
    examples=(
        "hsmtoll token road",
        "hsmtoll token road --header | curl -H @- $URL",
    ),
)
@scope_argument
@click.option("--json", "as_json", is_flag=True, help="Token, type, remaining seconds, scope.")
@click.option("--header", is_flag=True, help="A header line, for `curl -H @-`.")
@click.option("--min-life", type=click.FloatRange(min=0), default=0.0, metavar="S",
              help="Seconds for which the token must remain valid.")  # fmt: skip
@click.option("--renew", is_flag=True, help="Get a new token even if one is cached.")
@for_whom
@final_try_option
@click.pass_obj
def token(
    options: GlobalOptions,
    *,
    scope: str | None,
    as_json: bool,
    header: bool,
    min_life: float,
    renew: bool,
    whom: ForWhom,
) -> None:
    """
    Print one Customs token, from the cache or newly issued.

    API is one of `hsmtoll apis`, or a scope; HSMTOLL_SCOPE where none is given.
    """
    if as_json and header:
        raise UsageError("--json and --header: one form at a time")
    if not math.isfinite(min_life):
        raise UsageError(f"--min-life {min_life}: seconds are expected")
    app = options.app()
    with contextlib.closing(app):
        token_service = app.token_service
        request = token_service.request(scope, **whom)
        got = token_service.token(request, token_service.requirements(min_life, renew=renew))
        left = int(got.remaining(app.clock.now()))
    if as_json:
        print_json(
            {
                "access_token": got.value,
                "token_type": got.token_type,
                "expires_in": left,
                "scope": got.scope,
            }
        )
    else:
        click.echo(f"Authorization: Bearer {got.value}" if header else got.value)


@command(needs="nothing", examples=("hsmtoll apis", "hsmtoll apis --json"))
@as_json_option
def apis(*, as_json: bool) -> None:
    """List the APIs with their scopes and paths."""
    if as_json:
        names = ("name", "norwegian", "eseal", "base", "test", "not_ready", "no_scope")
        rows = [{n: getattr(a, n) or None for n in names} for a in catalogue.APIS]
        print_json({"guide": catalogue.VERSION, "apis": rows})
        return
    table: list[tuple[str, ...]] = [("API", "Norwegian scope", "eSeal scope", "path")]
    for api in catalogue.APIS:
        scopes = ["(name it)" if api.no_scope else one or "-" for one in (api.norwegian, api.eseal)]
        table.append((api.name, *scopes, api.not_ready or api.base or "self-test"))
    widths = [max(len(row[at]) for row in table) for at in range(3)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        click.echo("  ".join([*cells, row[3]]))
    click.echo(f"as in Customs' guide (https://toll.github.io) of {catalogue.VERSION}")
