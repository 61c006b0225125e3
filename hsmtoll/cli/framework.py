"""
Base classes of the commands: global options before or after the command, examples and needs in
the help, lazily imported commands, and completion. The list of commands is in
`hsmtoll.cli.commands`.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ZshComplete

from hsmtoll.errors import HsmTollError, UsageError, sanitized
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "CONFIG",
    "PROFILE",
    "USE_FINAL_TRY",
    "Command",
    "File",
    "Group",
    "command",
    "completion_of",
    "completion_script",
    "group",
    "help_of",
    "options_of",
    "starting_with",
    "store_in_meta",
]

#: Keys of the global options in click's shared `Context.meta`.
CONFIG: Final = "hsmtoll_config"
PROFILE: Final = "hsmtoll_profile"
USE_FINAL_TRY: Final = "hsmtoll_use_final_try"
_VERBOSITY: Final = "hsmtoll_verbosity"

_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)

_SHELLS: Final = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}

#: The environment variable by which the shell's script requests completions.
_COMPLETE: Final = "_HSMTOLL_COMPLETE"


def store_in_meta(ctx: click.Context, param: click.Parameter, value: object) -> None:
    """The callback of an option that several commands share: stores it under its name."""
    # Options after the command are read last, and win.
    if value is not None:
        ctx.meta[param.name or ""] = value


def _verbose(ctx: click.Context, _: click.Parameter, value: int) -> None:
    total = ctx.meta[_VERBOSITY] = ctx.meta.get(_VERBOSITY, 0) + value
    logging.getLogger("hsmtoll").setLevel(_LEVELS[min(total, len(_LEVELS) - 1)])


def _profiles(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    from hsmtoll.settings import profiles  # noqa: PLC0415 - 0.2 s that help does not need

    # On an error complete nothing: a message would be inserted into the command line.
    try:
        return starting_with(incomplete, profiles(ctx.meta.get(CONFIG)))
    except HsmTollError:
        return []


class File(click.Path):
    """A path on the command line. Shells expand ``~`` at the start of a word, and not after =."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `click.Path.convert`, but reject a leading ``~``."""
        if str(value).startswith("~"):
            self.fail("~ is not expanded here; write the whole path", param, ctx)
        return super().convert(value, param, ctx)


_GLOBAL: Final = (
    click.Option(
        ["--config", CONFIG],
        metavar="FILE",
        type=File(),
        expose_value=False,
        callback=store_in_meta,
        help="Configuration file (TOML).",
    ),
    click.Option(
        ["--profile", PROFILE],
        metavar="NAME",
        expose_value=False,
        callback=store_in_meta,
        shell_complete=_profiles,
        help="Table [profile.NAME] of the configuration file.",
    ),
    click.Option(
        ["-v", "--verbose", _VERBOSITY],
        count=True,
        expose_value=False,
        callback=_verbose,
        help="Report each step; -vv reports more.",
    ),
)


