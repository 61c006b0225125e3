"""
Extensions of certificates (RFC 5280 section 4.2, EN 319 412-5): DER to values, without validation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from hsmtoll import der
from hsmtoll.x509 import names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from hsmtoll.x509.names import Comparable

__all__ = [
    "ALTERNATIVE_NAMES",
    "EXTENSION_NAMES",
    "UNDERSTOOD",
    "Informational",
    "QcStatements",
    "basic_constraints",
    "key_usage",
    "name_constraints",
    "read",
]

_A = TypeVar("_A")
_T = TypeVar("_T")

ALTERNATIVE_NAMES: Final = "2.5.29.17"
_QC_STATEMENTS: Final = "1.3.6.1.5.5.7.1.3"
# The extensions that RFC 5280 section 4.2 and RFC 3739 define.
UNDERSTOOD: Final = frozenset(
    f"2.5.29.{arc}" for arc in (9, 14, 15, 17, 18, 19, 30, 31, 32, 33, 35, 36, 37, 46, 54)
) | {"1.3.6.1.5.5.7.1.1", "1.3.6.1.5.5.7.1.11", _QC_STATEMENTS}

EXTENSION_NAMES: Final = {
    "2.5.29.14": "subjectKeyIdentifier",
    "2.5.29.31": "cRLDistributionPoints",
    "2.5.29.32": "certificatePolicies",
    "2.5.29.35": "authorityKeyIdentifier",
    "2.5.29.37": "extKeyUsage",
    "1.3.6.1.5.5.7.1.1": "authorityInfoAccess",
    ALTERNATIVE_NAMES: "subjectAltName",
    _QC_STATEMENTS: "qcStatements",
}

# RFC 5280 section 4.2.1.3, in the order of the bits.
_KEY_USAGE: Final = (
    "digitalSignature",
    "nonRepudiation",
    "keyEncipherment",
    "dataEncipherment",
    "keyAgreement",
    "keyCertSign",
    "cRLSign",
    "encipherOnly",
    "decipherOnly",
)

# EN 319 412-5 section 4.2.3 and EN 319 412-1 section 5.1.
_QC_TYPE: Final = {
    "0.4.0.1862.1.6.1": "esign",
    "0.4.0.1862.1.6.2": "eseal",
    "0.4.0.1862.1.6.3": "web",
}
_SEMANTICS_OID: Final = "1.3.6.1.5.5.7.11.2"
_SEMANTICS: Final = {"0.4.0.194121.1.1": "natural person", "0.4.0.194121.1.2": "legal person"}


class QcStatements(NamedTuple):
    """EN 319 412-5: *types*: ``esign eseal web`` or an OID; *semantics*: kind of subject."""

    compliance: bool = False
    qscd: bool = False
    types: tuple[str, ...] = ()
    semantics: str | None = None


def read(field: bytes | None) -> tuple[dict[str, bytes], frozenset[str]]:
    """The contents of extensions by their OID, and the OIDs of those that are critical."""
    found: dict[str, bytes] = {}
    critical: set[str] = set()
    for extension in der.parts(field) if field is not None else ():
        name, *flag, value = der.parts(extension)
        oid = der.oid(name)
        if oid in found:
            raise ValueError(f"extension {oid} is there twice")
        if len(flag) > 1:
            raise ValueError(f"extension {oid} has fields that no extension has")
        found[oid] = der.content(value, der.OCTET_STRING)
        if flag and any(der.content(flag[0], der.BOOLEAN)):
            critical.add(oid)
    return found, frozenset(critical)


class Informational:
    """
    Extensions that do not decide about validity: their readable parts are parsed, and the OIDs of
    those with unreadable parts are collected in *unreadable*.
    """

    def __init__(self, extensions: Mapping[str, bytes]) -> None:
        self.extensions = extensions
        self.unreadable: set[str] = set()

    def read(self, oid: str, item: Callable[[bytes], Iterable[_T]]) -> tuple[_T, ...]:
        """The results of *item* for all members of the extension, a SEQUENCE OF."""
        found: list[_T] = []
        raw = self.extensions.get(oid)
        for each in self.value(oid, der.parts, raw) or () if raw is not None else ():
            found += self.value(oid, lambda one: tuple(item(one)), each) or ()
        return tuple(found)

    def value(self, oid: str, read: Callable[[_A], _T], of: _A) -> _T | None:
        """The result of *read* for *of*; None if it fails."""
        try:
            return read(of)
        except (ValueError, IndexError):
            self.unreadable.add(oid)
            return None


def basic_constraints(raw: bytes | None) -> tuple[bool, int | None]:
    """``cA`` and pathLenConstraint of basicConstraints."""
    ca, length = False, None
    for each in der.parts(raw) if raw is not None else ():
        if each[0] == der.BOOLEAN:
            ca = any(der.content(each, der.BOOLEAN))
        else:
            length = der.number(each)
    return ca, length


def key_usage(raw: bytes | None) -> frozenset[str] | None:
    """The permitted key usages; None without the extension."""
    if raw is None:
        return None
    bits = der.content(raw, der.BIT_STRING)[1:]
    return frozenset(
        name
        for place, name in enumerate(_KEY_USAGE)
        if place // 8 < len(bits) and bits[place // 8] & 0x80 >> place % 8
    )


def subject_key_id(informational: Informational) -> bytes | None:
    raw = informational.extensions.get("2.5.29.14")
    if raw is None:
        return None
    return informational.value("2.5.29.14", lambda whole: der.content(whole, der.OCTET_STRING), raw)


def authority_key_id(item: bytes) -> Iterator[bytes]:
    if item[0] == 0x80:
        yield der.content(item, 0x80)


def directory_name(name: bytes) -> Iterator[Comparable]:
    """A GeneralName (RFC 5280 section 4.2.1.6) for comparing, if it is a directory name."""
    if name[0] == 0xA4:
        yield names.comparable(names.read(der.content(name, 0xA4)))


def name_constraints(
    raw: bytes | None,
) -> tuple[tuple[Comparable, ...] | None, tuple[Comparable, ...]]:
    """The permitted directory names, None if there are none, and the excluded ones."""
    found: dict[int, list[Comparable]] = {0xA0: [], 0xA1: []}
    for each in der.parts(raw) if raw is not None else ():
        for tree in der.parts(each, each[0]):
            found[each[0]] += directory_name(der.parts(tree)[0])
    return tuple(found[0xA0]) or None, tuple(found[0xA1])


def qc_statements(informational: Informational) -> QcStatements:
    stated = dict(informational.read(_QC_STATEMENTS, _statement))

    def oids(statement: str) -> tuple[str, ...]:
        items = der.parts(stated[statement]) if stated.get(statement) else ()
        return tuple(der.oid(item) for item in items if item[0] == der.OID)

    # RFC 3739 section 3.2.6.1 puts the identifier inside a statement; some issuers write it as a
    # statement of its own.
    semantics = {*stated, *(informational.value(_QC_STATEMENTS, oids, _SEMANTICS_OID) or ())}
    types = informational.value(_QC_STATEMENTS, oids, "0.4.0.1862.1.6") or ()
    return QcStatements(
        compliance="0.4.0.1862.1.1" in stated,
        qscd="0.4.0.1862.1.4" in stated,
        types=tuple(_QC_TYPE.get(oid, oid) for oid in types),
        semantics=next((name for oid, name in _SEMANTICS.items() if oid in semantics), None),
    )


def _statement(item: bytes) -> Iterator[tuple[str, bytes]]:
    oid, *parameters = der.parts(item)
    yield der.oid(oid), parameters[0] if parameters else b""


def ocsp_urls(item: bytes) -> Iterator[str]:
    method, location = der.parts(item)
    if der.oid(method) == "1.3.6.1.5.5.7.48.1":
        yield from _uri(location)


def crl_urls(point: bytes) -> Iterator[str]:
    for name in der.parts(point):
        # Of distributionPoint, only the form fullName has URLs.
        for form in der.parts(name, 0xA0) if name[0] == 0xA0 else ():
            for each in der.parts(form, 0xA0) if form[0] == 0xA0 else ():
                yield from _uri(each)


def _uri(name: bytes) -> Iterator[str]:
    # Unchecked: some issuers write a text that is not a URL, which is shown as it is.
    if name[0] == 0x86:
        yield der.content(name, 0x86).decode("latin-1")
