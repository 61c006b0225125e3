"""The list of commands, and how a command is run."""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from hsmtoll.cli.framework import Group, completion_script, help_of, options_of, starting_with
from hsmtoll.cli.log import StderrHandler, say, use_format
from hsmtoll.cli.options import GlobalOptions
from hsmtoll.cli.signals import INTERRUPTED, Terminated, ended_by_signal
from hsmtoll.cli.streams import StdoutClosed, write_line
from hsmtoll.errors import HsmTollError, UsageError, sanitized
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.resources.abc import Traversable

__all__ = ["main", "run"]


def run(argv: Sequence[str] | None = None) -> int:
    """
    One command. Returns the exit code: 0, or that of the error's class.

    An error is one line with its code, what was attempted and what happened, then what to do;
    with --json, one line of JSON. Tracebacks are never printed: nothing that a user can do
    follows from one.
    """
    use_format(os.environ.get("HSMTOLL_LOG"))
    given = sys.argv[1:] if argv is None else list(argv)
    # Read here: click may fail before it has parsed the option.
    as_json = "--json" in given[: given.index("--") if "--" in given else None]
    try:
        code = main.main(args=argv, prog_name="hsmtoll", standalone_mode=False)
        sys.stdout.flush()
    except HsmTollError as exc:
        return ended_by_signal(exc) or _print_error(exc, as_json=as_json)
    except click.exceptions.NoArgsIsHelpError as exc:
        write_line(exc.format_message())
        return UsageError.exit_code
    except click.UsageError as exc:
        return _print_error(_usage_error(exc), as_json=as_json)
    except (click.Abort, KeyboardInterrupt, Terminated) as exc:
        return ended_by_signal(exc) or INTERRUPTED
    except StdoutClosed:
        # EPIPE: the reader, such as `head`, has read enough.
        return 0
    except Exception as exc:  # noqa: BLE001 - the last line of defence keeps secrets in
        ended = ended_by_signal(exc)
        if ended:
            return ended
        at = exc.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else "?"
        bug = HsmTollError(
            f"internal error: {type(exc).__name__} at {where}",
            hint="please report this line and the command that was run",
        )
        return _print_error(bug, as_json=as_json)
    return code if isinstance(code, int) else 0


def _usage_error(exc: click.UsageError) -> UsageError:
    see = f"see `{exc.ctx.command_path if exc.ctx else 'hsmtoll'} --help`"
    if isinstance(exc, click.NoSuchOption):
        near = did_you_mean(exc.option_name, options_of(exc.ctx), see)
        return UsageError(f"no such option: {sanitized(exc.option_name)}", hint=near)
    # click lists the values of a missing argument below each other.
    return UsageError(_lower(" ".join(exc.format_message().split())), hint=see)


