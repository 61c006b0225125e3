"""
What Customs' APIs say about messages, at once and later, and about uploads (PROTOCOL C.8 to C.13).

The documents name the error texts, not the whole schema: what is demanded here is the part of a
message that the guide's pages mention.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "Upload",
    "answered",
    "asynchronous_errors",
    "identity",
    "presentation_errors",
    "synchronous_errors",
    "unpack_upload",
]

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

#: Where the key of a message stands: it may not change by PUT (PROTOCOL C.8).
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "transport": (
        "activeBorderTransportMeans.identificationNumber",
        "activeBorderTransportMeans.typeOfIdentification",
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
_RELATION: Final = (
    "parentObjectType",
    "parentObjectReference",
    "childObjectType",
    "childObjectReference",
)


def answered(errors: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The body of a 400."""
    return {"validationErrors": errors}


def _at(message: object, path: str) -> Any:
    for part in path.split("."):
        message = message.get(part) if isinstance(message, dict) else None
    return message


def _blank(message: object, path: str) -> dict[str, str] | None:
    found = _at(message, path)
    good = isinstance(found, str) and found.strip()
    return None if good else {"field": path, "error": "must not be blank"}


def synchronous_errors(
    kind: str, level: str, method: str, message: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Field by field, with the texts of PROTOCOL C.10; empty where all is in order."""
    found: list[dict[str, str] | None] = []
    if kind == "present":
        found = [_blank(message, "requestId"), _blank(message, "customsOfficeOfPresentation")]
    elif kind == "relation":
        found = [_blank(message, path) for path in _RELATION]
        found += [_one_of(message, path) for path in ("parentObjectType", "childObjectType")]
    else:
        if message.get("documentIssueDate") is None:
            found.append({"field": "documentIssueDate", "error": "must not be null"})
        elif not _INSTANT.fullmatch(str(message["documentIssueDate"])):
            found.append({"field": "documentIssueDate", "error": _INSTANT_ERROR})
        if method != "DELETE":
            found += [_blank(message, path) for path in _KEYS[level]]
    if kind != "present" and not (message.get("declarant") or message.get("representative")):
        text = (
            "At least one of the following fields should be non null: [declarant, representative]"
        )
        found.append({"field": "", "error": text})
    return [one for one in found if one]


def _one_of(message: object, path: str) -> dict[str, str] | None:
    found = _at(message, path)
    if not isinstance(found, str) or not found.strip() or found in _OBJECT_TYPES:
        return None
    return {"field": path, "error": f"Must be one of [{', '.join(_OBJECT_TYPES)}]"}


def identity(level: str, message: Mapping[str, Any]) -> tuple[str, ...]:
    """The key members of a message."""
    return tuple(str(_at(message, path)) for path in _KEYS.get(level, ()))


def asynchronous_errors(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is found after the 202: countries, and the playground's data (PROTOCOL C.13)."""
    found: list[dict[str, Any]] = []
    for path, holder in _objects(message, ""):
        country = holder.get("country")
        if isinstance(country, str) and (not re.fullmatch(r"[A-Z]{2}", country) or country == "XX"):
            found.append(_pointed("Country is invalid", f"{path}country"))
        found += _previous(path, holder)
        vat = holder.get("vatIdentificationNumber", "2056550")
        if str(vat) != "2056550":
            text = "Unknown vatIdentificationNumber"
            found.append(_pointed(text, f"{path}vatIdentificationNumber"))
    return found


def _previous(path: str, holder: Mapping[str, Any]) -> list[dict[str, Any]]:
    kind, number = holder.get("typeOfReference"), str(holder.get("referenceNumber", ""))
    where = f"{path}referenceNumber"
    if kind == "N820":
        if not re.fullmatch(r"[A-Za-z0-9]{18}", number) or "INVALID" in number:
            text = "Document with typeOfReference N820 contains a referenceNumber in wrong state"
            return [_pointed(text, where)]
    elif kind == "CUDE":
        known = re.fullmatch(r"123456789-(10082022|2022-08-10)-(\d+)", number)
        if not known or not 1 <= int(known[2]) <= 10:
            return [_pointed("Document with typeOfReference CUDE is not found", where)]
    return []


def _pointed(text: str, path: str) -> dict[str, Any]:
    return {"description": text, "pointer": {"messageElementPath": path}}


def _objects(found: object, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(found, dict):
        yield path, found
        for name, value in found.items():
            yield from _objects(value, f"{path}{name}.")
    elif isinstance(found, list):
        for at, value in enumerate(found):
            yield from _objects(value, f"{path.removesuffix('.')}[{at}].")


#: PROTOCOL C.13, ICS2: what can be presented in the playground.
_PRESENTABLE: Final[Mapping[str, frozenset[str]]] = {
    "entry-summary-declaration": frozenset(f"23NO0000000000000{n}" for n in range(1, 6))
    | frozenset(f"23NO{n:014d}" for n in range(1, 6)),
    "receptacle": frozenset({"GBASFZMLBKONAUN30001001019999"}),
    "house-consignment": frozenset(
        {"NO100000001MU", "NO100000002MU", "HC001", "HC002", "HC003", "HC004"}
    ),
    "container": frozenset(f"JARU00000{n}" for n in range(10, 27)),
}


def presentation_errors(level: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Empty where the message names something that the playground knows."""
    known = _PRESENTABLE.get(level)
    named = {str(value) for _, holder in _objects(message, "") for value in holder.values()}
    if known is None or known & named:
        return []
    return [_pointed("Reference is not found", "reference")]


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts, or the first *problem*: (field, error)."""

    document_type: str = ""
    filename: str = ""
    size: int = 0
    problem: tuple[str, str] | None = None


def unpack_upload(declaration_id: str, body: bytes) -> Upload:
    """The multipart body, judged by PROTOCOL C.12; the boundary is read from its first line."""
    parts = _parts(body)
    names = [name for name, _, _ in parts]
    document_type, filename, content = "", "", b""
    for name, file, data in parts:
        if name == "metadata":
            document_type = _document_type(data)
        elif name == "file":
            filename, content = file, data
    checks = (
        ("declarationId", bool(re.fullmatch(r"\d{9}-\d{8}-\d+", declaration_id, re.ASCII))),
        ("parts must be metadata, then file", names == ["metadata", "file"]),
        ("documentType", document_type in DOCUMENT_TYPES),
        ("file extension", filename.rpartition(".")[2].lower() in EXTENSIONS),
        ("file size", len(content) <= LARGEST),
    )
    wrong = next((name for name, good in checks if not good), None)
    return Upload(
        document_type, filename, len(content), None if wrong is None else (wrong, "is invalid")
    )


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
