"""Each rule switched off changes what the wire shows: nothing else stands in for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.sandbox.rules import TABLE
from tests.kit.customs_messages import house, presentation
from tests.kit.rule_cases import NOW, Twins, certificate, eseal, grants, leaf
from tests.kit.sandbox_requests import Wire, claims_of, wire

if TYPE_CHECKING:
    from collections.abc import Callable

TWINS = {twins.rule: twins for twins in grants()}
TEST_AUTH = "/api/movement/road/v2/test-auth"
HOUSE = "/api/movement/road/v2/house-consignment"


@pytest.mark.parametrize("rule", sorted(TWINS))
def test_without_its_rule_a_bad_grant_becomes_a_token(rule: str) -> None:
    twins: Twins = TWINS[rule]
    for without, status in ((frozenset[str](), twins.status), (frozenset({rule}), 200)):
        with wire(without=without, **twins.settings) as found:
            if twins.revoked:
                found.sandbox.revoke(twins.revoked)
            found.sandbox.trust(_prod(), environment="prod")
            assert found.send(twins.bad).status_code == status


def _prod() -> Any:
    from tests.kit.rule_cases import enterprise

    return enterprise("prod").root


def _metadata(found: Wire) -> Any:
    where = f"{found.sandbox.issuer}.well-known/oauth-authorization-server"
    return found.http.get(where).json()["issuer"].endswith("/")


def _refusal(found: Wire) -> Any:
    return "trace_id" in found.grant(eseal().but(claims={"nbf": 1})).json()["error_description"]


def _replayed(found: Wire) -> Any:
    return [found.send(eseal()).status_code for _ in range(2)]


def _claims(found: Wire) -> Any:
    return claims_of(found.grant().json()["access_token"])


def _identifier(found: Wire) -> Any:
    ask = eseal().but(chain=leaf(organization_id="ei:SE 1"))
    return claims_of(found.grant(ask).json()["access_token"])["consumer"]["ID"]


def _short() -> dict[str, Any]:
    return {"documentIssueDate": "2026-05-04T10:00:00Z"}


def _norwegian_token(found: Wire) -> str:
    answer = found.grant(certificate(), scope="toll:movement/road/v2")
    return str(answer.json()["access_token"])


def _faulty(found: Wire, endpoint: str, ask: Callable[[], Any]) -> Any:
    found.sandbox.fault("500", endpoint)
    return ask().status_code


def _denied(found: Wire) -> Any:
    found.sandbox.state.customs_denied.add(("NTRSE-5566778899", "toll:eu/movement/road/v2"))
    return found.exchange(found.grant().json()["access_token"]).status_code


def _ends_together(found: Wire) -> Any:
    subject = found.grant().json()["access_token"]
    issued = found.exchange(subject).json()["access_token"]
    return claims_of(issued)["exp"] - claims_of(subject)["exp"]


def _too_late(found: Wire) -> Any:
    subject = found.grant().json()["access_token"]
    found.sandbox.fault("clock", "exchange", seconds=10_000)
    return found.exchange(subject).status_code


def _submitted(found: Wire, **members: Any) -> str:
    message = {**house(), **members}
    return str(found.call("POST", HOUSE, found.bearer(), json=message).json()["requestId"])


def _result(found: Wire, request_id: str, token: str | None = None) -> Any:
    path = f"{HOUSE.replace('road/v2', 'road/status/v2')}/validation-status/{request_id}"
    return found.call("GET", path, token or found.bearer())


def _later(found: Wire, **members: Any) -> Any:
    return _result(found, _submitted(found, **members)).json()


def _asked_by_another(found: Wire) -> Any:
    other = found.exchange(_norwegian_token(found)).json()["access_token"]
    return _result(found, _submitted(found), other).status_code


def _presented(found: Wire) -> Any:
    message = presentation("house-consignment", requestId="4c1c3c0e-6c9f-4a51-9a39-1f0f1d7d1a11")
    token = found.bearer("toll:eu/movement/entry")
    path = "/api/movement/presentation/v1/house-consignment"
    return found.call("POST", path, token, json=message).status_code


def _twice(found: Wire) -> Any:
    subject = found.grant().json()["access_token"]
    return [found.exchange(subject).status_code for _ in range(2)]


def _feed(found: Wire) -> Any:
    found.sandbox.signal("NTRSE-0000000000")
    token = found.bearer("toll:eu/movement/entry")
    return found.call("GET", "/api/movement/routing/v1/house-consignment", token).json()


def _uploaded(found: Wire) -> Any:
    path = "/api/goodsdeclaration/document/v2/declaration-id/123456789-01092026-1/document"
    files = [
        ("metadata", (None, '{"documentType": "selfie"}', "application/json")),
        ("file", ("a.pdf", b"x", "application/pdf")),
    ]
    token = found.bearer("toll:eu/goodsdeclaration/document.write")
    return found.call("POST", path, token, files=files).status_code


SHAPES: dict[str, Callable[[Wire], Any]] = {
    "M01": _metadata,
    "M02": lambda w: "x5c" in w.http.get(f"{w.sandbox.issuer}jwk").json()["keys"][0],
    "M03": lambda w: w.http.get(f"{w.sandbox.issuer}health").status_code,
    "M08": _refusal,
    "M09": lambda w: "cache-control" in w.grant().headers,
    "M10": lambda w: w.send(eseal().but(authorization=True)).status_code,
    "M56": lambda w: (
        w.send(eseal().but(claims={"iat": NOW - 60, "exp": NOW + 60}))
        .json()
        .get("error_description", "")[:19]
    ),
    "M58": _replayed,
    "M59": lambda w: w.send(eseal().but(claims={"jti": None})).status_code,
    "M68": lambda w: w.grant(scope="toll:eu/movement/air toll:movement/air").status_code,
    "M80": lambda w: len(w.grant().json()),
    "M81": lambda w: w.grant().json()["expires_in"],
    "M82": lambda w: w.grant().json()["expires_in"],
    "M83": lambda w: len(w.grant().json()["access_token"].split(".")[0]),
    "M84": lambda w: "sub" in _claims(w),
    "M86": _identifier,
    "M87": lambda w: _claims(w)["client_id"].startswith("eidas-"),
    "M88": lambda w: _claims(w)["consumer"]["authority"],
    "T06": lambda w: len(w.exchange(w.grant().json()["access_token"]).json()),
    "T10": lambda w: w.call("GET", TEST_AUTH, "x").status_code,
    "T11": lambda w: w.call("GET", TEST_AUTH, w.bearer("toll:eu/movement/air")).status_code,
    "T12": lambda w: w.call("GET", TEST_AUTH, w.bearer()).status_code,
    "T14": lambda w: w.call("POST", HOUSE, w.bearer(), content=b"{}").status_code,
    "T15": lambda w: w.call("POST", HOUSE, w.bearer(), json={}).status_code,
    "T20": lambda w: w.call("DELETE", f"{HOUSE}/26NO", w.bearer(), json=_short()).status_code,
    "T21": lambda w: w.call("DELETE", f"{HOUSE}/26NO", w.bearer()).status_code,
    "T26": lambda w: "x-correlationid" in w.call("GET", TEST_AUTH, None).headers,
    "M72": lambda w: (
        w.grant(certificate(), scope="toll:movement/road/v2", consumer_org="987654325")
        .json()
        .get("error_description", "")[:40]
    ),
    "M85": lambda w: claims_of(_norwegian_token(w))["consumer"]["ID"],
    "M89": lambda w: _faulty(w, "token", w.grant),
    "T03": lambda w: w.exchange(w.grant().json()["access_token"][:-8] + "AAAAAAAA").status_code,
    "T04": lambda w: (
        w.exchange(w.grant(scope="digdir:verksemd.eu").json()["access_token"]).status_code
    ),
    "T05": _denied,
    "T07": _ends_together,
    "T08": lambda w: len(w.bearer().split(".")[0]),
    "T09": _too_late,
    "T13": lambda w: len({_submitted(w) for _ in range(2)}),
    "T16": lambda w: _result(w, _submitted(w)).status_code,
    "T17": lambda w: "mrn" in _later(w),
    "T18": _asked_by_another,
    "T19": lambda w: (
        w.call(
            "POST", HOUSE.replace("road/v2", "road/status/v2"), w.bearer(), json=_short()
        ).status_code
    ),
    "B1": lambda w: w.grant(eseal().but(chain=leaf(key_usage={"keyEncipherment"}))).status_code,
    "B4": lambda w: w.grant(eseal().but(chain=leaf(qualified=True, qc_type="esign"))).status_code,
    "F2": _twice,
    "T22": lambda w: [_presented(w) for _ in range(2)],
    "T23": _feed,
    "T24": _uploaded,
    "T25": lambda w: _later(w, consignee={"country": "XX"})["status"],
    "T27": lambda w: _faulty(w, "exchange", lambda: w.exchange(w.grant().json()["access_token"])),
}

#: What a shape needs to be seen at all.
NEEDS: dict[str, dict[str, Any]] = {
    "T16": {"polling_delay": 60.0},
    "B1": {"key_usage_enforced": True},
    "F2": {"exchange_twice": False},
}


@pytest.mark.parametrize("rule", sorted(SHAPES))
def test_without_its_rule_the_answer_looks_different(rule: str) -> None:
    seen = []
    for without in (frozenset[str](), frozenset({rule})):
        with wire(without=without, **NEEDS.get(rule, {})) as found:
            seen.append(SHAPES[rule](found))
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("T01", {"scope": "x"}),
        ("T02", {"grant_type": "urn:ietf:params:oauth:grant-type:token-exchange"}),
    ],
)
def test_without_its_rule_a_bad_exchange_becomes_a_token(
    rule: str, changes: dict[str, str]
) -> None:
    for without, status in ((frozenset[str](), 400), (frozenset({rule}), 200)):
        with wire(without=without) as found:
            subject = found.grant().json()["access_token"]
            assert found.exchange(subject, **changes).status_code == status


def test_every_rule_of_the_table_is_switched_off_by_some_test() -> None:
    assert set(TABLE) == {*TWINS, *SHAPES, "T01", "T02"}
