"""Which requests the proxy lets pass, with which token, and which headers go along."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from hsmtoll.errors import ConfigurationError
from hsmtoll.proxy.admission import (
    Admission,
    Rejected,
    paths_by_prefix,
    request_headers,
    response_headers,
)

ADMISSION = Admission(frozenset({"127.0.0.1:8880", "localhost:8880"}), {})
OPEN = Admission(None, {"/api/movement/ferry/v1": "toll:movement/ferry"})
ROAD = "/api/movement/road/v2"


@pytest.mark.parametrize("host", ["127.0.0.1:8880", "localhost:8880", "LOCALHOST:8880"])
def test_the_address_that_is_listened_on_is_served(host: str) -> None:
    ADMISSION.check_origin(CIMultiDict({"Host": host}))
    ADMISSION.check_origin(CIMultiDict({"Host": host, "Sec-Fetch-Site": "none"}))


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "host-refused"),
        ({"Host": "evil.example:8880"}, "host-refused"),
        ({"Host": "127.0.0.1:8881"}, "host-refused"),
        ({"Host": "127.0.0.1"}, "host-refused"),
        ({"Host": "127.0.0.1:8880", "Origin": "http://evil.example"}, "origin-refused"),
        ({"Host": "127.0.0.1:8880", "Origin": "null"}, "origin-refused"),
        ({"Host": "127.0.0.1:8880", "Origin": "http://127.0.0.1:8880"}, "origin-refused"),
        ({"Host": "127.0.0.1:8880", "Sec-Fetch-Site": "cross-site"}, "origin-refused"),
        ({"Host": "127.0.0.1:8880", "Sec-Fetch-Site": "same-site"}, "origin-refused"),
    ],
)
def test_a_page_in_a_browser_is_not_served(headers: dict[str, str], code: str) -> None:
    with pytest.raises(Rejected) as caught:
        ADMISSION.check_origin(CIMultiDict(headers))
    assert (caught.value.status, caught.value.code) == (403, code)


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        (f"{ROAD}/test-auth", "road"),
        (f"{ROAD}/transport?x=../y", "road"),
        (f"{ROAD}/a%20b", "road"),
        (f"{ROAD}/a..b/.c/...", "road"),
        (f"{ROAD}/a;b=..;c", "road"),
        ("/api/movement/road/status/v2/x", "road-query"),
        ("/api/movement/ferry/v1", "toll:movement/ferry"),
        ("/api/movement/ferry/v1/x?y", "toll:movement/ferry"),
    ],
)
def test_a_known_path_has_the_scope_of_its_api(path: str, scope: str) -> None:
    target = OPEN.target("GET", path, CIMultiDict())
    assert (target.path, target.scope) == (path, scope)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api/movement/road/v3/x",
        "/api/movement/road/v2x",
        "/api/movement/ferry/v10",
        f"{ROAD}/../../../other",
        f"{ROAD}/%2e%2e/other",
        f"{ROAD}/%2E./other",
        f"{ROAD}/..%2fother",
        f"{ROAD}/..%5cother",
        f"{ROAD}/..;/other",
        f"{ROAD}/.%2e;x=y/other",
        f"{ROAD}/./x",
        f"{ROAD}\\..\\x",
        f"{ROAD}/x#y",
        f"{ROAD}/ø",
        f"/{ROAD}/x",
        f"https://evil.example{ROAD}/x",
        "evil.example:443",
        "*",
        f"{ROAD}/{'a' * 5000}",
    ],
)
def test_another_path_does_not_pass(path: str) -> None:
    with pytest.raises(Rejected) as caught:
        OPEN.target("GET", path, CIMultiDict())
    assert caught.value.status == 404


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "get", "PROPFIND", "GET\x1b"])
def test_a_method_that_customs_does_not_have_does_not_pass(method: str) -> None:
    with pytest.raises(Rejected) as caught:
        OPEN.target(method, f"{ROAD}/x", CIMultiDict())
    assert caught.value.status == 405
    assert str(caught.value).isprintable()


def test_a_caller_may_not_bring_a_token_of_its_own() -> None:
    with pytest.raises(Rejected, match="Authorization"):
        OPEN.target("GET", f"{ROAD}/x", CIMultiDict({"authorization": "Bearer x"}))


def test_headers_say_for_whom_the_token_is() -> None:
    headers = CIMultiDict(
        {
            "hsmtoll-consumer-org": "314159265",
            "Hsmtoll-Resource": "https://api.example",
            "Hsmtoll-Authorization-Details": '[{"type": "x"}]',
        }
    )
    assert OPEN.target("GET", f"{ROAD}/x", headers).whom == {
        "consumer_org": "314159265",
        "resource": "https://api.example",
        "authorization_details": [{"type": "x"}],
    }
    for text in ("{", "[" * 8000, "NaN", '{"a": 1, "a": 2}'):
        headers["Hsmtoll-Authorization-Details"] = text
        with pytest.raises(Rejected, match="not JSON"):
            OPEN.target("GET", f"{ROAD}/x", headers)


@pytest.mark.parametrize(
    "given",
    [
        [("Hsmtoll-Consumer", "314159265")],
        [("Hsmtoll-Consumer-Org", "314159265"), ("hsmtoll-consumer-org", "271828182")],
    ],
)
def test_a_header_that_says_unclearly_for_whom_it_is_does_not_pass(
    given: list[tuple[str, str]],
) -> None:
    with pytest.raises(Rejected) as caught:
        OPEN.target("GET", f"{ROAD}/x", CIMultiDict(given))
    assert (caught.value.status, caught.value.code) == (400, "usage")


@pytest.mark.parametrize("path", ["/api/none", f"{ROAD}/../x", f"//{ROAD}"])
def test_the_query_of_a_rejected_request_is_not_repeated(path: str) -> None:
    with pytest.raises(Rejected) as caught:
        OPEN.target("GET", f"{path}?secret=1", CIMultiDict())
    assert path in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_body_in_another_transfer_coding_does_not_pass() -> None:
    OPEN.target("POST", f"{ROAD}/x", CIMultiDict({"Transfer-Encoding": "Chunked"}))
    with pytest.raises(Rejected, match="transfer coding"):
        OPEN.target("POST", f"{ROAD}/x", CIMultiDict({"Transfer-Encoding": "gzip, chunked"}))


def test_a_callers_path_makes_no_label_of_the_metrics() -> None:
    admission = Admission(None, {"/api/own": "toll:own"})
    targets = [admission.target("GET", f"/api/own/{each}", CIMultiDict()) for each in range(3)]
    assert {each.api.name for each in targets} == {"/api/own"}


def test_headers_of_the_connection_stay_behind_and_others_go_along_unchanged() -> None:
    kept = [(b"Content-Type", b"text/plain"), (b"X-Twice", b"1"), (b"X-Twice", b"2")]
    given = [
        (b"Host", b"127.0.0.1:8880"), (b"Connection", b"keep-alive, X-Mine"), (b"X-Mine", b"1"),
        (b"Transfer-Encoding", b"chunked"), (b"TE", b"trailers"), (b"Upgrade", b"websocket"),
        (b"Cookie", b"a=b"), (b"Expect", b"100-continue"), (b"Proxy-Authorization", b"Basic x"),
        (b"Hsmtoll-Consumer-Org", b"314159265"), *kept,
    ]  # fmt: skip
    assert request_headers(given) == kept


@pytest.mark.parametrize(
    ("location", "given"),
    [
        ("https://api.toll.example/api/movement/road/v2/x", "/api/movement/road/v2/x"),
        ("https://api.toll.example", "/"),
        ("/relative", "/relative"),
        ("https://api.toll.example.evil/x", "https://api.toll.example.evil/x"),
        ("https://elsewhere.example/x", "https://elsewhere.example/x"),
        # As a path, it would be another host.
        ("https://api.toll.example//evil.example", "https://api.toll.example//evil.example"),
        ("https://[", "https://["),
    ],
)
def test_a_location_at_customs_leads_through_the_proxy(location: str, given: str) -> None:
    raw = [(b"Location", location.encode()), (b"Set-Cookie", b"a=b"), (b"Server", b"x")]
    assert response_headers(raw, location, "https://api.toll.example") == [
        ("Server", "x"),
        ("Location", given),
    ]


@pytest.mark.parametrize("word", ["/api/x", "/api/x=", "api/x=road", "/api/../x=road", "/=road"])
def test_a_further_path_is_a_prefix_with_its_scope(word: str) -> None:
    assert paths_by_prefix(["/api/x=road", "/api/y=toll:y"]) == {
        "/api/x": "road",
        "/api/y": "toll:y",
    }
    with pytest.raises(ConfigurationError):
        paths_by_prefix([word])


def test_a_header_of_an_answer_is_left_out_only_for_a_control_character() -> None:
    raw = [(b"Server", b"x"), (b"X-A", b"a\x1b[31m"), (b"X-B", b"b\tc")]
    assert response_headers(raw, "/a\x01", "https://api.toll.example") == [
        ("Server", "x"),
        ("X-B", "b\tc"),
    ]


@pytest.mark.parametrize(("raw", "text"), [("æ".encode(), "æ"), ("æ".encode("latin-1"), "æ")])
def test_a_letter_beyond_ascii_stays_that_letter(raw: bytes, text: str) -> None:
    headers = response_headers([(b"Server", b"x"), (b"X-A", raw)], None, "https://x")
    assert headers == [("Server", "x"), ("X-A", text)]
