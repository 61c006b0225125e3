"""Customs' guide, page by page: its own examples are taken, and what it forbids is refused."""

from __future__ import annotations

import copy
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from tests.kit.customs_messages import house, message, presentation
from tests.kit.sandbox_requests import Wire, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

ROAD, STATUS = "/api/movement/road/v2", "/api/movement/road/status/v2"
GUIDE = "https://toll.github.io/api/"

#: mo-eksempler-EN, with the declaration and the VOEC number of its test data.
CUDE = {
    "typeOfReference": "CUDE",
    "declarantNumber": "123456789",
    "declarationDate": "2022-08-10",
    "sequenceNumber": "1",
}
TRANSIT = {"typeOfReference": "N820", "referenceNumber": "22FR98765273876523"}
MASTER = {
    "carrierIdentificationNumber": "123456789",
    "transportDocumentMasterLevel": {"documentNumber": "HUH34UI5HU34I", "type": "N741"},
}


def release(procedure: str, outgoing: str | None = None) -> dict[str, Any]:
    chosen = {"outgoingProcedure": outgoing} if outgoing else {"hasOutgoingProcedure": False}
    return {"importProcedure": procedure, **chosen}


def export(number: str = "22SEEVO1CT5UAP2BT3", kind: str = "UGE_EXPORT") -> dict[str, str]:
    return {"typeOfExport": kind, "exportId": number}


def goods(value: float = 400.50, count: int = 11, number: str = "2056550") -> list[dict[str, Any]]:
    return [
        {
            "additionalFiscalReferences": {"vatIdentificationNumber": number, "role": "FR5"},
            "itemAmountInvoicedVOEC": {"value": value, "numberOfItems": count},
            "commodityCodeVOEC": {"harmonizedSystemSubHeadingCode": "551100"},
        }
    ]


IMPORT = release("IMMEDIATE_RELEASE_IMPORT")
EXAMPLES: dict[str, dict[str, Any]] = {
    "1": {
        "consignmentMasterLevel": MASTER,
        "previousDocuments": [CUDE],
        "exportFromEU": [export()],
        "importProcedure": release("IMMEDIATE_RELEASE_IMPORT", "EXP"),
    },
    "2": {
        "previousDocuments": [TRANSIT, CUDE],
        "importProcedure": release("IMMEDIATE_RELEASE_IMPORT", "TRA"),
    },
    "3": {
        "previousDocuments": [TRANSIT],
        "importProcedure": release("TRANSIT_IMPORT", "TRA"),
    },
    "4": {
        "previousDocuments": [{"typeOfReference": "RETR", "referenceNumber": "SE2298081234598765"}],
        "exportFromEU": [export("22SEEEO1CT5UAP2BT3")],
        "importProcedure": release("TRANSIT_RELEASE", "EXP"),
    },
    "5": {"previousDocuments": [CUDE], "importProcedure": IMPORT},
    "6": {"goodsItem": goods(), "importProcedure": release("IMMEDIATE_RELEASE_VOEC")},
    "7": {
        "receptacleIdentificationNumber": "4j3i24ji3o24ji23",
        "importProcedure": release("COLLECTIVE_RELEASE"),
    },
    "8": {"previousDocuments": [CUDE], "importProcedure": release("WAREHOUSE_RELEASE")},
    "9": {
        "previousDocuments": [{"typeOfReference": "GONU", "referenceNumber": "123456789"}],
        "exportFromEU": [export("22SEEVO1CT5UAP2BT3", "AES_EXPORT")],
        "importProcedure": release("WAREHOUSE_RELEASE", "EXP"),
    },
    # prosedyre-mo-vei-ferge-EN, variants 27 and 30.
    "variant 27": {
        "previousDocuments": [{"typeOfReference": "N955", "referenceNumber": "1"}],
        "importProcedure": release("ATA_CARNET"),
    },
    "variant 30": {"previousDocuments": [CUDE], "importProcedure": release("CUSTOMS_DECLARATION")},
}


@pytest.fixture(scope="module")
def customs() -> Iterator[Wire]:
    with wire() as found:
        yield found


@pytest.fixture(scope="module")
def road(customs: Wire) -> str:
    return customs.bearer()


def sent(customs: Wire, token: str, level: str, given: dict[str, Any]) -> dict[str, Any]:
    """What becomes of a message: its 400, or its result."""
    answer = customs.call("POST", f"{ROAD}/{level}", token, json=given)
    if answer.status_code == 400:
        found: dict[str, Any] = answer.json()
        return found
    assert answer.status_code == 202
    where = f"{STATUS}/{level}/validation-status/{answer.json()['requestId']}"
    result: dict[str, Any] = customs.call("GET", where, token).json()
    return result


