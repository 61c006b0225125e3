"""JSON of others is read to the letter where it decides, and within bounds wherever it is read."""

from __future__ import annotations

import json

import pytest

from hsmtoll.jsonio import read_lenient, read_strict


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[1,]", b'{"a": NaN}', b"Infinity", b"-Infinity", b"\xff", b"1 2",
        b'{"a": 1, "a": 1}', b'{"b": [{"a": 1, "a": 2}]}', b"[" * 1_000_000, b"1" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_json_or_may_be_read_in_two_ways_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's own errors are some of them
        read_strict(raw)


def test_the_same_name_in_several_objects_is_no_ambiguity() -> None:
    assert read_strict('{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}') == {
        "a": {"a": 1},
        "b": [{"a": 2}, {"a": 3}],
    }


@pytest.mark.parametrize("raw", [b"", b"<html>", b"\xff", b"[" * 1_000_000, b"[]," * 100_000])
def test_an_answer_that_is_no_json_is_none(raw: bytes) -> None:
    assert read_lenient(raw) is None


def test_an_answer_has_as_many_values_as_its_size_explains() -> None:
    assert read_lenient(b"[" + b",".join([b"[]"] * 30_000) + b"]") is None
    # The control: as many, and something in each of them.
    large = json.dumps([{"sequence": number, "to": "x" * 40} for number in range(30_000)]).encode()
    assert len(read_lenient(large)) == 30_000
