"""
Static data of Customs' playground, and the guide's rules for the content of a message.

From the guide (https://toll.github.io); each error names its page. What no page mentions is
accepted. Pages: mo-eksempler (test data), ufullstendig-dokumentasjon and
asynkrone-valideringsfeil (errors found later), mo-kodeverk (code lists), ics2-forsendelser.
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "ROUTING",
    "arrival",
    "arrival_errors",
    "content_errors",
    "identification_errors",
    "member_at",
    "missing_documentation",
    "page_url",
    "presentation_errors",
]

_INCOMPLETE: Final = "mo/ufullstendig-dokumentasjon-EN"
_ASYNCHRONOUS: Final = "mo/asynkrone-valideringsfeil-EN"
_EXAMPLES: Final = "mo/mo-eksempler-EN"
_CODES: Final = "mo/mo-kodeverk-EN"
_ARRIVAL: Final = "mo/beskrivelse-av-ankomst-api-EN"
_ICS2: Final = "ics2/ics2-forsendelser-EN"

#: ISO 3166-1 alpha-2.
_ISO_3166: Final = """
AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ
BR BS BT BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM
DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS
GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN
KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ
MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM
PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV
SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI
VN VU WF WS YE YT ZA ZM ZW
"""
_COUNTRIES: Final = frozenset(_ISO_3166.split())

#: The Norwegian offices of CL141 in mo-kodeverk. The EU's whole list is not at hand.
_CL141_NORWAY: Final = """
NO321002 NO321003 NO323001 NO324001 NO324002 NO325001 NO329901 NO329902 NO329903 NO331001
NO331002 NO331003 NO332001 NO332004 NO333001 NO334001 NO334002 NO339901 NO339902 NO341001
NO341002 NO341003 NO341004 NO342001 NO343001 NO344001 NO344002 NO345001 NO345002 NO351001
NO351003 NO361001 NO361002 NO362002 NO363001 NO364001 NO364002 NO365001 NO365002 NO365003
NO368001 NO371001 NO372001 NO373001 NO373002
"""
_OFFICES: Final = frozenset(_CL141_NORWAY.split())

#: importProcedure, by mo-kodeverk and the tables of prosedyre-mo-vei-ferge.
_PROCEDURES: Final = (
    "IMMEDIATE_RELEASE_IMPORT",
    "CUSTOMS_DECLARATION",
    "TRANSIT_IMPORT",
    "TRANSIT_RELEASE",
    "IMMEDIATE_RELEASE_VOEC",
    "COLLECTIVE_RELEASE",
    "WAREHOUSE_RELEASE",
    "DOCUMENTS_NOT_OBLIGED_RELEASE",
    "ATA_CARNET",
    "TIR_CARNET",
    "NATO_FORM_302",
)
#: Procedures whose tables have a column with CUDE. The error page names only the first one.
_WITH_DECLARATION: Final = ("IMMEDIATE_RELEASE_IMPORT", "CUSTOMS_DECLARATION", "WAREHOUSE_RELEASE")
_OUTGOING: Final = ("TRA", "EXP", "TRE")

#: typeOfExport and the form of its exportId (TB_EXPORTTYPE). UGE_EXPORT occurs only in examples.
_EXPORTS: Final[Mapping[str, str]] = {
    "AES_EXPORT": r"[0-9A-Za-z]{18}",
    "EUEIR_EXPORT": r".{1,35}",
    "EIDR_EXPORT": r"\d\dSE[0-9A-Za-z]{11}AE[0-9A-Za-z]",
    "UGE_EXPORT": r".+",
}
_DECLARATION_MEMBERS: Final = ("declarantNumber", "declarationDate", "sequenceNumber")
_KNOWN_VOEC_NUMBER: Final = "2056550"
_MAX_ITEM_VALUE: Final = 3000
_PLACES: Final = ("placeOfLoading", "placeOfUnloading", "placeOfAcceptance", "placeOfDelivery")

#: ENS, receptacle, house document and type, container, routing: the table of ics2-forsendelser.
_GOODS_TABLE: Final = (
    ("23NO00000000000001", "GBASFZMLBKONAUN30001001019999", "NO100000001MU", "N750", "",
     "TO_CONTROL"),
    ("23NO00000000000002", "GBASFZMLBKONAUN30001001019999", "NO100000002MU", "N750", "",
     "TO_ENTRY"),
    ("23NO00000000000003", "", "HC001", "N740", "", "TO_ENTRY"),
    ("23NO00000000000003", "", "HC002", "N740", "", "TO_CONTROL"),
    ("23NO00000000000004", "", "HC001", "N703", "", "TO_CONTROL"),
    ("23NO00000000000004", "", "HC002", "N703", "", "TO_ENTRY"),
    ("23NO00000000000005", "", "HC003", "N714", "JARU0000010", "TO_CONTROL"),
    ("23NO00000000000005", "", "HC004", "N714", "JARU0000026", "TO_ENTRY"),
)  # fmt: skip
_ISSUED: Final = "2026-01-01T00:00:00Z"


def _signal(row: tuple[str, ...]) -> dict[str, Any]:
    ens, receptacle, document, kind, container, routing = row
    signal: dict[str, Any] = {
        "entrySummaryDeclarationMRN": ens,
        "transportDocumentHouseLevel": {
            # The guide says documentNumber; the one public client reads referenceNumber.
            "documentNumber": document,
            "referenceNumber": document,
            "type": kind,
        },
        "routingResult": {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, "|".join(row))),
            "routing": routing,
            "documentIssueDate": _ISSUED,
        },
    }
    if receptacle:
        signal["receptacleIdentificationNumber"] = receptacle
    if container:
        signal["containerIdentificationNumber"] = container
    return signal


#: "The routing signals retrieved in the playground environment are also a static list".
ROUTING: Final = tuple(_signal(row) for row in _GOODS_TABLE)


def page_url(name: str, anchor: str = "") -> str:
    """The address of a page of the guide."""
    return f"https://toll.github.io/api/{name}.html{anchor}"


def member_at(message: object, path: str) -> Any:
    """The member at a dotted *path*, ``None`` where there is none."""
    for part in path.split("."):
        message = message.get(part) if isinstance(message, dict) else None
    return message


def _error(text: str, path: str, source: str) -> dict[str, Any]:
    return {"description": text, "pointer": {"messageElementPath": path}, "see": page_url(source)}


def _walk(found: object, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object of a message, with the path of its members."""
    if isinstance(found, dict):
        yield path, found
        for name, value in found.items():
            yield from _walk(value, f"{path}{name}.")
    elif isinstance(found, list):
        for index, value in enumerate(found):
            yield from _walk(value, f"{path.removesuffix('.')}[{index}].")


