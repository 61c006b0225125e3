"""Messages that the tables of Customs' guide allow, with nothing in them that they do not name."""

from __future__ import annotations

import uuid
from typing import Any

DATE = "2026-05-04T10:00:00Z"
OFFICE = "NO351001"


def message(level: str, number: str | None = None, **members: Any) -> dict[str, Any]:
    """
    The least of a message at *level*, road v2's as well as the other modes'; *number* is its own
    document's, *members* come beside and inside it: those of a consignment with their own name.
    """
    number = number or uuid.uuid4().hex[:12]
    if level == "transport":
        return {**transport(number), **members}
    if level == "relation":
        return {**relation(), **members}
    if level in ("master-consignment", "house-consignment"):
        return {"documentIssueDate": DATE, **consignment(level, number), **members}
    return {"documentIssueDate": DATE, **members}


def transport(number: str) -> dict[str, Any]:
    return {
        "documentIssueDate": DATE,
        "carrier": {"name": "Eksempel AB", "identificationNumber": "556677889"},
        "activeBorderTransportMeans": {
            "identificationNumber": number,
            "typeOfIdentification": "30",
            "countryCode": "SE",
            "operator": {"name": "Kari Nordmann"},
        },
        "customsOfficeOfFirstEntry": {"referenceNumber": OFFICE},
        "estimatedDateAndTimeOfArrival": "2026-05-04T18:00:00Z",
    }


def consignment(level: str, number: str, **members: Any) -> dict[str, Any]:
    name = level.partition("-")[0].capitalize()
    mass = {"Master": "grossMass", "House": "totalGrossMass"}[name]
    parties = {"consignor": {"name": "Selger"}, "consignee": {"name": "Mottaker"}}
    document = {"documentNumber": number, "type": "N730"}
    inner = {**parties, f"transportDocument{name}Level": document, mass: 12.5, **members}
    return {f"consignment{name}Level": inner}


def house(number: str | None = None, **members: Any) -> dict[str, Any]:
    """A house consignment; *members* of its ``consignmentHouseLevel``."""
    number = number or uuid.uuid4().hex[:12]
    return {"documentIssueDate": DATE, **consignment("house-consignment", number, **members)}


def relation() -> dict[str, Any]:
    """As in the guide's code example, without the optional representative."""
    return {
        "parentObjectType": "TRANSPORT",
        "parentObjectReference": "24NO02091D3HAVFST5",
        "childObjectType": "MASTER_CONSIGNMENT",
        "childObjectReference": "24NO02091DW4BIEST4",
    }


def presentation(level: str, **members: Any) -> dict[str, Any]:
    """Goods of the playground's table."""
    document = {"documentNumber": "HC001", "type": "N740"}
    goods: dict[str, Any] = {
        "entry-summary-declaration": {"mrn": "23NO00000000000001"},
        "receptacle": {"receptacleIdentificationNumber": "GBASFZMLBKONAUN30001001019999"},
        "container": {"containerIdentificationNumber": "JARU0000010"},
        "house-consignment": {"transportDocumentHouseLevel": document},
        "master-consignment": {"transportDocumentMasterLevel": document},
    }
    chosen = {"requestId": str(uuid.uuid4()), "customsOfficeOfPresentation": OFFICE}
    return {**chosen, **goods[level], **members}
