"""`hsmtoll sign` and `hsmtoll exchange`: sign on one machine, get the token on another."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click

from hsmtoll.cli.framework import command
from hsmtoll.cli.input import read_stdin
from hsmtoll.cli.options import (
    GlobalOptions,
    final_try_option,
    for_whom,
    scope_argument,
)
from hsmtoll.cli.streams import print_json
from hsmtoll.errors import HsmTollError, UsageError
from hsmtoll.signing.one_time import OneTimeAssertion
from hsmtoll.token import NO_REQUIREMENTS, TokenRequest
from hsmtoll.tokens.rate_limit import RateLimit
from hsmtoll.tokens.single_flight import PendingRenewal
from hsmtoll.tokens.stores import MemoryStore

if TYPE_CHECKING:
    from hsmtoll.token import ForWhom

__all__ = ["exchange", "sign"]

#: Bytes. An assertion with a chain of certificates is some ten kilobytes.
_LARGEST_ASSERTION: Final = 64 * 1024


@command(
    needs="a device, HSMTOLL_ENVIRONMENT, HSMTOLL_IDENTITY; no network",
    examples=("ssh keyhost hsmtoll sign road | hsmtoll exchange",),
)
@scope_argument
@for_whom
@final_try_option
@click.pass_obj
def sign(
    options: GlobalOptions,
    *,
    scope: str | None,
    whom: ForWhom,
) -> None:
    """
    Print one signed assertion, to be exchanged on another machine.

    Nothing is sent. The assertion can be used once, within two minutes.
    """
    app = options.app()
    request = app.token_service.request(scope, **whom)
    try:
        renewal = app.renewal_by(app.signer)
        try:
            grant = renewal.sign(request)
        except HsmTollError as exc:
            if exc.code != "leaf-guessed":
                raise
            # The first signature showed which certificate belongs to the key: sign with that one.
            grant = renewal.sign(request)
        click.echo(grant.assertion)
    finally:
        app.close()


@command(
    needs="network, HSMTOLL_ENVIRONMENT; no device",
    examples=("ssh keyhost hsmtoll sign road | hsmtoll exchange --json",),
)
@click.option("--json", "as_json", is_flag=True, help="Token, type, remaining seconds, scope.")
@click.pass_obj
def exchange(options: GlobalOptions, *, as_json: bool) -> None:
    """Exchange an assertion, read from stdin, for a Customs token."""
    app = options.app()
    audience = app.endpoints.issuer
    if sys.stdin.isatty():
        raise UsageError(
            "exchange: an assertion is expected on stdin",
            hint="hsmtoll sign road | hsmtoll exchange",
        )
    raw = read_stdin("exchange", _LARGEST_ASSERTION + 1)
    assertion = OneTimeAssertion(raw.decode("ascii", "replace").strip(), audience=audience)
    # Not rate-limited here: the signature was counted where it was made.
    limit = RateLimit(MemoryStore(), app.clock, per_hour=1)
    renewal = replace(app.renewal_by(assertion), rate_limit=limit, per_request=1)
    token = renewal.renew(
        TokenRequest(assertion.scope), PendingRenewal(app.clock.now().boot, NO_REQUIREMENTS)
    )
    if as_json:
        print_json(
            {
                "access_token": token.value,
                "token_type": token.token_type,
                "expires_in": token.lifetime,
                "scope": token.scope,
            }
        )
    else:
        click.echo(token.value)
