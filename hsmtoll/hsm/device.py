"""
One signing key behind a PKCS#11 module: three questions, and what administers it.

    Device ── certificates() ── key() ── sign() ──► hsmtoll.signing.signer
      ├─ InProcessDevice   the module runs in this process          (hsmtoll.hsm.in_process)
      └─ WorkerDevice      it runs in processes of its own          (hsmtoll.hsm.pool)

The login is part of each question. The annotations are types at run time: a question and its
answer cross the pipe to a worker as they stand here (`hsmtoll.hsm.codec`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from hsmtoll.hsm.facts import KeyFacts, ModuleFacts, Signature, Stored, StoredCertificate
from hsmtoll.hsm.pin_log import TokenUser
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey, SigningInput

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Device"]


class Device(Protocol):
    """
    A signing key behind a PKCS#11 module.

    Nothing is opened before the first question. Every method may be called from any thread. Raises
    PinIncorrect, PinNotTried, ConfigurationError and DeviceError; after an error the next call
    starts afresh, and where nothing helps callers are told ``device-down`` at once for a while
    (`hsmtoll.hsm.recovery`).
    """

    @property
    def uri(self) -> KeyUri:
        """Which key, or which device."""

    @property
    def generation(self) -> int:
        """Goes up when the handles are new: what was read before may be out of date then."""

    @property
    def pin_state(self) -> str | None:
        """
        The PIN as of the last try, or look at its flags: ``ok count-low to-be-changed final-try
        locked unset`` as the device says after a login, ``refused`` (now or before),
        ``unresolved`` (what became of a try is not known), ``not-tried`` (nothing can be written
        down); ``None`` where no PIN was needed.
        """

    @property
    def pin_accepted(self) -> bool:
        """
        Whether the device took a PIN from this source: False where no login was needed, or where
        somebody else of the process had logged in, which proves nothing about this PIN.
        """

    def certificates(
        self, *, near: bool = False, force_login: bool = False
    ) -> tuple[StoredCertificate, ...]:
        """
        The certificates that the device shows, in its order, after login where a PIN is given;
        *force_login* logs in where the device's flags do not ask for it, too. With *near*, a
        device that has many is asked only for those that lie with the key, by CKA_ID or label,
        and for their issuers; for all where there are none.

        One that cannot be read, or is larger than 64 KiB, is there without its DER.
        """

    def other_certificates(self) -> tuple[StoredCertificate, ...]:
        """
        The certificates that the module's other devices show without a login, each with its
        device's URI for a label.
        """

    def key(self, *, candidates: Iterable[RsaPublicKey] = ()) -> KeyFacts:
        """
        What the device says about the key, after login where a PIN is given.

        *candidates* are public keys of leaves: they choose between several keys. Raises
        DeviceError: ``key-missing``, ``key-ambiguous``, ``not-logged-in``, ``key-type``,
        ``key-size``, ``key-sign``, ``key-exportable``, ``key-mismatch``.
        """

    def sign(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> Signature:
        """
        The signature over a grant, with RS256, RS384 or RS512.

        It is returned only if the key's public half verifies it. Where the device hides that half,
        one of *candidates* must verify it and is kept; without candidates the caller has to check.
        Raises DeviceError ``signature-wrong`` otherwise, and PolicyDenied for what is no grant.
        """

    def self_test(
        self, alg: str, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> RsaPublicKey | None:
        """
        Sign what is no grant, and always the same: the public key that verifies it, ``None`` where
        there is none to ask. Raises as `sign`.
        """

    def sign_request(self, alg: str, info: bytes, *, public: RsaPublicKey) -> bytes:
        """
        The signature over *info*, a CertificationRequestInfo (RFC 2986) for the key's own public
        half, which is *public*. Raises as `sign`.
        """

    def generate(
        self, *, bits: int, label: str, key_id: bytes | None, always_authenticate: bool
    ) -> KeyUri:
        """As `hsmtoll.hsm.objects.generate`."""

    def private_keys(self) -> tuple[KeyFacts, ...]:
        """What the device says about each of its private keys, after login."""

    def store(self, certificates: tuple[tuple[bytes, str, bytes], ...], *, hint: str) -> Stored:
        """As `hsmtoll.hsm.objects.store`."""

    def inspect(self, *, log_in: bool = True) -> ModuleFacts:
        """As `hsmtoll.hsm.inspect.inspect`; with *log_in* this device is logged in to."""

    def token_users(self) -> tuple[TokenUser, ...]:
        """The PIN ledger's places of the devices that the URI names."""

    def close(self) -> None:
        """Log out and let go of everything; the next question opens it again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