def later(customs: Wire, token: str, **members: Any) -> list[tuple[str, str]]:
    """The errors that are found in a house consignment after it was taken; each names its page."""
    found = sent(customs, token, "house-consignment", house(**members))
    assert all(each["see"].startswith(GUIDE) for each in found["validationErrorList"])
    assert (found["status"] == "SUCCESS") == (found["validationErrorList"] == [])
    top = "consignmentHouseLevel."
    return [
        (each["pointer"]["messageElementPath"].removeprefix(top), each["description"])
        for each in found["validationErrorList"]
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_the_guide_succeeds_and_lacks_nothing(
    customs: Wire, road: str, name: str
) -> None:
    found = sent(customs, road, "house-consignment", house(**EXAMPLES[name]))

    assert (found["status"], found["incompleteDocumentationReasonList"]) == ("SUCCESS", [])
    assert len(found["mrn"]) == 18


@pytest.mark.parametrize(
    ("level", "missing"),
    [
        ("transport", "carrier"),
        ("transport", "activeBorderTransportMeans.operator"),
        ("transport", "activeBorderTransportMeans.identificationNumber"),
        ("transport", "customsOfficeOfFirstEntry.referenceNumber"),
        ("transport", "documentIssueDate"),
        ("master-consignment", "consignmentMasterLevel.consignor"),
        ("master-consignment", "consignmentMasterLevel.grossMass"),
        ("house-consignment", "consignmentHouseLevel.consignee"),
        ("house-consignment", "consignmentHouseLevel.totalGrossMass"),
        ("house-consignment", "consignmentHouseLevel.transportDocumentHouseLevel.type"),
    ],
)
def test_what_the_guides_tables_call_mandatory_is_demanded_and_its_page_named(
    customs: Wire, road: str, level: str, missing: str
) -> None:
    assert sent(customs, road, level, message(level))["status"] == "SUCCESS"

    short = copy.deepcopy(message(level))
    holder, *path = [short, *missing.split(".")]
    for part in path[:-1]:
        holder = holder[part]
    del holder[path[-1]]
    (error,) = sent(customs, road, level, short)["validationErrors"]
    assert error["field"] == missing
    assert error["error"] in ("must not be null", "must not be blank")
    assert error["see"] == f"{GUIDE}mo/sentrale-dataelementer-EN.html"


@pytest.mark.parametrize("level", ["transport", "master-consignment", "house-consignment"])
def test_declarant_and_representative_are_neither_demanded_nor_refused(
    customs: Wire, road: str, level: str
) -> None:
    named = {"identificationNumber": "123456789"}
    for members in ({}, {"representative": named}, {"declarant": named}):
        done = sent(customs, road, level, {**message(level), **members})
        assert done["status"] == "SUCCESS"

    gone = customs.call("DELETE", f"{ROAD}/{level}/{done['mrn']}", road, json=message("any"))
    assert gone.status_code == 202
    again = customs.call("DELETE", f"{ROAD}/{level}/{done['mrn']}", road, json=message("any"))
    assert again.status_code == 404


def test_a_transport_may_come_before_its_consignments_are_known(customs: Wire, road: str) -> None:
    given = message("transport")
    assert not any(name.startswith("consignment") for name in given)
    assert sent(customs, road, "transport", given)["status"] == "SUCCESS"


@pytest.mark.parametrize("mode", ["air", "rail", "maritime"])
def test_the_driver_is_demanded_by_road_alone(customs: Wire, mode: str) -> None:
    token = customs.bearer(f"toll:eu/movement/{mode}")
    path = f"/api/movement/{mode}/v1/transport"
    given = message("transport")
    del given["activeBorderTransportMeans"]["operator"]
    assert customs.call("POST", path, token, json=given).status_code == 202
    del given["carrier"]
    assert customs.call("POST", path, token, json=given).status_code == 400


@pytest.mark.parametrize("number", [*range(1, 11)])
def test_the_ten_declarations_of_the_playground_are_found(
    customs: Wire, road: str, number: int
) -> None:
    document = {**CUDE, "sequenceNumber": str(number)}
    assert later(customs, road, previousDocuments=[document], importProcedure=IMPORT) == []


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"sequenceNumber": "11"}, "sequenceNumber"),
        ({"sequenceNumber": "0"}, "sequenceNumber"),
        ({"declarationDate": "2022-08-11"}, "sequenceNumber"),
        ({"declarantNumber": "913144929"}, "sequenceNumber"),
        ({"declarantNumber": None}, "declarantNumber"),
        ({"declarationDate": ""}, "declarationDate"),
        # What other documents have in its place does not make a declaration of it.
        (
            {
                "declarantNumber": None,
                "declarationDate": None,
                "sequenceNumber": None,
                "referenceNumber": "123456789-10082022-1",
            },
            "declarantNumber",
        ),
    ],
)
def test_another_declaration_is_a_failure(
    customs: Wire, road: str, changes: dict[str, Any], place: str
) -> None:
    given = {"previousDocuments": [{**CUDE, **changes}], "importProcedure": IMPORT}
    assert later(customs, road, **given)[0][0] == f"previousDocuments[0].{place}"


