"""
What a module reports about itself, its tokens, keys and certificates, as values.

`hsmtoll.hsm.codec` encodes them for the pipe between processes, so every annotation must exist at
run time. Importing this loads neither a PKCS#11 module nor python-pkcs11.
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
    A certificate object: its CKA_VALUE (DER), CKA_LABEL and CKA_ID. *problem* is the reason why it
    cannot be read; *der* is empty then.
    """

    der: bytes
    label: str
    id: bytes
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFacts:
    """
    What the module reports about a private key; nothing of it is verified here. None means that
    the attribute cannot be read. *bits* is the size of the modulus.
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
        """Whether the device reports that the key cannot be read out of it in plain text."""
        return self.sensitive is True and self.extractable is False


@dataclass(frozen=True, slots=True)
class Signature:
    """
    RSASSA-PKCS1-v1_5 signature, and the public key that it was verified *by*: None if the device
    hides its public key and the caller has offered none.
    """

    value: bytes
    by: RsaPublicKey | None


@dataclass(frozen=True, slots=True)
class Stored:
    """
    The certificates (DER) that were *written*, those that were stored before (*present*), those
    that the device refused (*left*), and those that it no longer has when they are read back
    (*lost*).
    """

    written: tuple[bytes, ...]
    present: tuple[bytes, ...]
    left: tuple[bytes, ...]
    lost: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFacts:
    """
    One PKCS#11 token. *pin_state* is the most severe of ``ok count-low to-be-changed final-try
    locked unset``; *refused* and *unresolved* count the entries of the PIN log. *logged_in*:
    whether private keys are visible. *problem* is the error of the login or of reading the token.
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
    One module and its PKCS#11 tokens, including slots that return an error. *login* is the error
    of the login, if one was tried and failed.
    """

    path: str
    manufacturer: str
    description: str
    version: tuple[int, int]
    cryptoki: tuple[int, int]
    tokens: tuple[TokenFacts, ...]
    login: HsmTollError | None = None
