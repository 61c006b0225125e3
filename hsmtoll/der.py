"""
DER (X.690) parsing into slices of the original bytes: signed data is never encoded again.

asn1crypto encodes a value anew when it is dumped and its length ends in the byte 0x80
(https://github.com/wbond/asn1crypto/issues/249), so signed bytes are never taken from it.
All functions raise ValueError for bytes of another form than the one to be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BIT_STRING",
    "BOOLEAN",
    "INTEGER",
    "OCTET_STRING",
    "OID",
    "SEQUENCE",
    "SET",
    "CertificateFields",
    "ber_values",
    "certificate_fields",
    "check_lengths",
    "content",
    "first",
    "number",
    "oid",
    "parts",
    "value_at",
    "values",
]

BOOLEAN: Final = 0x01
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
OID: Final = 0x06
SEQUENCE: Final = 0x30
SET: Final = 0x31

#: Maximum bytes of an object identifier; the longest in use have about twenty.
_MAX_OID_BYTES: Final = 128

#: Maximum nesting; a certificate has about ten levels, not counting those inside extensions.
_MAX_NESTING: Final = 64


def _header_and_content_size(data: bytes, at: int = 0, *, strict: bool = False) -> tuple[int, int]:
    """The sizes, in bytes, of header and content of the value that begins at *at*."""
    if at + 2 > len(data):
        raise ValueError("it ends too early")
    if data[at] & 0x1F == 0x1F:
        raise ValueError("a tag that no certificate has")
    size, head = data[at + 1], 2
    if size >= 0x80:
        more = data[at + 2 : at + 2 + (size & 0x7F)]
        size, head = int.from_bytes(more, "big"), 2 + len(more)
        if not more or (strict and (more[0] == 0 or size < 0x80)):
            raise ValueError("BER, not DER: a length is not in its shortest form")
    if at + head + size > len(data):
        raise ValueError("it ends too early")
    return head, size


def values(data: bytes, *, strict: bool = False) -> list[bytes]:
    """Split *data* into its values, each with its header. *strict*: lengths must be DER."""
    found: list[bytes] = []
    at = 0
    while at < len(data):
        head, size = _header_and_content_size(data, at, strict=strict)
        found.append(data[at : at + head + size])
        at += head + size
    return found


def ber_values(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """
    Split *data* into its BER values: tag, content, and the value with its header.

    A length may be indefinite (X.690 section 8.1.3.6).
    """
    at = 0
    while at < len(data):
        end = _ber_end(data, at)
        if _is_indefinite(data, at):
            yield data[at], data[at + 2 : end - 2], data[at:end]
        else:
            yield data[at], data[at + _header_and_content_size(data, at)[0] : end], data[at:end]
        at = end


def _is_indefinite(data: bytes, at: int) -> bool:
    return data[at + 1 : at + 2] == b"\x80" and bool(data[at] & 0x20)


def _ber_end(data: bytes, at: int) -> int:
    """The end of the value that begins at *at*. Each byte is read once."""
    depth = 0
    while True:
        if depth and data[at : at + 2] == b"\0\0":
            depth, at = depth - 1, at + 2
        elif _is_indefinite(data, at):
            depth, at = depth + 1, at + 2
            if depth > _MAX_NESTING:
                raise ValueError("it is nested deeper than any certificate")
        else:
            at += sum(_header_and_content_size(data, at))
        if not depth:
            return at


def value_at(data: bytes, at: int) -> bytes:
    """The value that begins at *at*, without what follows it."""
    return data[at : at + sum(_header_and_content_size(data, at))]


def first(data: bytes) -> bytes:
    """The first value in *data*, without what follows it."""
    return value_at(data, 0)


def content(value: bytes, tag: int) -> bytes:
    """The content of exactly one value, which has this *tag*."""
    head, size = _header_and_content_size(value)
    if value[0] != tag or head + size != len(value):
        raise ValueError("a value of another kind than expected")
    return value[head:]


def parts(value: bytes, tag: int = SEQUENCE) -> list[bytes]:
    """The values inside exactly one constructed value, which has this *tag*."""
    return values(content(value, tag))


def check_lengths(der: bytes) -> None:
    """ValueError unless all lengths are DER (X.690 section 10.1). OCTET STRINGs are not opened."""
    pending = [(0, der)]
    while pending:
        depth, data = pending.pop()
        if depth > _MAX_NESTING:
            raise ValueError("it is nested deeper than any certificate")
        pending += [
            (depth + 1, each[_header_and_content_size(each)[0] :])
            for each in values(data, strict=True)
            if each[0] & 0x20
        ]


def oid(value: bytes) -> str:
    """An object identifier in dotted form."""
    raw = content(value, OID)
    if not raw or raw[-1] & 0x80 or len(raw) > _MAX_OID_BYTES:
        raise ValueError("not an object identifier")
    arcs, arc = [], 0
    for byte in raw:
        arc = arc << 7 | byte & 0x7F
        if not byte & 0x80:
            arcs.append(arc)
            arc = 0
    root = min(arcs[0] // 40, 2)
    return ".".join(map(str, (root, arcs[0] - 40 * root, *arcs[1:])))


def number(value: bytes, tag: int = INTEGER) -> int:
    """A signed integer."""
    raw = content(value, tag)
    if not raw:
        raise ValueError("a number without digits")
    return int.from_bytes(raw, "big", signed=True)


class CertificateFields(NamedTuple):
    """The fields of a certificate (RFC 5280 section 4.1), each as its original DER."""

    tbs: bytes
    version: int
    serial: bytes
    algorithm: bytes
    issuer: bytes
    validity: bytes
    subject: bytes
    spki: bytes
    #: The value inside the field ``extensions``; None without that field.
    extensions: bytes | None
    signature_algorithm: bytes
    signature: bytes


def certificate_fields(der: bytes) -> CertificateFields:
    """Split one certificate into its fields. *version* is 1, 2 or 3; the encoding counts from 0."""
    whole = parts(der)
    if len(whole) != 3:
        raise ValueError("it has fields that no certificate has")
    tbs, algorithm, signature = whole
    fields = parts(tbs)
    version = 1
    if fields and fields[0][0] == 0xA0:
        version = number(content(fields.pop(0), 0xA0)) + 1
    fixed, optional = fields[:6], fields[6:]
    tags = [each[0] for each in optional]
    if len(fixed) != 6 or tags != sorted({*tags} & {0x81, 0x82, 0xA3}):
        raise ValueError("it has fields that no certificate has")
    extensions = content(optional[-1], 0xA3) if 0xA3 in tags else None
    serial, algorithm_in_tbs, issuer, validity, subject, spki = fixed
    return CertificateFields(
        tbs, version, serial, algorithm_in_tbs, issuer, validity, subject, spki,
        extensions, algorithm, signature,
    )  # fmt: skip
