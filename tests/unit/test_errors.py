"""The error tree is as drawn, and foreign words are safe to show."""

from __future__ import annotations

import pickle
import re
import traceback

import pytest

from hsmtoll import errors
from hsmtoll.errors import HsmTollError, foreign


def _classes() -> dict[str, type[HsmTollError]]:
    found = {name: getattr(errors, name) for name in errors.__all__ if name != "foreign"}
    return {name: kind for name, kind in found.items() if kind is not HsmTollError}


def test_the_drawing_at_the_top_is_the_tree() -> None:
    drawn = re.findall(r"([├└│ ─]+) (\w+)\s+(\d+)  ", errors.__doc__ or "")
    names = {name: (int(code), "│" in branch) for branch, name, code in drawn}

    assert set(names) == set(_classes())
    for name, kind in _classes().items():
        code, below_another = names[name]
        assert kind.exit_code == code
        assert (kind.__base__ is not HsmTollError) == below_another


def test_every_class_has_an_exit_code_of_its_own() -> None:
    codes = [kind.exit_code for kind in _classes().values()]

    assert len(set(codes)) == len(codes)


def test_every_class_has_a_code_of_its_own() -> None:
    codes = {kind.default_code for kind in _classes().values()}

    assert len(codes) == len(_classes())
    for kind in _classes().values():
        assert kind("something").code == kind.default_code
        assert kind("something", code="key-missing").code == "key-missing"


def test_hints_are_notes_so_that_a_traceback_shows_each_of_them_once() -> None:
    exc = errors.GrantRefused("refused", hint="do this\nor that", trace_id="4711")
    shown = "".join(traceback.format_exception(exc))

    assert exc.__notes__ == ["hint: do this", "hint: or that", "hint: for support: trace id 4711"]
    assert all(shown.count(note) == 1 for note in exc.__notes__)
    assert pickle.loads(pickle.dumps(exc)).__notes__ == exc.__notes__  # noqa: S301 - our own
    # The control.
    assert not hasattr(errors.GrantRefused("refused"), "__notes__")


def test_terminal_escapes_are_shown_and_not_obeyed() -> None:
    shown = foreign("Evil\x1b[2J\x07\u202eOrg\nnext line")

    assert shown.isprintable()
    assert "\\x1b" in shown
    assert "\\u202e" in shown


def test_plain_words_of_any_language_stay_as_they_are() -> None:
    assert foreign("Grønn Ål AS – Trondheim") == "Grønn Ål AS – Trondheim"


def test_long_words_are_cut_at_300_characters() -> None:
    assert len(foreign("x" * 301)) == 300
    assert foreign("x" * 300) == "x" * 300


@pytest.mark.parametrize(
    "said",
    [
        "bad assertion: {secret}",
        "bad assertion: {part}",
        "{secret}{secret}",
        "a{part}b",
        "form: grant_type=x&assertion={secret}&y=z",
    ],
)
def test_no_run_of_a_secret_is_shown(said: str) -> None:
    secret = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo0123456789abcdefg"
    shown = foreign(said.format(secret=secret, part=secret[7:29]), secret)

    for at in range(len(secret) - 11):
        assert secret[at : at + 12] not in shown
    assert "[left out]" in shown


def test_what_is_not_the_secret_is_kept_beside_it() -> None:
    assert foreign("before abcdefghijklmnop after", "abcdefghijklmnop") == "before [left out] after"


def test_a_short_secret_is_left_out_whole() -> None:
    assert foreign("PIN 4711 is wrong", "4711") == "PIN [left out] is wrong"


def test_whatever_looks_like_a_jwt_is_left_out_although_nobody_named_it() -> None:
    assert "eyJ" not in foreign("got eyJhbGciOiJSUzI1NiJ9.eyJhIjoxfQ.c2ln here")


def test_a_jwt_with_the_header_of_a_secret_is_left_out_with_all_its_parts() -> None:
    header = "eyJhbGciOiJSUzI1NiJ9"
    other = f"{header}.eyJzdWIiOiJhIn0.c3ViamVjdC10b2tlbg"
    assert foreign(f"got {other} here", f"{header}.eyJqdGkiOiJhIn0.c2lnbmF0dXJl") == (
        "got [left out] here"
    )
