"""The sandbox's Customs on the wire: exchange and APIs, each with its negative control."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.kit.customs_messages import house, presentation
from tests.kit.rule_cases import certificate, eseal, leaf
from tests.kit.sandbox_requests import Wire, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

ROAD, STATUS = "/api/movement/road/v2", "/api/movement/road/status/v2"
UPLOAD = "/api/goodsdeclaration/document/v2/declaration-id"


@pytest.fixture(scope="module")
def sandbox_customs() -> Iterator[Wire]:
    with wire() as found:
        yield found


@pytest.fixture(scope="module")
def sandbox_road(sandbox_customs: Wire) -> str:
    return sandbox_customs.bearer()


def claims_of(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def finished(found: Wire, token: str, request_id: str) -> Any:
    answer = found.call("GET", f"{STATUS}/house-consignment/validation-status/{request_id}", token)
    assert answer.is_success
    return answer.json()


def test_the_exchange_gives_a_token_that_ends_with_its_subject(sandbox_customs: Wire) -> None:
    subject = sandbox_customs.grant().json()["access_token"]
    answer = sandbox_customs.exchange(subject)
    assert answer.status_code == 200
    assert set(answer.json()) == {"issued_token_type", "access_token", "token_type", "expires_in"}
    claims = claims_of(answer.json()["access_token"])
    assert claims["exp"] == claims_of(subject)["exp"]
    assert claims["sub"] == "NTRSE-5566778899"
    norwegian = sandbox_customs.bearer("toll:movement/road/v2", certificate())
    assert claims_of(norwegian)["sub"] == "987654325"


@pytest.mark.parametrize(
    ("changes", "rule", "status"),
    [
        ({"scope": "x"}, "T01", 400),
        ({"grant_type": "urn:ietf:params:oauth:grant-type:token-exchange"}, "T02", 400),
        ({"subject_token_type": "urn:ietf:params:oauth:token-type:access_token"}, "T02", 400),
        ({"subject_token": "a.b.c"}, "T03", 401),
    ],
)
def test_the_exchange_refuses(
    sandbox_customs: Wire, changes: dict[str, str], rule: str, status: int
) -> None:
    subject = sandbox_customs.grant().json()["access_token"]
    assert sandbox_customs.exchange(subject, **changes).status_code == status
    assert sandbox_customs.sandbox.received[-1].refused_by == rule
    assert sandbox_customs.exchange(subject).status_code == 200


def test_the_self_test_scope_cannot_be_exchanged(sandbox_customs: Wire) -> None:
    subject = sandbox_customs.grant(scope="digdir:verksemd.eu").json()["access_token"]
    answer = sandbox_customs.exchange(subject)
    assert answer.status_code == 403
    assert "Not authorized to request scope digdir" in answer.text


def test_test_auth_wants_a_road_token_of_customs(sandbox_customs: Wire, sandbox_road: str) -> None:
    path = f"{ROAD}/test-auth"
    good = sandbox_customs.call("GET", path, sandbox_road)
    assert (good.status_code, good.content) == (200, b"")
    assert {"x-correlationid", "x-request-id"} <= set(good.headers)
    assert sandbox_customs.call("GET", path, None).status_code == 401
    subject = sandbox_customs.grant().json()["access_token"]
    assert sandbox_customs.call("GET", path, subject).status_code == 401
    document = sandbox_customs.bearer("toll:eu/goodsdeclaration/document.write")
    assert sandbox_customs.call("GET", path, document).status_code == 403


def test_a_submission_ends_in_an_mrn_and_only_its_owner_sees_it(
    sandbox_customs: Wire, sandbox_road: str
) -> None:
    message = house()
    sent = sandbox_customs.call("POST", f"{ROAD}/house-consignment", sandbox_road, json=message)
    assert sent.status_code == 202
    done = finished(sandbox_customs, sandbox_road, sent.json()["requestId"])
    assert done["status"] == "SUCCESS"
    assert len(done["mrn"]) == 18
    other = eseal().but(chain=leaf(organization_id="NTRSE-2"))
    stranger = sandbox_customs.bearer(ask=other)
    path = f"{STATUS}/house-consignment/validation-status/{sent.json()['requestId']}"
    assert sandbox_customs.call("GET", path, stranger).status_code == 404
    wrong = f"{ROAD}/house-consignment/validation-status/{sent.json()['requestId']}"
    assert sandbox_customs.call("GET", wrong, sandbox_road).status_code == 404

    one = f"{ROAD}/house-consignment/{done['mrn']}"
    changed = sandbox_customs.call("PUT", one, sandbox_road, json=house())
    failed = finished(sandbox_customs, sandbox_road, changed.json()["requestId"])
    assert failed["status"] == "FAILURE"
    assert sandbox_customs.call("DELETE", one, sandbox_road).status_code == 400
    gone = sandbox_customs.call("DELETE", one, sandbox_road, json=house())
    assert gone.status_code == 202
    assert sandbox_customs.call("PUT", one, sandbox_road, json=message).status_code == 404


def test_missing_members_are_named_field_by_field(sandbox_customs: Wire, sandbox_road: str) -> None:
    path = f"{ROAD}/house-consignment"
    answer = sandbox_customs.call("POST", path, sandbox_road, json={"documentIssueDate": "x"})
    assert answer.status_code == 400
    fields = {one["field"]: one["error"] for one in answer.json()["validationErrors"]}
    assert "ISO-8601" in fields["documentIssueDate"]
    parts = ("consignor", "consignee", "totalGrossMass", "transportDocumentHouseLevel.type")
    assert {f"consignmentHouseLevel.{part}" for part in parts} <= set(fields)
    assert len(fields) == 6
    text = sandbox_customs.call("POST", path, sandbox_road, content=b"{}")
    assert text.status_code == 415


def test_playground_data_decides_later(sandbox_customs: Wire, sandbox_road: str) -> None:
    path = f"{ROAD}/house-consignment"
    for number, status in (("A" * 18, "SUCCESS"), ("INVALID" + "A" * 11, "FAILURE")):
        previous = [{"typeOfReference": "N820", "referenceNumber": number}]
        given = house(
            previousDocuments=previous, importProcedure={"importProcedure": "TRANSIT_IMPORT"}
        )
        sent = sandbox_customs.call("POST", path, sandbox_road, json=given)
        done = finished(sandbox_customs, sandbox_road, sent.json()["requestId"])
        assert done["status"] == status


def test_presentation_takes_a_request_id_once(sandbox_customs: Wire) -> None:
    token = sandbox_customs.bearer("toll:eu/movement/entry")
    base = "/api/movement/presentation/v1"
    body = presentation("house-consignment")
    assert sandbox_customs.call("POST", f"{base}/house-consignment", token, json=body).is_success
    again = sandbox_customs.call("POST", f"{base}/house-consignment", token, json=body)
    assert again.status_code == 400
    (status,) = sandbox_customs.call("GET", f"{base}/validation-status", token).json()
    assert (status["requestId"], status["status"]) == (body["requestId"], "SUCCESS")


def test_routing_is_read_from_marker_to_marker(sandbox_customs: Wire) -> None:
    token = sandbox_customs.bearer("toll:eu/movement/entry")
    path = "/api/movement/routing/v1/house-consignment"
    for _ in range(1001):
        sandbox_customs.sandbox.signal("NTRSE-5566778899")
    sandbox_customs.sandbox.signal("NTRSE-2")
    first = sandbox_customs.call("GET", path, token).json()
    assert len(first) == 1000
    marker = first[-1]["routingResult"]["id"]
    rest = sandbox_customs.call("GET", path, token, params={"marker": marker}).json()
    assert len(rest) == 1
    last = rest[-1]["routingResult"]["id"]
    assert sandbox_customs.call("GET", path, token, params={"marker": last}).json() == []


@pytest.mark.parametrize(
    ("declaration", "kind", "name", "size", "status"),
    [
        ("123456789-01092023-1", "invoice", "a.pdf", 10, 201),
        ("123456789-01092023-1", "freight invoice", "a.xlsx", 10_000_000, 201),
        ("12345-01092023-1", "invoice", "a.pdf", 10, 400),
        ("123456789-01092023-1", "Invoice", "a.pdf", 10, 400),
        ("123456789-01092023-1", "invoice", "a.doc", 10, 400),
        ("123456789-01092023-1", "invoice", "a.pdf", 10_000_001, 400),
    ],
)
def test_an_upload_is_checked(
    sandbox_customs: Wire, declaration: str, kind: str, name: str, size: int, status: int
) -> None:
    token = sandbox_customs.bearer("toll:eu/goodsdeclaration/document.write")
    metadata = (None, json.dumps({"documentType": kind}), "application/json")
    parts = [("metadata", metadata), ("file", (name, b"x" * size, "application/octet-stream"))]
    path = f"{UPLOAD}/{declaration}/document"
    assert sandbox_customs.call("POST", path, token, files=parts).status_code == status
    if status == 201:
        swapped = sandbox_customs.call("POST", path, token, files=parts[::-1])
        assert swapped.status_code == 400
        (error,) = swapped.json()["validationErrors"]
        # A field, and what is wrong with it.
        assert error["field"] == "metadata"
        alone = sandbox_customs.call("POST", path, token, files=parts[:1])
        assert alone.json()["validationErrors"] == [{"field": "file", "error": "must not be null"}]
