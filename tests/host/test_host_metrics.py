"""The metrics of a signing host: judged by promtool, documented, and about what happened."""

from __future__ import annotations

import re
import ssl
import subprocess
import time
from typing import TYPE_CHECKING, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hsmtoll.host.measures import PIN_STATES
from tests.kit.monitoring import PAGE, documented
from tests.kit.signing_host import APP, ME, Authority, RunningHost, entry, eventually

if TYPE_CHECKING:
    from collections.abc import Callable


DAY: Final = 86_400


def exposition(host: RunningHost) -> str:
    return str(host.health("/metrics").body["text"])


def shown(text: str) -> dict[str, set[str]]:
    """The metrics of *text*, without those of the process: name → its labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("process_") and not family.name.endswith("_created"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {label for each in family.samples for label in each.labels} - {"le"}
            found[name] = labels
    return found


def promtool(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )


@pytest.fixture
def used_host(make_host: Callable[..., RunningHost]) -> RunningHost:
    """A host that has given a grant and a token, and refused something."""
    host = make_host(entry(ME, per_minute=20, per_day=100)).start()
    assert host.ask().status == 200
    assert host.ask("/v1/token").status == 200
    assert host.ask(scope="air").status == 403
    return host


def test_promtool_has_nothing_to_say(used_host: RunningHost) -> None:
    text = exposition(used_host)
    judged = promtool(text)
    assert (judged.returncode, judged.stdout + judged.stderr) == (0, "")
    # The control: it judges.
    assert "no help text" in promtool(re.sub(r"# HELP hsmtoll_host_ready .*\n", "", text)).stderr


def test_the_table_of_the_page_is_what_a_host_exposes(used_host: RunningHost) -> None:
    text = exposition(used_host)
    assert shown(text) == documented()
    assert len(documented()) > 20
    for name in re.findall(r"`(process_\w+)`", PAGE):
        assert f"# TYPE {name} " in text


def test_openmetrics_for_whoever_accepts_it(used_host: RunningHost) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    reply = used_host.health("/metrics", headers={"Accept": accept})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert "# TYPE hsmtoll_host_requests counter\n" in reply.body["text"]
    assert reply.body["text"].endswith("# EOF\n")
    plain = used_host.health("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert "# EOF" not in plain.body["text"]


def test_requests_are_counted_by_who_asked_for_what_and_how_it_ended(
    make_host: Callable[..., RunningHost],
) -> None:
    with make_host(entry(ME, per_day=2), entry(f"san:dns:{APP}", mode=["grant"])).start() as host:
        assert host.measured(
            "requests_total", profile="acme", caller=ME, mode="grant", outcome="policy_denied"
        ) == 0  # fmt: skip
        assert host.ask(scope="air").status == 403
        assert [host.ask().status for _ in range(2)] == [200, 200]
        assert host.ask().status == 429
        assert host.ask_tls(host.authority.issue(APP)).status == 200
        assert host.ask_tls(host.authority.issue("nobody.example")).status == 403
        assert host.ask(profile="none").status == 403
        assert host.ask("/v1/token", scope="rail").status == 403
        assert host.ask(iat=1).status == 400
        app, of_acme = f"san:dns:{APP}", {"profile": "acme"}
        for labels, count in (
            ({**of_acme, "caller": ME, "mode": "grant", "outcome": "ok"}, 2),
            ({**of_acme, "caller": ME, "mode": "grant", "outcome": "policy_denied"}, 1),
            ({**of_acme, "caller": ME, "mode": "grant", "outcome": "quota_exceeded"}, 1),
            ({**of_acme, "caller": ME, "mode": "token", "outcome": "policy_denied"}, 1),
            ({**of_acme, "caller": app, "mode": "grant", "outcome": "ok"}, 1),
            ({**of_acme, "caller": "other", "mode": "grant", "outcome": "policy_denied"}, 1),
            ({"profile": "other", "caller": ME, "mode": "grant", "outcome": "policy_denied"}, 1),
            ({"profile": "other", "caller": "other", "mode": "other", "outcome": "bad_request"}, 1),
        ):
            assert host.measured("requests_total", **labels) == count, labels
        assert host.measured("request_duration_seconds_count", mode="grant") == 7
        assert host.measured("signing_duration_seconds_count", profile="acme") == 3
        assert host.measured("quota_used_ratio", profile="acme", caller=ME, period="day") == 1
        # The self-test is one.
        assert host.measured("signatures_total", profile="acme") == 4


def test_no_text_of_a_caller_and_no_secret_is_in_a_label_or_a_help(
    running_host: RunningHost,
) -> None:
    host, canary = running_host, "zanzibar"
    granted = host.ask().body["assertion"]
    token = host.ask("/v1/token").body["access_token"]
    stranger = Authority(host.home / "other").issue(f"{canary}.example")
    for members in (
        {"profile": canary}, {"scope": canary}, {"resource": f"https://{canary}/"}, {canary: 1},
        {"authorization_details": [{"type": canary}]}, {"consumer_org": canary},
    ):  # fmt: skip
        assert host.ask(**members).status in (400, 403)
    assert host.ask(f"/v1/{canary}").status == 404
    assert host.send(canary.upper(), "/v1/grant").status == 400
    assert host.health(f"/metrics?{canary}", headers={"Accept": canary}).status == 200
    with pytest.raises((ssl.SSLError, ConnectionError)):
        host.ask_tls(stranger)
    text = exposition(host)
    for secret in (canary, canary.upper(), granted, token, token.rpartition(".")[2]):
        assert secret not in text
    # The control: those of the policy are there, and as many series as before.
    assert f'caller="{ME}"' in text
    assert set(re.findall(r'caller="([^"]*)"', text)) == {
        ME, f"san:dns:{APP}", "other",
    }  # fmt: skip
    assert host.measured("connections_refused_total", reason="handshake") == 1


def test_states_are_those_of_the_device_the_certificate_and_the_token(
    used_host: RunningHost,
) -> None:
    host, acme = used_host, {"profile": "acme"}
    assert host.measured("device_up", **acme) == 1
    states = {each: host.measured("pin_state", state=each, **acme) for each in PIN_STATES}
    assert states == {each: float(each == "ok") for each in PIN_STATES}
    ends = host.measured("certificate_not_after_timestamp_seconds", **acme)
    assert ends is not None
    assert 300 * DAY < ends - time.time() < 800 * DAY
    left = host.measured("token_remaining_seconds", **acme)
    assert left is not None
    assert 0 < left <= 600
    skew = host.measured("clock_skew_seconds", **acme)
    assert skew is not None
    assert abs(skew) < 5
    for server in ("Maskinporten", "Customs"):
        count = host.measured(
            "token_request_duration_seconds_count", server=server, outcome="200", **acme
        )
        assert count == 1
    host.faults.set("token-removed")
    assert host.ask().word == "device_down"
    assert host.measured("device_up", **acme) == 0
    assert host.measured("ready") == 0
    host.faults.clear()
    eventually(lambda: host.measured("device_up", **acme) == 1)


def test_a_certificate_is_known_before_the_first_grant(running_host: RunningHost) -> None:
    ends = running_host.measured("certificate_not_after_timestamp_seconds", profile="acme")
    assert ends is not None
    assert running_host.measured("token_remaining_seconds", profile="acme") is None


def test_the_audit_and_the_reload_are_told(used_host: RunningHost) -> None:
    host = used_host
    records = host.records()
    assert host.measured("audit_seq") == len(records)
    assert host.measured("audit_writable") == 1
    free = host.measured("audit_free_bytes")
    assert free is not None
    assert free > 0
    sealed = host.measured("audit_last_seal_timestamp_seconds")
    assert sealed is not None
    assert sealed <= time.time()
    unsealed = host.measured("audit_unsealed_records")
    assert unsealed is not None
    assert 0 <= unsealed < len(records)
    assert host.measured("policy_last_reload_successful") == 1
    loaded = host.measured("policy_last_reload_success_timestamp_seconds")
    host.say("nonsense = ")
    host.reload()
    assert host.measured("policy_last_reload_successful") == 0
    assert host.measured("policy_last_reload_success_timestamp_seconds") == loaded
    new = {"profile": "acme", "caller": "uid:4242", "mode": "grant", "outcome": "policy_denied"}
    assert host.measured("requests_total", **new) is None
    host.write_policy(entry(ME), entry("uid:4242"))
    host.reload()
    # From zero, so that the first refusal is an increase.
    assert host.measured("requests_total", **new) == 0
    assert host.measured("policy_last_reload_successful") == 1
    assert host.measured("policy_last_reload_success_timestamp_seconds") != loaded
    host.stop_file.touch()
    assert host.measured("stopped") == 1


@pytest.mark.parametrize("page", ["/", "/live", "/ready", "/metrics"])
def test_a_name_that_a_page_in_a_browser_points_at_the_loopback_is_refused(
    running_host: RunningHost, page: str
) -> None:
    for name in ("rebound.example", "rebound.example:9464", "localhost.rebound.example", "[::1"):
        reply = running_host.health(page, headers={"Host": name})
        assert (reply.status, reply.word) == (403, "host_refused"), name
    # The control: whoever asks this machine by its addresses, and Prometheus with a port.
    for name in ("localhost", "LOCALHOST:9464", "127.0.0.1:9464", "[::1]:9464"):
        assert running_host.health(page, headers={"Host": name}).status == 200, name


def test_public_metrics_are_asked_for_by_any_name(make_host: Callable[..., RunningHost]) -> None:
    host = make_host().start(HSMTOLL_HOST__METRICS_PUBLIC="true")
    assert host.health("/metrics", headers={"Host": "signer.example:9464"}).status == 200
