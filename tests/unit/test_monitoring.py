"""Alerts and dashboard of `docker/monitoring/` are complete, and about metrics that there are."""

from __future__ import annotations

import re

import yaml

from tests.kit.monitoring import DASHBOARD, FOLDER, RULES, documented, panels


def test_each_alert_has_cases_in_which_it_fires_alone_each_with_its_control() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text("utf-8"))["tests"]
    samples = [each["promql_expr_test"][0]["exp_samples"] for each in tests]
    for fires, control, expected in zip(tests[::2], tests[1::2], samples[::2], strict=True):
        assert control["name"].startswith(f"{fires['name']}, not: ")
        assert expected == [{"labels": f'{{alertname="{fires["name"]}"}}', "value": 1}]
    assert samples[1::2] == [[]] * (len(tests) // 2)
    assert [each["alert"] for each in RULES] == list(
        dict.fromkeys(each["name"] for each in tests[::2])
    )


def test_alerts_and_dashboard_name_only_metrics_that_a_host_exposes() -> None:
    expressions = [*(each["expr"] for each in RULES), *(each for _, each in panels())]
    named = {name for each in expressions for name in re.findall(r"\bhsmtoll_\w+", each)}
    known = set(documented())
    known |= {f"{name}_{part}" for name in known for part in ("bucket", "count", "sum")}
    assert named <= known
    # The control: every metric but the one that counts records is looked at by somebody.
    families = {re.sub("_(bucket|count|sum)$", "", each) for each in named}
    assert documented().keys() - families == {
        "hsmtoll_host_audit_seq",
        "hsmtoll_host_policy_last_reload_success_timestamp_seconds",
    }


def test_alerts_and_dashboard_go_by_labels_that_there_are() -> None:
    expressions = [*(each["expr"] for each in RULES), *(each for _, each in panels())]
    used = {name for each in expressions for name in re.findall(r"(\w+) *[!=]=?~?\"", each)}
    grouped = [
        part for each in expressions for part in re.findall(r"(?:by|on) \(([\w, ]+)\)", each)
    ]
    used |= {name.strip() for each in grouped for name in each.split(",")}
    assert {"profile", "caller", "server", "outcome"} <= used
    known = {"job", "instance", "le"}.union(*documented().values())
    assert used <= known


def test_the_dashboard_is_one_that_grafana_can_import() -> None:
    assert {"title", "uid", "schemaVersion", "templating", "panels"} <= DASHBOARD.keys()
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["type"] in ("stat", "timeseries", "bargauge")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (at["x"] + column, at["y"] + row) for column in range(at["w"]) for row in range(at["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
