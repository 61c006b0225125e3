"""
No secret shows: PIN, assertion, subject token and bearer, in whatever a person or a log can see.

Each search has its control: the same search finds the same secret where it is shown on purpose.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll import HsmTollError
from hsmtoll.app import App
from hsmtoll.settings import load
from hsmtoll.transport import HttpClient
from tests.kit.commands import hsmtoll

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hsmtoll.http_messages import HttpResponse, Post
    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.settings import Settings
    from hsmtoll.testing.softhsm import SoftHsm

FAULTS = (
    ("", ""),
    ("echo", "token"),
    ("echo", "exchange"),
    ("newline-token", "token"),
    ("newline-token", "exchange"),
    ("html", "token"),
    ("truncated", "exchange"),
    ("reset", "token"),
    ("500", "exchange"),
    ("redirect", "token"),
    ("429", "token"),
    ("401", "api"),
)


def shown(secret: str, where: str) -> bool:
    """Whether any run of 12 characters of *secret*, or a short secret itself, is in *where*."""
    size = min(12, len(secret))
    return any(secret[at : at + size] in where for at in range(len(secret) - size + 1))


class Listening(HttpClient):
    """The real wire, and a note of every secret that travels on it."""

    secrets: list[str]

    def post(self, post: Post) -> HttpResponse:
        self.secrets.append(post.secret)
        answer = super().post(post)
        if answer.status == 200 and b"access_token" in answer.body:
            self.secrets.append(answer.body.decode().split('"access_token": "')[-1].split('"')[0])
        return answer


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything that any logger says, of any library, at any level."""
    caplog.set_level(logging.DEBUG)
    for name in ("hsmtoll", "httpx", "httpcore", "asyncio", "filelock", "aiohttp"):
        caplog.set_level(logging.DEBUG, logger=name)
    return caplog


@pytest.fixture
def heard(toll_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[App, Any]]:
    """An app whose token requests are recorded."""
    app = App(toll_settings)
    http_client = Listening(ca_file=toll_settings.ca_file, timeout=5.0, deadline=10.0)
    http_client.secrets = []
    monkeypatch.setattr(app, "http_client", http_client)
    yield app, http_client
    app.close()


def text_of(exc: BaseException) -> str:
    """Everything that can be read off an error: text, hint, causes, and what it was made with."""
    return "".join(
        [
            *traceback.format_exception(exc),
            repr(exc),
            repr(vars(exc)),
            repr(exc.args),
            str(getattr(exc, "hint", "")),
        ]
    )


@pytest.mark.parametrize("fault", FAULTS, ids="-".join)
def test_neither_logs_nor_errors_show_a_secret(
    heard: tuple[App, Listening],
    records: pytest.LogCaptureFixture,
    toll_sandbox: Sandbox,
    toll_softhsm: SoftHsm,
    fault: tuple[str, str],
) -> None:
    app, http_client = heard
    if fault[0]:
        toll_sandbox.fault(*fault)
    words = ""
    try:
        client = app.client()
        token = client.token("road")
        words += repr(token) + str(token) + repr(client.status()) + repr(client)
        response = client.call("GET", "/api/movement/road/v2/test-auth")
        words += repr(response) + repr(response.request)
    except HsmTollError as exc:
        words += text_of(exc)
    finally:
        client.close()
    logged = "\n".join(
        f"{each.getMessage()} {each.args!r} {vars(each)!r}" for each in records.records
    )

    assert http_client.secrets
    for secret in (*http_client.secrets, toll_softhsm.pin):
        assert not shown(secret, words)
        assert not shown(secret, logged)
    # The control: the same search finds what is shown on purpose.
    logging.getLogger("hsmtoll.client").debug("%s", http_client.secrets[0])
    assert shown(http_client.secrets[0], records.text)


def test_values_that_hold_secrets_do_not_show_them(
    toll_settings: Settings, toll_softhsm: SoftHsm
) -> None:
    del toll_settings
    pin = toll_softhsm.pin
    made = load(hsm__pin=pin, hsm__pin_file=None)
    app = App(made)
    device = app.devices[0]

    for each in (
        made,
        made.hsm,
        app,
        device,
        app.hsm.pin(app.hsm.uris()[0]),
        toll_softhsm,
        vars(device),
    ):
        assert not shown(pin, repr(each) + str(each))
    assert made.hsm.pin is not None
    assert shown(pin, repr(made.hsm.pin.get_secret_value()))


