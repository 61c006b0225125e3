"""The page of settings, compared with the model: names, defaults and examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError

import hsmtoll
from hsmtoll.settings import Settings, variable

_PAGE = (Path(hsmtoll.__file__).parent / "docs" / "settings.md").read_text(encoding="utf-8")
_ROW = re.compile(r"^\| `(HSMTOLL_\w+)` \| (.+?) \| (.+) \| `(.+)` \|$", re.MULTILINE)
_ROWS = [tuple(found.groups()) for found in _ROW.finditer(_PAGE)]
#: Read before the model is: they say where the settings are.
_OUTSIDE = {"HSMTOLL_CONFIG", "HSMTOLL_PROFILE"}


def _fields(
    group: type[BaseModel] = Settings, path: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """Variable → (default, type with its constraints) of each setting."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, field in group.model_fields.items():
        here = (*path, name)
        if isinstance(field.default, BaseModel):
            found |= _fields(type(field.default), here)
        else:
            kind: Any = field.annotation
            for each in field.metadata:
                kind = Annotated[kind, each]
            found[variable(*here)] = (field.default, kind)
    return found


_FIELDS = _fields()


def test_each_setting_has_one_row_and_no_row_is_of_another() -> None:
    assert sorted(name for name, *_ in _ROWS) == sorted({*_FIELDS, *_OUTSIDE})
    assert _PAGE.count("\n| `HSMTOLL_") == len(_ROWS)


@pytest.mark.parametrize(("name", "default"), [row[:2] for row in _ROWS if row[0] in _FIELDS])
def test_a_default_of_the_page_is_the_default_of_the_model(name: str, default: str) -> None:
    model: Any = _FIELDS[name][0]
    words = re.findall(r"`([^`]+)`", default)
    if model in (None, ()):
        # What takes the place of an empty setting is decided elsewhere.
        assert default
    else:
        # RS256 is an algorithm's name; other words are lower-case.
        assert [word.lower() for word in words[:1]] == [
            f"{model:g}" if isinstance(model, float) else str(model).lower()
        ]


@pytest.mark.parametrize(("name", "example"), [(r[0], r[3]) for r in _ROWS if r[0] in _FIELDS])
def test_an_example_of_the_page_is_a_value_that_is_taken(name: str, example: str) -> None:
    default, kind = _FIELDS[name]
    value = TypeAdapter(kind).validate_python(example)
    shown = value.get_secret_value() if isinstance(value, SecretStr) else value
    assert shown != default, "an example shows something else than the default"


def test_a_value_out_of_range_is_no_example() -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(_FIELDS["HSMTOLL_BUDGET__PER_REQUEST"][1]).validate_python("11")
