"""Public vectors: where a suite lies, and where hsmtoll ends a case in another way, on purpose."""

from __future__ import annotations

import json
import tomllib
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.resources.abc import Traversable

ROOM: Final = Path(__file__).parents[1] / "vectors"


def package(name: str) -> Traversable:
    """The files of a package of vectors; skips the module that asks where it is not installed."""
    if find_spec(name) is None:
        pytest.skip(
            f"{name} is not installed (scripts/requirements-vectors.txt)", allow_module_level=True
        )
    return resources.files(name)


def data(name: str) -> Any:
    """A JSON file of the room."""
    return json.loads((ROOM / "data" / name).read_text(encoding="utf-8"))


@cache
def decisions(suite: str) -> dict[str, str]:
    """Reasons by the name of the case."""
    table = tomllib.loads((ROOM / "decisions.toml").read_text(encoding="utf-8"))
    rows = [row for row in table["decision"] if row["suite"] == suite]
    return {case: row["reason"] for row in rows for case in row["cases"]}


def judge(suite: str, verdicts: Mapping[str, tuple[bool, bool]]) -> None:
    """
    By the name of the case: what the suite says, and what is found. They are the same, except for
    exactly the cases in the table of decisions.
    """
    differing = {case for case, (verdict, found) in verdicts.items() if verdict != found}
    decided = decisions(suite).keys()
    assert not differing - decided, "these end in another way, and decisions.toml has no reason"
    assert not decided - differing, "these agree, or are not there: take them out of decisions.toml"