def test_a_pin_cannot_be_pickled(toll_softhsm: SoftHsm) -> None:
    from hsmtoll.hsm.pin import PinValue

    with pytest.raises(TypeError):
        pickle.dumps(PinValue.of(toll_softhsm.pin).value)


COMMANDS = (
    ("token", "road"),
    ("token", "road", "--json"),
    ("sign", "road"),
    ("test-auth", "road"),
    ("chain",),
    ("objects",),
    ("objects", "--json"),
    ("doctor",),
    ("doctor", "--json"),
    ("doctor", "--online", "--scope", "road"),
    ("doctor", "--evidence"),
    ("token", "verksemd.eu"),
    ("token", "nonsense"),
    ("key", "jwk"),
    ("--help",),
)


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_no_command_shows_the_pin_or_more_than_it_was_asked_for(
    toll_settings: Settings, toll_softhsm: SoftHsm, argv: tuple[str, ...]
) -> None:
    del toll_settings
    done = hsmtoll("-vv", *argv)

    assert not shown(toll_softhsm.pin, done.stdout + done.stderr)
    assert "eyJ" not in done.stderr
    printing = argv[0] in ("token", "sign") and done.returncode == 0
    assert ("eyJ" in done.stdout) == printing
    if argv[0] == "token" and printing:
        # It is the bearer alone: neither the assertion nor Maskinporten's token.
        assert done.stdout.count("eyJ") <= 2


def test_a_pin_in_the_environment_reaches_no_child_and_no_argv(
    toll_settings: Settings, toll_softhsm: SoftHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del toll_settings
    seen = tmp_path / "seen"
    script = tmp_path / "pin-command"
    script.write_text(
        f"#!/bin/sh\nenv >{seen}\ncat /proc/$PPID/cmdline >>{seen}\ncat {toll_softhsm.pin_file}\n"
    )
    script.chmod(0o700)
    monkeypatch.setenv("HSMTOLL_HSM__PIN_FILE", "")
    monkeypatch.setenv("HSMTOLL_HSM__PIN_COMMAND", str(script))
    monkeypatch.setenv("HSMTOLL_ISS", "canary-in-the-environment")

    done = subprocess.run(
        [sys.executable, "-m", "hsmtoll", "sign", "road"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert "hsmtoll" in seen.read_text()
    assert not shown(toll_softhsm.pin, seen.read_text())
    assert "canary-in-the-environment" not in seen.read_text()
    assert "canary-in-the-environment" in str(os.environ)


def test_everything_that_is_written_is_for_its_owner_alone(
    toll_settings: Settings, toll_softhsm: SoftHsm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del toll_settings
    monkeypatch.setenv("HSMTOLL_CACHE", f"file://{tmp_path}/cache")
    monkeypatch.setenv("HSMTOLL_STATE", str(tmp_path / "state"))
    before = os.umask(0)
    try:
        App(load(), one_shot=True).client().token("road")
    finally:
        os.umask(before)

    files = [each for name in ("cache", "state") for each in (tmp_path / name).rglob("*")]
    assert any(each.suffix == ".json" for each in files)
    for each in (*files, tmp_path / "cache", tmp_path / "state"):
        assert each.stat().st_mode & 0o777 == (0o700 if each.is_dir() else 0o600), each
        if each.is_file():
            assert not shown(toll_softhsm.pin, each.read_text(errors="replace"))


def test_tasks_that_fail_show_no_secret_either(
    heard: tuple[App, Listening], records: pytest.LogCaptureFixture, toll_sandbox: Sandbox
) -> None:
    app, http_client = heard
    toll_sandbox.fault("echo", "token")

    async def several() -> list[BaseException]:
        client = app.aclient()
        done = await asyncio.gather(
            *(client.token("road") for _ in range(5)), return_exceptions=True
        )
        return [each for each in done if isinstance(each, BaseException)]

    failed = asyncio.run(several())

    assert len(failed) == 5
    assert http_client.secrets
    for secret in http_client.secrets:
        assert not any(shown(secret, text_of(each)) for each in failed)
        assert not shown(secret, records.text)
