"""What an answer of a Customs API means, as values."""

from __future__ import annotations

import pytest

from hsmtoll.customs.errors import field_errors


@pytest.mark.parametrize(
    ("number", "more"),
    [(10, []), (11, ["and 1 more errors"]), (400_000, ["and 399990 more errors"])],
)
def test_ten_errors_of_an_answer_are_shown_and_the_rest_is_counted(
    number: int, more: list[str]
) -> None:
    lines = field_errors([{"field": "mass", "error": "too small"}] * number, "")
    assert lines == ["mass: too small"] * 10 + more


def test_what_is_no_error_is_none() -> None:
    assert field_errors([None, 1, "x", {}], "") == ["message: None"]
    assert field_errors({"a": 1}, "") == []
