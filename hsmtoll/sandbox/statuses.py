"""
Answers of the query APIs about submitted messages (beskrivelse-av-sporre-api-EN): one object for a
consignment; for a transport or a master consignment a list of references, with ``received``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hsmtoll.sandbox import playground
from hsmtoll.sandbox.playground import member_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hsmtoll.sandbox.state import Document

__all__ = ["HOUSE", "MASTER", "below", "in_receptacle", "one"]

MASTER: Final = "master-consignment"
HOUSE: Final = "house-consignment"
_NUMBER: Final[Mapping[str, str]] = {
    MASTER: "transportDocumentMasterLevel",
    HOUSE: "transportDocumentHouseLevel",
}
_HOLDER: Final[Mapping[str, str]] = {
    MASTER: "consignmentMasterLevel",
    HOUSE: "consignmentHouseLevel",
}


def one(document: Document) -> dict[str, Any]:
    """The status of one received message."""
    return _status_of(document.key, document)


def _status_of(key: tuple[str, ...], document: Document | None) -> dict[str, Any]:
    number, kind = (*key, "", "")[:2]
    status: dict[str, Any] = {
        "documentNumber": number,
        "type": kind,
        "received": document is not None,
    }
    if document is not None:
        reasons = playground.missing_documentation(document.message)
        status["documentStatus"] = "INCOMPLETE" if reasons else "SUCCESS"
        status["incompleteDocumentationReasonList"] = reasons
    return status


def below(mrn: str, documents: Mapping[str, Document], level: str) -> list[dict[str, Any]]:
    """The references of the message *mrn* at *level*, whether received or not."""
    keys = dict.fromkeys(_references(mrn, documents, level))
    known = {each.key: each for each in documents.values() if each.level == level}
    return [_status_of(key, known.get(key)) for key in keys]


def _references(
    mrn: str, documents: Mapping[str, Document], level: str
) -> Iterator[tuple[str, ...]]:
    """Keys: named in the message itself, in a child's message, or by a relation."""
    parent = documents[mrn]
    listed = parent.message.get(_HOLDER[level])
    for entry in listed if isinstance(listed, list) else ():
        yield _key(member_at(entry, _NUMBER[level]))
    for child in documents.values():
        inside = f"{_HOLDER[HOUSE]}.{_HOLDER[MASTER]}.{_NUMBER[MASTER]}"
        if parent.level == MASTER and child.level == level == HOUSE:
            if _key(member_at(child.message, inside)) == parent.key:
                yield child.key
        elif child.level == "relation" and child.message.get("parentObjectReference") == mrn:
            found = documents.get(str(child.message.get("childObjectReference")))
            if found is not None and found.level == level:
                yield found.key


def _key(found: object) -> tuple[str, ...]:
    return (str(member_at(found, "documentNumber")), str(member_at(found, "type")))


def in_receptacle(number: str, documents: Mapping[str, Document], org: str) -> list[dict[str, Any]]:
    """The house consignments of *org* in a postal receptacle."""
    path = f"{_HOLDER[HOUSE]}.receptacleIdentificationNumber"
    return [
        one(each)
        for each in documents.values()
        if each.org == org and member_at(each.message, path) == number
    ]
