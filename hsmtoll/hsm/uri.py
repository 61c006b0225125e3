"""
PKCS#11 URIs (RFC 7512), which name a token and an object on it: parsing, text, comparison.

``pin-value`` is refused; ``pin-source`` must name a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias
from urllib.parse import unquote, urlsplit

from hsmtoll.errors import ConfigurationError, sanitized

__all__ = ["KeyUri"]

# RFC 7512 section 2.3: attribute → field. The order is the order of the normalised text.
_PATH: Final = {
    "library-manufacturer": "library_manufacturer",
    "library-description": "library_description",
    "library-version": "library_version",
    "slot-manufacturer": "slot_manufacturer",
    "slot-description": "slot_description",
    "slot-id": "slot_id",
    "manufacturer": "manufacturer",
    "model": "model",
    "serial": "serial",
    "token": "token",
    "object": "object",
    "id": "id",
    "type": "type",
}
_QUERY: Final = {"module-path": "module_path", "pin-source": "pin_source"}
_REFUSED: Final = {
    "pin-value": "a PIN in a URI ends up in logs, process lists and shell histories",
    "module-name": "a module name means different files on different machines; a path does not",
}
_TYPES: Final = ("public", "private", "cert", "secret-key", "data")
# unreserved + pk11-res-avail, without "&", which ends a query attribute.
_PLAIN: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~:[]@!$'()*+,"


#: The value of an attribute.
Fact: TypeAlias = str | bytes | int | tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUri:
    """
    One ``pkcs11:`` URI. A field that is None matches everything.

    *id* is bytes (CKA_ID); *slot_id* a number; *library_version* ``(major, minor)``, where M
    alone is M.0 (RFC 7512 section 2.3); *pin_source* an absolute path, without ``file:``.
    """

    token: str | None = None
    manufacturer: str | None = None
    model: str | None = None
    serial: str | None = None
    slot_id: int | None = None
    slot_manufacturer: str | None = None
    slot_description: str | None = None
    library_manufacturer: str | None = None
    library_description: str | None = None
    library_version: tuple[int, int] | None = None
    object: str | None = None
    id: bytes | None = None
    type: str | None = None
    module_path: str | None = None
    pin_source: str | None = None

    @classmethod
    def parse(cls, text: str) -> KeyUri:
        """Parse one URI. ConfigurationError (``uri``), which names the invalid attribute."""
        scheme, colon, rest = text.strip().partition(":")
        if not colon or scheme.lower() != "pkcs11":
            # The text may be anything, even a PIN: do not repeat it.
            raise _wrong(
                "it does not start with 'pkcs11:'",
                hint="white space separates URIs; write a blank in a name as %20",
            )
        path, _, query = rest.partition("?")
        values: dict[str, Any] = {}
        for part, between, known in ((path, ";", _PATH), (query, "&", _QUERY)):
            for piece in filter(None, part.split(between)):
                name, value = _attribute(piece, known)
                if name in values:
                    raise _wrong(f"'{piece.partition('=')[0]}' is given twice")
                values[name] = value
        return cls(**values)

    def __str__(self) -> str:
        path = [f"{name}={shown}" for name in _PATH if (shown := self._shown(name)) is not None]
        query = [
            f"{name}={_quoted(v.encode(), also='/')}"
            for name, f in _QUERY.items()
            if (v := getattr(self, f))
        ]
        return "pkcs11:" + ";".join(path) + ("?" + "&".join(query) if query else "")

    def _shown(self, name: str) -> str | None:
        value = getattr(self, _PATH[name])
        if value is None:
            return None
        if isinstance(value, bytes):
            return "".join(f"%{byte:02x}" for byte in value)
        if isinstance(value, tuple):
            return ".".join(map(str, value))
        return _quoted(str(value).encode())

    def matches(self, **facts: Fact) -> bool:
        """
        Whether the fields equal *facts*, which are given by field name; others are not compared.

        Padding is ignored in the fixed-size fields of PKCS#11, which do not include *object*.
        """
        return all(
            _same(getattr(self, name), fact, padded=name != "object")
            for name, fact in facts.items()
        )

    @property
    def names_object(self) -> bool:
        """Whether the URI has a label or id of an object."""
        return self.object is not None or self.id is not None

    def device_only(self) -> KeyUri:
        """The URI of the token: without the attributes of an object."""
        return replace(self, object=None, id=None, type=None)


def _attribute(piece: str, known: dict[str, str]) -> tuple[str, object]:
    name, equals, raw = piece.partition("=")
    if name in _REFUSED:
        raise _wrong(f"'{name}' is refused: {_REFUSED[name]}", hint=_INSTEAD[name])
    if name not in known:
        misplaced = name in _PATH or name in _QUERY
        why = "is on the wrong side of the '?'" if misplaced else "is not an attribute of RFC 7512"
        raise _wrong(f"'{sanitized(name)}' {why}")
    if not equals:
        raise _wrong(f"'{name}' has no value")
    return known[name], _value(name, raw)


_INSTEAD: Final = {
    "pin-value": "Use pin-source=/path/of/a/file or HSMTOLL_HSM__PIN_FILE.",
    "module-name": "Use module-path=/path/of/the/module.so or HSMTOLL_HSM__MODULE.",
}


_WHOLE_PATH: Final = "write the whole path"


def _value(name: str, raw: str) -> object:
    if re.search(r"%(?![0-9A-Fa-f]{2})", raw):
        raise _wrong(f"'{name}' has a '%' without two hex digits after it")
    if name == "id":
        return _bytes(raw)
    try:
        text = _bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise _wrong(f"'{name}' is not UTF-8") from None
    if "\0" in text:
        raise _wrong(f"'{name}' has a NUL in it")
    if name == "slot-id":
        return _number(name, text)
    if name == "library-version":
        major, dot, minor = text.partition(".")
        return _number(name, major), _number(name, minor) if dot else 0
    if name == "type" and text not in _TYPES:
        raise _wrong(f"'type' is one of {', '.join(_TYPES)}")
    if name == "pin-source":
        return _file(text)
    if name == "module-path" and text.startswith("~"):
        raise _wrong("'module-path' begins with ~, which is not expanded here", hint=_WHOLE_PATH)
    return text


def _bytes(raw: str) -> bytes:
    # Latin-1 maps each byte to one character. Characters beyond ASCII become their UTF-8, and
    # surrogates from the environment the bytes that they stand for.
    octets = raw.encode("utf-8", "surrogateescape")
    return unquote(octets.decode("latin-1"), encoding="latin-1").encode("latin-1")


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text):
        raise _wrong(f"'{name}' is a decimal number")
    return int(text)


def _file(text: str) -> str:
    # RFC 7512 permits any value for pin-source; in some programs it is a command.
    if text.startswith("file:"):
        try:
            parts = urlsplit(text)
        except ValueError:
            raise _wrong("'pin-source' is not the URI of a file") from None
        if parts.netloc not in {"", "localhost"} or parts.query or parts.fragment:
            raise _wrong("'pin-source' is a file of this machine and nothing else")
        text = unquote(parts.path)
    if text.startswith("~"):
        raise _wrong("'pin-source' begins with ~, which is not expanded here", hint=_WHOLE_PATH)
    if not text.startswith("/") or "|" in text or "\0" in text:
        raise _wrong(
            "'pin-source' is the absolute path of a file, or file: with one, and nothing else"
        )
    return text


def _quoted(data: bytes, *, also: str = "") -> str:
    plain = _PLAIN + also
    return "".join(chr(byte) if chr(byte) in plain else f"%{byte:02X}" for byte in data)


def _same(wanted: Fact, fact: Fact, *, padded: bool) -> bool:
    if wanted is None:
        return True
    if padded and isinstance(wanted, str) and isinstance(fact, str):
        return wanted.rstrip(" \0") == fact.rstrip(" \0")
    return wanted == fact


def _wrong(why: str, *, hint: str | None = None) -> ConfigurationError:
    return ConfigurationError(
        f"a pkcs11: URI (RFC 7512) cannot be read: {why}",
        hint=hint or "`hsmtoll objects` prints the URI of every key, ready to paste.",
        code="uri",
    )
