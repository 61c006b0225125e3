"""The public surface is what ``__all__`` says: sorted, complete, importable; the tree as drawn."""

from __future__ import annotations

import re

import hsmtoll
from hsmtoll import errors


def test_the_public_names_are_sorted_and_each_is_there() -> None:
    ours = [name for name in hsmtoll.__all__ if name not in errors.__all__]
    assert ours == sorted(ours)
    assert errors.__all__ == sorted(errors.__all__)
    assert len(hsmtoll.__all__) == len(set(hsmtoll.__all__))
    for name in hsmtoll.__all__:
        assert getattr(hsmtoll, name).__name__ == name


def test_a_name_that_is_not_public_is_not_there() -> None:
    assert not hasattr(hsmtoll, "Device")


def test_every_error_class_is_public() -> None:
    def tree(base: type[errors.HsmTollError]) -> set[str]:
        inside = (tree(each) for each in base.__subclasses__())
        return {base.__name__}.union(*inside) if base.__module__ == errors.__name__ else set()

    assert tree(errors.HsmTollError) == set(errors.__all__)
    assert tree(errors.HsmTollError) <= set(hsmtoll.__all__)


def test_the_drawing_of_the_errors_is_their_tree() -> None:
    drawn = re.findall(r"^ +((?:│   )*)[├└]── (\w+) +(\d+) ", errors.__doc__ or "", re.MULTILINE)
    path: list[str] = ["HsmTollError"]
    stated = set()
    for bars, name, code in drawn:
        depth = len(bars) // 4 + 1
        path[depth:] = [name]
        stated.add((path[depth - 1], name, int(code)))
    classes = {
        (each.__base__.__name__, name, each.exit_code)
        for name in errors.__all__
        if name != "HsmTollError"
        for each in [getattr(errors, name)]
    }
    assert stated == classes
