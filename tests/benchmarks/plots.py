"""The plots that the page speed shows, drawn from the series of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree as ET

import pygal
from pygal.style import Style

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.benchmarks.stage import Series

_STYLE: Final = Style(
    background="white",
    plot_background="white",
    font_family="sans-serif",
    colors=("#1f5fa8", "#c0504d"),
    title_font_size=18,
    label_font_size=13,
    major_label_font_size=13,
    legend_font_size=13,
)
_MOVING: Final = ("}script", "}desc")
_LOOKS: Final[dict[str, dict[str, Any]]] = {
    "signatures": {
        "title": "Signatures spent on a cold token",
        "x_title": "callers at once",
        "y_title": "C_SignInit",
        "logarithmic": True,
        "y_labels": [10**power for power in range(5)],
    },
    "renewal": {
        "title": "A call while its token is renewed, by a device of 300 ms",
        "x_title": "seconds",
        "y_title": "ms",
        "stroke": False,
        "range": (0, None),
    },
    "workers": {
        "title": "Signatures a second",
        "x_title": "processes on the device",
        "y_title": "a second",
        "range": (0, None),
    },
}


def draw(series: Sequence[Series], stem: Path) -> list[Path]:
    """One SVG for each plot among *series*, ``STEM-PLOT.svg``."""
    drawn = []
    for plot in dict.fromkeys(each.plot for each in series):
        mine = [each for each in series if each.plot == plot]
        look = dict(_LOOKS[plot])
        low, _ = look.pop("range", (None, None))
        if low is not None:
            look["range"] = (low, max(y for each in mine for _, y in each.points) * 1.1)
        kind = pygal.XY if plot == "renewal" else pygal.Line
        chart = kind(
            style=_STYLE, width=760, height=400, explicit_size=True, legend_at_bottom=True,
            dots_size=2 if plot == "renewal" else 4, show_x_guides=False, **look,
        )  # fmt: skip
        if kind is pygal.Line:
            places = sorted({x for each in mine for x, _ in each.points})
            chart.x_labels = [f"{x:,.0f}" for x in places]
            for each in mine:
                known = dict(each.points)
                chart.add(each.name, [known.get(x) for x in places])
        else:
            for each in mine:
                chart.add(each.name, list(each.points))
        drawn.append(stem.with_name(f"{stem.name}-{plot}.svg"))
        drawn[-1].write_bytes(_still(chart.render()))
    return drawn


def _still(svg: bytes) -> bytes:
    """Without the scripts and their words that pygal puts in for a page of its own."""
    ET.register_namespace("", "http://www.w3.org/2000/svg")
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(svg)  # noqa: S314 - made a line above
    for parent in list(root.iter()):
        for child in [each for each in parent if each.tag.endswith(_MOVING)]:
            parent.remove(child)
    return bytes(ET.tostring(root, encoding="utf-8")) + b"\n"
