"""
Synchronous validation errors (400) of Customs' APIs, for messages and uploads.

Checked is what the guide requires or forbids, for each API. Each error names the guide's page in
``see``, which real answers do not have. What no page forbids is accepted.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.sandbox import playground
from hsmtoll.sandbox.playground import member_at, page_url

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Upload", "answered", "fixed", "identity", "synchronous_errors", "unpack_upload"]

DOCUMENT_TYPES: Final = frozenset(
    (
        "invoice",
        "permits",
        "freight invoice",
        "proof of origin documentation",
        "waybill",
        "export documentation",
    )
)
EXTENSIONS: Final = frozenset(("pdf", "jpg", "png", "txt", "docx", "xlsx"))
LARGEST: Final = 10_000_000

_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", re.ASCII)
_INSTANT_ERROR: Final = "invalid ISO-8601 instant in UTC (yyyy-MM-ddTHH:mm:ssZ)"
_OBJECT_TYPES: Final = ("TRANSPORT", "MASTER_CONSIGNMENT", "HOUSE_CONSIGNMENT")

_ELEMENTS: Final = "mo/sentrale-dataelementer-EN"
_RELATIONS: Final = "mo/beskrivelse-av-koblings-api-EN"
_FORMATS: Final = "mo/synkrone-valideringsfeil-EN"
_ICS2: Final = "ics2/ics2-forsendelser-EN"

#: The mandatory data elements of sentrale-dataelementer, each with the members that may carry it:
#: the page names elements, the members are those of the one public client. A transport without
#: references to consignments is taken: they may follow by relations (beskrivelse-av-koblings-api).
_MANDATORY: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "transport": (
        ("carrier",),
        ("activeBorderTransportMeans.identificationNumber",),
        ("activeBorderTransportMeans.typeOfIdentification",),
        ("customsOfficeOfFirstEntry.referenceNumber",),
    ),
    "master-consignment": (
        ("consignmentMasterLevel.consignor",),
        ("consignmentMasterLevel.consignee",),
        ("consignmentMasterLevel.transportDocumentMasterLevel.documentNumber",),
        ("consignmentMasterLevel.transportDocumentMasterLevel.type",),
        ("consignmentMasterLevel.grossMass", "consignmentMasterLevel.totalGrossMass"),
    ),
    "house-consignment": (
        ("consignmentHouseLevel.consignor",),
        ("consignmentHouseLevel.consignee",),
        ("consignmentHouseLevel.transportDocumentHouseLevel.documentNumber",),
        ("consignmentHouseLevel.transportDocumentHouseLevel.type",),
        ("consignmentHouseLevel.totalGrossMass", "consignmentHouseLevel.grossMass"),
    ),
}
#: Known for road alone.
_DRIVER: Final = ("activeBorderTransportMeans.operator",)

#: Members that are an object, a number or a date: missing, they "must not be null", the others
#: "must not be blank".
_NOT_TEXT: Final = frozenset(
    (
        "carrier",
        "consignee",
        "consignor",
        "documentIssueDate",
        "grossMass",
        "operator",
        "totalGrossMass",
    )
)

#: What a message is known by, and what else PUT may not change (kobling-oppdatering-og-sletting).
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "transport": (
        "activeBorderTransportMeans.identificationNumber",
        "activeBorderTransportMeans.typeOfIdentification",
        "scheduledDateAndTimeOfArrival",
    ),
    "master-consignment": (
        "consignmentMasterLevel.transportDocumentMasterLevel.documentNumber",
        "consignmentMasterLevel.transportDocumentMasterLevel.type",
    ),
    "house-consignment": (
        "consignmentHouseLevel.transportDocumentHouseLevel.documentNumber",
        "consignmentHouseLevel.transportDocumentHouseLevel.type",
    ),
}
_FIXED: Final[Mapping[str, tuple[str, ...]]] = {
    "transport": ("activeBorderTransportMeans.conveyanceReferenceNumber",),
    "master-consignment": ("consignmentMasterLevel.carrier.identificationNumber",),
}
_RELATION: Final = (
    "parentObjectType",
    "parentObjectReference",
    "childObjectType",
    "childObjectReference",
)

Error = dict[str, str]


def answered(errors: list[Error]) -> dict[str, list[Error]]:
    """The body of a 400."""
    return {"validationErrors": errors}


def synchronous_errors(
    kind: str, level: str, method: str, message: Mapping[str, Any], mode: str = ""
) -> list[Error]:
    """Field by field, with the texts of synkrone-valideringsfeil; empty where all is in order."""
    if kind == "present":
        names = ("requestId", "customsOfficeOfPresentation")
        found = [_required(message, (name,), _ICS2) for name in names]
        return [*filter(None, found), *playground.identification_errors(level, message)]
    if kind == "arrive":
        return playground.arrival_errors(message)
    if level == "relation":
        return _relation_errors(method, message)
    if mode == "maritime-ssnn":
        # For the Coastal Administration's one system; its members stand in Swagger alone.
        return []
    found = [_required(message, ("documentIssueDate",), _ELEMENTS)]
    if method != "DELETE":
        elements = _MANDATORY[level]
        if level == "transport" and mode == "road":
            elements = (*elements, _DRIVER)
        found += [_required(message, paths, _ELEMENTS) for paths in elements]
    dates = ("estimatedDateAndTimeOfArrival", "scheduledDateAndTimeOfArrival")
    found += [_instant(message, name) for name in ("documentIssueDate", *dates)]
    return [one for one in found if one]


def _relation_errors(method: str, message: Mapping[str, Any]) -> list[Error]:
    found: list[Error | None]
    if method == "DELETE":
        found = [_required(message, ("documentIssueDate",), _RELATIONS)]
    else:
        found = [_required(message, (path,), _RELATIONS) for path in _RELATION]
        found += [_one_of(message, path) for path in ("parentObjectType", "childObjectType")]
    found.append(_instant(message, "documentIssueDate"))
    return [one for one in found if one]


def _required(message: object, paths: tuple[str, ...], source: str) -> Error | None:
    """An error unless one of *paths* has a value; the first one is named."""
    values = [member_at(message, path) for path in paths]
    if any(value is not None and str(value).strip() not in ("", "{}", "[]") for value in values):
        return None
    null = paths[0].rpartition(".")[2] in _NOT_TEXT
    error = "must not be null" if null else "must not be blank"
    return {"field": paths[0], "error": error, "see": page_url(source)}


def _instant(message: object, path: str) -> Error | None:
    found = member_at(message, path)
    if found is None or str(found).strip() == "" or _INSTANT.fullmatch(str(found)):
        return None
    return {"field": path, "error": _INSTANT_ERROR, "see": page_url(_FORMATS)}


def _one_of(message: object, path: str) -> Error | None:
    found = member_at(message, path)
    if not isinstance(found, str) or not found.strip() or found in _OBJECT_TYPES:
        return None
    text = f"Must be one of [{', '.join(_OBJECT_TYPES)}]"
    return {"field": path, "error": text, "see": page_url(_RELATIONS)}


def identity(level: str, message: Mapping[str, Any]) -> tuple[str, ...]:
    """The members that identify a message."""
    return tuple(str(member_at(message, path)) for path in _KEYS.get(level, ()))


def fixed(level: str, message: Mapping[str, Any]) -> tuple[str, ...]:
    """What PUT may not change."""
    paths = (*_KEYS.get(level, ()), *_FIXED.get(level, ()))
    return tuple(str(member_at(message, path)) for path in paths)


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts, or the first *problem*: (field, error)."""

    document_type: str = ""
    filename: str = ""
    size: int = 0
    problem: tuple[str, str] | None = None


