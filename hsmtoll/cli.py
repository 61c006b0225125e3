"""
argv in; result on stdout, everything else on stderr, an exit code out.

Prompts go to the terminal. Nothing is decided here that a program would need as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import math
import os
import re
import select
import shlex
import signal
import stat
import sys
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO, cast

import click

from hsmtoll import apis as catalogue
from hsmtoll.commandline import (
    CONFIG,
    PROFILE,
    File,
    Group,
    completion_script,
    help_of,
    options_of,
    starting_with,
)
from hsmtoll.errors import (
    AuditBroken,
    ConfigurationError,
    DeviceError,
    ExchangeRefused,
    HsmTollError,
    NetworkError,
    OutcomeUnknown,
    PinIncorrect,
    PinNotTried,
    PolicyDenied,
    UsageError,
    foreign,
    install_extra,
)
from hsmtoll.suggestions import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from _typeshed import ReadableBuffer

    from hsmtoll.app import App
    from hsmtoll.hsm.device import KeyFacts, StoredCertificate
    from hsmtoll.hsm.inspect import ModuleFacts
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.settings import Settings

__all__ = ["main", "run"]

_INTERRUPTED: Final = 130
_TERMINATED: Final = 143

#: Seconds after SIGTERM.
_TO_PUT_AWAY: Final = 10.0

_UNWRITTEN: Final = "result-unwritten"

#: Bytes. An assertion with a chain of certificates is some ten kilobytes.
_LARGEST_ASSERTION: Final = 64 * 1024

#: RFC 9110 section 5.6.2: what names of methods and headers are made of.
_WORD: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

#: Characters; RFC 9110 section 4.1 asks servers for no more than 8,000.
_LONGEST_PATH: Final = 8_000

#: Levels. The messages of the guide have some ten.
_DEEPEST: Final = 100

#: RFC 3339, UTC.
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"


def run(argv: Sequence[str] | None = None) -> int:
    """
    One command. Returns the exit code: 0, or that of the error's class.

    An error is one line with its code, what was attempted and what happened, then what to do;
    with --json, one line of JSON. Tracebacks are never printed: nothing that a user can do
    follows from one.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    # Read here and not by the commands: their command line itself may be what is wrong.
    as_json = "--json" in given[: given.index("--") if "--" in given else None]
    try:
        code = main.main(args=argv, prog_name="hsmtoll", standalone_mode=False)
        sys.stdout.flush()
    except HsmTollError as exc:
        return _ended_at(exc) or _print_error(exc, as_json=as_json)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return UsageError.exit_code
    except click.UsageError as exc:
        return _print_error(_misused(exc), as_json=as_json)
    except (click.Abort, KeyboardInterrupt, _Terminated) as exc:
        return _ended_at(exc) or _INTERRUPTED
    except _ReaderLeft:
        # It has read what it wanted, as `head` does; there is nobody to tell.
        return 0
    except Exception as exc:  # noqa: BLE001 - the last line of defence keeps secrets in
        ended = _ended_at(exc)
        if ended:
            return ended
        at = exc.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else "?"
        bug = HsmTollError(
            f"unexpected {type(exc).__name__} at {where}: a mistake in hsmtoll",
            hint="please report this line with what was run",
        )
        return _print_error(bug, as_json=as_json)
    return code if isinstance(code, int) else 0


def _misused(exc: click.UsageError) -> UsageError:
    see = f"see `{exc.ctx.command_path if exc.ctx else 'hsmtoll'} --help`"
    if isinstance(exc, click.NoSuchOption):
        near = did_you_mean(exc.option_name, options_of(exc.ctx), see)
        return UsageError(f"no such option: {foreign(exc.option_name)}", hint=near)
    # click lists the values of a missing argument below each other.
    return UsageError(_lower(" ".join(exc.format_message().split())), hint=see)


class _Terminated(BaseException):
    """SIGTERM has come."""


def _ended_at(exc: BaseException | None) -> int:
    """
    The code where *exc* came of being told to end, said once; 0 where it did not. What goes wrong
    while things are put away does not change why that was.
    """
    while exc is not None:
        if isinstance(exc, _Terminated):
            _say("terminated")
            return _TERMINATED
        if isinstance(exc, click.Abort | KeyboardInterrupt):
            _say("interrupted")
            return _INTERRUPTED
        exc = exc.__context__
    return 0


def obey_signals() -> None:
    """
    From now on SIGTERM ends the command as Ctrl-C does: what was begun is put away first, in 10
    seconds at most. Neither waits for a PIN that is being typed.
    """

    def interrupt(*_: object) -> None:
        _hang_up()
        raise KeyboardInterrupt

    def end(*_: object) -> None:
        # `timeout` sends it twice; what is being put away is not cut off by the second.
        signal.signal(signal.SIGTERM, lambda *_: None)
        _hang_up()
        raise _Terminated

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    # Whoever started us may have said that it is to be ignored.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
        _end_in_time()


def _end_in_time() -> None:
    # A handler of Python's runs between two of its steps, and a module that hangs, or a reader
    # that takes nothing more, lets none come. A thread hears of the signal all the same.
    hears, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(hears, True)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGTERM not in os.read(hears, 64):
            pass
        time.sleep(_TO_PUT_AWAY)
        _hang_up()
        os._exit(_TERMINATED)

    # Without it a command can do all else.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=watch, name="hsmtoll-end", daemon=True).start()


def _hang_up() -> None:
    # Where no PIN was asked for, this is not loaded.
    pins = sys.modules.get("hsmtoll.hsm.pin")
    if pins is not None and hasattr(pins, "hang_up"):
        pins.hang_up()


class _ReaderLeft(Exception):
    """Nobody reads stdout any more."""


class _Patient(io.FileIO):
    """One that others have set to be non-blocking is waited for, as one that blocks is."""

    def write(self, data: ReadableBuffer, /) -> int:
        # Typeshed does not say so: None where nothing could be written at once.
        while (done := cast("int | None", super().write(data))) is None:
            ready = select.poll()
            ready.register(self, select.POLLOUT)
            ready.poll()
        return done