def _entries(holder: object, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    listed = holder.get(name) if isinstance(holder, dict) else None
    items = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return [(index, item) for index, item in enumerate(items) if isinstance(item, dict)]


def _has_value(value: object) -> bool:
    return value is not None and str(value).strip() != ""


def content_errors(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Errors found after the 202: code lists, contradictions, and the playground's data."""
    found = [error for path, holder in _walk(message, "") for error in _object_errors(path, holder)]
    house = message.get("consignmentHouseLevel")
    if isinstance(house, dict):
        found += _house_errors(house)
    return found


def _object_errors(path: str, holder: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("country", "countryCode"):
        country = holder.get(name)
        if isinstance(country, str) and country not in _COUNTRIES:
            yield _error("Country is invalid", f"{path}{name}", _ASYNCHRONOUS)
    if path.endswith("customsOfficeOfFirstEntry."):
        office = holder.get("referenceNumber")
        if _has_value(office) and not _is_office(office):
            yield _error("Must be a valid customs office", f"{path}referenceNumber", _ASYNCHRONOUS)
    for name in _PLACES:
        place = holder.get(name)
        if isinstance(place, dict) and not any(
            _has_value(place.get(one)) for one in ("address", "location", "unloCode")
        ):
            text = "If location AND address is not provided, then unloCode is required"
            yield _error(text, f"{path}{name}.unloCode", _ASYNCHRONOUS)
    unlo = holder.get("unloCode")
    if _has_value(unlo) and not re.fullmatch(r"[A-Z]{2}[A-Z2-9]{3}", str(unlo)):
        yield _error("Invalid code. Expected valid UNLOCODE", f"{path}unloCode", _ASYNCHRONOUS)
    for index, document in _entries(holder, "previousDocuments"):
        yield from _document_errors(f"{path}previousDocuments[{index}].", document)
    vat = holder.get("vatIdentificationNumber")
    if vat is not None and str(vat) != _KNOWN_VOEC_NUMBER:
        place = f"{path}vatIdentificationNumber"
        yield _error("Unknown vatIdentificationNumber", place, _EXAMPLES)


def _is_office(code: object) -> bool:
    """Whether *code* is on the guide's list of Norwegian offices, or has a foreign one's form."""
    text = str(code)
    if re.fullmatch(r"NO\d{6}", text):
        return text in _OFFICES
    return re.fullmatch(r"[A-Z]{2}[0-9A-Z]{6}", text) is not None and text[:2] in _COUNTRIES


def _document_errors(path: str, document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    kind, number = document.get("typeOfReference"), document.get("referenceNumber")
    if kind == "CUDE":
        missing = [name for name in _DECLARATION_MEMBERS if not _has_value(document.get(name))]
        for name in missing:
            yield _error("Required field when typeReference is CUDE", f"{path}{name}", _INCOMPLETE)
        if missing:
            return
        declarant, date, sequence = (str(document[name]) for name in _DECLARATION_MEMBERS)
        known = re.fullmatch(r"[1-9]|10", sequence)
        if (declarant, date) != ("123456789", "2022-08-10") or not known:
            text = "Document with typeOfReference CUDE is not found"
            yield _error(text, f"{path}sequenceNumber", _EXAMPLES)
    elif not _has_value(number):
        text = "Field should have value unless typeOfReference is CUDE"
        yield _error(text, f"{path}referenceNumber", _INCOMPLETE)
    elif kind == "N820" and (
        not re.fullmatch(r"[A-Za-z0-9]{18}", str(number)) or "INVALID" in str(number)
    ):
        text = "Document with typeOfReference N820 contains a referenceNumber in wrong state"
        yield _error(text, f"{path}referenceNumber", _EXAMPLES)


def _house_errors(house: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rules between members of ``consignmentHouseLevel``."""
    prefix = "consignmentHouseLevel"
    procedure = member_at(house, "importProcedure.importProcedure")
    outgoing = member_at(house, "importProcedure.outgoingProcedure")
    documents = _entries(house, "previousDocuments")
    exports = _entries(house, "exportFromEU")
    if _has_value(procedure) and procedure not in _PROCEDURES:
        text = f"Invalid code. Expected codes are one of [{', '.join(_PROCEDURES)}]"
        yield _error(text, f"{prefix}.importProcedure.importProcedure", _CODES)
    if _has_value(outgoing) and outgoing not in _OUTGOING:
        text = f"When field is provided, it has to be one of {', '.join(_OUTGOING)}"
        yield _error(text, f"{prefix}.importProcedure.outgoingProcedure", _ASYNCHRONOUS)
    if documents and not _has_value(procedure):
        text = f"importProcedure is required when any {prefix}.previousDocuments[] is provided"
        yield _error(text, f"{prefix}.importProcedure", _INCOMPLETE)
    yield from _documents_errors(prefix, documents, procedure, outgoing)
    if exports and outgoing == "TRA":
        text = f"Field cannot have values when {prefix}.importProcedure.outgoingProcedure is TRA"
        yield _error(text, f"{prefix}.exportFromEU", _ASYNCHRONOUS)
    yield from _export_errors(prefix, exports)
    yield from _goods_errors(prefix, house, procedure)


def _documents_errors(
    prefix: str, documents: list[tuple[int, Mapping[str, Any]]], procedure: object, outgoing: object
) -> Iterator[dict[str, Any]]:
    where = f"{prefix}.previousDocuments"
    if sum(document.get("typeOfReference") == "CUDE" for _, document in documents) > 1:
        text = "PreviousDocuments can only contain one document of type CUDE"
        yield _error(text, where, _INCOMPLETE)
    for index, document in documents:
        place = f"{where}[{index}]"
        if (
            _has_value(procedure)
            and procedure in _PROCEDURES
            and procedure not in _WITH_DECLARATION
        ):
            text = f"Field cannot be filled out when {prefix}.importProcedure is {procedure}"
            for name in _DECLARATION_MEMBERS:
                if _has_value(document.get(name)):
                    yield _error(text, f"{place}.{name}", _INCOMPLETE)
        # Variant 24 of the road's tables has N820 with EXP, for WAREHOUSE_RELEASE.
        if (
            document.get("typeOfReference") == "N820"
            and outgoing == "EXP"
            and procedure != "WAREHOUSE_RELEASE"
        ):
            text = f"Field cannot have value N820 out when {prefix}.outgoingProcedure is EXP"
            yield _error(text, f"{place}.typeOfReference", _INCOMPLETE)
    numbers = [(index, document.get("referenceNumber")) for index, document in documents]
    for index, number in _duplicates(numbers):
        text = f"Duplicate PreviousDocuments with referenceNumber: {number}"
        yield _error(text, f"{where}[{index}].referenceNumber", _ASYNCHRONOUS)


def _export_errors(
    prefix: str, exports: list[tuple[int, Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    where = f"{prefix}.exportFromEU"
    for index, export in exports:
        kind, number = export.get("typeOfExport"), export.get("exportId")
        if _has_value(kind) and kind not in _EXPORTS:
            text = "Invalid code. Expected codes are one of [AES_EXPORT, EUEIR_EXPORT, EIDR_EXPORT]"
            yield _error(text, f"{where}[{index}].typeOfExport", _CODES)
        elif (
            _has_value(kind)
            and _has_value(number)
            and not re.fullmatch(_EXPORTS[str(kind)], str(number))
        ):
            text = f"Invalid MRN format for export of type {kind}"
            yield _error(text, f"{where}[{index}].exportId", _ASYNCHRONOUS)
    for index, number in _duplicates([(index, each.get("exportId")) for index, each in exports]):
        text = f"Duplicate ExportFromEU with exportId: {number}"
        yield _error(text, f"{where}[{index}].exportId", _ASYNCHRONOUS)


def _duplicates(values: list[tuple[int, Any]]) -> Iterator[tuple[int, str]]:
    """Each value that has occurred before, with its index."""
    seen: Counter[str] = Counter()
    for index, value in values:
        if _has_value(value):
            if seen[str(value)]:
                yield index, str(value)
            seen[str(value)] += 1


def _goods_errors(
    prefix: str, house: Mapping[str, Any], procedure: object
) -> Iterator[dict[str, Any]]:
    if house.get("goodsItem") and procedure != "IMMEDIATE_RELEASE_VOEC":
        text = (
            f"If {prefix}.importProcedure.importProcedure is not IMMEDIATE_RELEASE_VOEC, it should "
            "not be provided."
        )
        yield _error(text, f"{prefix}.goodsItem", _ASYNCHRONOUS)
    for index, item in _entries(house, "goodsItem"):
        value = _number(member_at(item, "itemAmountInvoicedVOEC.value"))
        count = _number(member_at(item, "itemAmountInvoicedVOEC.numberOfItems")) or 1
        if value is not None and value / count > _MAX_ITEM_VALUE:
            text = "When item value exceeds NOK 3000, a regular import declaration has to be"
            path = f"{prefix}.goodsItem[{index}].itemAmountInvoicedVOEC.value"
            yield _error(f"{text} submitted", path, _ASYNCHRONOUS)


def _number(value: object) -> float | None:
    try:
        return float(str(value)) if _has_value(value) else None
    except ValueError:
        return None


def missing_documentation(message: Mapping[str, Any]) -> list[str]:
    """
    What is missing of a house consignment's documentation and may be sent until the border is
    reached, as codes of IncompleteDocumentationReason (mo-kodeverk).
    """
    house = message.get("consignmentHouseLevel")
    if not isinstance(house, dict):
        return []
    procedure = member_at(house, "importProcedure.importProcedure")
    outgoing = member_at(house, "importProcedure.outgoingProcedure")
    kinds = {each.get("typeOfReference") for _, each in _entries(house, "previousDocuments")}
    exports = [
        each
        for _, each in _entries(house, "exportFromEU")
        if _has_value(each.get("typeOfExport")) and _has_value(each.get("exportId"))
    ]
    goods = [each for _, each in _entries(house, "goodsItem")]
    complete = goods and all(
        _has_value(member_at(each, path))
        for each in goods
        for path in (
            "itemAmountInvoicedVOEC.value",
            "itemAmountInvoicedVOEC.numberOfItems",
            "additionalFiscalReferences.vatIdentificationNumber",
        )
    )
    missing = {
        "INCOMPLETE_CUDE_DOCUMENTATION": procedure in _WITH_DECLARATION
        and not kinds & {"CUDE", *(["GONU"] if procedure == "WAREHOUSE_RELEASE" else [])},
        "INCOMPLETE_EXP_DOCUMENTATION": outgoing in ("EXP", "TRE") and not exports,
        "INCOMPLETE_TRA_DOCUMENTATION": (
            (procedure == "TRANSIT_IMPORT" or outgoing in ("TRA", "TRE")) and "N820" not in kinds
        )
        or (procedure == "TRANSIT_RELEASE" and "RETR" not in kinds),
        "INCOMPLETE_VOEC_DOCUMENTATION": procedure == "IMMEDIATE_RELEASE_VOEC" and not complete,
    }
    return [code for code, lacks in missing.items() if lacks]


# --- arrival ------------------------------------------------------------------------------------


def arrival(message: Mapping[str, Any]) -> dict[str, str]:
    """
    MRN, time and customs office of an arrival, if present. The page says what must be included but
    not in which members, so the values are recognised by their form.
    """
    forms = {
        "mrn": r"\d{2}[A-Z]{2}[A-Z0-9]{14}",
        "dateAndTimeOfArrival": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z",
        "customsOfficeOfArrival": r"[A-Z]{2}[0-9A-Z]{6}",
    }
    found: dict[str, str] = {}
    for _, holder in _walk(message, ""):
        for name, value in holder.items():
            for part, form in forms.items():
                # The time when the message was written is not that of the arrival.
                written = name == "documentIssueDate"
                if isinstance(value, str) and not written and re.fullmatch(form, value):
                    found.setdefault(part, value)
    return found


def arrival_errors(message: Mapping[str, Any]) -> list[dict[str, str]]:
    """Required content of an arrival that is missing (beskrivelse-av-ankomst-api)."""
    found = arrival(message)
    return [
        {"field": name, "error": "must not be blank", "see": page_url(_ARRIVAL)}
        for name in ("mrn", "dateAndTimeOfArrival", "customsOfficeOfArrival")
        if name not in found
    ]


# --- presentation -------------------------------------------------------------------------------

#: Level → the member that identifies its goods.
_IDENTIFIED_BY: Final[Mapping[str, str]] = {
    "entry-summary-declaration": "mrn",
    "receptacle": "receptacleIdentificationNumber",
    "container": "containerIdentificationNumber",
    "house-consignment": "transportDocumentHouseLevel.documentNumber",
    "master-consignment": "transportDocumentMasterLevel.documentNumber",
}


def _goods_named_in(message: Mapping[str, Any]) -> dict[str, str]:
    """
    The goods that a message names, by the columns of the playground's table.

    The pages give the columns but not the members. So any member whose name begins with
    "receptacle" or "container" is read, and a document's number and type at any depth.
    """
    named: dict[str, str] = {}
    for _, holder in _walk(message, ""):
        for name, value in holder.items():
            if not isinstance(value, str) or not value.strip():
                continue
            lower = name.lower()
            if lower in ("mrn", "entrysummarydeclarationmrn"):
                named["ens"] = value
            elif lower.startswith("receptacle"):
                named["receptacle"] = value
            elif lower.startswith("container"):
                named["container"] = value
            elif lower == "documentnumber":
                named |= {"document": value, "type": str(holder.get("type", ""))}
    return named


def identification_errors(level: str, message: Mapping[str, Any]) -> list[dict[str, str]]:
    """An error if the message lacks the member that identifies the goods of *level*."""
    column = {
        "entry-summary-declaration": {"ens"},
        "receptacle": {"receptacle"},
        "container": {"container"},
    }.get(level, {"document", "ens"})
    named = _goods_named_in(message)
    if column & set(named):
        return []
    return [{"field": _IDENTIFIED_BY[level], "error": "must not be blank", "see": page_url(_ICS2)}]


def presentation_errors(level: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Office and goods, against CL141 and the rows of the playground's table."""
    found = []
    if not _is_office(message.get("customsOfficeOfPresentation")):
        text = "Must be a valid customs office"
        found.append(_error(text, "customsOfficeOfPresentation", _ICS2))
    named = _goods_named_in(message)
    columns = ("ens", "receptacle", "document", "type", "container")
    rows = [dict(zip(columns, row, strict=False)) for row in _GOODS_TABLE]
    # The table has no master consignments: any is accepted.
    fits = level == "master-consignment" or any(named.items() <= row.items() for row in rows)
    if not fits:
        found.append(_error("Reference is not found", _IDENTIFIED_BY[level], _ICS2))
    return found
