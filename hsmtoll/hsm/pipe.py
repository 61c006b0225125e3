"""
What a Device and the process that isolates it say to each other: frames, and values in them.

JSON and, behind it, plain bytes, with both lengths before them: a module gone wrong can send
nonsense, but no code.
"""

from __future__ import annotations

import json
import struct
import time
from base64 import b64decode, b64encode
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from hsmtoll.errors import DeviceError, from_data, to_data
from hsmtoll.hsm.device import KeyFacts, StoredCertificate
from hsmtoll.hsm.inspect import ModuleFacts, TokenFacts
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

__all__ = [
    "Pipe",
    "certificates_from",
    "certificates_to",
    "facts_from",
    "facts_to",
    "keys_from",
    "keys_to",
    "module_from",
    "module_to",
]

#: The lengths of the JSON, and of the bytes behind it.
_HEAD: Final = struct.Struct(">II")
#: Bytes, of either. A device full of certificates of the largest size stays below.
_LARGEST: Final = 16 * 1024 * 1024


class Pipe:
    """
    One end of a connected stream socket: whole messages in both directions, by one thread. Of a
    message, the member ``data`` alone is bytes, and goes as it is.
    """

    def __init__(self, there: socket.socket, now: Callable[[], float] = time.monotonic) -> None:
        self.socket = there
        self._now = now
        self._got = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message whole, within the socket's own timeout."""
        data = message.get("data", b"")
        if data:
            message = {name: value for name, value in message.items() if name != "data"}
        body = json.dumps(message).encode()
        self.socket.sendall(b"".join((_HEAD.pack(len(body), len(data)), body, data)))

    def receive(self, *, until: float | None = None) -> dict[str, Any]:
        """
        One message. EOFError where the other side ended, TimeoutError after *until*, ValueError
        or TypeError for what is none.
        """
        while (message := self._whole()) is None:
            if until is not None:
                left = until - self._now()
                if left <= 0:
                    raise TimeoutError
                self.socket.settimeout(left)
            part = self.socket.recv(65536)
            if not part:
                raise EOFError
            self._got += part
        return message

    def _whole(self) -> dict[str, Any] | None:
        """The next message, if all of it has come."""
        if len(self._got) < _HEAD.size:
            return None
        size, more = _HEAD.unpack_from(self._got)
        if max(size, more) > _LARGEST:
            raise ValueError("a frame that is too large")
        data = _HEAD.size + size
        if len(self._got) < data + more:
            return None
        message = json.loads(self._got[_HEAD.size : data])
        if not isinstance(message, dict) or "data" in message:
            raise TypeError("a frame that is no message")
        if more:
            message["data"] = bytes(self._got[data : data + more])
        del self._got[: data + more]
        return message


# ---------------------------------------------------------------------- values


def certificates_to(certificates: Sequence[StoredCertificate]) -> list[Any]:
    """Certificates as values."""
    return [
        [b64encode(each.der).decode(), each.label, each.id.hex(), each.problem]
        for each in certificates
    ]


def certificates_from(said: list[Any]) -> tuple[StoredCertificate, ...]:
    """Certificates that were sent."""
    return tuple(
        StoredCertificate(b64decode(der), str(label), bytes.fromhex(key_id), problem)
        for der, label, key_id, problem in said
    )


def keys_to(keys: Sequence[RsaPublicKey | None]) -> list[Any]:
    """Public keys as values."""
    return [each and [hex(each.modulus), each.exponent] for each in keys]


def keys_from(said: list[Any]) -> tuple[RsaPublicKey | None, ...]:
    """Public keys that were sent."""
    return tuple(each and RsaPublicKey(int(each[0], 16), int(each[1])) for each in said)


def facts_to(facts: KeyFacts) -> dict[str, Any]:
    """KeyFacts as a value."""
    return _members(facts) | {
        "uri": str(facts.uri),
        "id": facts.id.hex(),
        "public": keys_to([facts.public])[0],
        "mechanisms": sorted(facts.mechanisms),
    }


def facts_from(said: dict[str, Any]) -> KeyFacts:
    """KeyFacts that were sent."""
    return KeyFacts(
        **said
        | {
            "uri": KeyUri.parse(said["uri"]),
            "id": bytes.fromhex(said["id"]),
            "public": keys_from([said["public"]])[0],
            "mechanisms": frozenset(said["mechanisms"]),
            "firmware": tuple(said["firmware"]),
            "library_version": tuple(said["library_version"]),
            "warnings": tuple(said["warnings"]),
        }
    )


def module_to(facts: ModuleFacts) -> dict[str, Any]:
    """ModuleFacts as a value."""
    return _members(facts) | {
        "tokens": [_token_to(each) for each in facts.tokens],
        "login": to_data(facts.login) if facts.login else None,
    }


def module_from(said: dict[str, Any]) -> ModuleFacts:
    """ModuleFacts that were sent."""
    return ModuleFacts(
        **said
        | {
            "version": tuple(said["version"]),
            "cryptoki": tuple(said["cryptoki"]),
            "tokens": tuple(_token_from(each) for each in said["tokens"]),
            "login": from_data(said["login"], unknown=DeviceError) if said["login"] else None,
        }
    )


def _token_to(facts: TokenFacts) -> dict[str, Any]:
    return _members(facts) | {
        "uri": str(facts.uri),
        "keys": [facts_to(each) for each in facts.keys],
        "certificates": [[str(uri), certificates_to([each])] for uri, each in facts.certificates],
    }


def _token_from(said: dict[str, Any]) -> TokenFacts:
    return TokenFacts(
        **said
        | {
            "uri": KeyUri.parse(said["uri"]),
            "firmware": tuple(said["firmware"]),
            "keys": tuple(facts_from(each) for each in said["keys"]),
            "certificates": tuple(
                (KeyUri.parse(uri), *certificates_from(each)) for uri, each in said["certificates"]
            ),
        }
    )


def _members(facts: KeyFacts | ModuleFacts | TokenFacts) -> dict[str, Any]:
    return {each.name: getattr(facts, each.name) for each in fields(facts)}