class _Result(_Patient):
    """stdout: what cannot be written is told as what it is, whichever command wrote it."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise _ReaderLeft from None
        except OSError as exc:
            raise ConfigurationError(
                f"the result cannot be written ({exc.strerror})",
                hint="see where stdout goes: is it open, and is there room?",
                code=_UNWRITTEN,
            ) from exc


class _Remarks(_Patient):
    """stderr: what cannot be told there changes no outcome."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def own_streams() -> None:
    """From now on stdout and stderr are ours: neither crashes, whatever they lead to."""
    if sys.stdin is None:
        # It was closed: whoever reads it is told so by the system.
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    sys.stdout = _text(_Result(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Remarks(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, before: TextIO | None) -> TextIO:
    encoding = before.encoding if before else None
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)


@contextlib.contextmanager
def _after_sending(what: str) -> Iterator[None]:
    """
    Where *what* was sent and the answer cannot be written, OutcomeUnknown: another code would
    look as if it could be sent again.
    """
    try:
        yield
    except ConfigurationError as exc:
        if exc.code != _UNWRITTEN:
            raise
        raise OutcomeUnknown(
            f"{what}: was sent, and {exc}",
            hint=f"look it up and do not repeat it; {exc.hint}",
            code=_UNWRITTEN,
        ) from exc


def _print_error(exc: HsmTollError, *, as_json: bool) -> int:
    """*exc* on stderr, as lines for a person or as one JSON object. Returns its exit code."""
    if as_json:
        names = ("hint", "who", "retryable", "retry_after", "trace_id", "correlation_id", "jti")
        told = {
            "schema": 1,
            "error": exc.code,
            "message": str(exc),
            "exit_code": exc.exit_code,
            **{name: getattr(exc, name) for name in names},
        }
        # Escapes of JSON alone, whatever the locale: those of the stream are none.
        _write(json.dumps(told))
    else:
        _say(f"{exc.code}: {exc}")
        for line in exc.hints:
            _say(line, "hint")
    return exc.exit_code


def _say(line: str, prefix: str = "hsmtoll") -> None:
    _write(f"{prefix}: {line}")


def _write(line: str) -> None:
    # One write for all of it: two threads would mix their lines.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _lower(text: str) -> str:
    return (text[:1].lower() + text[1:]).rstrip(".")


@dataclass(frozen=True, slots=True)
class _Globals:
    """The global options, which may stand after the command as well: read when they are used."""

    given: Mapping[str, Any]

    @property
    def config(self) -> str | None:
        return self.given.get(CONFIG)

    @property
    def profile(self) -> str | None:
        return self.given.get(PROFILE)

    def settings(self) -> Settings:
        from hsmtoll.settings import load

        return load(config=self.config, profile=self.profile)

    def app(self, *, use_final_try: bool = False) -> App:
        from hsmtoll.app import App

        settings = self.settings()
        in_environment = {name.upper() for name, value in os.environ.items() if value}
        if settings.environment != "sandbox" and "HSMTOLL_HSM__PIN" in in_environment:
            logging.getLogger("hsmtoll").warning(
                "HSMTOLL_HSM__PIN: every child process and crash report sees the environment; "
                "HSMTOLL_HSM__PIN_FILE is safer"
            )
        _results_alone()
        return App(settings, one_shot=True, use_final_try=use_final_try)


def _results_alone() -> None:
    """From now on descriptor 1 leads where stderr does: modules write where they like."""
    # Somebody else's stdout (a test's) stays what it is.
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Result) or raw.fileno() != 1:
        return
    sys.stdout.flush()
    # Never 2, which would lead here again.
    kept = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
    os.dup2(2, 1)
    sys.stdout = _text(_Result(kept, "w"), sys.stdout)


class _Stderr(logging.Handler):
    """Log records as lines of ours, wherever stderr points at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(f"{record.levelname.lower()}: {foreign(record.getMessage())}")


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    sections={
        "Set up": ("doctor", "objects", "key", "chain", "pin"),
        "Call Customs": (
            "apis",
            "token",
            "test-auth",
            "call",
            "submit",
            "upload",
            "routing",
            "sign",
            "exchange",
        ),
        "Signing host": ("serve", "policy", "audit", "stop", "resume"),
        "Develop": ("sandbox", "completion", "help"),
    },
    examples=("hsmtoll doctor", "hsmtoll help token", "hsmtoll sandbox -- hsmtoll test-auth road"),
)
@click.version_option(version("hsmtoll"), prog_name="hsmtoll")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Customs tokens, signed with a key that never leaves its device."""
    ctx.obj = _Globals(ctx.meta)
    logger = logging.getLogger("hsmtoll")
    logger.handlers[:] = [_Stderr()]
    logger.propagate = False


_path = File(path_type=Path)
_file = File(path_type=Path, exists=True, dir_okay=False)

#: What a device needs, for the help of the commands.
_DEVICE: Final = "a device: HSMTOLL_HSM__MODULE, HSMTOLL_HSM__KEY and its PIN"
_ACCESS: Final = "network, HSMTOLL_ENVIRONMENT; device or signing host unless cached"
_POLICY: Final = "HSMTOLL_HOST__POLICY (--config FILE); no device, no running host"

#: What a command prints for programs, in place of its lines.
_as_json = click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")

_final_try = click.option(
    "--use-final-try",
    is_flag=True,
    help="Log in even if the device reports the last try before it locks.",
)


