"""`hsmtoll health`: what a container's probe learns of a signing host."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from hsmtoll.errors import HsmTollError
from hsmtoll.host.probe import probe
from tests.kit.commands import hsmtoll
from tests.kit.own_device import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kit.signing_host import RunningHost

_METRICS = "HSMTOLL_HOST__METRICS"


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "[::1]:{}", "::1:{}"])
def test_a_host_that_runs_is_live_at_each_form_of_a_loopback_address(
    make_host: Callable[..., RunningHost], form: str
) -> None:
    host, where = make_host(), form.format(free_port())
    host.environ[_METRICS] = where
    host.start()
    output = host.command("health")
    assert (output.returncode, output.stdout, output.stderr) == (0, "live\n", "")
    assert host.command("health", "--ready").stdout == "ready\n"
    # The control: after its end nobody answers.
    assert host.end() == 0
    output = host.command("health")
    assert (output.returncode, output.stdout) == (1, "")
    assert output.stderr.startswith(f"hsmtoll: not-live: {where}: nobody answers (")


@pytest.mark.parametrize("form", ["0.0.0.0:{}", "[::]:{}", ":::{}"])
def test_a_host_that_listens_on_all_addresses_is_asked_on_the_loopback(
    make_host: Callable[..., RunningHost], form: str
) -> None:
    host = make_host()
    host.environ |= {_METRICS: form.format(free_port()), "HSMTOLL_HOST__METRICS_PUBLIC": "true"}
    output = host.start().command("health")
    assert (output.returncode, output.stdout, output.stderr) == (0, "live\n", "")


def test_a_host_is_asked_at_its_unix_socket_with_nothing_but_the_address(
    running_host: RunningHost,
) -> None:
    bare = {_METRICS: running_host.environ[_METRICS]}
    assert hsmtoll("health", env=bare).stdout == "live\n"
    assert running_host.faults.count("C_Login") == 1  # the host's own


def test_a_stopped_host_is_live_and_not_ready_and_the_reason_is_told(
    running_host: RunningHost,
) -> None:
    running_host.stop_file.touch()
    assert running_host.command("health").returncode == 0
    output = running_host.command("health", "--ready")
    assert output.returncode == 1
    line, hint = output.stderr.splitlines()
    assert line.startswith("hsmtoll: not-ready: unix://")
    assert line.endswith(": stopped: the stop file is there")
    assert hint.startswith("hint: ")
    running_host.stop_file.unlink()
    assert running_host.command("health", "--ready").returncode == 0


def test_without_an_address_the_setting_is_named() -> None:
    output = hsmtoll("health", env={})
    assert output.returncode == 10
    assert output.stderr.startswith("hsmtoll: setting-missing: HSMTOLL_HOST__METRICS: required")


@pytest.mark.parametrize("where", ["9464", "localhost", ":9464", "127.0.0.1:99999", "unix://"])
def test_what_is_no_address_is_refused_as_the_host_refuses_it(where: str) -> None:
    output = hsmtoll("health", env={_METRICS: where})
    assert output.returncode in (1, 10)
    assert _METRICS in output.stderr
    assert "Traceback" not in output.stderr


@pytest.fixture
def other() -> Iterator[Callable[[bytes], str]]:
    """Another program that listens, by what it answers; its address."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answering(answer: bytes) -> str:
        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{listening.getsockname()[1]}"

    yield answering
    listening.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-other\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 503 No\r\nContent-Length: 14\r\n\r\n{"why": "text"',
    ],
)
def test_another_program_at_the_address_is_not_taken_for_the_host(
    other: Callable[[bytes], str], answer: bytes
) -> None:
    with pytest.raises(HsmTollError) as refused:
        probe(other(answer), _METRICS, "ready")
    assert (refused.value.code, refused.value.exit_code) == ("not-ready", 1)


def test_a_reason_cannot_begin_a_line_of_its_own(other: Callable[[bytes], str]) -> None:
    body = rb'{"ready": false, "why": ["first\nhsmtoll: forged \u001b[2J", 7]}'
    head = b"HTTP/1.1 503 No\r\nContent-Length: %d\r\n\r\n" % len(body)
    with pytest.raises(HsmTollError) as refused:
        probe(other(head + body), _METRICS, "ready")
    assert str(refused.value).isprintable()
    assert "first" in str(refused.value)
