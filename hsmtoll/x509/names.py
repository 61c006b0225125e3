"""
Distinguished names of certificates: parsing, comparison, display.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from typing import TYPE_CHECKING, Any, Final

from hsmtoll import der
from hsmtoll.errors import sanitized

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_NAME", "Comparable", "Name", "comparable", "read", "shown", "values"]

#: Maximum characters of one attribute. X.520 permits 64 for most and 128 for some; issuers exceed
#: that, but not by so much, and the time to compare names grows with the square of their length.
MAX_NAME: Final = 256

# The short names of RFC 4514 section 3, and those common in enterprise certificates.
_SHORT: Final = {
    "2.5.4.3": "CN",
    "2.5.4.4": "SN",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "STREET",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.42": "GN",
    "2.5.4.97": "organizationIdentifier",
    "0.9.2342.19200300.100.1.1": "UID",
    "0.9.2342.19200300.100.1.25": "DC",
    "1.2.840.113549.1.9.1": "emailAddress",
}

# X.680 table 1: the universal tags of character strings, and their encodings.
_CHARACTERS: Final = {
    12: "utf-8",
    18: "ascii",
    19: "latin-1",
    20: "latin-1",
    22: "latin-1",
    26: "latin-1",
    28: "utf-32-be",
    30: "utf-16-be",
}

# A relative distinguished name: one or more of (type, value as text or None, value as DER).
Rdn = tuple[tuple[str, str | None, bytes], ...]
Name = tuple[Rdn, ...]

#: The form of a name for comparison: the result of `comparable`.
Comparable = tuple[Any, ...]


def read(value: bytes) -> Name:
    """A Name (RFC 5280 section 4.1.2.4) from its DER. ValueError for anything else."""
    return tuple(
        tuple(_attribute(item) for item in der.parts(relative, der.SET))
        for relative in der.parts(value)
    )


def _attribute(item: bytes) -> tuple[str, str | None, bytes]:
    name, raw = der.parts(item)
    oid, codec, text = der.oid(name), _CHARACTERS.get(raw[0]), None
    if codec is not None:
        # A value that is not valid in its encoding is shown and compared as bytes.
        with contextlib.suppress(UnicodeDecodeError):
            text = der.content(raw, raw[0]).decode(codec)
    if text is not None and len(text) > MAX_NAME:
        raise ValueError(
            f"{_SHORT.get(oid, oid)} in a name has {len(text)} characters, more than {MAX_NAME}"
        )
    return oid, text, raw


def values(name: Name, oid: str) -> Iterator[str]:
    """The text values of the attributes of type *oid*, verbatim."""
    for relative in name:
        for found, value, _ in relative:
            if found == oid and value is not None:
                yield value


def comparable(name: Name) -> Comparable:
    """
    A form that is equal for names equal by RFC 5280 section 7.1 and RFC 4518: string type, case and
    number of spaces are ignored. A wrong match does no harm, because signatures are verified too.
    """
    return tuple(
        tuple(
            sorted((oid, raw if text is None else _prepared(text)) for oid, text, raw in relative)
        )
        if len(relative) > 1
        else tuple((oid, raw if text is None else _prepared(text)) for oid, text, raw in relative)
        for relative in name
    )


def _prepared(text: str) -> bytes:
    mapped = "".join(
        " " if char.isspace() else char
        for char in text
        if char.isspace() or unicodedata.category(char) not in ("Cc", "Cf")
    )
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", mapped).casefold())
    return " ".join(folded.split()).encode("utf-8", "surrogatepass")


def shown(name: Name) -> str:
    """The name for display: RFC 4514, escaped, at most 300 characters."""
    return sanitized(
        ",".join(
            "+".join(
                f"{_SHORT.get(oid, oid)}={f'#{raw.hex()}' if text is None else _rfc4514(text)}"
                for oid, text, raw in relative
            )
            for relative in reversed(name)
        )
    )


def _rfc4514(text: str) -> str:
    escaped = re.sub(r'([\\,+"<>;])', r"\\\1", text)
    if escaped[:1] in ("#", " "):
        escaped = "\\" + escaped
    return escaped[:-1] + "\\ " if escaped.endswith(" ") and len(text) > 1 else escaped
