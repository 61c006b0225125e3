"""docs/rules.md is what the table of rules says, and explains each id that the tree cites."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from hsmtoll.sandbox.rules import TABLE
from scripts.rules_page import DUTIES, PAGE, citations, page

TOP: Final = Path(__file__).parents[2]
KNOWN: Final = {*TABLE, *(duty.id for duty in DUTIES)}


def test_the_page_is_what_the_table_and_the_duties_give() -> None:
    assert (TOP / PAGE).read_text(encoding="utf-8") == page()


def test_the_page_has_each_rule_once() -> None:
    rows = re.findall(r"^\| ([MTCBF]\d+) \|", (TOP / PAGE).read_text("utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == KNOWN


def test_each_id_that_the_tree_cites_is_on_the_page() -> None:
    unknown = {f"{id_} in {name}" for id_, name in citations(TOP) if id_ not in KNOWN}
    assert unknown == set()


def test_each_id_on_the_page_is_cited() -> None:
    assert KNOWN - {id_ for id_, _ in citations(TOP)} == set()


def test_a_citation_is_found_in_each_place_that_may_have_one(tmp_path: Path) -> None:
    # In two parts: this file is searched for citations as well.
    nobodys = [f"{letter}{number}" for letter, number in (("M", "00"), ("C", "99"), ("F", "9"))]
    for name in ("hsmtoll/docs/a.md", "tests/unit/a.py", "scripts/a.py", "docker/a.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"as {' and '.join(nobodys[:2])} require\n")
    (tmp_path / "README.md").write_text(f"{nobodys[2]}, MP-100, RS256, M429")
    found = set(citations(tmp_path))
    assert {name for _, name in found} == {
        "hsmtoll/docs/a.md", "tests/unit/a.py", "scripts/a.py", "docker/a.sh", "README.md",
    }  # fmt: skip
    assert {id_ for id_, _ in found} == {*nobodys}
    # The control: they would be reported.
    assert not KNOWN & {*nobodys}


@pytest.mark.parametrize("row", [*TABLE.values(), *DUTIES], ids=lambda row: row.id)
def test_a_rule_without_a_public_source_is_called_inferred(row: object) -> None:
    basis, sources = (getattr(row, name) for name in ("basis", "sources"))
    assert set(basis.split("/")) <= {"D", "O", "I"}
    assert sources or basis == "I"
    for source in sources:
        assert re.fullmatch(r"https://[^\s|<>]+|RFC \d{4} section [\d.]*\d", source)
