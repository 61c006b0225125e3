"""Calls to the Customs APIs: `hsmtoll test-auth`, `call`, `submit`, `upload` and `routing`."""

from __future__ import annotations

import contextlib
import math
import re
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hsmtoll import apis as catalogue
from hsmtoll.cli.framework import File, command, completion_of, starting_with
from hsmtoll.cli.input import check_json, read_body, read_message
from hsmtoll.cli.log import say
from hsmtoll.cli.options import (
    NEEDS_ACCESS,
    PATH,
    GlobalOptions,
    as_json_option,
    final_try_option,
    for_whom,
    scope_argument,
    scope_option,
)
from hsmtoll.cli.streams import after_sending, print_result, to_json
from hsmtoll.customs.errors import SAFE, check
from hsmtoll.customs.routing import Marker, marker_of
from hsmtoll.customs.submissions import LEVELS
from hsmtoll.customs.uploads import DOCUMENT_TYPES
from hsmtoll.errors import ExchangeRefused, NetworkError, UsageError, sanitized

if TYPE_CHECKING:
    from hsmtoll.app import App
    from hsmtoll.token import ForWhom

__all__ = ["call", "routing", "submit", "test_auth", "upload"]

#: A token, the form of method and header names (RFC 9110 section 5.6.2).
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

#: Characters; RFC 9110 section 4.1 asks servers for no more than 8,000.
_MAX_PATH: Final = 8_000


