"""
The interface of a signing key on a PKCS#11 token: certificates, key, signature, administration.

    Device ── certificates() ── key() ── sign() ──► hsmtoll.signing.signer
      ├─ InProcessDevice   the module runs in this process          (hsmtoll.hsm.in_process)
      └─ WorkerDevice      it runs in processes of its own          (hsmtoll.hsm.pool)

Every call logs in if necessary. The annotations are used at run time: `hsmtoll.hsm.codec` encodes
arguments and results for the pipe to a worker by them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hsmtoll.hsm.facts import KeyFacts, ModuleFacts, Signature, Stored, StoredCertificate
from hsmtoll.hsm.pin_log import TokenUser
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey, SigningInput

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Device", "DeviceSettings"]


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """
    The settings of a device, whether its module runs in this process or in a worker.

    *uri* selects the token and the key. *public_key* is the key's public half, for tokens that hide
    it. *use_final_try* permits the last try before the token locks the PIN; *allow_exportable_key*
    permits a key that can leave the token. *user_type* is the CKU_ constant to log in with, None
    for CKU_USER. Only grants whose ``aud`` is *audience* are signed; any if it is None. *deadline*,
    in seconds, limits the wait for the module's lock, and in a worker the whole call.
    """

    module_path: Path
    uri: KeyUri
    _: KW_ONLY
    public_key: RsaPublicKey | None = None
    use_final_try: bool = False
    allow_exportable_key: bool = False
    user_type: int | None = None
    audience: str | None = None
    deadline: float = 60.0


class Device(Protocol):
    """
    A signing key behind a PKCS#11 module.

    Nothing is opened before the first call. All methods are thread-safe. They raise PinIncorrect,
    PinNotTried, ConfigurationError and DeviceError. After an error the next call opens everything
    again; if recovery fails, calls fail at once with ``device-down`` for a while
    (`hsmtoll.hsm.recovery`).
    """

    @property
    def uri(self) -> KeyUri:
        """The URI that selects the key, or the token."""

    @property
    def generation(self) -> int:
        """Increases with new handles: objects read before may be out of date."""

    @property
    def pin_state(self) -> str | None:
        """
        The state of the PIN after the last attempt, or after the last reading of the token's flags:
        ``ok count-low to-be-changed final-try locked unset`` by these flags, ``refused`` (now or
        before), ``unresolved`` (the outcome of an attempt is unknown), ``not-tried`` (the PIN log
        cannot be written); None if no PIN was needed.
        """

    @property
    def pin_accepted(self) -> bool:
        """
        Whether the device has accepted a PIN from this source. False if no login was needed, or if
        other code of the process had logged in, which says nothing about this PIN.
        """

    def certificates(
        self, *, near: bool = False, force_login: bool = False
    ) -> tuple[StoredCertificate, ...]:
        """
        The certificates on the token, in its order, after login if there is a PIN; *force_login*
        logs in even without CKF_LOGIN_REQUIRED. With *near*, on a token with many certificates,
        only those with the key's CKA_ID or label and their issuers; all if there are none.

        One that cannot be read, or is larger than 64 KiB, is returned without its DER.
        """

    def other_certificates(self) -> tuple[StoredCertificate, ...]:
        """
        The certificates on the module's other tokens, without login; the label of each is the URI
        of its token.
        """

    def key(self, *, candidates: Iterable[RsaPublicKey] = ()) -> KeyFacts:
        """
        The attributes of the key, after login if there is a PIN.

        *candidates* are public keys of leaves, which select between several keys. Raises
        DeviceError: ``key-missing``, ``key-ambiguous``, ``not-logged-in``, ``key-type``,
        ``key-size``, ``key-sign``, ``key-exportable``, ``key-mismatch``.
        """

    def sign(
        self, alg: str, unsigned: SigningInput, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> Signature:
        """
        Sign a grant with RS256, RS384 or RS512.

        The signature is verified with the key's public key. If the token hides that, one of
        *candidates* must verify it and is remembered; without candidates the caller must verify.
        Raises DeviceError ``signature-wrong`` if it does not verify, and PolicyDenied for data
        that is no grant.
        """

    def self_test(
        self, alg: str, *, candidates: Iterable[RsaPublicKey] = ()
    ) -> RsaPublicKey | None:
        """
        Sign constant data that is no grant. Returns the public key that verifies the signature,
        ``None`` if no public key is known. Raises as `sign`.
        """

    def sign_request(self, alg: str, info: bytes, *, public: RsaPublicKey) -> bytes:
        """
        Sign *info*, a CertificationRequestInfo (RFC 2986) for the key's own public key *public*.
        Raises as `sign`.
        """

    def generate(
        self, *, bits: int, label: str, key_id: bytes | None, always_authenticate: bool
    ) -> KeyUri:
        """As `hsmtoll.hsm.objects.generate`."""

    def private_keys(self) -> tuple[KeyFacts, ...]:
        """The attributes of all private keys on the token, after login."""

    def store(self, certificates: tuple[tuple[bytes, str, bytes], ...], *, hint: str) -> Stored:
        """As `hsmtoll.hsm.objects.store`."""

    def inspect(self, *, log_in: bool = True) -> ModuleFacts:
        """
        Everything that the module shows; with *log_in*, after a login to this token if there is a
        PIN. The error of that login is `ModuleFacts.login`, and is not raised.
        """

    def token_users(self) -> tuple[TokenUser, ...]:
        """The PIN log's keys for the tokens that the URI names."""

    def close(self) -> None:
        """Log out and close everything; the next call opens it again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
