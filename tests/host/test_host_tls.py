"""Who is who: certificates over TLS 1.3 and those taken back, accounts on the Unix socket."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.kit.signing_host import APP, ME, PROFILE, Authority, entry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.kit.signing_host import Identity, Reply, RunningHost


def turned_away(host: RunningHost, identity: Identity) -> bool:
    """Whether the handshake ends it, as the caller sees it."""
    try:
        host.ask_tls(identity)
    except (ssl.SSLError, OSError):
        return True
    return False


def s_client(host: RunningHost, *argv: str) -> str:
    """What openssl says of the door."""
    return subprocess.run(
        ["openssl", "s_client", "-connect", f"localhost:{host.tls_port}", "-CAfile",
         str(host.authority.ca), *argv],
        input="", capture_output=True, text=True, check=False, timeout=60,
    ).stdout  # fmt: skip


def test_it_speaks_tls_1_3_alone_and_resumes_nothing(running_host: RunningHost) -> None:
    mine = running_host.authority.issue(APP)
    own = ("-cert", str(mine.cert), "-key", str(mine.key))
    new = s_client(running_host, *own)
    assert "TLSv1.3" in new
    assert "Verify return code: 0 (ok)" in new
    # A ticket would spare the next handshake the look at the revocation list.
    assert "New Session Ticket" not in new
    assert "Cipher is (NONE)" in s_client(running_host, *own, "-tls1_2")


def test_nobody_comes_in_without_a_certificate_of_that_ca(
    running_host: RunningHost, make_host: Callable[..., RunningHost]
) -> None:
    other = make_host().authority.issue(APP)
    assert turned_away(running_host, other)
    # One that is good for a server is none of a caller's.
    assert turned_away(running_host, running_host.authority.issue(APP, server=True))
    assert running_host.records("intent", "refused") == []
    assert running_host.ask_tls(running_host.authority.issue(APP)).status == 200


def test_there_is_no_tcp_without_certificates_of_callers(
    make_host: Callable[..., RunningHost],
) -> None:
    result = make_host().run("serve", HSMTOLL_HOST__CLIENT_CA="")
    assert result.returncode == 10
    assert "HSMTOLL_HOST__CLIENT_CA: required" in result.stderr


def test_all_settings_that_the_host_lacks_are_named_at_once(
    make_host: Callable[..., RunningHost],
) -> None:
    lacking = ("POLICY", "AUDIT_DIR", "AUDIT_KEY", "CERT", "CLIENT_CA")
    result = make_host().run("serve", **{f"HSMTOLL_HOST__{name}": "" for name in lacking})
    assert result.returncode == 10
    first, *hints = result.stderr.splitlines()
    assert first.startswith("hsmtoll: setting-missing: HSMTOLL_HOST__POLICY, ")
    assert [hint.split(":")[1].strip() for hint in hints] == [f"HSMTOLL_HOST__{n}" for n in lacking]
    # Without an address there is no TLS that needs a certificate.
    none = ("SOCKET", "LISTEN", "CERT")
    result = make_host().run("serve", **{f"HSMTOLL_HOST__{name}": "" for name in none})
    assert "HSMTOLL_HOST__SOCKET: required, and not set" in result.stderr


def test_a_certificate_on_the_policys_list_is_refused_and_its_twin_is_not(
    running_host: RunningHost,
) -> None:
    stolen, twin = running_host.authority.issue(APP), running_host.authority.issue(APP)
    assert running_host.ask_tls(stolen).status == 200
    running_host.write_policy(
        entry(f"san:dns:{APP}"), before=f'revoked_sha256 = ["{stolen.sha256}"]\n{PROFILE}'
    )
    running_host.reload()

    before = running_host.signatures()
    reply = running_host.ask_tls(stolen)
    assert (reply.status, reply.word) == (403, "policy_denied")
    assert running_host.signatures() == before
    assert running_host.ask_tls(twin).status == 200


@pytest.mark.parametrize("beside", [True, False], ids=["in-the-ca-file", "in-its-own"])
def test_a_revocation_list_counts_from_the_next_handshake_on(
    make_host: Callable[..., RunningHost], *, beside: bool
) -> None:
    host = make_host()
    stolen, twin = host.authority.issue(APP), host.authority.issue(APP)
    crl = host.authority.crl()
    ca = host.home / "callers.pem"
    ca.write_bytes(host.authority.ca.read_bytes() + (crl.read_bytes() if beside else b""))
    if not beside:
        host.environ["HSMTOLL_HOST__CLIENT_CRL"] = str(crl)
    host.start(HSMTOLL_HOST__CLIENT_CA=str(ca))
    assert host.ask_tls(stolen).status == 200

    new = host.authority.crl(stolen).read_bytes()
    if beside:
        ca.write_bytes(host.authority.ca.read_bytes() + new)
    host.reload()
    assert turned_away(host, stolen)
    assert host.ask_tls(twin).status == 200

    # A list that has expired says nothing about anybody, so nobody comes in.
    old = host.authority.crl(days=-1).read_bytes()
    if beside:
        ca.write_bytes(host.authority.ca.read_bytes() + old)
    host.reload()
    assert turned_away(host, twin)


def test_each_ca_on_the_way_to_a_caller_is_looked_up_in_a_list(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    root = host.authority
    stolen = Authority(host.home / "below", below=root)
    theirs, other = stolen.issue(APP), root.issue(APP)
    lists = host.home / "lists.pem"

    def rejected(*crls: Path) -> tuple[bool, bool]:
        """Whether who is below the CA below, and who is not, is turned away."""
        lists.write_bytes(b"".join(each.read_bytes() for each in crls))
        if host.process is None:
            host.start(HSMTOLL_HOST__CLIENT_CRL=str(lists))
        else:
            host.reload()
        return turned_away(host, theirs), turned_away(host, other)

    assert rejected(root.crl(), stolen.crl()) == (False, False)
    assert rejected(root.crl(), stolen.crl(theirs)) == (True, False)
    # Its key makes new callers, who are on no list of its own.
    assert rejected(root.crl(stolen), stolen.crl()) == (True, False)
    # A list that is missing says nothing about anybody, which who runs the host has to hear.
    missing = "a client certificate was rejected (unable to get certificate CRL)"
    assert missing not in host.log()
    assert rejected(root.crl()) == (True, False)
    assert turned_away(host, theirs)
    assert host.log().count(missing) == 1
    assert rejected(root.crl(), stolen.crl()) == (False, False)


def test_a_stolen_certificate_gets_its_quota_and_nothing_after_it_nor_after_a_restart(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(entry(f"san:dns:{APP}", per_day=3))
    host.start()
    stolen = host.authority.issue(APP)

    def tried() -> list[tuple[int, str]]:
        asked: list[Reply] = [
            *(host.ask_tls(stolen) for _ in range(3)),
            host.ask_tls(stolen, scope="air"),
            host.ask_tls(stolen, profile="other"),
            host.ask_tls(stolen, consumer_org="987654325"),
        ]
        return [(each.status, each.word) for each in asked]

    denied = [(403, "policy_denied")] * 3
    assert tried() == [(200, "")] * 3 + denied
    assert tried() == [(429, "quota_exceeded")] * 3 + denied
    host.end(signal.SIGKILL)
    host.start()
    before = host.signatures()
    assert tried() == [(429, "quota_exceeded")] * 3 + denied
    assert host.signatures() == before
    assert len(host.records("intent")) == 3


@pytest.mark.needs_root
def test_an_account_of_another_namespace_is_refused_and_not_guessed(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(entry("uid:65534"), entry(f"uid:{os.geteuid()}"))
    host.start()
    host.open_to_all()
    before = host.signatures()
    for uid, gid in ((65534, 1000), (1000, 65534)):
        reply = host.as_account(uid, _REQUEST, gid=gid)
        assert b"403 Forbidden" in reply
        assert b"another user namespace" in reply
    assert host.signatures() == before
    assert host.records("refused")[0]["caller"] == "unknown"
    assert host.as_account(1000, _REQUEST).count(b"no caller entry matches") == 1
    assert host.ask().status == 200


@pytest.mark.needs_root
def test_two_entries_that_fit_are_both_named_and_neither_counts(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(entry("uid:1000"), entry("gid:1007"))
    host.start()
    host.open_to_all()
    reply = host.as_account(1000, _REQUEST, gid=1007)
    assert b"gid:1007, uid:1000" in reply
    assert b"200 OK" in host.as_account(1000, _REQUEST)
    assert b"200 OK" in host.as_account(1001, _REQUEST, gid=1007)
    assert [each["caller"] for each in host.records("intent")] == ["uid:1000", "gid:1007"]
    assert ME not in str(host.records("intent"))


_BODY = b'{"profile": "acme", "scope": "road"}'
_REQUEST = (
    b"POST /v1/grant HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nContent-Length: " + str(len(_BODY)).encode() + b"\r\n\r\n" + _BODY
)


@pytest.mark.parametrize("silent", [64, 600])
def test_connections_that_send_nothing_keep_nobody_out(
    running_host: RunningHost, silent: int
) -> None:
    mine = running_host.authority.issue(APP)
    with contextlib.ExitStack() as held:
        for _ in range(silent):
            address = ("localhost", running_host.tls_port)
            held.enter_context(socket.create_connection(address, timeout=60))
        assert running_host.ask_tls(mine).status == 200
        shown = running_host.health("/metrics").body["text"]
    dropped = re.search(
        r'^hsmtoll_host_connections_refused_total{reason="crowded"} ([0-9]+)', shown, re.MULTILINE
    )
    assert dropped is not None
    assert (int(dropped[1]) > 0) == (silent > 512)
    assert running_host.log().count("too many TLS handshakes at once") == (silent > 512)