class _GlobalOptionsCommand(click.Command):
    """
    A command with the global options, except those whose name it uses itself.

    *needs* and *examples* are shown in its help.
    """

    def __init__(
        self, *args: Any, needs: str = "", examples: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.needs = needs
        self.examples = tuple(examples)

    def _global_options(self) -> tuple[click.Option, ...]:
        own = {name for param in self.params for name in param.opts}
        return tuple(option for option in _GLOBAL if not own & {*option.opts})

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Its own parameters, then the global ones."""
        return [*super().get_params(ctx), *self._global_options()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List its own options, then the global ones."""
        for title, params in (
            ("Options", super().get_params(ctx)),
            ("Global options, before or after the command", self._global_options()),
        ):
            options = [each for each in params if isinstance(each, click.Option)]
            rows = [row for each in options if (row := each.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Add what it needs, and its examples unwrapped."""
        super().format_epilog(ctx, formatter)
        if self.needs:
            formatter.write_paragraph()
            formatter.write_text(f"Needs: {self.needs}.")
        if self.examples:
            with formatter.section("Example" if len(self.examples) == 1 else "Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.examples))


class Command(_GlobalOptionsCommand):
    """One command."""


class Group(_GlobalOptionsCommand, click.Group):
    """
    Commands under one name.

    *listed* is the list in its help, by title: for each command its name, its module in this
    package, imported on demand, and its summary, the first sentence of its own help. The module has
    a function with the command's name. Without *listed* the commands are added as usual.
    """

    command_class = Command

    def __init__(
        self,
        *args: Any,
        listed: Mapping[str, Sequence[tuple[str, str, str]]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.listed = listed or {}
        self._modules = {name: module for rows in self.listed.values() for name, module, _ in rows}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands, including those not imported yet."""
        return list(self._modules) or super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported on first use."""
        if cmd_name in self._modules and cmd_name not in self.commands:
            module = importlib.import_module(f"hsmtoll.cli.{self._modules[cmd_name]}")
            self.add_command(getattr(module, cmd_name.replace("-", "_")))
        return super().get_command(ctx, cmd_name)

    def summaries(self) -> dict[str, dict[str, str]]:
        """Title of the list → name of the command → summary."""
        if not self.listed:
            return {"Commands": {name: _summary(each) for name, each in self.commands.items()}}
        return {title: {row[0]: row[2] for row in rows} for title, rows in self.listed.items()}

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands from the list, without importing them; then options."""
        known = [
            CompletionItem(name, help=summary)
            for rows in self.summaries().values()
            for name, summary in rows.items()
            if name.startswith(incomplete)
        ]
        return [*known, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, then the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by title, without shortening summaries."""
        width = max(map(len, self.list_commands(ctx)))
        for title, rows in self.summaries().items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in rows.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve the command; UsageError with the nearest name if there is none."""
        name = args[0]
        if (
            self.get_command(ctx, name) is None
            and not ctx.resilient_parsing
            and not name.startswith("-")
        ):
            raise UsageError(
                f"{ctx.command_path} {sanitized(name)}: there is no such command",
                hint=did_you_mean(
                    name, self.list_commands(ctx), f"see `{ctx.command_path} --help`"
                ),
            )
        return super().resolve_command(ctx, args)


Group.group_class = Group


def command(
    name: str | None = None, **attributes: Any
) -> Callable[[Callable[..., Any]], click.Command]:
    """As `click.command`, for a module that is imported when its command is named."""
    return click.command(name, cls=Command, **attributes)


def group(name: str | None = None, **attributes: Any) -> Callable[[Callable[..., Any]], Group]:
    """As `click.group`, for a module that is imported when its command is named."""
    return click.group(name, cls=Group, **attributes)


def _summary(command: click.Command) -> str:
    """The first sentence, whole."""
    first = (command.help or "").strip().partition("\n\n")[0]
    return " ".join(first.split()).partition(". ")[0].removesuffix(".") + "."


def starting_with(incomplete: str, words: Iterable[str]) -> list[str]:
    """Those of *words* that begin with *incomplete*."""
    return [word for word in words if word.startswith(incomplete)]


def completion_of(
    words: Iterable[str],
) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """The completion of an argument whose values are *words*."""
    known = tuple(words)
    return lambda _ctx, _param, incomplete: starting_with(incomplete, known)


def options_of(ctx: click.Context | None) -> list[str]:
    """The names of the options that the command takes."""
    if ctx is None:
        return []
    params = ctx.command.get_params(ctx)
    return [name for each in params if isinstance(each, click.Option) for name in each.opts]


def completion_script(shell: str, command: click.Command) -> str:
    """The completion script for *shell* (bash, zsh or fish)."""
    made = _SHELLS[shell](command, {}, "hsmtoll", _COMPLETE)
    # Not source(), which starts the shell to check its version.
    return made.source_template % made.source_vars()


def help_of(ctx: click.Context, names: Sequence[str]) -> str:
    """The help of the command *names*; of hsmtoll itself if empty."""
    here = ctx.find_root()
    for name in names:
        group = here.command
        if not isinstance(group, click.Group):
            raise UsageError(f"{here.command_path}: it has no command {sanitized(name)}")
        _, command, _ = group.resolve_command(here, [name])
        if command is not None:
            here = click.Context(command, parent=here, info_name=name)
    return here.get_help()