@pytest.mark.parametrize(
    ("members", "place", "text"),
    [
        ({"previousDocuments": [CUDE]}, "importProcedure", "importProcedure is required when any"),
        (
            {"previousDocuments": [{**TRANSIT, "referenceNumber": "22FRINVALID6523123"}],
             "importProcedure": release("TRANSIT_IMPORT", "TRA")},
            "previousDocuments[0].referenceNumber",
            "contains a referenceNumber in wrong state",
        ),
        (
            {"previousDocuments": [{**TRANSIT, "referenceNumber": "22FR9876527387652"}],
             "importProcedure": release("TRANSIT_IMPORT", "TRA")},
            "previousDocuments[0].referenceNumber",
            "contains a referenceNumber in wrong state",
        ),
        (
            {"previousDocuments": [{"typeOfReference": "RETR"}],
             "importProcedure": release("TRANSIT_RELEASE")},
            "previousDocuments[0].referenceNumber",
            "Field should have value unless typeOfReference is CUDE",
        ),
        (
            {"previousDocuments": [CUDE, {**CUDE, "sequenceNumber": "2"}],
             "importProcedure": IMPORT},
            "previousDocuments",
            "PreviousDocuments can only contain one document of type CUDE",
        ),
        (
            {"previousDocuments": [TRANSIT, TRANSIT],
             "importProcedure": release("TRANSIT_IMPORT", "TRA")},
            "previousDocuments[1].referenceNumber",
            "Duplicate PreviousDocuments with referenceNumber: 22FR98765273876523",
        ),
        (
            {"previousDocuments": [TRANSIT],
             "importProcedure": release("COLLECTIVE_RELEASE", "EXP")},
            "previousDocuments[0].typeOfReference",
            "Field cannot have value N820 out when consignmentHouseLevel.outgoingProcedure is EXP",
        ),
        (
            {"previousDocuments": [{**TRANSIT, "declarantNumber": "123456789"}],
             "importProcedure": release("TRANSIT_IMPORT", "TRA")},
            "previousDocuments[0].declarantNumber",
            "cannot be filled out when consignmentHouseLevel.importProcedure is TRANSIT_IMPORT",
        ),
        (
            {"exportFromEU": [export()], "importProcedure": release("TRANSIT_IMPORT", "TRA")},
            "exportFromEU",
            "when consignmentHouseLevel.importProcedure.outgoingProcedure is TRA",
        ),
        (
            {"exportFromEU": [export(), export()],
             "importProcedure": release("COLLECTIVE_RELEASE", "EXP")},
            "exportFromEU[1].exportId",
            "Duplicate ExportFromEU with exportId: 22SEEVO1CT5UAP2BT3",
        ),
        (
            {"exportFromEU": [export("24SE012345", "AES_EXPORT")],
             "importProcedure": release("COLLECTIVE_RELEASE", "EXP")},
            "exportFromEU[0].exportId",
            "Invalid MRN format for export of type AES_EXPORT",
        ),
        (
            {"exportFromEU": [export("24NO0123456789AAED", "EIDR_EXPORT")],
             "importProcedure": release("COLLECTIVE_RELEASE", "EXP")},
            "exportFromEU[0].exportId",
            "Invalid MRN format for export of type EIDR_EXPORT",
        ),
        (
            {"importProcedure": release("COLLECTIVE_RELEASE", "XYZ")},
            "importProcedure.outgoingProcedure",
            "When field is provided, it has to be one of",
        ),
        (
            {"importProcedure": release("NEVER_RELEASE")},
            "importProcedure.importProcedure",
            "Invalid code. Expected codes are one of [IMMEDIATE_RELEASE_IMPORT",
        ),
        (
            {"goodsItem": goods(number="589403"),
             "importProcedure": release("IMMEDIATE_RELEASE_VOEC")},
            "goodsItem[0].additionalFiscalReferences.vatIdentificationNumber",
            "Unknown vatIdentificationNumber",
        ),
        (
            {"goodsItem": goods(6001.0, 2), "importProcedure": release("IMMEDIATE_RELEASE_VOEC")},
            "goodsItem[0].itemAmountInvoicedVOEC.value",
            "When item value exceeds NOK 3000, a regular import declaration has to be submitted",
        ),
        (
            {"goodsItem": goods(), "importProcedure": release("COLLECTIVE_RELEASE")},
            "goodsItem",
            "importProcedure is not IMMEDIATE_RELEASE_VOEC, it should not be provided.",
        ),
        (
            {"placeOfDelivery": {"name": "Oslo"}},
            "placeOfDelivery.unloCode",
            "If location AND address is not provided, then unloCode is required",
        ),
        (
            {"placeOfDelivery": {"unloCode": "oslo"}},
            "placeOfDelivery.unloCode",
            "Invalid code. Expected valid UNLOCODE",
        ),
        (
            {"consignee": {"name": "Mottaker", "address": {"country": "QQ"}}},
            "consignee.address.country",
            "Country is invalid",
        ),
    ],
)  # fmt: skip
def test_what_the_guide_lists_as_an_error_is_found_later(
    customs: Wire, road: str, members: dict[str, Any], place: str, text: str
) -> None:
    found = later(customs, road, **members)
    assert [where for where, _ in found] == [place]
    assert text in found[0][1]