def unpack_upload(declaration_id: str, body: bytes) -> Upload:
    """The multipart body, judged by document-api-EN; the boundary is read from its first line."""
    parts = _parts(body)
    names = [name for name, _, _ in parts]
    document_type, filename, content = "", "", b""
    for name, file, data in parts:
        if name == "metadata":
            document_type = _document_type(data)
        elif name == "file":
            filename, content = file, data
    checks = (
        (
            "declarationId",
            "is not <declarant>-<ddmmyyyy>-<sequence>",
            bool(re.fullmatch(r"\d{9}-\d{8}-\d+", declaration_id, re.ASCII)),
        ),
        _order(names),
        (
            "metadata.documentType",
            f"Must be one of [{', '.join(sorted(DOCUMENT_TYPES))}]",
            document_type in DOCUMENT_TYPES,
        ),
        (
            "file",
            f"its name must end in one of [{', '.join(sorted(EXTENSIONS))}]",
            filename.rpartition(".")[2].lower() in EXTENSIONS,
        ),
        ("file", "is larger than 10 MB", len(content) <= LARGEST),
    )
    wrong = next(((name, text) for name, text, good in checks if not good), None)
    return Upload(document_type, filename, len(content), wrong)


def _order(names: list[str]) -> tuple[str, str, bool]:
    """The first part that is missing, or not where it belongs: metadata, then file."""
    wanted = ["metadata", "file"]
    missing = next((name for name in wanted if name not in names), None)
    if missing is not None:
        return missing, "must not be null", False
    extra = next((name for name in names if name not in wanted), None)
    if extra is not None:
        return extra, "is not expected", False
    return "metadata", "must be the first part, and the only one of its name", names == wanted


def _document_type(data: bytes) -> str:
    try:
        found = json.loads(data)
    except ValueError:
        return ""
    return (
        str(found["documentType"])
        if isinstance(found, dict) and set(found) == {"documentType"}
        else ""
    )


def _parts(body: bytes) -> list[tuple[str, str, bytes]]:
    boundary, _, _ = body.partition(b"\r\n")
    if not boundary.startswith(b"--"):
        return []
    found = []
    for piece in body.split(boundary)[1:]:
        head, _, data = piece.partition(b"\r\n\r\n")
        name = re.search(rb'[; ]name="?([^";\r\n]*)', head)
        file = re.search(rb'filename="?([^";\r\n]*)', head)
        if name:
            filename = file[1].decode("utf-8", "replace") if file else ""
            found.append((name[1].decode(), filename, data.removesuffix(b"\r\n")))
    return found
