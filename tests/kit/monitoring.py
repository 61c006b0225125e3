"""Alerts and dashboard of `docker/monitoring/`, and the metrics that the manual names."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml

PAGE: Final = resources.files("hsmtoll").joinpath("docs/operations.md").read_text("utf-8")
FOLDER: Final = Path(__file__).parents[2] / "docker" / "monitoring"
ALERTS: Final[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yml").read_text("utf-8"))
RULES: Final[list[dict[str, Any]]] = ALERTS["groups"][0]["rules"]
DASHBOARD: Final[dict[str, Any]] = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))

#: What Grafana puts in the place of its variables.
GRAFANA: Final = {"$__rate_interval": "1m", "$instance": ".*"}


def documented() -> dict[str, set[str]]:
    """The metrics of the table for who watches a host: name → its labels."""
    rows = re.findall(r"^\| `(hsmtoll_\w+)` \|([^|]*)\|", PAGE, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def panels() -> list[tuple[str, str]]:
    """Title and expression of each query of the dashboard, as Grafana sends it."""
    found = []
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in GRAFANA.items():
                expression = expression.replace(variable, value)
            found.append((panel["title"], expression))
    return found