def test_transit_and_export_go_together_into_a_warehouse(customs: Wire, road: str) -> None:
    # prosedyre-mo-vei-ferge-EN, variant 24.
    assert not later(
        customs,
        road,
        previousDocuments=[TRANSIT],
        exportFromEU=[export("24SE0123456789AAED", "EIDR_EXPORT")],
        importProcedure=release("WAREHOUSE_RELEASE", "EXP"),
    )


def test_a_customs_office_is_one_of_the_code_list(customs: Wire, road: str) -> None:
    for office, status in (("NO364002", "SUCCESS"), ("NO999999", "FAILURE"), ("Oslo", "FAILURE")):
        given = message("transport", customsOfficeOfFirstEntry={"referenceNumber": office})
        assert sent(customs, road, "transport", given)["status"] == status


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"importProcedure": IMPORT}, "INCOMPLETE_CUDE_DOCUMENTATION"),
        ({"importProcedure": release("COLLECTIVE_RELEASE", "EXP")}, "INCOMPLETE_EXP_DOCUMENTATION"),
        ({"importProcedure": release("TRANSIT_IMPORT")}, "INCOMPLETE_TRA_DOCUMENTATION"),
        ({"importProcedure": release("IMMEDIATE_RELEASE_VOEC")}, "INCOMPLETE_VOEC_DOCUMENTATION"),
    ],
)
def test_what_may_still_come_is_told_as_incomplete(
    customs: Wire, road: str, members: dict[str, Any], reason: str
) -> None:
    found = sent(customs, road, "house-consignment", house(**members))
    assert found["status"] == "SUCCESS"
    assert found["incompleteDocumentationReasonList"] == [reason]
    where = f"{STATUS}/house-consignment/{found['mrn']}/transport-document/status"
    status = customs.call("GET", where, road).json()
    assert status["documentStatus"] == "INCOMPLETE"
    assert status["incompleteDocumentationReasonList"] == [reason]


def test_lists_of_documents_say_which_of_them_were_received(customs: Wire, road: str) -> None:
    number, ours = uuid.uuid4().hex, {"documentNumber": uuid.uuid4().hex, "type": "N730"}
    named = [ours, {"documentNumber": number, "type": "N741"}]
    given = message(
        "transport",
        consignmentMasterLevel=[{"transportDocumentMasterLevel": each} for each in named],
    )
    lorry = sent(customs, road, "transport", given)["mrn"]
    number = ours["documentNumber"]
    master = sent(customs, road, "master-consignment", message("master-consignment", number))
    inside = {"transportDocumentMasterLevel": ours}
    sent(customs, road, "house-consignment", house("H1", consignmentMasterLevel=inside))

    path = f"{STATUS}/transport/{lorry}/master-consignment/transport-document/status"
    masters = customs.call("GET", path, road).json()
    assert [(one["documentNumber"], one["received"]) for one in masters] == [
        (named[0]["documentNumber"], True),
        (named[1]["documentNumber"], False),
    ]
    path = f"{STATUS}/master-consignment/{master['mrn']}/transport-document/status"
    (one,) = customs.call("GET", path, road).json()
    assert (one["documentNumber"], one["received"]) == ("H1", True)


