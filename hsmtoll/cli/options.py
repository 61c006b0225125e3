"""Options and arguments shared by several commands, and the reading of their values."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hsmtoll import apis as catalogue
from hsmtoll.cli.framework import CONFIG, PROFILE, USE_FINAL_TRY, File, completion_of, store_in_meta
from hsmtoll.cli.input import read_json
from hsmtoll.cli.log import use_format
from hsmtoll.cli.streams import redirect_fd1_to_stderr
from hsmtoll.errors import UsageError, sanitized

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hsmtoll.app import App
    from hsmtoll.settings import Settings
    from hsmtoll.token import ForWhom

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
    "for_whom",
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
    "--use-final-try", USE_FINAL_TRY,
    is_flag=True, expose_value=False, callback=store_in_meta,
    help="Log in even if the device reports the last try before it locks.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """
    The options that several commands share, and what is built from them. Read lazily, as they may
    follow the command.
    """

    given: Mapping[str, Any]

    @property
    def config(self) -> str | None:
        return self.given.get(CONFIG)

    @property
    def profile(self) -> str | None:
        return self.given.get(PROFILE)

    def settings(self) -> Settings:
        from hsmtoll.settings import load  # noqa: PLC0415 - 0.2 s that help and completion do not need

        settings = load(config=self.config, profile=self.profile)
        use_format(settings.log)
        return settings

    def app(self, *, one_shot: bool = True, settings: Settings | None = None) -> App:
        """
        The parts of *settings* (else of those of the environment and the file), for a command that
        ends (*one_shot*), or for one that goes on.

        Raises ConfigurationError.
        """
        from hsmtoll.app import App  # noqa: PLC0415 - 0.3 s that help does not need

        settings = settings or self.settings()
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
        final_try = self.given.get(USE_FINAL_TRY, False)
        return App(settings, one_shot=one_shot, use_final_try=final_try)


complete_apis: Final = completion_of(api.name for api in catalogue.APIS if not api.not_ready)


def scope_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """The API or scope, an argument or the option --scope or --api: passed as *scope*."""

    @click.argument("argument", metavar="[API|SCOPE]", required=False, shell_complete=complete_apis)
    @click.option(
        "--scope", "--api", "option", metavar="S", shell_complete=complete_apis,
        help="The API or scope, as an option.",
    )  # fmt: skip
    @functools.wraps(function)
    def called(*args: Any, argument: str | None, option: str | None, **others: Any) -> Any:
        if argument and option:
            raise UsageError(
                f"{sanitized(argument)} and {sanitized(option)}: one API or scope at a time"
            )
        return function(*args, scope=argument or option, **others)

    return called


scope_option = click.option(
    "--scope", metavar="S", shell_complete=complete_apis,
    help="The scope of the token, instead of the API's own.",
)  # fmt: skip


def for_whom(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say for whom a token is requested: passed as *whom*, a `ForWhom`."""

    @click.option("--consumer-org", metavar="N", help="On whose behalf; nine digits.")
    @click.option("--resource", multiple=True, metavar="R", help="May be repeated.")
    @click.option(
        "--authorization-details", "details", metavar="@F",
        help="JSON list of objects (RFC 9396), such as a customer's system user.",
    )  # fmt: skip
    @functools.wraps(function)
    def called(
        *args: Any,
        consumer_org: str | None,
        resource: tuple[str, ...],
        details: str | None,
        **others: Any,
    ) -> Any:
        what = "--authorization-details: the value"
        given = None if details is None else read_json(details, what)
        whom: ForWhom = {
            "consumer_org": consumer_org,
            "resource": resource or None,
            "authorization_details": given,
        }
        return function(*args, whom=whom, **others)

    return called
