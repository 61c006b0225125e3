"""The two token requests as values: what is sent, which replies are accepted, what refusals say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hsmtoll.errors import (
    ClockError,
    ExchangeRefused,
    GrantRefused,
    HsmTollError,
    NetworkError,
    ScopeNotGranted,
    TryAgainLater,
)
from hsmtoll.http_messages import HttpResponse, Post
from hsmtoll.jsonio import read_lenient
from hsmtoll.tokens import exchange
from hsmtoll.tokens.exchange import PROD, TEST, Issued
from hsmtoll.tokens.mp_codes import REFUSALS

ASSERTION = "aaaaaaaaaaaaaaaaaaaaaaaa.bbbbbbbbbbbbbbbbbbbbbbbb.cccccccccccccccccccccccc"
GOOD = {"access_token": "abc.def-_~+/=", "token_type": "Bearer", "expires_in": 119, "scope": "s"}
TRACE = "0123456789abcdef0123456789abcdef"


def answer(status: int = 200, body: object = None, **headers: str) -> HttpResponse:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpResponse(status, {k.replace("_", "-"): v for k, v in headers.items()}, raw)


def post() -> Post:
    return exchange.grant_post(TEST, ASSERTION)


def refused(
    description: str, *, code: str | None = None, error: str = "invalid_grant"
) -> HttpResponse:
    body = {"error": error, "error_description": f"{description} (trace_id: {TRACE})"}
    if code:
        body["error_uri"] = f"https://test.maskinporten.no/errors/{code}"
    return answer(400, body)


def subject_error(given: HttpResponse) -> HsmTollError:
    with pytest.raises(HsmTollError) as caught:
        exchange.read_subject(given, post(), jti="j1")
    return caught.value


def test_leg_one_is_the_form_of_rfc_7523() -> None:
    assert post().url == "https://test.maskinporten.no/token"
    assert post().form == {
        "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
        "assertion": ASSERTION,
    }


def test_the_exchange_uses_the_bare_words_of_customs_and_no_urns() -> None:
    made = exchange.exchange_post(PROD, Issued("subject", 100))

    assert made.url == "https://api.toll.no/api/access/external/oauth/token"
    assert made.form == {
        "grant_type": "token-exchange",
        "subject_token_type": "access_token",
        "subject_token": "subject",
    }


def test_a_good_answer_gives_its_token_and_seconds() -> None:
    assert exchange.read_subject(answer(body=GOOD), post()).value == GOOD["access_token"]
    issued = exchange.read_issued(answer(body={**GOOD, "issued_token_type": "anything"}), post())
    assert issued.expires_in == 119


@pytest.mark.parametrize("seconds", [0, -1, 86_401, 1.5, "599", True, None, [599], 10**30])
def test_expires_in_is_a_whole_number_of_seconds(seconds: object) -> None:
    error = subject_error(answer(body={**GOOD, "expires_in": seconds}))

    assert isinstance(error, GrantRefused)
    assert "expires_in" in str(error)


@pytest.mark.parametrize("seconds", [1, 120, 86_400])
def test_every_lifetime_from_a_second_to_a_day_is_taken(seconds: int) -> None:
    given = answer(body={**GOOD, "expires_in": seconds})
    assert exchange.read_subject(given, post()).expires_in == seconds


@pytest.mark.parametrize(
    ("asked", "reply"),
    [
        ("a", {"scope": "a"}),
        ("a", {}),
        ("a b", {"scope": "b a"}),
        ("a", {"scope": " b\ta c "}),
        ("", {"scope": "a"}),
    ],
)
def test_a_scope_that_is_granted_whole_or_not_spoken_of_is_taken(
    asked: str, reply: dict[str, str]
) -> None:
    body = {name: value for name, value in GOOD.items() if name != "scope"} | reply
    assert exchange.read_subject(answer(body=body), post(), scope=asked).expires_in == 119


@pytest.mark.parametrize(
    ("asked", "granted"), [("a", ""), ("a", "b"), ("a b", "a"), ("a", "ab A"), ("a", "a,b")]
)
def test_a_scope_that_is_not_granted_is_no_token(asked: str, granted: str) -> None:
    with pytest.raises(ScopeNotGranted) as caught:
        exchange.read_subject(answer(body={**GOOD, "scope": granted}), post(), scope=asked)

    assert (caught.value.code, caught.value.retryable) == ("scope-narrowed", False)
    assert caught.value.hint


@pytest.mark.parametrize("granted", [None, ["a"], {"a": 1}, 1, True])
def test_a_scope_that_is_no_string_is_no_answer(granted: object) -> None:
    with pytest.raises(GrantRefused, match="scope") as caught:
        exchange.read_subject(answer(body={**GOOD, "scope": granted}), post(), scope="a")

    assert caught.value.code == "answer-unusable"
    # The control: Customs speaks of none (T06), and what it would say is not ours to judge.
    assert exchange.read_issued(answer(body={**GOOD, "scope": granted}), post()).expires_in == 119


@pytest.mark.parametrize("value", ["", "a b", "a\nX-Evil: 1", "a\x00", "ø", 7, None, "=a"])
def test_an_access_token_follows_the_bearer_grammar_and_is_not_shown(value: object) -> None:
    error = subject_error(answer(body={**GOOD, "access_token": value}))

    assert "Evil" not in str(error) + str(error.hint)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b"\xff", b'"x"', b"[" * 100_000])
def test_a_200_without_a_json_object_is_told_by_leg(body: bytes) -> None:
    assert isinstance(subject_error(answer(body=body)), GrantRefused)
    with pytest.raises(ExchangeRefused):
        exchange.read_issued(answer(body=body), post())


@pytest.mark.parametrize("code", sorted(REFUSALS))
def test_every_code_tells_its_meaning_who_must_act_and_the_trace_id(code: str) -> None:
    row = REFUSALS[code]
    error = subject_error(refused("Invalid assertion.", code=code))

    assert error.code == code
    assert code in str(error)
    assert row.meaning in (error.hint or "")
    assert error.who == row.who
    assert error.trace_id == TRACE
    assert error.jti == "j1"
    assert error.exit_code == (61 if row.scope else 60)
    assert error.retryable == (code in ("MP-012", "MP-130"))


@pytest.mark.parametrize("code", ["MP-012", "MP-130"])
def test_a_refusal_that_a_new_grant_may_cure_is_retryable_once(code: str) -> None:
    given = refused("Invalid assertion.", code=code)
    for retried in (False, True):
        with pytest.raises(GrantRefused) as caught:
            exchange.read_subject(given, post(), retried=retried)
        assert caught.value.retryable is not retried


@pytest.mark.parametrize("code", sorted(REFUSALS))
def test_a_refused_certificate_is_retryable_where_there_is_another(code: str) -> None:
    asked: list[str] = []

    def rejected(message: str) -> bool:
        asked.append(message)
        return True

    with pytest.raises(GrantRefused) as caught:
        exchange.read_subject(refused("No.", code=code), post(), retried=True, rejected=rejected)
    about = code in ("MP-120", "MP-122", "MP-123", "MP-124")
    assert (caught.value.scope == "certificate", caught.value.retryable) == (about, about)
    assert asked == ([code] if about else [])
    # The control: nobody has another one.
    assert not subject_error(refused("No.", code="MP-120")).retryable


@pytest.mark.parametrize("corrected", [False, True])
def test_an_issue_time_in_the_future_is_retryable_once_the_clock_was_corrected(
    *, corrected: bool
) -> None:
    given = refused("Issue time is in the future.")
    for retried in (False, True):
        with pytest.raises(ClockError) as caught:
            exchange.read_subject(given, post(), retried=retried, corrected=corrected)
        assert caught.value.retryable is (corrected and not retried)


def test_an_unknown_code_is_still_readable() -> None:
    error = subject_error(refused("Something new.", code="MP-999"))

    assert error.code == "MP-999"
    assert "Something new." in str(error)


def test_without_error_uri_the_text_stands_for_the_code() -> None:
    error = subject_error(refused("Invalid assertion. Client not found"))

    assert error.code == "MP-100"


def test_the_old_form_of_the_trace_is_read_as_well() -> None:
    body = {"error": "x", "error_description": "No (correlation id: 1b9d6bcd-bbfd-4b2d-9b5d-ab8d)"}
    assert subject_error(answer(400, body)).trace_id == "1b9d6bcd-bbfd-4b2d-9b5d-ab8d"


@pytest.mark.parametrize("text", ["Issue time is in the future.", "Issue time is after now"])
def test_an_issue_time_in_the_future_is_a_clock_error(text: str) -> None:
    assert isinstance(subject_error(refused(text)), ClockError)


def test_a_refused_scope_is_its_own_class() -> None:
    assert type(subject_error(refused("x", code="MP-200"))) is ScopeNotGranted
    assert type(subject_error(refused("x", code="MP-120"))) is GrantRefused


def test_an_echo_of_the_assertion_is_left_out() -> None:
    error = subject_error(refused(f"cannot read {ASSERTION[5:60]}"))

    shown = str(error) + str(error.hint)
    assert not any(ASSERTION[at : at + 12] in shown for at in range(len(ASSERTION) - 11))


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_trouble_on_their_side_may_be_tried_again(status: int) -> None:
    error = subject_error(answer(status, b"<html>Bad gateway</html>"))

    assert isinstance(error, NetworkError)
    assert error.retryable


def test_too_many_requests_is_try_again_later() -> None:
    assert isinstance(subject_error(answer(429, {})), TryAgainLater)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    error = subject_error(answer(status, b"", location="https://evil.example/"))

    assert isinstance(error, NetworkError)
    assert not error.retryable


def test_a_scope_that_customs_does_not_know_says_what_to_check() -> None:
    body = {"error": "invalid_scope", "error_description": "Not authorized to request scope toll:x"}
    with pytest.raises(ExchangeRefused) as caught:
        exchange.read_issued(answer(403, body, x_correlationid="c-1"), post())

    assert caught.value.code == "scope-not-authorized"
    assert caught.value.correlation_id == "c-1"
    assert "Digitoll" in (caught.value.hint or "")


def test_nothing_secret_is_in_the_texts_of_the_values() -> None:
    values: list[Any] = [post(), Issued("bearer-value", 9), answer(body=GOOD)]

    assert "bearer-value" not in repr(values)
    assert ASSERTION not in repr(values)
    assert "abc.def" not in repr(values)


@pytest.mark.parametrize("filler", [" ", "(", "(trace_id:", "(trace_id: ", "\t(correlation id:"])
def test_an_answer_of_a_megabyte_is_looked_at_as_far_as_a_person_reads(filler: str) -> None:
    body = {"error": "invalid_grant", "error_description": "no " + filler * (2**20 // len(filler))}
    body["error_uri"] = "x" * 2**20 + "/MP-100"
    error = subject_error(answer(400, body))
    assert str(error).startswith("Maskinporten refused the grant: 400, MP-100, invalid_grant: no")
    assert len(str(error)) < 500
    assert error.trace_id is None


def test_what_follows_the_first_two_thousand_characters_changes_nothing() -> None:
    # The expression for the trace id sees no more of a text than this.
    body = {"error": "e", "error_description": "a" * 1990 + f" (trace_id: {TRACE})"}
    assert subject_error(answer(400, body)).trace_id is None
    body = {"error": "e", "error_description": "a" * 1900 + f" (trace_id: {TRACE})  "}
    assert subject_error(answer(400, body)).trace_id == TRACE


def test_a_token_is_no_longer_than_a_header_can_carry() -> None:
    longest = "a" * 16 * 1024
    assert exchange.read_subject(answer(body=GOOD | {"access_token": longest}), post()).value
    longer = GOOD | {"access_token": longest + "a"}
    error = subject_error(answer(body=longer, x_correlationid=longest))
    assert "more than 16384 characters" in str(error)
    # What is as long is not looked for in what is shown: then nothing is shown.
    assert error.correlation_id is None


def test_an_answer_of_more_values_than_any_has_is_not_read() -> None:
    for values, read in ((19_000, True), (1_000_000, False)):
        given = answer(400, {"error": "invalid_grant", "values": [[]] * values})
        assert (read_lenient(given.body) is not None) == read
        assert isinstance(subject_error(given), GrantRefused)
    # A batch of the feed has many, and each of them says something.
    batch = json.dumps([{"routingResult": {"id": "x" * 36}}] * 100_000).encode()
    assert len(read_lenient(batch)) == 100_000


def _summary(error: HsmTollError) -> tuple[object, ...]:
    return type(error), error.code, error.who, error.retryable, error.retry_after


@pytest.mark.parametrize(
    ("status", "kind", "attributes"),
    [
        (429, TryAgainLater, ("throttled", True, 7.0)),
        (500, NetworkError, ("server-error", True, 7.0)),
        (300, NetworkError, ("redirect", False, None)),
        (399, NetworkError, ("redirect", False, None)),
        (100, NetworkError, ("redirect", False, None)),
    ],
)
def test_trouble_of_either_server_says_whether_and_when_to_try_again(
    status: int, kind: type[HsmTollError], attributes: tuple[object, ...]
) -> None:
    given = answer(status, {}, x_request_id="r-1")
    with pytest.raises(kind) as first:
        exchange.read_subject(given, post(), jti="j1", wait=7.0)
    with pytest.raises(kind) as second:
        exchange.read_issued(given, post(), wait=7.0)
    for caught, jti in ((first, "j1"), (second, None)):
        error = caught.value
        assert (error.code, error.retryable, error.retry_after) == attributes
        assert (error.correlation_id, error.jti) == ("r-1", jti)


def test_a_refusal_by_customs_is_customs_to_explain_and_shows_no_secret() -> None:
    body = {"error": "invalid_token", "error_description": f"cannot read {ASSERTION}"}
    with pytest.raises(ExchangeRefused) as caught:
        exchange.read_issued(answer(401, body, x_correlationid=ASSERTION), post(), wait=7.0)
    error = caught.value
    assert _summary(error) == (ExchangeRefused, "exchange-refused", "customs", False, None)
    assert "invalid_token: cannot read" in str(error)
    assert "HSMTOLL_ENVIRONMENT" in (error.hint or "")
    assert ASSERTION not in f"{error} {error.hint} {error.correlation_id}"


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("retried", [True, False])
def test_a_clock_that_runs_fast_is_tried_once_more_when_it_was_corrected(
    *, corrected: bool, retried: bool
) -> None:
    given = refused("Issue time is in the future.")
    with pytest.raises(ClockError) as caught:
        exchange.read_subject(given, post(), wait=7.0, corrected=corrected, retried=retried)
    again = corrected and not retried
    wait = 7.0 if again else None
    assert _summary(caught.value) == (ClockError, "issued-in-future", "you", again, wait)


def test_a_page_of_html_adds_nothing_and_other_text_is_quoted() -> None:
    assert "no reason given" in str(subject_error(answer(400, b" <html>Denied</html>")))
    assert "Denied by the gateway" in str(subject_error(answer(400, b"Denied by the gateway")))
    odd = answer(400, {"error": ["a list"], "error_description": "and a text"})
    assert str(subject_error(odd)).endswith("400, and a text")


def test_a_code_is_read_from_the_end_of_its_uri_alone() -> None:
    body = {"error": "x", "error_uri": "https://test.maskinporten.no/MP-100/errors"}
    assert subject_error(answer(400, body)).code == "grant-refused"
