"""Whatever a token endpoint answers, both requests end in a token or in one of our errors."""

from __future__ import annotations

import json
import string

from hypothesis import given
from hypothesis import strategies as st

from hsmtoll.clock import retry_after
from hsmtoll.errors import HsmTollError
from hsmtoll.http_messages import HttpResponse
from hsmtoll.tokens.exchange import (
    TEST,
    Issued,
    exchange_post,
    grant_post,
    read_issued,
    read_subject,
)

ASSERTION = "eyJhbGciOiJSUzI1NiJ9.eyJqdGkiOiJhIn0.c2lnbmF0dXJlLW9mLXRoZS1ncmFudA"
SUBJECT = Issued("eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c3ViamVjdC10b2tlbi1vZi1sZWctb25l", 120)
LEAKS = ("c2lnbmF0dXJl", "c3ViamVjdC10b2")

_texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "invalid_grant",
            "JWT is expired",
            "Issue time is in the future. (trace_id: 0123456789abcdef)",
            "https://docs.digdir.no/docs/x/MP-012",
            "MP-999",
            "not authorized to request scope",
            ASSERTION,
            f"you sent {SUBJECT.value}",
            "\x1b[31mred",
        ]
    ),
)
_values: st.SearchStrategy[object] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _texts, st.just("Bearer")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_objects = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        (
            "access_token",
            "token_type",
            "expires_in",
            "scope",
            "error",
            "error_description",
            "error_uri",
        ),
        _values,
    ),
)
_good = st.builds(
    lambda token, seconds: {
        "access_token": token, "token_type": "Bearer", "expires_in": seconds
    },
    st.text(string.ascii_letters, min_size=1, max_size=20),
    st.integers(1, 86_400),
)  # fmt: skip
_bodies = st.one_of(
    st.binary(max_size=200),
    _objects.map(lambda value: json.dumps(value).encode()),
    _good.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"", b"<html>", b"[" * 50_000, b'{"expires_in": 1' + b"0" * 5000 + b"}"]),
)
_headers = st.dictionaries(
    st.sampled_from(["retry-after", "date", "x-correlationid", "content-type", "x-request-id"]),
    st.one_of(_texts, st.sampled_from(["10", "Tue, 01 Dec 2026 12:00:00 GMT", "9" * 400])),
)
_answers = st.builds(HttpResponse, st.integers(100, 599), _headers, _bodies)


def _checked(exc: HsmTollError) -> None:
    shown = f"{exc} {exc.hint} {exc.code} {exc.trace_id} {exc.correlation_id}"
    assert not any(leak in shown for leak in LEAKS)
    assert "\x1b" not in shown
    assert "\n" not in str(exc)
    assert exc.exit_code in {50, 60, 61, 70, 75, 80}


@given(_answers)
def test_maskinporten_gives_a_token_or_one_of_our_errors(answer: HttpResponse) -> None:
    try:
        issued = read_subject(answer, grant_post(TEST, ASSERTION), jti="a")
    except HsmTollError as exc:
        _checked(exc)
    else:
        assert answer.status == 200
        assert 1 <= issued.expires_in <= 86_400


@given(_answers)
def test_customs_gives_a_token_or_one_of_our_errors(answer: HttpResponse) -> None:
    try:
        issued = read_issued(answer, exchange_post(TEST, SUBJECT))
    except HsmTollError as exc:
        _checked(exc)
    else:
        assert answer.status == 200
        assert issued.value.isprintable()
        assert " " not in issued.value


@given(_good)
def test_a_good_answer_gives_a_token(value: dict[str, object]) -> None:
    """The control: not everything is an error."""
    answer = HttpResponse(200, {}, json.dumps(value).encode())
    assert read_subject(answer, grant_post(TEST, ASSERTION)).value == value["access_token"]
    assert read_issued(answer, exchange_post(TEST, SUBJECT)).value == value["access_token"]


@given(_headers, st.floats(0, 1e11))
def test_a_wait_is_never_negative(headers: dict[str, str], now: float) -> None:
    wait = retry_after(headers, now=now)
    assert wait is None or wait >= 0
