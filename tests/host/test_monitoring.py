"""
What `docker/monitoring/` has for Prometheus and Grafana: each alert fires and stays silent as it
should, on a real Prometheus too, where every query of the dashboard has an answer.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import yaml

from tests.kit.monitoring import FOLDER, RULES, panels
from tests.kit.own_device import free_port
from tests.kit.signing_host import ME, PATIENCE, RunningHost, entry, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def promtool(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *argv], capture_output=True, text=True, check=False)


# ---------------------------------------------------------------------- without a host


def test_the_rules_are_tried_by_promtool() -> None:
    done = promtool("test", "rules", FOLDER / "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("spoilt", ["({}) and vector(0) > 0", "vector(1) > 0 or ({})"])
def test_the_cases_notice_an_alert_that_never_or_always_fires(spoilt: str, tmp_path: Path) -> None:
    shutil.copy(FOLDER / "alerts_test.yml", tmp_path)
    rules = [{**each, "expr": spoilt.format(each["expr"])} for each in RULES]
    groups = {"groups": [{"name": "hsmtoll", "rules": rules}]}
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(groups))
    assert promtool("check", "rules", tmp_path / "alerts.yml").returncode == 0
    done = promtool("test", "rules", tmp_path / "alerts_test.yml")
    assert done.returncode == 1
    for each in RULES:
        assert f'alertname="{each["alert"]}"' in done.stdout + done.stderr


# ---------------------------------------------------------------------- with Prometheus


@dataclass
class Prometheus:
    """A Prometheus that runs, with the rules of the folder."""

    port: int

    def get(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", f"/api/v1/{path}")
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of *expression* now."""
        found: list[dict[str, Any]] = self.get(f"query?query={quote(expression)}")["result"]
        return found

    def alerts(self) -> dict[str, str]:
        """The alerts that are not inactive: name → state."""
        found = self.get("alerts")["alerts"]
        return {each["labels"]["alertname"]: each["state"] for each in found}

    def answers(self) -> bool:
        try:
            return bool(self.query("hsmtoll_host_ready"))
        except (OSError, ValueError):
            # It does not listen, or says in plain text that it is starting.
            return False


@pytest.fixture
def watched(
    make_host: Callable[..., RunningHost], tmp_path: Path
) -> Iterator[tuple[RunningHost, Prometheus]]:
    """A host, and a Prometheus that looks at it each second and waits no minute."""
    host, target, port = make_host(entry(ME, per_day=100)), free_port(), free_port()
    host.start(HSMTOLL_HOST__METRICS=f"127.0.0.1:{target}")
    rules = (FOLDER / "alerts.yml").read_text("utf-8")
    (tmp_path / "alerts.yml").write_text(re.sub(r"for: \d+m", "for: 1s", rules))
    settings = (FOLDER / "prometheus.yml").read_text("utf-8")
    settings = settings.replace("host:9464", f"127.0.0.1:{target}").replace(": 15s", ": 1s")
    (tmp_path / "prometheus.yml").write_text(settings)
    assert promtool("check", "config", tmp_path / "prometheus.yml").returncode == 0
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(
        [
            "prometheus", f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log, stderr=log,
    ) as process:  # fmt: skip
        made = Prometheus(port)
        try:
            eventually(made.answers)
            yield host, made
        finally:
            process.terminate()


def test_a_real_prometheus_raises_the_alert_of_a_device_that_is_down(
    watched: tuple[RunningHost, Prometheus],
) -> None:
    host, prometheus = watched
    assert host.ask().status == 200
    eventually(lambda: prometheus.query('hsmtoll_host_requests_total{outcome="ok"} == 1'))
    assert "HsmtollDeviceDown" not in prometheus.alerts()
    host.faults.set("token-removed")
    assert host.ask().word == "device_down"
    eventually(lambda: prometheus.alerts().get("HsmtollDeviceDown") == "firing")
    (alert,) = (
        each
        for each in prometheus.get("alerts")["alerts"]
        if each["labels"]["alertname"] == "HsmtollDeviceDown"
    )
    assert "profile acme" in alert["annotations"]["summary"]
    host.faults.clear()
    eventually(lambda: "HsmtollDeviceDown" not in prometheus.alerts())
    host.say("nonsense = ")
    host.reload()
    eventually(lambda: prometheus.alerts().get("HsmtollPolicyNotReloaded") == "firing")


def test_every_query_of_the_dashboard_has_an_answer(
    watched: tuple[RunningHost, Prometheus],
) -> None:
    host, prometheus = watched
    waiting = dict.fromkeys(panels())
    assert len(waiting) > 20

    def answered() -> bool:
        # Rates need something that happens between two looks.
        assert host.ask().status in (200, 429)
        assert host.ask("/v1/token").status in (200, 429)
        assert host.ask(scope="air").status == 403
        for panel in list(waiting):
            if prometheus.query(panel[1]):
                del waiting[panel]
        return not waiting

    try:
        eventually(answered)
    except AssertionError:
        assert sorted(waiting) == []
    # The control: Prometheus knows what is no expression, and what is nothing.
    with pytest.raises(AssertionError, match="bad_data"):
        prometheus.query("rate(hsmtoll_host_requests_total)")
    assert prometheus.query("hsmtoll_host_no_such") == []
