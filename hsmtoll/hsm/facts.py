"""
What a device says of itself, its keys and its certificates, as values.

They cross the pipe between processes as they are (`hsmtoll.hsm.codec`), so every annotation is a
type at run time. Importing this loads neither a module nor python-pkcs11.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsmtoll.errors import HsmTollError
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey

__all__ = ["KeyFacts", "ModuleFacts", "Signature", "Stored", "StoredCertificate", "TokenFacts"]


@dataclass(frozen=True, slots=True)
class StoredCertificate:
    """
    A certificate object: its DER, CKA_LABEL and CKA_ID as the device gives them. *problem* is why
    it cannot be read, and then *der* is empty.
    """

    der: bytes
    label: str
    id: bytes
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """
    What the module reports about a private key; nothing of it is proven but *public*, where a
    signature was checked. None means that the device does not say. *bits* is the modulus' size.
    """

    uri: KeyUri
    label: str
    id: bytes
    key_type: str
    bits: int | None
    public: RsaPublicKey | None
    sensitive: bool | None
    always_sensitive: bool | None
    extractable: bool | None
    never_extractable: bool | None
    local: bool | None
    sign: bool | None
    always_authenticate: bool | None
    mechanisms: frozenset[str]
    token_label: str
    manufacturer: str
    model: str
    serial: str
    firmware: tuple[int, int]
    library_manufacturer: str
    library_description: str
    library_version: tuple[int, int]
    warnings: tuple[str, ...] = ()

    @property
    def protected(self) -> bool:
        """Whether the device says that the key cannot be taken out of it."""
        return self.sensitive is True and self.extractable is False


@dataclass(frozen=True, slots=True)
class Signature:
    """
    RSASSA-PKCS1-v1_5 signature, and the public key that it was verified *by*: ``None`` where the
    device hides its own and none was offered.
    """

    value: bytes
    by: RsaPublicKey | None


@dataclass(frozen=True, slots=True)
class Stored:
    """
    DERs that were *written*, were there before (*present*), and found no room (*left*). *lost*
    are those that cannot be read back: the device did not keep them, or no longer.
    """

    written: tuple[bytes, ...]
    present: tuple[bytes, ...]
    left: tuple[bytes, ...]
    lost: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFacts:
    """
    One p11_token. *pin_state* is the worst of ``ok count-low to-be-changed final-try locked
    unset``; *refused* and *unresolved* count the entries of the PIN log. *logged_in* says
    whether private keys could be seen; *problem* is why not, or why nothing could be read.
    """

    uri: KeyUri
    slot_id: int
    slot_description: str
    initialized: bool = False
    login_required: bool = False
    pinpad: bool = False
    pin_state: str = "unset"
    refused: int = 0
    unresolved: int = 0
    firmware: tuple[int, int] = (0, 0)
    logged_in: bool = False
    keys: tuple[KeyFacts, ...] = ()
    certificates: tuple[tuple[KeyUri, StoredCertificate], ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFacts:
    """
    One module and its p11_tokens, slots that answer with an error included. *login* is why nobody
    could log in, where that was tried.
    """

    path: str
    manufacturer: str
    description: str
    version: tuple[int, int]
    cryptoki: tuple[int, int]
    tokens: tuple[TokenFacts, ...]
    login: HsmTollError | None = None
