"""docs/architecture.md is about this tree: its folders, its modules, its functions."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Final

import pytest

TOP: Final = Path(__file__).parents[2]
PACKAGE: Final = TOP / "hsmtoll"
TEXT: Final = (PACKAGE / "docs/architecture.md").read_text(encoding="utf-8")

FOLDERS: Final = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"}
MODULES: Final = {path.stem for path in PACKAGE.glob("*.py")}


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return str(found)


def first_cells(text: str, name: str) -> list[str]:
    """The words in backquotes of the first column of the table whose head is *name*."""
    (table,) = re.findall(rf"^\| {name} \|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [
        word for row in table.splitlines() for word in re.findall(r"`(.+?)`", row.split("|")[1])
    ]


def dotted_names() -> set[str]:
    """Each name of the package in the page: in journeys at the start of a line, else in quotes."""
    blocks = re.findall(r"^```text\n(.*?)^```", section("Three journeys"), re.MULTILINE | re.DOTALL)
    written = re.findall(r"^ *([a-z_]\w*(?:\.\w+)+)", "\n".join(blocks), re.MULTILINE)
    written += re.findall(r"(?:by|host:|;) ([a-z_]\w*(?:\.\w+)+)", "\n".join(blocks))
    prose = re.sub(r"^```text\n.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    written += re.findall(r"`([a-z_]\w*(?:\.\w+)+)`", prose)
    files = (".md", ".py", ".toml")
    return {name for name in written if not name.endswith(files)}


def resolved(name: str) -> object:
    """What *name* is: a module, or an attribute of one at any depth."""
    found: object = importlib.import_module("hsmtoll")
    path = "hsmtoll"
    for part in name.split("."):
        path += f".{part}"
        known = hasattr(found, part)
        found = getattr(found, part) if known else importlib.import_module(path)
    return found


def test_the_page_is_read_in_ten_minutes() -> None:
    assert len(TEXT.splitlines()) <= 200


def test_each_folder_is_named_and_no_other() -> None:
    named = first_cells(section("Folders"), "folder")
    assert len(named) == len(set(named))
    assert {name.removesuffix("/") for name in named} == FOLDERS


def test_each_module_beside_the_folders_is_named_and_no_other() -> None:
    named = first_cells(section("Folders"), "module")
    assert len(named) == len(set(named))
    assert {*named, *re.findall(r"`hsmtoll/(__\w+__)\.py`", section("Folders"))} == MODULES


@pytest.mark.parametrize("name", sorted(dotted_names()))
def test_each_function_that_is_named_exists(name: str) -> None:
    assert resolved(name) is not None


def test_a_name_that_does_not_exist_is_noticed() -> None:
    for name in ("tokens.cache.Cache.gone", "tokens.gone", "gone.tokens"):
        with pytest.raises(ImportError):
            resolved(name)
    # The journeys are long, and are read.
    assert len(dotted_names()) > 50
    assert {"__main__.main", "host.worker.main", "transport.HttpClient.post"} <= dotted_names()


def test_each_thread_that_is_named_is_started_somewhere() -> None:
    sources = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    for name in first_cells(section("Locks and threads"), "thread"):
        assert f'"{name}"' in sources
    # The control: a name that no thread has is in no source.
    assert '"hsmtoll-nobody"' not in sources
