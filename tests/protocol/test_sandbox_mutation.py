"""Each rule switched off changes what the wire shows: nothing else stands in for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.sandbox_twins import NOW, Twins, eseal, grants, leaf
from tests.sandbox_wire import Wire, claims_of, wire

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
    from tests.sandbox_twins import enterprise

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
}


def _short() -> dict[str, Any]:
    return {"documentIssueDate": "2026-05-04T10:00:00Z", "declarant": {"name": "Eksempel AB"}}


@pytest.mark.parametrize("rule", sorted(SHAPES))
def test_without_its_rule_the_answer_looks_different(rule: str) -> None:
    seen = []
    for without in (frozenset[str](), frozenset({rule})):
        with wire(without=without) as found:
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