@pytest.mark.parametrize(
    "goods",
    [
        {"documentNumber": "NO100000001MU", "type": "N750"},
        {"documentNumber": "NO100000002MU", "type": "N750"},
        {"documentNumber": "HC001", "type": "N740"},
        {"documentNumber": "HC002", "type": "N703"},
        {"documentNumber": "HC004", "type": "N714"},
    ],
)
def test_house_documents_of_the_playground_are_presented(
    customs: Wire, goods: dict[str, str]
) -> None:
    # Named as an object, or beside the request id: the page does not say which.
    assert presented(customs, transportDocumentHouseLevel=goods) == "SUCCESS"
    assert presented(customs, transportDocumentHouseLevel=None, **goods) == "SUCCESS"


@pytest.mark.parametrize(
    ("level", "members"),
    [
        ("house-consignment", {"documentNumber": "HC001", "type": "N750"}),
        ("house-consignment", {"documentNumber": "HC009", "type": "N740"}),
        ("house-consignment", {"mrn": "23NO00000000000005"}),
        ("house-consignment", {"customsOfficeOfPresentation": "not-an-office"}),
        ("entry-summary-declaration", {"mrn": "23NO00000000000006"}),
        ("receptacle", {"receptacleIdentificationNumber": "GBASFZMLBKONAUN30001001019998"}),
        ("container", {"containerIdentificationNumber": "JARU0000011"}),
    ],
)
def test_other_goods_and_offices_are_validation_errors(
    customs: Wire, level: str, members: dict[str, str]
) -> None:
    assert presented(customs, level) == "SUCCESS"
    document = {name: members[name] for name in ("documentNumber", "type") if name in members}
    changed = {"transportDocumentHouseLevel": document} if document else members
    assert presented(customs, level, **changed) == "FAILURE"


def test_goods_in_a_member_of_no_name_are_not_presented(customs: Wire) -> None:
    body = {**presentation("house-consignment"), "reference": "HC001"}
    del body["transportDocumentHouseLevel"]
    path = "/api/movement/presentation/v1/house-consignment"
    answer = customs.call("POST", path, customs.bearer("toll:eu/movement/entry"), json=body)
    assert answer.status_code == 400
    (error,) = answer.json()["validationErrors"]
    assert error["see"] == f"{GUIDE}ics2/ics2-forsendelser-EN.html"


def presented(customs: Wire, level: str = "house-consignment", **members: Any) -> str:
    token, base = customs.bearer("toll:eu/movement/entry"), "/api/movement/presentation/v1"
    body = {**presentation(level), **members}
    body = {name: value for name, value in body.items() if value is not None}
    assert customs.call("POST", f"{base}/{level}", token, json=body).status_code == 202
    listed = customs.call("GET", f"{base}/validation-status", token).json()
    (found,) = [each for each in listed if each["requestId"] == body["requestId"]]
    return str(found["status"])


def test_the_routing_feed_is_the_playgrounds_static_list(customs: Wire) -> None:
    token, path = customs.bearer("toll:eu/movement/entry"), "/api/movement/routing/v1"
    first = customs.call("GET", f"{path}/house-consignment", token).json()
    assert first == customs.call("GET", f"{path}/house-consignment", token).json()
    seen = [
        (
            each["entrySummaryDeclarationMRN"],
            each["transportDocumentHouseLevel"]["documentNumber"],
            each["transportDocumentHouseLevel"]["type"],
            each["routingResult"]["routing"],
        )
        for each in first
    ]
    assert len(seen) == 8
    assert ("23NO00000000000001", "NO100000001MU", "N750", "TO_CONTROL") in seen
    assert ("23NO00000000000005", "HC004", "N714", "TO_ENTRY") in seen
    marker = {"marker": first[5]["routingResult"]["id"]}
    rest = customs.call("GET", f"{path}/house-consignment", token, params=marker).json()
    assert rest == first[6:]
    marker = {"marker": first[-1]["routingResult"]["id"]}
    assert customs.call("GET", f"{path}/house-consignment", token, params=marker).json() == []