def _api_names(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    return starting_with(incomplete, (api.name for api in catalogue.APIS if not api.not_ready))


def _submittable(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    from hsmtoll.customs import LEVELS

    return starting_with(incomplete, LEVELS)


def _levels(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    from hsmtoll.customs import LEVELS

    return starting_with(incomplete, LEVELS.get(ctx.params.get("api") or "", ()))


def _document_types(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    from hsmtoll.customs import DOCUMENT_TYPES

    # Shells differ in how they quote a completion with a blank in it.
    return starting_with(incomplete, (kind for kind in DOCUMENT_TYPES if " " not in kind))


def _methods(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    return starting_with(incomplete.upper(), ("GET", "POST", "PUT", "PATCH", "DELETE"))


def _paths(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    return starting_with(incomplete, (api.base for api in catalogue.APIS if api.base))


def _commands(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    group: click.Command = main
    for name in ctx.params.get("names") or ():
        group = getattr(group, "commands", {}).get(name, group)
    return starting_with(incomplete, getattr(group, "commands", {}))


def _what(function: Callable[..., Any]) -> Callable[..., Any]:
    """The API or scope asked for: a word, or --scope or --api, which mean the same."""
    function = click.argument(
        "what", metavar="[API|SCOPE]", required=False, shell_complete=_api_names
    )(function)
    return click.option(
        "--scope", "--api", "named", metavar="S", shell_complete=_api_names,
        help="The API or scope, as an option.",
    )(function)  # fmt: skip


def _one(what: str | None, named: str | None) -> str | None:
    if what and named:
        raise UsageError(f"{foreign(what)} and {foreign(named)}: one API or scope at a time")
    return what or named


_scope = click.option(
    "--scope", metavar="S", shell_complete=_api_names,
    help="The scope of the token, instead of the API's own.",
)  # fmt: skip


def _for_whom(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the grant that say for whom it is; `_whom` reads them."""
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


def _whom(
    consumer_org: str | None, resource: tuple[str, ...], details: str | None
) -> dict[str, Any]:
    """The same as keywords of the client's methods."""
    given: Any = None
    if details is not None:
        try:
            given = _parsed(_body(details) or b"")
        except ValueError as exc:
            raise UsageError(
                f"--authorization-details: that is not JSON{_place(exc)}", hint=_no_json(details)
            ) from None
    return {
        "consumer_org": consumer_org,
        "resource": resource or None,
        "authorization_details": given,
    }


def _print_json(value: dict[str, Any]) -> None:
    click.echo(_json({"schema": 1, **value}))


def _print_result(value: dict[str, Any], *lines: str, as_json: bool) -> None:
    """*value* for programs, or *lines* for a person."""
    if as_json:
        _print_json(value)
    else:
        click.echo("\n".join(lines))


def _json(value: Any, *, indent: int | None = 2) -> str:
    """JSON for stdout; with escapes of its own where the locale does not hold a character."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


@main.command(
    needs=_ACCESS,
    examples=(
        "hsmtoll token road",
        "hsmtoll token road --header | curl -H @- $URL",
    ),
)
@_what
@click.option("--json", "as_json", is_flag=True, help="Token, type, remaining seconds, scope.")
@click.option("--header", is_flag=True, help="A header line, for `curl -H @-`.")
@click.option("--min-life", type=click.FloatRange(min=0), default=0.0, metavar="S",
              help="Seconds for which the token must remain valid.")  # fmt: skip
@click.option("--renew", is_flag=True, help="Get a new token even if one is cached.")
@_for_whom
@_final_try
@click.pass_obj
def token(
    ours: _Globals,
    *,
    what: str | None,
    named: str | None,
    as_json: bool,
    header: bool,
    min_life: float,
    renew: bool,
    consumer_org: str | None,
    resource: tuple[str, ...],
    details: str | None,
    use_final_try: bool,
) -> None:
    """
    Print one Customs token, from the cache or newly issued.

    API is one of `hsmtoll apis`, or a scope; HSMTOLL_SCOPE where none is given.
    """
    if as_json and header:
        raise UsageError("--json and --header: one form at a time")
    if not math.isfinite(min_life):
        raise UsageError(f"--min-life {min_life}: seconds are expected")
    whom = _whom(consumer_org, resource, details)
    app = ours.app(use_final_try=use_final_try)
    with app.client() as client:
        got = client.token(_one(what, named), min_life=min_life, renew=renew, **whom)
        left = int(got.remaining(app.clock.now()))
    if as_json:
        _print_json(
            {
                "access_token": got.value,
                "token_type": got.token_type,
                "expires_in": left,
                "scope": got.scope,
            }
        )
    else:
        click.echo(f"Authorization: Bearer {got.value}" if header else got.value)


@main.command(
    needs="a device, HSMTOLL_ENVIRONMENT, HSMTOLL_IDENTITY; no network",
    examples=("ssh keyhost hsmtoll sign road | hsmtoll exchange",),
)
@_what
@_for_whom
@_final_try
@click.pass_obj
def sign(
    ours: _Globals,
    *,
    what: str | None,
    named: str | None,
    consumer_org: str | None,
    resource: tuple[str, ...],
    details: str | None,
    use_final_try: bool,
) -> None:
    """
    Print one signed assertion, to be exchanged on another machine.

    Nothing is sent. The assertion can be used once, within two minutes.
    """
    whom = _whom(consumer_org, resource, details)
    app = ours.app(use_final_try=use_final_try)
    request = app.engine.request(_one(what, named), **whom)
    try:
        signer = app.signer
        try:
            assertion = app.budget.assertion(signer, request, identity=signer.identity())
        except HsmTollError as exc:
            if exc.code != "leaf-guessed":
                raise
            # The signature showed which certificate it is; the next one is for that.
            assertion = app.budget.assertion(signer, request, identity=signer.identity())
        click.echo(assertion)
    finally:
        app.close()


@main.command(
    needs="network, HSMTOLL_ENVIRONMENT; no device",
    examples=("ssh keyhost hsmtoll sign road | hsmtoll exchange --json",),
)
@click.option("--json", "as_json", is_flag=True, help="Token, type, remaining seconds, scope.")
@click.pass_obj
def exchange(ours: _Globals, *, as_json: bool) -> None:
    """Exchange an assertion, read from stdin, for a Customs token."""
    from hsmtoll.signer import SpentOnce

    app = ours.app()
    audience = app.endpoints.issuer
    if sys.stdin.isatty():
        raise UsageError(
            "exchange: an assertion is expected on stdin",
            hint="hsmtoll sign road | hsmtoll exchange",
        )
    raw = _stdin("exchange", _LARGEST_ASSERTION + 1)
    handed = SpentOnce(raw.decode("ascii", "replace").strip(), audience=audience)
    engine = app.engine_with(lambda: handed)
    subject = engine.granted(handed.spend())
    if handed.scope == catalogue.SELF_TEST_SCOPE:
        raise engine.self_test()
    issued = engine.exchanged(subject)
    if as_json:
        _print_json(
            {
                "access_token": issued.value,
                "token_type": "Bearer",
                "expires_in": min(issued.expires_in, subject.expires_in),
                "scope": handed.scope,
            }
        )
    else:
        click.echo(issued.value)


@main.command(
    "test-auth",
    needs=_ACCESS,
    examples=("hsmtoll test-auth road", "hsmtoll test-auth verksemd.eu"),
)
@_what
@_as_json
@_final_try
@click.pass_obj
def test_auth(
    ours: _Globals, *, what: str | None, named: str | None, as_json: bool, use_final_try: bool
) -> None:
    """
    Get a token, make the API's test call and print its status.

    Success is 200. API is one of `hsmtoll apis`; HSMTOLL_SCOPE where none is given.
    """
    app = ours.app(use_final_try=use_final_try)
    # As `token`: without a word the default, or an error.
    word = _one(what, named) or app.settings.scope
    api = _test_api(word or app.engine.request(None).scope)
    with app.client() as client:
        if api.name == "verksemd.eu":
            try:
                client.token(api.name)
            except ExchangeRefused as exc:
                if exc.code != "self-test":
                    raise
                _print_result(
                    {"api": api.name, "granted": catalogue.SELF_TEST_SCOPE},
                    f"granted {catalogue.SELF_TEST_SCOPE}",
                    as_json=as_json,
                )
                _say(str(exc))
            return
        if api.test is None:
            raise UsageError(
                f"API {api.name}: no test call is documented for it",
                hint="`hsmtoll test-auth road` proves key, certificate and both services",
            )
        if api.test_seen:
            _say(f"the test call of {api.name} is not documented; a public client names it")
        response = client.call("GET", f"{api.base}{api.test}")
        _checked(response, api, app)
        if response.status_code != 200:
            raise NetworkError(
                f"API {api.name}: {response.status_code}, where its test call answers 200",
                hint="something between may have answered: check HSMTOLL_PROXY and the endpoints",
            )
        _print_result({"api": api.name, "status": 200}, "200 OK", as_json=as_json)


def _test_api(word: str) -> catalogue.Api:
    if ":" not in word:
        return catalogue.named(word)
    found = [api for api in catalogue.APIS if word in (api.norwegian, api.eseal)]
    if not found:
        raise UsageError(f"scope {foreign(word)}: no API of the Customs guide has it")
    return found[0]


def _checked(response: Any, api: catalogue.Api, app: App) -> None:
    from hsmtoll.customs import check

    check(response, api, now=app.clock.now().wall)


@main.command(
    needs=_ACCESS,
    examples=(
        "hsmtoll call GET /api/movement/road/v2/test-auth -i",
        "hsmtoll call POST /api/movement/road/v2/transport --json-data @transport.json",
    ),
)
@click.argument("method", shell_complete=_methods)
@click.argument("path", shell_complete=_paths)
@click.option("--data", metavar="@F", help="Body: text, or @FILE, or @- for stdin.")
@click.option("--json-data", metavar="@F", help="The same, sent as application/json.")
@click.option("-i", "--include", is_flag=True, help="Print status and headers before the body.")
@click.option(
    "--header", "headers", multiple=True, metavar="H", help="NAME: VALUE; may be repeated."
)
@_scope
@_for_whom
@_final_try
@click.pass_obj
def call(
    ours: _Globals,
    *,
    method: str,
    path: str,
    data: str | None,
    json_data: str | None,
    include: bool,
    headers: tuple[str, ...],
    scope: str | None,
    consumer_org: str | None,
    resource: tuple[str, ...],
    details: str | None,
    use_final_try: bool,
) -> None:
    """
    Make one API call and print the body of the answer.

    PATH is below Customs' host and decides the scope; `hsmtoll apis` lists the base paths. With
    --scope, PATH may be one that is not listed.
    """
    if data is not None and json_data is not None:
        raise UsageError("--data and --json-data: one body at a time")
    if not _WORD.fullmatch(method):
        raise UsageError(f"method {foreign(method)}: a word such as GET is expected")
    api = catalogue.at(path) if scope else catalogue.api_of_path(path)
    if not path.isprintable() or len(path) > _LONGEST_PATH:
        raise UsageError(
            f"path {foreign(path)}: printable characters are expected, {_LONGEST_PATH} at most"
        )
    sent = [_header(line) for line in headers]
    body = _body(data if data is not None else json_data)
    if json_data is not None:
        try:
            _parsed(body or b"")
        except ValueError as exc:
            raise UsageError(
                f"--json-data: that is not JSON{_place(exc)}", hint=_no_json(json_data)
            ) from None
        sent.append(("Content-Type", "application/json"))
    whom = _whom(consumer_org, resource, details)
    app = ours.app(use_final_try=use_final_try)
    with app.client() as client:
        response = client.call(
            method.upper(), path, scope=scope, **whom, content=body, headers=sent
        )
    from hsmtoll.customs import SAFE

    asked = method.upper() in SAFE
    with contextlib.nullcontext() if asked else _after_sending(f"call to {api.name}"):
        try:
            if include:
                click.echo(_head(response))
                sys.stdout.flush()
            sys.stdout.buffer.write(response.content)
            sys.stdout.buffer.flush()
        finally:
            # What Customs refused is refused, whoever could read the reasons.
            _checked(response, api, app)
        if not response.content and not include:
            _say(f"{_status(response)}: the body of the answer is empty")


def _status(response: Any) -> str:
    return f"{response.status_code} {foreign(response.reason_phrase)}".rstrip()


def _head(response: Any) -> str:
    lines = [f"{foreign(response.http_version)} {_status(response)}"]
    lines += [
        f"{foreign(name)}: {foreign(value)}" for name, value in response.headers.multi_items()
    ]
    return "\n".join([*lines, ""])


#: Who calls whom, and where a request ends.
_OUR_HEADERS: Final = ("authorization", "host", "cookie", "content-length", "transfer-encoding")


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    name = name.strip()
    if not colon or not _WORD.fullmatch(name) or not line.isprintable() or not line.isascii():
        raise UsageError("--header: NAME: VALUE is expected, in ASCII")
    if name.lower() in _OUR_HEADERS:
        raise UsageError(f"--header {name}: hsmtoll sets it itself, or never")
    return name, value.strip()


def _body(given: str | None) -> bytes | None:
    if given is None or not given.startswith("@"):
        # The bytes that were typed, whatever encoding they are in.
        return os.fsencode(given) if given is not None else None
    return _content(given, "body:")


def _content(file: str, what: str) -> bytes:
    """The bytes of FILE or @FILE; - or @- is stdin. UsageError where they cannot be read."""
    name = file.removeprefix("@")
    if name == "-":
        return _stdin(what.partition(":")[0])
    try:
        return Path(name).read_bytes()
    except OSError as exc:
        raise UsageError(
            f"{what} {foreign(name)} cannot be read ({exc.strerror})",
            hint="~ is not expanded here; write the whole path" if name[:1] == "~" else None,
        ) from exc


def _no_json(given: str) -> str:
    there = len(given) < _LONGEST_PATH and "\0" not in given and Path(given).is_file()
    return f"did you mean @{foreign(given)}?" if there else _NO_JSON


#: Why what looks like JSON may be none.
_NO_JSON: Final = f"it has neither NaN nor Infinity (RFC 8259), and here {_DEEPEST} levels at most"


def _parsed(raw: bytes) -> Any:
    """*raw* as JSON; ValueError for what is none, and for what is nested without end."""
    try:
        value = json.loads(raw, parse_constant=_no_number)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    level = [value]
    for _ in range(_DEEPEST):
        # Only what holds others has a next level.
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _place(exc: ValueError) -> str:
    """Where the JSON of a message is wrong, if that is known."""
    if isinstance(exc, json.JSONDecodeError):
        return f" (line {exc.lineno}, column {exc.colno})"
    return ""


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _stdin(what: str, limit: int = -1) -> bytes:
    try:
        return sys.stdin.buffer.read(limit)
    except OSError as exc:
        raise UsageError(f"{what}: stdin cannot be read ({exc.strerror})") from exc


@main.command(
    needs=_ACCESS,
    examples=(
        "hsmtoll submit road POST transport transport.json",
        "hsmtoll submit road PUT transport t.json --mrn 26NO4TU2HUD59UCBT8 --json",
    ),
)
@click.argument("api", shell_complete=_submittable)
@click.argument("method", shell_complete=_methods)
@click.argument("level", shell_complete=_levels)
@click.argument("message", metavar="[FILE]", required=False, type=File())
@click.option("--mrn", metavar="M", help="What is changed or deleted, for PUT and DELETE.")
@click.option("--timeout", type=click.FloatRange(min=0, max=86_400), default=120.0, metavar="S",
              show_default=True, help="Seconds to wait for the result.")  # fmt: skip
@_as_json
@_scope
@_for_whom
@_final_try
@click.pass_obj
def submit(
    ours: _Globals,
    *,
    api: str,
    method: str,
    level: str,
    message: str | None,
    mrn: str | None,
    timeout: float,
    as_json: bool,
    scope: str | None,
    consumer_org: str | None,
    resource: tuple[str, ...],
    details: str | None,
    use_final_try: bool,
) -> None:
    """
    Submit a message and wait for its result: SUCCESS and the MRN.

    The message (JSON) is in FILE, also written @FILE, or on stdin; text that begins with { is the
    message itself. METHOD is POST, PUT or DELETE; LEVEL is transport, master-consignment,
    house-consignment, relation or another that the API has.
    """
    if not math.isfinite(timeout):
        raise UsageError(f"--timeout {timeout}: seconds are expected")
    is_text = message is not None and message.lstrip().startswith("{")
    neither = "submit: neither a JSON object nor a file:"
    raw = os.fsencode(message or "") if is_text else _content(message or "-", neither)
    try:
        parsed = _parsed(raw)
    except ValueError as exc:
        raise UsageError(f"submit: the message is not JSON{_place(exc)}", hint=_NO_JSON) from None
    if not isinstance(parsed, dict):
        raise UsageError("submit: the message is not a JSON object", hint="{…} is expected")
    try:
        json.dumps(parsed, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        # JSON can say both, by escapes and by digits, and they cannot be sent on.
        raise UsageError(
            "submit: the message has half of a surrogate pair or too large a number in it"
        ) from None
    whom = _whom(consumer_org, resource, details)
    app = ours.app(use_final_try=use_final_try)
    with app.client() as client:
        receipt = client.submit(
            api,
            method.upper(),
            level,
            json=parsed,
            mrn=mrn,
            patience=timeout,
            scope=scope,
            **whom,
            # At once and before the first question, so that it can be asked for later.
            accepted=lambda request_id: _say(f"accepted, requestId {request_id}"),
            waiting=_waiting,
        )
    with _after_sending(f"submission {receipt.request_id}"):
        _print_result(
            {"result": "SUCCESS", "request_id": receipt.request_id, "mrn": receipt.mrn},
            f"SUCCESS {foreign(receipt.mrn)}" if receipt.mrn else "SUCCESS",
            as_json=as_json,
        )


def _waiting(seconds: float) -> None:
    """One line that is written over, for a person; a log gets none of it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\rhsmtoll: waiting for the result, {seconds:.0f} s ")
        sys.stderr.flush()


@main.command(
    needs=_ACCESS,
    examples=("hsmtoll upload 123456789-01092026-1 invoice.pdf --type invoice",),
)
@click.argument("declaration_id")
@click.argument("file", type=File())
@click.option("--type", "kind", required=True, metavar="T", shell_complete=_document_types,
              help="invoice, permits, waybill, …")  # fmt: skip
@_as_json
@_final_try
@click.pass_obj
def upload(
    ours: _Globals,
    *,
    declaration_id: str,
    file: str,
    kind: str,
    as_json: bool,
    use_final_try: bool,
) -> None:
    """
    Upload a document to a declaration.

    FILE may be written @FILE as well. Type, ending and size are checked before anything is sent.
    """
    file = file.removeprefix("@")
    _check_file(file)
    app = ours.app(use_final_try=use_final_try)
    with app.client() as client:
        receipt = client.upload(declaration_id, file, document_type=kind)
    _say(f"uploaded {foreign(Path(file).name)} to {declaration_id}")
    if as_json or receipt.body:
        with _after_sending(f"upload of {foreign(Path(file).name)}"):
            _print_result(
                {"declaration_id": declaration_id, "type": kind, "answer": receipt.body},
                _json(receipt.body, indent=None),
                as_json=as_json,
            )


@main.command(
    needs=_ACCESS,
    examples=("hsmtoll routing --marker routing.marker", "hsmtoll routing --limit 10"),
)
@click.option("--marker", type=_path, metavar="FILE", help="How far the feed was taken; written.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Signals at most.")
@click.option("--level", type=click.Choice(["house-consignment", "transport"]),
              default="house-consignment", help="Default: house-consignment.")  # fmt: skip
@_final_try
@click.pass_obj
def routing(
    ours: _Globals, *, marker: Path | None, limit: int | None, level: str, use_final_try: bool
) -> None:
    """
    Print the routing feed, one JSON line a signal.

    With --marker, FILE holds how far the feed was read. It is written after the signals were
    printed: after a kill, the next run prints some of them again and leaves none out.
    """
    from hsmtoll.customs import Marker, marker_of

    app = ours.app(use_final_try=use_final_try)
    left = limit
    with app.client() as client:
        for batch in client.routing(marker, level=level):
            taken = batch if left is None else batch[:left]
            for each in taken:
                sys.stdout.write(f"{_json(each, indent=None)}\n")
            # The batch counts as taken when the next one is asked for.
            sys.stdout.flush()
            if left is not None:
                left -= len(taken)
                if left == 0:
                    last = marker_of(taken[-1])
                    if last is not None:
                        Marker(marker).write(last)
                    return


def _check_file(file: str) -> None:
    """UsageError for a name that cannot be sent, and for what would be waited for without end."""
    if not Path(file).name.isprintable():
        raise UsageError(f"upload of {foreign(file)}: the name has characters that are no text")
    # What cannot be looked at cannot be read either, and is told then.
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(Path(file).stat().st_mode):
            raise UsageError(f"upload of {foreign(file)}: not a regular file")


@main.command(
    needs="a device (HSMTOLL_HSM__MODULE, HSMTOLL_HSM__KEY); no network",
    examples=("hsmtoll chain", "hsmtoll chain --pem > chain.pem"),
)
@click.option("--json", "as_json", is_flag=True, help="A list, leaf first.")
@click.option("--pem", is_flag=True, help="The certificates, leaf first.")
@_final_try
@click.pass_obj
def chain(ours: _Globals, *, as_json: bool, pem: bool, use_final_try: bool) -> None:
    """Show the verified certificate chain that is sent as x5c."""
    if as_json and pem:
        raise UsageError("--json and --pem: one form at a time")
    app = ours.app(use_final_try=use_final_try)
    try:
        found = app.chain()
    finally:
        app.close()
    sent = found.sent(app.settings.x5c_mode)
    if pem:
        click.echo("".join(each.pem() for each in sent), nl=False)
    elif as_json:
        listed = [
            {
                "schema": 1,
                "subject": each.subject,
                "issuer": each.issuer,
                "serial": each.serial_hex,
                "not_before": each.not_before.strftime(_TIME),
                "not_after": each.not_after.strftime(_TIME),
                "sha256": each.sha256,
            }
            for each in sent
        ]
        click.echo(_json(listed))
    else:
        for line in found.explain():
            click.echo(line)
        if len(sent) < len(found.certificates):
            click.echo(f"sent: the first {len(sent)} (HSMTOLL_X5C is {app.settings.x5c})")


@main.command(
    needs="HSMTOLL_HSM__MODULE; with a PIN private keys show as well",
    examples=("hsmtoll objects", "hsmtoll objects --json"),
)
@click.option("--json", "as_json", is_flag=True, help="Everything, for a program.")
@click.pass_obj
def objects(ours: _Globals, *, as_json: bool) -> None:
    """
    List devices, keys and certificates of the PKCS#11 module.

    Each with its URI, as HSMTOLL_HSM__KEY takes it.
    """
    app = ours.app()
    seen = app.inspect()
    told = _inventory(seen, app.clock.now().wall)
    if as_json:
        _print_json(told)
        _raise_for_pin(seen)
        return
    click.echo(f"module {told['module']}: {told['description']} {told['version']}".rstrip())
    for device in told["p11_tokens"]:
        _print_device(device)
    if not told["p11_tokens"]:
        click.echo("  no device: is it plugged in, and its service running?")
    _raise_for_pin(seen)


def _raise_for_pin(seen: ModuleFacts) -> None:
    """After what is there was printed: an error if keys are not in it because of the PIN."""
    if isinstance(seen.login, ConfigurationError | PinIncorrect | PinNotTried):
        raise seen.login


def _inventory(seen: ModuleFacts, now: float) -> dict[str, Any]:
    return {
        "module": seen.path,
        "manufacturer": foreign(seen.manufacturer),
        "description": foreign(seen.description),
        "version": ".".join(map(str, seen.version)),
        "p11_tokens": [
            {
                "uri": str(each.uri),
                "slot": each.slot_id,
                "initialized": each.initialized,
                "pin": each.pin_state,
                "refused_pins": each.refused,
                "logged_in": each.logged_in,
                "problem": each.problem,
                "keys": [_key_row(key) for key in each.keys],
                "certificates": [_certificate_row(u, c, now) for u, c in each.certificates],
            }
            for each in seen.tokens
        ],
    }


_FLAGS: Final = ("sensitive", "always_sensitive", "extractable", "never_extractable", "local",
                 "sign", "always_authenticate")  # fmt: skip


def _key_row(key: KeyFacts) -> dict[str, Any]:
    flags = {name: getattr(key, name) for name in _FLAGS}
    return {"uri": str(key.uri), "type": key.key_type, "bits": key.bits, **flags}


def _certificate_row(uri: KeyUri, stored: StoredCertificate, now: float) -> dict[str, Any]:
    from hsmtoll.certificate import Certificate

    if stored.problem is not None:
        return {"uri": str(uri), "problem": f"cannot be read: {stored.problem}"}
    try:
        read = Certificate.load(stored.der)
    except ValueError as exc:
        return {"uri": str(uri), "problem": f"cannot be read: {exc}"}
    return {
        "uri": str(uri),
        "subject": read.subject,
        "issuer": read.issuer,
        "sha256": read.sha256,
        "not_after": read.not_after.strftime(_TIME),
        "days_left": read.days_left(datetime.fromtimestamp(now, UTC)),
    }


#: What the flags of a device say of its PIN; whether the one that is set is right shows at login.
_PIN_STATES: Final = {
    "ok": "not locked",
    "count-low": "not locked; a wrong one was given since the last login",
    "to-be-changed": "not locked; to be changed",
    "final-try": "the next wrong one locks it",
    "unset": "none was set on the device",
}


def _print_device(device: dict[str, Any]) -> None:
    click.echo(f"\n{device['uri']}")
    if not device["initialized"] and not device["keys"] and not device["certificates"]:
        click.echo("  not initialised")
        return
    refused = f", {device['refused_pins']} refused before" if device["refused_pins"] else ""
    click.echo(f"  PIN: {_PIN_STATES.get(device['pin'], device['pin'])}{refused}")
    if device["problem"]:
        click.echo(f"  private keys do not show: {device['problem']}")
    elif not device["logged_in"]:
        click.echo("  private keys do not show without a PIN, such as HSMTOLL_HSM__PIN_FILE")
    for key in device["keys"]:
        told = [
            name if value else f"not {name}" if value is False else f"{name}?"
            for name, value in ((name, key[name]) for name in _FLAGS)
        ]
        click.echo(f"  key  {key['uri']}")
        click.echo(f"       {key['type']} {key['bits'] or ''} {', '.join(told)}".replace("_", " "))
    for each in device["certificates"]:
        click.echo(f"  cert {each['uri']}")
        click.echo(
            f"       {each['problem']}"
            if "problem" in each
            else f"       {each['subject']}, {each['days_left']} days left"
        )


@main.command(
    needs="nothing, it checks what is set; network with --online alone",
    examples=("hsmtoll doctor", "hsmtoll doctor --online --scope road"),
)
@click.option("--json", "as_json", is_flag=True, help="Every check, for a program.")
@click.option(
    "--sign", is_flag=True, help="Make one signature as well, over a text of a grant's size."
)
@click.option("--online", is_flag=True, help="Ask the services as well: clock, grants.")
@click.option("--scope", "--api", "scopes", multiple=True, metavar="S",
              shell_complete=_api_names,
              help="With --online: ask for a grant of this as well.")  # fmt: skip
@click.option("--crl", type=_file, help="Check the leaf against this revocation list.")
@click.option("--evidence", is_flag=True, help="A JSON report for an auditor.")
@_final_try
@click.pass_obj
def doctor(
    ours: _Globals,
    *,
    as_json: bool,
    sign: bool,
    online: bool,
    scopes: tuple[str, ...],
    crl: Path | None,
    evidence: bool,
    use_final_try: bool,
) -> int:
    """
    Check settings, device, certificates and services.

    Each step is checked if the one before it is right. Exits with 0, or with the code of the
    first failure. Nothing is sent without --online, and nothing signed without --sign or
    --online; whether Maskinporten trusts the issuer of
    the certificate shows only with it.
    """
    from hsmtoll import doctor as checks

    try:
        app = ours.app(use_final_try=use_final_try)
    except ConfigurationError as exc:
        if evidence:
            # It would show an auditor settings that nobody has made.
            raise
        report = checks.unsettled(exc)
    else:
        with contextlib.closing(app):
            report = checks.run(app, online=online, signing=sign, scopes=scopes, crl=crl)
    told = report.evidence() if evidence else report.as_json() if as_json else None
    if told is not None:
        click.echo(_json(told))
    else:
        click.echo("\n".join(report.lines()))
    return report.exit_code


@main.group(
    examples=("hsmtoll key generate", "hsmtoll help key import"),
    needs=_DEVICE,
)
def key() -> None:
    """Make a key on the device; request and store its certificate."""


@key.command(
    "generate", needs=_DEVICE, examples=("hsmtoll key generate", "hsmtoll key generate --bits 4096")
)
@click.option("--bits", type=click.Choice(["3072", "2048", "4096"]), default="3072")
@click.option("--label", metavar="L", help="Default: that of HSMTOLL_HSM__KEY.")
@click.option("--id", "key_id", metavar="HEX", help="Default: that of HSMTOLL_HSM__KEY, or random.")
@click.option(
    "--always-authenticate", is_flag=True, help="The device wants the PIN for every signature."
)
@_final_try
@click.pass_obj
def key_generate(
    ours: _Globals,
    *,
    bits: str,
    label: str | None,
    key_id: str | None,
    always_authenticate: bool,
    use_final_try: bool,
) -> None:
    """
    Make an RSA key on the device and print its URI.

    The key is for signing alone and cannot be exported.
    """
    from hsmtoll import enrol

    try:
        given = bytes.fromhex(key_id) if key_id else None
    except ValueError:
        raise UsageError("--id: hexadecimal bytes are expected, such as 01") from None
    app = ours.app(use_final_try=use_final_try)
    with app.devices[0] as device:
        uri = enrol.generate(
            device,
            bits=int(bits),
            label=label,
            id=given,
            always_authenticate=always_authenticate,
        )
        to_set = enrol.uri_to_set(device, uri)
    click.echo(str(uri))
    if to_set is not None:
        _say("the settings do not select this key; to go on with it:")
        _say(_selecting(app.settings, to_set), "hint")


def _selecting(settings: Settings, uri: KeyUri) -> str:
    """The variables to set for *uri*, as a shell takes them."""
    if settings.hsm.key:
        return f"export HSMTOLL_HSM__KEY={shlex.quote(str(uri))}"
    told = f"export HSMTOLL_HSM__KEY_LABEL={shlex.quote(uri.object or '')}"
    return f"{told} HSMTOLL_HSM__KEY_ID={uri.id.hex()}" if uri.id else told


@key.command(
    "csr",
    needs=_DEVICE,
    examples=(
        "hsmtoll key csr --country SE --organization 'Acme AB' \\",
        "  --common-name 'Acme AB' --organization-identifier NTRSE-5566778899 > a.csr",
    ),
)
@click.option("--country", required=True, metavar="CC")
@click.option("--organization", required=True, metavar="NAME")
@click.option("--common-name", required=True, metavar="NAME")
@click.option("--organization-identifier", required=True, metavar="ID",
              help="NTRSE-5566778899, NTRNO-987654325, VATDE-123456789, …")  # fmt: skip
@click.option("--unit", metavar="NAME")
@click.option("--serial-number", metavar="N")
@_final_try
@click.pass_obj
def key_csr(ours: _Globals, /, *, use_final_try: bool, **subject: Any) -> None:
    """Print a certificate request (PKCS#10, PEM), signed on the device."""
    from hsmtoll import enrol

    app = ours.app(use_final_try=use_final_try)
    with app.devices[0] as device:
        click.echo(enrol.csr(device, **subject).rstrip())


@key.command(
    "import",
    needs=_DEVICE,
    examples=("hsmtoll key import chain.pem", "hsmtoll key import - < delivered.p7b"),
)
@click.argument("chain", metavar="FILE", type=_path)
@_final_try
@click.pass_obj
def key_import(ours: _Globals, *, chain: Path, use_final_try: bool) -> None:
    """
    Store a certificate and its chain on the device, beside its key.

    FILE is PEM, DER or PKCS#7 (.p7b), - is stdin. What is there already is not stored again.
    """
    from hsmtoll import enrol

    app = ours.app(use_final_try=use_final_try)
    data = _content(str(chain), "key import:")
    with app.devices[0] as device:
        now = datetime.fromtimestamp(app.clock.now().wall, UTC)
        # Without an identity the rules of eSeals judge: what they take, the others take.
        family = app.settings.identity or "eseal"
        done = enrol.import_chain(
            device,
            data,
            name=f"key import {foreign(chain)}",
            file=None if str(chain) == "-" else chain,
            now=now,
            identity=family,
            mode=app.settings.x5c_mode,
            root_sha256=app.settings.hsm.root_sha256,
        )
    for what, certificates in (
        ("written", done.written),
        ("there already", done.present),
        ("no room for it: name it in a file, HSMTOLL_HSM__CERTIFICATES", done.left),
    ):
        for each in certificates:
            click.echo(f"{each.subject}: {what}")


@key.command("jwk", needs=_DEVICE, examples=("hsmtoll key jwk > key.jwk",))
@_final_try
@click.pass_obj
def key_jwk(ours: _Globals, *, use_final_try: bool) -> None:
    """
    Print the public key as a JWK (RFC 7517).

    With its RFC 7638 thumbprint as kid, ready to be registered at Samarbeidsportalen.
    """
    from hsmtoll import enrol

    app = ours.app(use_final_try=use_final_try)
    with app.devices[0] as device:
        click.echo(json.dumps(enrol.jwk(device, alg=app.settings.alg), indent=2))


@main.group(needs="HSMTOLL_HSM__MODULE", examples=("hsmtoll pin clear",))
def pin() -> None:
    """Manage the record of refused PINs."""


@pin.command(
    "clear",
    needs="HSMTOLL_HSM__MODULE; HSMTOLL_HSM__KEY for one device; no PIN",
    examples=("hsmtoll pin clear",),
)
@_as_json
@click.pass_obj
def pin_clear(ours: _Globals, *, as_json: bool) -> None:
    """
    Forget the refused PINs of the devices in the settings.

    For after the device was unblocked to the same PIN, which would not be tried again otherwise.
    """
    from hsmtoll.hsm.inspect import places
    from hsmtoll.hsm.uri import KeyUri

    app = ours.app()
    uris = app.uris() if app.names_a_key else (KeyUri(),)
    user = app.settings.hsm.user_type
    found = [each for uri in uris for each in places(Path(app.module(uri)), uri, user_type=user)]
    if not found:
        raise DeviceError("pin clear: no device fits", hint="`hsmtoll objects` shows what is there")
    forgotten = app.ledger.clear(*found)
    # Each device has a record of its user's PIN and one of its keys' own.
    devices = len({replace(each, user="user") for each in found})
    _print_result(
        {"forgotten": forgotten, "devices": devices},
        f"forgot {forgotten} record(s) of {devices} device(s)",
        as_json=as_json,
    )


@main.command("apis", needs="nothing", examples=("hsmtoll apis", "hsmtoll apis --json"))
@_as_json
def list_apis(*, as_json: bool) -> None:
    """List the APIs with their scopes and paths."""
    if as_json:
        names = ("name", "norwegian", "eseal", "base", "test", "not_ready", "no_scope")
        rows = [{n: getattr(a, n) or None for n in names} for a in catalogue.APIS]
        _print_json({"guide": catalogue.VERSION, "apis": rows})
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


@main.command(
    needs="a device, the settings HSMTOLL_HOST__…, the extra host",
    examples=("hsmtoll serve",),
)
@click.pass_obj
def serve(ours: _Globals) -> int:
    """
    Run the signing host for the callers in its policy.

    SIGTERM ends it. SIGHUP reads policy and certificates again.
    """
    try:
        from hsmtoll.host import server
    except ImportError as exc:
        raise UsageError("serve: its server is not installed", hint=install_extra("host")) from exc
    settings = ours.settings()
    ready = partial(_say, "signing host: ready")
    return server.serve(settings, config=ours.config, profile=ours.profile, ready=ready)


@main.group(
    needs=_POLICY,
    examples=("hsmtoll policy test --profile acme uid:1001 road",),
)
def policy() -> None:
    """Explain the signing host's policy."""


@policy.command(
    "test",
    needs=_POLICY,
    examples=("hsmtoll policy test --profile acme uid:1001 road",),
)
@click.option("--profile", required=True, metavar="P",
              help="Profile of the policy that the caller asks for.")  # fmt: skip
@click.option("--mode", type=click.Choice(["grant", "token"]), help="Default: both.")
@_as_json
@click.argument("caller")
@click.argument("scope", metavar="API|SCOPE", shell_complete=_api_names)
@click.pass_obj
def policy_test(
    ours: _Globals, *, profile: str, mode: str | None, as_json: bool, caller: str, scope: str
) -> int:
    """
    Show what a caller may have, with the line of the policy that decides.

    CALLER is uid:N, gid:N, san:dns:NAME or san:uri:URI. Exits with 90 if nothing is allowed.
    """
    from hsmtoll.host.brake import needed
    from hsmtoll.host.policy import explain

    path = needed(ours.settings().host.policy, "policy")
    verdicts = explain(path, profile, caller, scope)
    told = {each: verdicts[each] for each in verdicts if mode in (None, each)}
    _print_result(
        {each: {"allowed": allowed, "reason": said} for each, (allowed, said) in told.items()},
        *(f"{each}: {said}" for each, (_, said) in told.items()),
        as_json=as_json,
    )
    return 0 if any(allowed for allowed, _ in told.values()) else PolicyDenied.exit_code


@main.group(
    needs="the directory of an audit; no device and no running host",
    examples=("hsmtoll audit list --since 2026-11-01",),
)
def audit() -> None:
    """Verify and list the log of what was signed for whom."""


class _Moment(click.DateTime):
    """A day or a time, as ISO 8601 writes them."""

    def __init__(self) -> None:
        super().__init__(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"])

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(
                f"{foreign(value)}: 2026-11-01 or 2026-11-01T08:00:00 is expected, in UTC",
                param,
                ctx,
            )


_moment = _Moment()


@audit.command(
    "verify",
    needs="the public half of the audit's key; PATH or HSMTOLL_HOST__AUDIT_DIR",
    examples=(
        "hsmtoll audit verify --public-key audit.pub /var/lib/hsmtoll/audit",
        "hsmtoll audit verify --public-key audit.pub --since 2026-11-01 \\",
        "  /var/lib/hsmtoll/audit",
    ),
)
@_as_json
@click.option("--public-key", required=True, type=_file, help="Of the audit key (PEM).")
@click.option("--head", metavar="SEQ:HASH", help="From a reply or the system log.")
@click.option(
    "--since", type=_moment, metavar="WHEN", help="From the segment on in which WHEN (UTC) lies."
)
@click.argument("path", nargs=-1, type=click.Path(path_type=Path, exists=True), metavar="[PATH…]")
@click.pass_obj
def audit_verify(
    ours: _Globals,
    *,
    as_json: bool,
    public_key: Path,
    head: str | None,
    since: datetime | None,
    path: tuple[Path, ...],
) -> None:
    """
    Find the first record that is not as it was written.

    Exits with 91 if a record was changed, removed, reordered or cut off, or is not covered by a
    checkpoint where one is due. PATH is the audit's directory, or some of its segments
    (audit-N.jsonl) that follow each other, with their checkpoints beside them; without it, it is
    HSMTOLL_HOST__AUDIT_DIR. Intents without a result are listed: the host ended between the two,
    or is signing now.
    """
    from hsmtoll.host.audit_log import verify

    path = path or (_audit_place(ours, None),)
    report = verify(path, public_key, head, since=_utc(since))
    if report.bad is not None:
        certain = f"up to record {report.sealed} all is" if report.sealed else "no record is"
        raise AuditBroken(
            f"audit {foreign(path[0])}: {report.bad}",
            hint=f"keep it as evidence; {certain} certain to be as it was written",
            code="audit-broken",
        )
    if head is not None and int(head.partition(":")[0]) < report.after:
        raise UsageError("head: it is of a record in an older segment, which was not read")
    found = {
        "first": report.after + 1,
        "records": report.seq,
        "head": f"{report.seq}:{report.head}",
        "anchored": report.sealed,
        "unverified": report.unverified,
        "open_intents": list(report.open_intents.values()),
    }
    cut = (
        () if head else ("a log that was cut off at an earlier checkpoint shows only with --head",)
    )
    _print_result(found, *report.described(), *cut, as_json=as_json)


def _audit_place(ours: _Globals, path: Path | None) -> Path:
    from hsmtoll.host.brake import needed

    return path or needed(ours.settings().host.audit_dir, "audit_dir")


@audit.command(
    "list",
    needs="PATH or HSMTOLL_HOST__AUDIT_DIR, usually by --config FILE",
    examples=(
        "hsmtoll audit list --since 2026-11-01",
        "hsmtoll audit list /var/lib/hsmtoll/audit --caller uid:1001 --json",
    ),
)
@click.option("--caller", metavar="NAME", help="uid:N, gid:N, san:dns:NAME or san:uri:URI.")
@click.option("--profile", metavar="P")
@click.option(
    "--since", type=_moment, metavar="WHEN", help="2026-11-01 or 2026-11-01T08:00:00, UTC."
)
@click.option("--until", type=_moment, metavar="WHEN", help="Up to, and without, that moment.")
@click.option("--json", "as_json", is_flag=True, help="The records whole, for a program.")
@click.argument("path", type=click.Path(path_type=Path, exists=True), required=False)
@click.pass_obj
def audit_list(
    ours: _Globals,
    *,
    caller: str | None,
    profile: str | None,
    since: datetime | None,
    until: datetime | None,
    as_json: bool,
    path: Path | None,
) -> None:
    """
    List what was signed, released and refused.

    PATH is the directory of the audit, HSMTOLL_HOST__AUDIT_DIR where none is given.
    """
    from hsmtoll.host.audit_log import list_records

    place = _audit_place(ours, path)
    span = {"since": _utc(since), "until": _utc(until)}
    records = list_records(place, caller=caller, profile=profile, **span)
    if as_json:
        _print_json({"records": list(records)})
        return
    shown = ("seq", "time", "event", "caller", "profile", "scope", "jti", "outcome")
    for at, each in enumerate(records):
        if at == 0:
            click.echo("  ".join(shown))
        click.echo("  ".join(foreign(each[name] or "-") for name in shown))


def _utc(moment: datetime | None) -> datetime | None:
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


@main.command(needs=_POLICY, examples=("hsmtoll stop",))
@click.pass_obj
def stop(ours: _Globals) -> None:
    """
    Stop the signing host before its next signature, until resume.

    A file says so, beside the policy; a host that is started later is stopped as well.
    """
    from hsmtoll.host.brake import stop, stop_file

    path = stop_file(ours.settings())
    click.echo(f"stopped: {path}" if stop(path) else f"stopped already: {path}")


@main.command(needs=_POLICY, examples=("hsmtoll resume",))
@click.pass_obj
def resume(ours: _Globals) -> None:
    """End a stop: the signing host signs again."""
    from hsmtoll.host.brake import resume, stop_file, stopped_by

    path = stop_file(ours.settings())
    was = resume(path)
    why = stopped_by(path)
    if why is not None:
        raise ConfigurationError(f"resume: still stopped: {why}", hint=f"look at {path.parent}")
    click.echo(f"resumed: {path}" if was else f"was not stopped: {path}")


@main.command(
    # What follows CMD is CMD's, options included.
    context_settings={"allow_interspersed_args": False},
    needs="the extra sandbox; SoftHSM for CMD; no device, network, settings",
    examples=(
        "hsmtoll sandbox -- hsmtoll test-auth road",
        "hsmtoll sandbox --port 8700 --env-file sandbox.env",
    ),
)
@click.option("--trust", multiple=True, type=_file, help="PEM with CA certificates to trust.")
@click.option("--client", "client_file", type=_file, help="Norwegian clients (TOML or JSON).")
@click.option("--env-file", type=_path, help="Where to write the variables to set.")
@click.option("--port", type=click.IntRange(0, 65533), default=0, metavar="N",
              help="Maskinporten on N, Customs on N+1, admin on N+2.")  # fmt: skip
@click.option("--rules", type=click.Choice(["strict-docs", "as-observed"]), default="strict-docs",
              help="As strict as documented, or as observed.")  # fmt: skip
@click.option("--identity", type=click.Choice(["eseal", "norwegian", "norwegian-key"]),
              default="eseal", help="The identity made for CMD.")  # fmt: skip
@click.option("--admin", is_flag=True, help="CMD gets the admin endpoint: faults, requests.")
@click.argument("command", nargs=-1, metavar="[-- CMD…]", type=click.UNPROCESSED)
def sandbox(
    *,
    trust: tuple[Path, ...],
    client_file: Path | None,
    env_file: Path | None,
    port: int,
    rules: Any,
    identity: str,
    admin: bool,
    command: tuple[str, ...],
) -> int:
    """
    Run a local Maskinporten and Customs, or a command against them.

    Without CMD it runs until interrupted and prints the variables to set. With CMD it makes a
    temporary SoftHSM device and an identity, runs CMD with all variables set, and exits with the
    code of CMD, 128+N if signal N ended it.
    """
    try:
        from hsmtoll.sandbox import server
    except ImportError as exc:
        raise UsageError(
            "sandbox: its server is not installed", hint=install_extra("sandbox")
        ) from exc
    from hsmtoll.app import keep_temporary_files_private

    keep_temporary_files_private()
    if command:
        from hsmtoll.testing.identity import run_as

        return run_as(
            identity,
            command,
            trust=trust,
            client_file=client_file,
            rules=rules,
            port=port,
            env_file=env_file,
            admin=admin,
        )
    return server.run(
        port=port,
        trust_files=trust,
        client_file=client_file,
        env_file=env_file,
        profile=rules,
    )


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


@main.command("help", needs="nothing", examples=("hsmtoll help token", "hsmtoll help key import"))
@click.argument("names", metavar="[COMMAND]...", nargs=-1, shell_complete=_commands)
@click.pass_context
def show_help(ctx: click.Context, *, names: tuple[str, ...]) -> None:
    """Show the help of a command."""
    click.echo(help_of(ctx, names))


def leave(code: int) -> NoReturn:
    """
    End the process with *code*, at once.

    Modules of vendors are known to crash in their own clean-up at exit, and one that hangs
    would keep the process: what had to be written is written.
    """
    _hang_up()
    if callable(signal.getsignal(signal.SIGTERM)):
        # There is nothing left to put away.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # What could not be written was told before, or there was nobody to tell.
        with contextlib.suppress(OSError, HsmTollError, _ReaderLeft):
            stream.flush()
    os._exit(code)
