"""Options and arguments shared by several commands, and the reading of their values."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hsmtoll import apis as catalogue
from hsmtoll.cli.framework import CONFIG, PROFILE, File, starting_with
from hsmtoll.cli.input import no_json, parse_json, place_of, read_body
from hsmtoll.cli.streams import redirect_fd1_to_stderr
from hsmtoll.errors import UsageError, foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hsmtoll.app import App
    from hsmtoll.settings import Settings

__all__ = [
    "EXISTING_FILE",
    "NEEDS_ACCESS",
    "NEEDS_DEVICE",
    "NEEDS_POLICY",
    "PATH",
    "GlobalOptions",
    "as_json_option",
    "complete_apis",
    "final_try_option",
    "grant_options",
    "one_scope",
    "read_grant_options",
    "scope_argument",
    "scope_option",
]

PATH: Final = File(path_type=Path)
EXISTING_FILE: Final = File(path_type=Path, exists=True, dir_okay=False)

#: What a command needs, for its help.
NEEDS_DEVICE: Final = "a device: HSMTOLL_HSM__MODULE, HSMTOLL_HSM__KEY and its PIN"
NEEDS_ACCESS: Final = "network, HSMTOLL_ENVIRONMENT; device or signing host unless cached"
NEEDS_POLICY: Final = "HSMTOLL_HOST__POLICY (--config FILE); no device, no running host"

#: Print the result as JSON instead of lines.
as_json_option = click.option(
    "--json", "as_json", is_flag=True, help="The result as one JSON object."
)

final_try_option = click.option(
    "--use-final-try",
    is_flag=True,
    help="Log in even if the device reports the last try before it locks.",
)


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """The global options. Read lazily, as they may also follow the command."""

    given: Mapping[str, Any]

    @property
    def config(self) -> str | None:
        return self.given.get(CONFIG)

    @property
    def profile(self) -> str | None:
        return self.given.get(PROFILE)

    def settings(self) -> Settings:
        from hsmtoll.settings import load  # noqa: PLC0415 - 0.2 s that help and completion do not need

        return load(config=self.config, profile=self.profile)

    def app(self, *, use_final_try: bool = False, one_shot: bool = True) -> App:
        """The parts for a command that ends (*one_shot*), or for one that goes on."""
        from hsmtoll.app import App  # noqa: PLC0415 - as above

        settings = self.settings()
        in_environment = {name.upper() for name, value in os.environ.items() if value}
        if settings.environment != "sandbox" and "HSMTOLL_HSM__PIN" in in_environment:
            logging.getLogger("hsmtoll").warning(
                "HSMTOLL_HSM__PIN: every child process and crash report sees the environment; "
                "HSMTOLL_HSM__PIN_FILE is safer"
            )
        for handler in logging.getLogger("hsmtoll").handlers:
            # The error of the command says the same.
            if one_shot:
                handler.addFilter(
                    lambda record: not record.getMessage().startswith("device-down: ")
                )
        redirect_fd1_to_stderr()
        return App(settings, one_shot=one_shot, use_final_try=use_final_try)


def complete_apis(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    return starting_with(incomplete, (api.name for api in catalogue.APIS if not api.not_ready))


def scope_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """The API or scope: an argument, or the equivalent option --scope or --api."""
    function = click.argument(
        "what", metavar="[API|SCOPE]", required=False, shell_complete=complete_apis
    )(function)
    return click.option(
        "--scope", "--api", "named", metavar="S", shell_complete=complete_apis,
        help="The API or scope, as an option.",
    )(function)  # fmt: skip


def one_scope(what: str | None, named: str | None) -> str | None:
    if what and named:
        raise UsageError(f"{foreign(what)} and {foreign(named)}: one API or scope at a time")
    return what or named


scope_option = click.option(
    "--scope", metavar="S", shell_complete=complete_apis,
    help="The scope of the token, instead of the API's own.",
)  # fmt: skip


def grant_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a grant on behalf of others, or for a resource; see `read_grant_options`."""
    for option in (
        click.option(
            "--authorization-details", "details", metavar="@F",
            help="JSON list of objects (RFC 9396), such as a customer's system user.",
        ),
        click.option("--resource", multiple=True, metavar="R", help="May be repeated."),
        click.option("--consumer-org", metavar="N", help="On whose behalf; nine digits."),
    ):  # fmt: skip
        function = option(function)
    return function


def read_grant_options(
    consumer_org: str | None, resource: tuple[str, ...], details: str | None
) -> dict[str, Any]:
    """The values of `grant_options` as keyword arguments of the client's methods."""
    given: Any = None
    if details is not None:
        try:
            given = parse_json(read_body(details) or b"")
        except ValueError as exc:
            raise UsageError(
                f"--authorization-details: that is not JSON{place_of(exc)}", hint=no_json(details)
            ) from None
    return {
        "consumer_org": consumer_org,
        "resource": resource or None,
        "authorization_details": given,
    }
