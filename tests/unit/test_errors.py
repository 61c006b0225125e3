"""The error tree is as drawn, and foreign words are safe to show."""

from __future__ import annotations

import json
import pickle
import re
import traceback
from typing import Any, get_args

import pytest

from hsmtoll import errors
from hsmtoll.errors import HsmTollError, from_data, sanitized, to_data


def _classes() -> dict[str, type[HsmTollError]]:
    found = {name: getattr(errors, name) for name in errors.__all__}
    kinds = {name: kind for name, kind in found.items() if isinstance(kind, type)}
    return {name: kind for name, kind in kinds.items() if kind is not HsmTollError}


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


def test_each_scope_is_described_at_the_top() -> None:
    described = re.findall(r"^            (\w+) {2,}\S", errors.__doc__ or "", re.MULTILINE)

    assert tuple(described) == get_args(errors.Scope)
    assert {kind.default_scope for kind in _classes().values()} <= set(described)


def test_a_signature_counts_as_spent_unless_the_error_comes_before_the_device_signs() -> None:
    before = {name for name, kind in _classes().items() if not kind("something").signed}

    assert before == {
        "AuditBroken", "CertificateError", "ConfigurationError", "PinIncorrect", "PinNotTried",
        "UsageError",
    }  # fmt: skip
    assert not errors.DeviceError("busy", signed=False).signed
    assert errors.PinNotTried("late", signed=True).signed


@pytest.mark.parametrize("kind", [HsmTollError, *_classes().values()])
def test_an_error_is_the_same_after_a_journey_as_data(kind: type[HsmTollError]) -> None:
    sent = kind(
        "signing: it failed",
        hint="do this\nor that",
        code="MP-012",
        who="digdir",
        trace_id="4711",
        jti="0a",
        correlation_id="c",
        retryable=True,
        retry_after=2.5,
        signed=not kind.default_signed,
        scope="attempt",
    )
    came = from_data(json.loads(json.dumps(to_data(sent))))

    assert type(came) is kind
    assert (str(came), vars(came)) == (str(sent), vars(sent))
    # The control: nothing of it was the default.
    plain = vars(kind("signing: it failed"))
    assert not any(plain[name] == each for name, each in vars(sent).items() if name in plain)


@pytest.mark.parametrize(
    "data",
    [
        None, [], "refused", {}, {"class": "UsageErrorr"}, {"class": ["DeviceError"]},
        {"class": "foreign"}, {"class": "__init__"}, {"class": "Path"},
        {
            "class": 3, "message": 4, "hint": ["x"], "code": "a b", "who": "me", "retryable": 1,
            "retry_after": True, "signed": 0, "scope": {}, "jti": {}, "trace_id": 1,
            "correlation_id": False,
        },
        {"code": "x" * 65, "retry_after": float("nan")}, {"code": "-\n", "retry_after": -1},
        {"retry_after": float("inf"), "who": []}, {"retry_after": 86_401},
    ],
)  # fmt: skip
def test_data_that_is_no_error_becomes_one_with_the_safe_values(data: Any) -> None:
    came = from_data(data, unknown=errors.DeviceError)

    assert type(came) is errors.DeviceError
    assert (came.signed, came.retryable) == (True, False)
    assert (came.code, came.scope, came.who) == ("device-failed", "device", None)
    assert (came.retry_after, came.hint, came.hints) == (None, None, ())
    assert str(came) == "it gives no reason"


def test_words_that_come_as_data_are_escaped_line_by_line_and_cut() -> None:
    came = from_data({"class": "DeviceError", "message": "a\x1b[2J\u202e", "hint": "b\r\nc\x07"})
    assert all(line.isprintable() for line in (str(came), *came.hints))
    assert len(came.hints) == 2

    assert len(str(from_data({"message": "x" * 1_000_000}))) < 10_000


def test_terminal_escapes_are_shown_and_not_obeyed() -> None:
    shown = sanitized("Evil\x1b[2J\x07\u202eOrg\nnext line")

    assert shown.isprintable()
    assert "\\x1b" in shown
    assert "\\u202e" in shown


def test_plain_words_of_any_language_stay_as_they_are() -> None:
    assert sanitized("Grønn Ål AS – Trondheim") == "Grønn Ål AS – Trondheim"


def test_long_words_are_cut_at_300_characters() -> None:
    assert len(sanitized("x" * 301)) == 300
    assert sanitized("x" * 300) == "x" * 300


@pytest.mark.parametrize(
    "text",
    [
        "bad assertion: {secret}",
        "bad assertion: {part}",
        "{secret}{secret}",
        "a{part}b",
        "form: grant_type=x&assertion={secret}&y=z",
    ],
)
def test_no_run_of_a_secret_is_shown(text: str) -> None:
    secret = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo0123456789abcdefg"
    shown = sanitized(text.format(secret=secret, part=secret[7:29]), secret)

    for at in range(len(secret) - 11):
        assert secret[at : at + 12] not in shown
    assert "[left out]" in shown


def test_what_is_not_the_secret_is_kept_beside_it() -> None:
    assert (
        sanitized("before abcdefghijklmnop after", "abcdefghijklmnop") == "before [left out] after"
    )


def test_a_short_secret_is_left_out_whole() -> None:
    assert sanitized("PIN 4711 is wrong", "4711") == "PIN [left out] is wrong"


def test_whatever_looks_like_a_jwt_is_left_out_although_nobody_named_it() -> None:
    assert "eyJ" not in sanitized("got eyJhbGciOiJSUzI1NiJ9.eyJhIjoxfQ.c2ln here")


@pytest.mark.parametrize("before", ["token", "%3D", "a", "_", "-"])
def test_a_jwt_that_follows_a_letter_is_left_out(before: str) -> None:
    jwt = "eyJhbGciOiJSUzI1NiJ9.eyJhIjoxfQ.c2ln"
    assert sanitized(f"got {before}{jwt} here") == f"got {before}[left out] here"


def test_a_thumbprint_that_holds_the_first_letters_of_a_jwt_is_shown() -> None:
    thumbprint = "NO3eyJk2-15VjG-zVZ3VKF-lWtPUdl1DhusBZ8LcH-g"
    assert sanitized(f"kid {thumbprint}; posted.") == f"kid {thumbprint}; posted."


def test_a_jwt_with_the_header_of_a_secret_is_left_out_with_all_its_parts() -> None:
    header = "eyJhbGciOiJSUzI1NiJ9"
    other = f"{header}.eyJzdWIiOiJhIn0.c3ViamVjdC10b2tlbg"
    assert sanitized(f"got {other} here", f"{header}.eyJqdGkiOiJhIn0.c2lnbmF0dXJl") == (
        "got [left out] here"
    )