#: The commands as the help lists them: name, module, summary.
_COMMANDS: Final = {
    "Set up": (
        ("doctor", "doctor", "Check settings, device, certificates and services."),
        ("objects", "device", "List devices, keys and certificates of the PKCS#11 module."),
        ("key", "device", "Make a key on the device; request and store its certificate."),
        ("chain", "device", "Show the verified certificate chain that is sent as x5c."),
        ("pin", "device", "Manage the record of refused PINs."),
    ),
    "Call Customs": (
        ("apis", "tokens", "List the APIs with their scopes and paths."),
        ("token", "tokens", "Print one Customs token, from the cache or newly issued."),
        ("test-auth", "customs", "Get a token, make the API's test call and print its status."),
        ("call", "customs", "Make one API call and print the body of the answer."),
        ("submit", "customs", "Submit a message and wait for its result: SUCCESS and the MRN."),
        ("upload", "customs", "Upload a document to a declaration."),
        ("routing", "customs", "Print the routing feed, one JSON line a signal."),
        ("proxy", "proxy", "Add Customs tokens to the requests of local programs."),
        ("sign", "grants", "Print one signed assertion, to be exchanged on another machine."),
        ("exchange", "grants", "Exchange an assertion, read from stdin, for a Customs token."),
    ),
    "Signing host": (
        ("serve", "host", "Run the signing host for the callers in its policy."),
        ("health", "host", "Ask a signing host or local proxy how it is, for a probe."),
        ("policy", "host", "Explain the signing host's policy."),
        ("audit", "host", "Verify and list the log of what was signed for whom."),
        ("stop", "host", "Stop the signing host before its next signature, until resume."),
        ("resume", "host", "End a stop: the signing host signs again."),
    ),
    "Develop": (
        ("sandbox", "sandbox", "Run a local Maskinporten and Customs, or a command against them."),
        (
            "completion",
            "commands",
            "Print the script that completes commands in bash, zsh or fish.",
        ),
        ("help", "commands", "Show the help of a command, or a page of the manual."),
    ),
}


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    listed=_COMMANDS,
    examples=(
        "hsmtoll doctor",
        "hsmtoll help token",
        "hsmtoll help topics",
        "hsmtoll sandbox -- hsmtoll test-auth road",
    ),
)
@click.version_option(version("hsmtoll"), prog_name="hsmtoll")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Customs tokens, signed with a key that never leaves its device."""
    ctx.obj = GlobalOptions(ctx.meta)
    logger = logging.getLogger("hsmtoll")
    logger.handlers[:] = [StderrHandler()]
    logger.propagate = False


def _pages() -> dict[str, Traversable]:
    """The pages of the manual, which are in every installation, by topic."""
    files = (resources.files("hsmtoll") / "docs").iterdir()
    pages = {file.name.removesuffix(".md"): file for file in files if file.name.endswith(".md")}
    return dict(sorted(pages.items()))


def _topics() -> str:
    """Each topic with the title of its page, one a line."""
    pages = _pages()
    width = max(map(len, pages))
    titles = (page.read_text("utf-8").partition("\n")[0].lstrip("# ") for page in pages.values())
    return "\n".join(
        f"{topic:{width}}  {title}" for topic, title in zip(pages, titles, strict=True)
    )


def _complete_help(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    names = ctx.params.get("names") or ()
    found: click.Command | None = main
    for name in names:
        found = found.get_command(ctx, name) if isinstance(found, click.Group) else None
    known = found.list_commands(ctx) if isinstance(found, click.Group) else []
    pages = [] if names else ["topics", *_pages()]
    return starting_with(incomplete, [*known, *(page for page in pages if page not in known)])


@main.command(
    needs="nothing",
    examples=(
        'eval "$(hsmtoll completion bash)"    # in ~/.bashrc',
        "hsmtoll completion zsh > ~/.zfunc/_hsmtoll",
        "hsmtoll completion fish > ~/.config/fish/completions/hsmtoll.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(*, shell: str) -> None:
    """
    Print the script that completes commands in bash, zsh or fish.

    It completes commands, options, APIs, levels, document types and profiles.
    """
    click.echo(completion_script(shell, main))


@main.command(
    "help",
    needs="nothing",
    examples=(
        "hsmtoll help token",
        "hsmtoll help key import",
        "hsmtoll help topics",
        "hsmtoll help settings",
    ),
)
@click.argument("names", metavar="[COMMAND...|TOPIC]", nargs=-1, shell_complete=_complete_help)
@click.pass_context
def show_help(ctx: click.Context, *, names: tuple[str, ...]) -> None:
    """
    Show the help of a command, or a page of the manual.

    `hsmtoll help topics` lists the pages. Where a command and a page have one name, the command's
    help is shown.
    """
    commands = main.list_commands(ctx)
    if len(names) != 1 or names[0] in commands:
        click.echo(help_of(ctx, names))
        return
    (topic,) = names
    pages = _pages()
    if topic == "topics":
        click.echo(_topics())
    elif topic in pages:
        click.echo(pages[topic].read_text("utf-8"), nl=False)
    else:
        raise UsageError(
            f"help {sanitized(topic)}: there is no such command or topic",
            hint=did_you_mean(
                topic, [*commands, *pages], "see `hsmtoll --help` and `hsmtoll help topics`"
            ),
        )


def _print_error(exc: HsmTollError, *, as_json: bool) -> int:
    """Print *exc* on stderr, as lines or as one JSON object. Returns its exit code."""
    if as_json:
        names = ("hint", "who", "retryable", "retry_after", "trace_id", "correlation_id", "jti")
        error = {
            "schema": 1,
            "error": exc.code,
            "message": str(exc),
            "exit_code": exc.exit_code,
            **{name: getattr(exc, name) for name in names},
        }
        # ASCII only: in another locale the stream's own escapes would not be valid JSON.
        write_line(json.dumps(error))
    else:
        trace = exc.trace_id or exc.correlation_id
        say(str(exc), level=logging.ERROR, code=exc.code, hints=exc.hints, jti=exc.jti, trace=trace)
    return exc.exit_code


def _lower(text: str) -> str:
    return (text[:1].lower() + text[1:]).rstrip(".")
