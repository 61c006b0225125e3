"""Errors begin in lower case and end without a full stop, wherever the source raises one."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from hsmtoll import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE: Final = Path(errors.__file__).parent

#: What is written with capitals in the middle of a sentence as well.
PROPER: Final = re.compile(r"(Maskinporten|Customs|SoftHSM)\b|[A-Z0-9_#+]{2,}\b")

#: Where a message begins that is put together elsewhere: the function, and which argument.
BEGINS: Final = {"translated": 1, "translate_pkcs11_errors": 0, "writing": 0, "_ask": 0, "Fault": 1}


def messages(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, beginning, end) of each message; empty where it is not written there."""
    kinds = {*errors.__all__, "error"}
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        func = call.func
        name = func.id if isinstance(func, ast.Name) else getattr(func, "attr", "")
        at = 0 if name in kinds else BEGINS.get(name)
        if at is not None and len(call.args) > at:
            for first, last in _written(call.args[at]):
                yield call.lineno, first, last


def _written(node: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.IfExp):
        yield from (*_written(node.body), *_written(node.orelse))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value, node.value
    elif isinstance(node, ast.JoinedStr):
        first, last = node.values[0], node.values[-1]
        if isinstance(first, ast.FormattedValue) and isinstance(first.value, ast.IfExp):
            yield from ((begins, "") for begins, _ in _written(first.value))
        yield _text(first), _text(last)


def _text(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else ""


def wrong(source: str) -> list[tuple[int, str]]:
    """Every message that begins with a capital or ends with a full stop."""
    return [
        (line, first or last)
        for line, first, last in messages(source)
        if (first[:1].isupper() and not PROPER.match(first)) or last.endswith(".")
    ]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_errors_begin_in_lower_case_and_end_without_a_full_stop(path: Path) -> None:
    assert wrong(path.read_text(encoding="utf-8")) == []


def test_the_source_has_many_messages() -> None:
    found = [m for path in PACKAGE.rglob("*.py") for m in messages(path.read_text("utf-8"))]
    assert len([first for _, first, _ in found if first]) > 250


@pytest.mark.parametrize(
    ("source", "is_wrong"),
    [
        ("raise DeviceError('The key is gone')", True),
        ("raise errors.DeviceError('the key is gone.')", True),
        ("raise DeviceError(f'The key {name}')", True),
        ("raise DeviceError(f'{name} is gone.')", True),
        ('raise DeviceError(f\'{"No" if a else "no"} key\')', True),
        ("Fault('code', 'The key is gone', 'Buy another.')", True),
        ("raise DeviceError('the key is gone', hint='Buy another.')", False),
        ("raise DeviceError('Maskinporten said no')", False),
        ("raise DeviceError('HSMTOLL_KID: not set')", False),
        ("raise ValueError('The key')", False),
    ],
)
def test_the_control_knows_right_from_wrong(source: str, is_wrong: bool) -> None:
    assert bool(wrong(source)) is is_wrong
