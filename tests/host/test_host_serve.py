"""The signing host from its socket to its device: who gets what, what it costs, what is written."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import re
import resource
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jws as judge
from joserfc.jwk import RSAKey

from tests.host.conftest import ME, OTHER, RunningHost, entry, eventually, raw_request
from tests.kit.signing_host import PROFILE, Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.identity import TemporaryIdentity

JSON = {"content-type": "application/json"}


def test_a_grant_is_the_hosts_own_and_a_library_of_others_verifies_it(
    running_host: RunningHost, toll_sandbox: Sandbox
) -> None:
    before = running_host.signatures()
    reply = running_host.ask()

    assert reply.status == 200
    assert running_host.signatures() == before + 1
    header = json.loads(base64.urlsafe_b64decode(reply.body["assertion"].split(".")[0] + "=="))
    leaf = x509.load_der_x509_certificate(base64.b64decode(header["x5c"][0]))
    pem = leaf.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    # Its default knows no chains in a header.
    registry = judge.JWSRegistry(algorithms=["RS256"])
    registry.max_header_length = 16_384
    key = RSAKey.import_key(pem)
    token = judge.deserialize_compact(reply.body["assertion"], key, registry=registry)
    claims = json.loads(token.payload)
    assert claims["aud"] == toll_sandbox.issuer
    assert claims["scope"] == "toll:eu/movement/road/v2"
    assert claims["jti"] == reply.body["jti"]
    assert 0 < reply.body["expires_in"] <= claims["exp"] - claims["iat"] <= 120
    (intent,), (result,) = running_host.records("intent"), running_host.records("result")
    assert intent["seq"] < result["seq"] == reply.body["audit"]["seq"]
    assert (intent["caller"], intent["profile"], intent["jti"]) == (ME, "acme", claims["jti"])
    assert result["outcome"] == "signed"


def test_a_token_is_signed_for_once_and_each_release_is_written_down(
    running_host: RunningHost,
) -> None:
    before = running_host.signatures()
    replies = [running_host.ask("/v1/token") for _ in range(5)]

    assert {reply.status for reply in replies} == {200}
    assert len({reply.body["access_token"] for reply in replies}) == 1
    assert running_host.signatures() == before + 1
    assert len(running_host.records("intent")) == 1
    released = running_host.records("release")
    assert [each["seq"] for each in released] == [r.body["audit"]["seq"] for r in replies]
    text = "".join(part.read_text() for part in running_host.audit.glob("*.jsonl"))
    assert replies[0].body["access_token"] not in text + running_host.log()


@pytest.mark.parametrize(
    ("members", "twin", "status", "error"),
    [
        ({"scope": "air"}, {"scope": "road"}, 403, "policy_denied"),
        ({"profile": "other"}, {"profile": "acme"}, 403, "policy_denied"),
        ({"consumer_org": "987654325"}, {"consumer_org": None}, 403, "policy_denied"),
        ({"resource": "https://x/"}, {"resource": None}, 403, "policy_denied"),
        ({"claims": {"iss": "me"}}, {}, 400, "bad_request"),
        ({"digest": "AAAA"}, {}, 400, "bad_request"),
        ({"scope": 7}, {"scope": "road"}, 400, "bad_request"),
        ({"scope": "road\n"}, {"scope": "road"}, 400, "bad_request"),
        ({"resource": "x" * 17_000}, {"resource": None}, 413, "too_large"),
    ],
)  # fmt: skip
def test_a_refusal_never_asks_the_device_and_its_twin_costs_one_signature(
    running_host: RunningHost,
    members: dict[str, Any],
    twin: dict[str, Any],
    status: int,
    error: str,
) -> None:
    before = running_host.signatures()
    refused = running_host.ask(**members)

    assert (refused.status, refused.body["error"]) == (status, error)
    assert set(refused.body) == {"error", "error_description", "hint"}
    assert running_host.signatures() == before
    assert running_host.records("intent") == []
    assert running_host.ask(**twin).status == 200
    assert running_host.signatures() == before + 1


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/v1/grant", {}, 405),
        ("POST", "/v1/sign", {"json": {}}, 404),
        ("POST", "/v1/grant?x=1", {"json": {}}, 404),
        ("POST", "/metrics", {"json": {}}, 404),
        ("POST", "/v1/grant", {"content": b"{}"}, 415),
        ("POST", "/v1/grant", {"data": {"profile": "acme"}}, 415),
        ("POST", "/v1/grant", {"content": b"[", "headers": JSON}, 400),
        ("POST", "/v1/grant", {"content": b'{"scope":"a","scope":"b"}', "headers": JSON}, 400),
    ],
)  # fmt: skip
def test_what_is_no_request_is_turned_away_before_anything_else(
    running_host: RunningHost, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    before = running_host.signatures(), len(running_host.records())
    assert running_host.send(method, path, **options).status == status
    assert (running_host.signatures(), len(running_host.records())) == before


@pytest.mark.needs_root
def test_another_account_gets_what_its_own_entry_says(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(entry(ME), entry(f"uid:{OTHER}", scopes=["air"]))
    host.start()
    host.open_to_all()

    assert b"403 Forbidden" in host.as_account(OTHER, raw_request(scope="road"))
    assert b"200 OK" in host.as_account(OTHER, raw_request(scope="air"))
    assert host.ask(scope="air").status == 403
    assert [each["caller"] for each in host.records("intent")] == [f"uid:{OTHER}"]


@pytest.mark.needs_root
def test_the_socket_is_closed_to_others_from_its_first_moment(running_host: RunningHost) -> None:
    assert running_host.socket.stat().st_mode & 0o777 == 0o660
    assert running_host.as_account(OTHER, raw_request()) == b""


@pytest.mark.needs_root
def test_half_requests_of_one_account_do_not_keep_another_waiting(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(entry(ME), entry(f"uid:{OTHER}"))
    host.start()
    host.open_to_all()
    held = []
    for _ in range(64):
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(host.socket))
        one.sendall(b"POST /v1/grant HTTP/1.1\r\n")
        held.append(one)

    assert b"200 OK" in host.as_account(OTHER, raw_request())
    # Half a request is cut off by itself.
    for one in held:
        one.settimeout(60)
        while one.recv(65536):
            pass
        one.close()
    assert host.ask().status == 200


def test_fifty_at_once_with_six_a_minute_are_six_intents(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(entry(ME, per_minute=6))
    host.start()
    before = host.signatures()

    def one(_: int) -> int:
        return host.ask().status

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        codes = list(pool.map(one, range(50)))
    assert (codes.count(200), codes.count(429)) == (6, 44)
    assert len(host.records("intent")) == 6
    assert host.signatures() == before + 6

    # A restart forgets nothing.
    assert host.end() == 0
    host.start()
    after = host.signatures()
    reply = host.ask()
    assert (reply.status, int(reply.headers["retry-after"]) > 0) == (429, True)
    assert host.signatures() == after


def test_stop_is_effective_at_once_and_without_a_restart(running_host: RunningHost) -> None:
    assert running_host.ask("/v1/token").status == 200
    before = running_host.signatures()
    assert running_host.run("stop").returncode == 0

    for path in ("/v1/grant", "/v1/token"):
        reply = running_host.ask(path)
        assert (reply.status, reply.body["error"]) == (403, "stopped")
    assert running_host.signatures() == before
    eventually(lambda: running_host.health("/ready").status == 503)
    assert running_host.run("resume").returncode == 0
    assert running_host.ask().status == 200


@pytest.mark.needs_root
def test_stop_while_twenty_wait_hands_out_nothing_more_not_even_what_is_being_signed(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(*(entry(f"uid:{OTHER + n}") for n in range(20)))
    host.start()
    host.open_to_all()
    before = host.signatures()
    # The first one holds the device until it is let go of, however slow this machine is.
    host.faults.set("hang")
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(host.as_account, OTHER + n, raw_request()) for n in range(20)]
        eventually(lambda: host.signatures() > before)
        assert host.run("stop").returncode == 0
        host.faults.clear()
        replies = [each.result() for each in asked]

    assert sum(b"200 OK" in each for each in replies) == 0
    assert host.signatures() == before + 1
    assert sum(b'"stopped"' in each for each in replies) == 20
    results = [each["outcome"] for each in host.records("result")]
    assert results.count("signed, and withheld: stopped") == 1


def test_who_leaves_while_it_is_signed_for_leaves_a_result_in_the_audit(
    running_host: RunningHost,
) -> None:
    running_host.faults.set("hang")
    before = running_host.faults.count("C_SignInit")
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(str(running_host.socket))
        one.sendall(raw_request())
        eventually(lambda: running_host.faults.count("C_SignInit") > before)
    # The host sees that the connection is closed, and only then the device answers.
    eventually(lambda: running_host.ask(scope="air").status == 403)
    assert running_host.records("result") == []
    running_host.faults.clear()
    eventually(lambda: running_host.records("result"))
    (intent,), (result,) = running_host.records("intent"), running_host.records("result")
    assert (result["jti"], result["outcome"]) == (intent["jti"], "signed")


def test_a_device_that_hangs_keeps_no_other_profile_waiting(
    make_host: Callable[..., RunningHost], toll_eseal: TemporaryIdentity
) -> None:
    host = make_host()
    module = toll_eseal.environ()["HSMTOLL_HSM__MODULE"]
    second = f'{PROFILE.replace("acme", "second")}[profile.second.hsm]\nmodule = "{module}"\n'
    allowed = 'scopes = ["road"], mode = ["grant"]'
    host.write_policy(
        f'[caller."{ME}"]',
        f"profile.acme = {{ {allowed} }}\nprofile.second = {{ {allowed} }}",
        before=PROFILE + second,
    )
    host.start()
    host.faults.set("hang")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(host.ask) for _ in range(4)]
        eventually(lambda: host.records("intent"))
        assert [host.ask(profile="second").status for _ in range(3)] == [200] * 3
        assert host.health("/ready").status == 200
        assert not any(each.done() for each in asked)
        host.faults.clear()
        assert [each.result().status for each in asked] == [200] * 4


def test_a_directory_of_the_stop_file_that_is_gone_means_stopped(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    (host.home / "away").mkdir()
    host.start(HSMTOLL_HOST__STOP_FILE=str(host.home / "away" / "stop"))
    assert host.ask().status == 200
    (host.home / "away").rmdir()
    reply = host.ask()
    assert (reply.status, reply.body["error"]) == (403, "stopped")


def test_a_new_policy_counts_after_sighup_and_a_broken_one_never(
    running_host: RunningHost,
) -> None:
    assert running_host.process is not None
    running_host.write_policy(entry(ME, scopes=["air"]))
    running_host.process.send_signal(signal.SIGHUP)
    eventually(lambda: running_host.ask(scope="air").status == 200)
    assert running_host.ask(scope="road").status == 403

    running_host.policy.write_text("[caller")
    running_host.process.send_signal(signal.SIGHUP)
    eventually(lambda: "old one stays in force" in running_host.log())
    assert running_host.ask(scope="air").status == 200
    outcomes = [each["outcome"] for each in running_host.records("policy")]
    assert outcomes[0] == "loaded"
    assert outcomes[1].startswith("kept: ")


def test_killed_between_intent_and_result_the_audit_shows_it(running_host: RunningHost) -> None:
    running_host.faults.set("hang")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running_host.ask)
        eventually(lambda: running_host.records("intent"))
        running_host.end(signal.SIGKILL)
        assert asked.exception(60) is not None
    running_host.faults.clear()

    result = running_host.run("audit", "verify", "--public-key", str(running_host.public_key),
                            str(running_host.audit))  # fmt: skip
    seq = running_host.records("intent")[0]["seq"]
    assert result.returncode == 0
    assert f"intent without a result: record {seq}" in result.stdout
    # And it goes on from there.
    running_host.start()
    assert running_host.ask().status == 200


def test_an_audit_that_cannot_be_written_means_that_nothing_is_signed(
    running_host: RunningHost,
) -> None:
    assert running_host.process is not None
    before = running_host.signatures()
    size = max(part.stat().st_size for part in running_host.audit.glob("audit-*.jsonl"))
    resource.prlimit(running_host.process.pid, resource.RLIMIT_FSIZE, (size + 10, size + 10))

    reply = running_host.ask()
    assert (reply.status, reply.body["error"]) == (503, "audit_broken")
    assert running_host.signatures() == before
    assert running_host.health("/ready").status == 503


def test_a_change_of_any_record_is_named_by_the_command(running_host: RunningHost) -> None:
    heads = [running_host.ask().body["audit"] for _ in range(3)]
    assert running_host.end() == 0
    (part,) = running_host.audit.glob("audit-*.jsonl")
    whole = part.read_bytes()
    lines = whole.splitlines(keepends=True)
    argv = ("audit", "verify", "--public-key", str(running_host.public_key))

    result = json.loads(running_host.run(*argv, str(running_host.audit), "--json").stdout)
    assert (result["schema"], result["records"], result["open_intents"]) == (1, len(lines), [])
    assert running_host.run(*argv, str(running_host.audit)).returncode == 0
    for at in range(len(lines)):
        changed = lines[at].replace(b'"', b"'", 1)
        for ruined in (
            [*lines[:at], changed, *lines[at + 1 :]],
            [*lines[:at], *lines[at + 1 :]],
        ):
            part.write_bytes(b"".join(ruined))
            result = running_host.run(*argv, str(running_host.audit))
            assert result.returncode == 91, (at, result.stdout)
            assert f"record {at + 1}" in result.stderr or f"record {at + 2}" in result.stderr
            # The start is sealed at once, all else at the end.
            certain = "no record is" if at == 0 else "up to record 1 all is"
            assert f"{certain} certain to be as it was written" in result.stderr
    part.write_bytes(whole)
    head = f"{heads[0]['seq']}:{heads[0]['head']}"
    assert running_host.run(*argv, "--head", head, str(running_host.audit)).returncode == 0
    wrong = f"{heads[0]['seq']}:{heads[1]['head']}"
    assert running_host.run(*argv, "--head", wrong, str(running_host.audit)).returncode == 91
    (running_host.audit / "checkpoints.jsonl").unlink()
    result = running_host.run(*argv, str(running_host.audit))
    assert (result.returncode, "record 1: no checkpoint" in result.stderr) == (91, True)
    # The host noted its last one elsewhere.
    result = running_host.run("serve")
    assert (result.returncode, "was noted, is not there" in result.stderr) == (91, True)


def test_a_device_that_is_down_is_a_503_and_comes_back_by_itself(
    running_host: RunningHost,
) -> None:
    running_host.faults.set("token-removed")
    reply = running_host.ask()
    assert (reply.status, reply.body["error"]) == (503, "device_down")
    assert int(reply.headers["retry-after"]) > 0
    running_host.faults.clear()
    eventually(lambda: running_host.ask().status == 200, 120)
    assert running_host.faults.count("C_Login") <= 4


def test_what_is_being_signed_is_finished_at_the_end(running_host: RunningHost) -> None:
    running_host.faults.set("slow", ms=1500)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running_host.ask)
        eventually(lambda: running_host.records("intent"))
        assert running_host.end(signal.SIGTERM) == 0
        assert asked.result(60).status == 200
    running_host.faults.clear()
    assert [each["outcome"] for each in running_host.records("result")] == ["signed"]
    assert not running_host.socket.exists()


def test_secrets_are_in_no_log_no_audit_and_no_page(
    running_host: RunningHost, toll_eseal: Any
) -> None:
    grant = running_host.ask().body["assertion"]
    token = running_host.ask("/v1/token").body["access_token"]
    pages = [running_host.health(page).body for page in ("/live", "/ready", "/metrics")]
    kept = b"".join(part.read_bytes() for part in running_host.audit.iterdir() if part.is_file())
    everything = running_host.log() + repr(pages) + kept.decode("utf-8", "replace")

    for secret in (toll_eseal.device.pin, grant, grant.rpartition(".")[2], token):
        assert secret not in everything
    # The control: what may be there is.
    assert running_host.records("result")[0]["jti"] in everything


def test_the_pages_for_those_who_watch(running_host: RunningHost) -> None:
    assert running_host.health("/live").body == {"live": True}
    assert running_host.health("/ready").body == {"ready": True, "why": []}
    assert "hsmtoll_host_signatures_total" in running_host.health("/metrics").body["text"]
    assert running_host.health("/v1/grant").status == 404


def without_values(reply: Reply) -> object:
    """The body; of metrics, which change with each look, the descriptions."""
    return (
        re.findall("^# .*$", reply.body["text"], re.MULTILINE)
        if "text" in reply.body
        else (reply.body)
    )


@pytest.mark.parametrize("page", ["/live", "/ready", "/metrics"])
def test_probes_and_prometheus_get_their_pages_as_they_ask_for_them(
    running_host: RunningHost, page: str
) -> None:
    plain = running_host.health(page)
    asked = running_host.health(f"{page}?name[]=hsmtoll_host_ready&x")
    assert (asked.status, without_values(asked)) == (plain.status, without_values(plain))
    head = running_host.health(page, "HEAD")
    assert (head.status, head.body) == (200, {"text": ""})
    assert head.headers["content-type"] == plain.headers["content-type"]
    assert int(head.headers["content-length"]) > 0
    # The control: nothing else is a way to ask.
    wrong = running_host.health(page, "POST")
    assert (wrong.status, wrong.headers["allow"]) == (405, "GET, HEAD")
    assert running_host.health(f"{page}/").status == 404


def test_no_reply_names_a_version_of_software(running_host: RunningHost) -> None:
    replies = [
        running_host.ask(),
        running_host.ask(scope="air"),
        running_host.send("GET", "/v1/grant"),
        running_host.send("POST", "/v1/grant", headers={"X": "y" * 9000}),
        *(running_host.health(page) for page in ("/live", "/metrics", "/none")),
    ]
    assert [each.status for each in replies] == [200, 403, 405, 400, 200, 200, 404]
    assert {each.headers["server"] for each in replies} == {"hsmtoll"}
    headers = repr([each.headers for each in replies]).lower()
    assert not any(name in headers for name in ("aiohttp", "python"))


@pytest.mark.parametrize(
    ("broken", "code", "words"),
    [
        ("policy", 10, "policy"),
        ("audit.key", 10, "audit"),
        ("socket", 10, "HSMTOLL_HOST__SOCKET"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line_and_a_code(
    make_host: Callable[..., RunningHost], broken: str, code: int, words: str
) -> None:
    host = make_host()
    if broken == "policy":
        host.policy.write_text("nonsense = ")
    elif broken == "audit.key":
        (host.home / "audit.key").write_text("no key")
    else:
        (host.home / "run").chmod(0o777)
    result = host.run("serve")
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_policy_test_says_what_decides(make_host: Callable[..., RunningHost]) -> None:
    host = make_host(entry("uid:1001"))
    line = host.policy.read_text().splitlines().index('[caller."uid:1001"]') + 2

    allowed = host.run("policy", "test", "--profile", "acme", "uid:1001", "road")
    assert allowed.returncode == 0
    assert "grant: allowed: " in allowed.stdout
    assert f"{host.policy}:{line}" in allowed.stdout
    denied = host.run("policy", "test", "--profile", "acme", "uid:1002", "road")
    assert denied.returncode == 90
    assert "default deny" in denied.stdout
    as_json = host.run("policy", "test", "--profile", "acme", "uid:1001", "road", "--json")
    verdicts = json.loads(as_json.stdout)
    assert (as_json.returncode, verdicts["schema"], verdicts["grant"]["allowed"]) == (0, 1, True)
    assert f"{host.policy}:{line}" in verdicts["grant"]["reason"]


def test_audit_list_answers_who_got_what(running_host: RunningHost) -> None:
    assert running_host.ask().status == 200
    assert running_host.ask(scope="air").status == 403
    eventually(lambda: running_host.records("refused"))
    listed = json.loads(running_host.run("audit", "list", "--caller", ME, "--json").stdout)
    events = [each["event"] for each in listed["records"]]
    assert listed["schema"] == 1
    assert events == ["intent", "result", "refused"]
    assert running_host.run("audit", "list", "--caller", "uid:7").stdout == ""
    lines = running_host.run("audit", "list", "--caller", ME).stdout.splitlines()
    assert lines[0].split() == [
        "seq",
        "time",
        "event",
        "caller",
        "profile",
        "scope",
        "jti",
        "outcome",
    ]
    wrong = running_host.run("audit", "list", "--since", "yesterday")
    assert wrong.returncode == 2
    assert "yesterday: 2026-11-01 or 2026-11-01T08:00:00 is expected" in wrong.stderr
    assert "%" not in wrong.stderr
    later = running_host.run("audit", "list", "--since", "2999-01-01")
    assert (later.returncode, later.stdout) == (0, "")


def test_the_log_says_once_why_nothing_is_signed_and_when_that_is_over(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host()
    pin = Path(host.environ["HSMTOLL_HSM__PIN_FILE"])
    kept = pin.read_text()
    pin.unlink()
    host.start(ready=False)

    def lines(word: str) -> list[str]:
        return [line for line in host.log().splitlines() if word in line]

    eventually(lambda: lines("not ready: profile acme: "))
    eventually(lambda: host.health("/ready").status == 503)
    pin.touch(mode=0o600)
    pin.write_text(kept)
    eventually(lambda: lines("signing host: ready"))
    # At warning, which is shown without -v; and no more often than the reason changes.
    (line,) = lines("not ready")
    assert "warning" in line
    assert "PIN file" in line
    assert lines("ready again") == []
    host.stop_file.touch()
    eventually(lambda: lines("not ready: stopped: "))
    host.stop_file.unlink()
    eventually(lambda: lines("ready again"))
    assert (len(lines("not ready")), len(lines("ready again"))) == (2, 1)