def _complete_levels(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    return starting_with(incomplete, LEVELS.get(ctx.params.get("api") or "", ()))


def _complete_methods(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    return starting_with(incomplete.upper(), ("GET", "POST", "PUT", "PATCH", "DELETE"))


_complete_paths: Final = completion_of(api.base for api in catalogue.APIS if api.base)
#: Without names with blanks: shells differ in how they quote such completions.
_complete_document_types: Final = completion_of(kind for kind in DOCUMENT_TYPES if " " not in kind)


@command(
    "test-auth",
    needs=NEEDS_ACCESS,
    examples=("hsmtoll test-auth road", "hsmtoll test-auth verksemd.eu"),
)
@scope_argument
@as_json_option
@final_try_option
@click.pass_obj
def test_auth(options: GlobalOptions, *, scope: str | None, as_json: bool) -> None:
    """
    Get a token, make the API's test call and print its status.

    Success is 200. API is one of `hsmtoll apis`; HSMTOLL_SCOPE where none is given.
    """
    app = options.app()
    # Without an argument: the default scope, or an error, as for `token`.
    word = scope or app.settings.scope
    api = _test_api(word or app.token_service.request(None).scope)
    with app.client() as client:
        if api.name == "verksemd.eu":
            try:
                client.token(api.name)
            except ExchangeRefused as exc:
                if exc.code != "self-test":
                    raise
                print_result(
                    {"api": api.name, "granted": catalogue.SELF_TEST_SCOPE},
                    f"granted {catalogue.SELF_TEST_SCOPE}",
                    as_json=as_json,
                )
                say(str(exc))
            return
        if api.test is None:
            raise UsageError(
                f"API {api.name}: no test call is documented for it",
                hint="`hsmtoll test-auth road` proves key, certificate and both services",
            )
        if api.test_seen:
            say(f"the test call of {api.name} is not documented; a public client names it")
        response = client.call("GET", f"{api.base}{api.test}")
        _checked(response, api, app)
        if response.status_code != 200:
            raise NetworkError(
                f"API {api.name}: {response.status_code}, where its test call answers 200",
                hint="a proxy or gateway may have answered: check HSMTOLL_PROXY and the endpoints",
            )
        print_result({"api": api.name, "status": 200}, "200 OK", as_json=as_json)


def _test_api(word: str) -> catalogue.Api:
    if ":" not in word:
        return catalogue.named(word)
    found = [api for api in catalogue.APIS if word in (api.norwegian, api.eseal)]
    if not found:
        raise UsageError(f"scope {sanitized(word)}: no API of the Customs guide has it")
    return found[0]


def _checked(response: Any, api: catalogue.Api, app: App) -> None:
    check(response, api, now=app.clock.now().wall)


@command(
    needs=NEEDS_ACCESS,
    examples=(
        "hsmtoll call GET /api/movement/road/v2/test-auth -i",
        "hsmtoll call POST /api/movement/road/v2/transport --json-data @transport.json",
    ),
)
@click.argument("method", shell_complete=_complete_methods)
@click.argument("path", shell_complete=_complete_paths)
@click.option("--data", metavar="@F", help="Body: text, or @FILE, or @- for stdin.")
@click.option("--json-data", metavar="@F", help="The same, sent as application/json.")
@click.option("-i", "--include", is_flag=True, help="Print status and headers before the body.")
@click.option(
    "--header", "headers", multiple=True, metavar="H", help="NAME: VALUE; may be repeated."
)
@scope_option
@for_whom
@final_try_option
@click.pass_obj
def call(
    options: GlobalOptions,
    *,
    method: str,
    path: str,
    data: str | None,
    json_data: str | None,
    include: bool,
    headers: tuple[str, ...],
    scope: str | None,
    whom: ForWhom,
) -> None:
    """
    Make one API call and print the body of the answer.

    PATH is below Customs' host and decides the scope; `hsmtoll apis` lists the base paths. With
    --scope, PATH may be one that is not listed.
    """
    if data is not None and json_data is not None:
        raise UsageError("--data and --json-data: one body at a time")
    if not _TOKEN.fullmatch(method):
        raise UsageError(f"method {sanitized(method)}: a word such as GET is expected")
    api = catalogue.at(path) if scope else catalogue.api_of_path(path)
    if not path.isprintable() or len(path) > _MAX_PATH:
        raise UsageError(
            f"path {sanitized(path)}: printable characters are expected, {_MAX_PATH} at most"
        )
    sent = [_header(line) for line in headers]
    body = data if json_data is None else json_data
    content = None if body is None else read_body(body)
    if json_data is not None:
        check_json(content or b"", "--json-data: the body", json_data)
        sent.append(("Content-Type", "application/json"))
    app = options.app()
    with app.client() as client:
        response = client.call(
            method.upper(), path, scope=scope, **whom, content=content, headers=sent
        )
    asked = method.upper() in SAFE
    with contextlib.nullcontext() if asked else after_sending(f"call to {api.name}"):
        try:
            if include:
                click.echo(_head(response))
                sys.stdout.flush()
            sys.stdout.buffer.write(response.content)
            sys.stdout.buffer.flush()
        finally:
            # Raise Customs' error even if the body could not be written.
            _checked(response, api, app)
        if not response.content and not include:
            say(f"{_status(response)}: the body of the answer is empty")


def _status(response: Any) -> str:
    return f"{response.status_code} {sanitized(response.reason_phrase)}".rstrip()


def _head(response: Any) -> str:
    lines = [f"{sanitized(response.http_version)} {_status(response)}"]
    lines += [
        f"{sanitized(name)}: {sanitized(value)}" for name, value in response.headers.multi_items()
    ]
    return "\n".join([*lines, ""])


#: Headers that a user may not set: credentials, routing and framing of the request.
_FORBIDDEN_HEADERS: Final = (
    "authorization",
    "host",
    "cookie",
    "content-length",
    "transfer-encoding",
)


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    name = name.strip()
    if not colon or not _TOKEN.fullmatch(name) or not line.isprintable() or not line.isascii():
        raise UsageError("--header: NAME: VALUE is expected, in ASCII")
    if name.lower() in _FORBIDDEN_HEADERS:
        raise UsageError(f"--header {name}: cannot be set")
    return name, value.strip()


@command(
    needs=NEEDS_ACCESS,
    examples=(
        "hsmtoll submit road POST transport transport.json",
        "hsmtoll submit road PUT transport t.json --mrn 26NO4TU2HUD59UCBT8 --json",
    ),
)
@click.argument("api", shell_complete=completion_of(LEVELS))
@click.argument("method", shell_complete=_complete_methods)
@click.argument("level", shell_complete=_complete_levels)
@click.argument("message", metavar="[FILE]", required=False, type=File())
@click.option("--mrn", metavar="M", help="What is changed or deleted, for PUT and DELETE.")
@click.option("--timeout", type=click.FloatRange(min=0, max=86_400), default=120.0, metavar="S",
              show_default=True, help="Seconds to wait for the result.")  # fmt: skip
@as_json_option
@scope_option
@for_whom
@final_try_option
@click.pass_obj
def submit(
    options: GlobalOptions,
    *,
    api: str,
    method: str,
    level: str,
    message: str | None,
    mrn: str | None,
    timeout: float,
    as_json: bool,
    scope: str | None,
    whom: ForWhom,
) -> None:
    """
    Submit a message and wait for its result: SUCCESS and the MRN.

    The message (JSON) is in FILE, also written @FILE, or on stdin; text that begins with { is the
    message itself. METHOD is POST, PUT or DELETE; LEVEL is transport, master-consignment,
    house-consignment, relation or another that the API has.
    """
    if not math.isfinite(timeout):
        raise UsageError(f"--timeout {timeout}: seconds are expected")
    parsed = read_message(message)
    app = options.app()
    with app.client() as client:
        receipt = client.submit(
            api,
            method.upper(),
            level,
            json=parsed,
            mrn=mrn,
            timeout=timeout,
            scope=scope,
            **whom,
            # Printed before polling, so that the user can query the result after an interruption.
            accepted=lambda request_id: say(f"accepted, requestId {request_id}"),
            waiting=_waiting,
        )
    with after_sending(f"submission {receipt.request_id}"):
        print_result(
            {"result": "SUCCESS", "request_id": receipt.request_id, "mrn": receipt.mrn},
            f"SUCCESS {sanitized(receipt.mrn)}" if receipt.mrn else "SUCCESS",
            as_json=as_json,
        )


def _waiting(seconds: float) -> None:
    """Show progress in one line that is overwritten; only on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\rhsmtoll: waiting for the result, {seconds:.0f} s ")
        sys.stderr.flush()


@command(
    needs=NEEDS_ACCESS,
    examples=("hsmtoll upload 123456789-01092026-1 invoice.pdf --type invoice",),
)
@click.argument("declaration_id")
@click.argument("file", type=File())
@click.option("--type", "kind", required=True, metavar="T", shell_complete=_complete_document_types,
              help="invoice, permits, waybill, …")  # fmt: skip
@as_json_option
@final_try_option
@click.pass_obj
def upload(
    options: GlobalOptions,
    *,
    declaration_id: str,
    file: str,
    kind: str,
    as_json: bool,
) -> None:
    """
    Upload a document to a declaration.

    FILE may be written @FILE as well. Type, ending and size are checked before anything is sent.
    """
    file = file.removeprefix("@")
    _check_file(file)
    app = options.app()
    with app.client() as client:
        receipt = client.upload(declaration_id, file, document_type=kind)
    say(f"uploaded {sanitized(Path(file).name)} to {declaration_id}")
    if as_json or receipt.body:
        with after_sending(f"upload of {sanitized(Path(file).name)}"):
            print_result(
                {"declaration_id": declaration_id, "type": kind, "answer": receipt.body},
                to_json(receipt.body, indent=None),
                as_json=as_json,
            )


@command(
    needs=NEEDS_ACCESS,
    examples=("hsmtoll routing --marker routing.marker", "hsmtoll routing --limit 10"),
)
@click.option("--marker", type=PATH, metavar="FILE", help="Position in the feed: read and updated.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Signals at most.")
@click.option("--level", type=click.Choice(["house-consignment", "transport"]),
              default="house-consignment", help="Default: house-consignment.")  # fmt: skip
@final_try_option
@click.pass_obj
def routing(
    options: GlobalOptions,
    *,
    marker: Path | None,
    limit: int | None,
    level: str,
) -> None:
    """
    Print the routing feed, one JSON line a signal.

    With --marker, FILE holds how far the feed was read. It is written after the signals were
    printed: after a kill, the next run prints some of them again and leaves none out.
    """
    app = options.app()
    left = limit
    with app.client() as client:
        for batch in client.routing(marker, level=level):
            taken = batch if left is None else batch[:left]
            for each in taken:
                sys.stdout.write(f"{to_json(each, indent=None)}\n")
            # The marker is saved when the next batch is requested.
            sys.stdout.flush()
            if left is not None:
                left -= len(taken)
                if left == 0:
                    last = marker_of(taken[-1])
                    if last is not None:
                        Marker(marker).write(last)
                    return


def _check_file(file: str) -> None:
    """UsageError for an unprintable name, or if not a regular file: a pipe could block for ever."""
    if not Path(file).name.isprintable():
        raise UsageError(f"upload of {sanitized(file)}: the name has unprintable characters")
    # An OSError is reported when the file is opened.
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(Path(file).stat().st_mode):
            raise UsageError(f"upload of {sanitized(file)}: not a regular file")
