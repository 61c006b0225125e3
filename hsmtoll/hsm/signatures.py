"""
The data that a device may sign, checked immediately before the signature, in the process that makes
it; and the verification of signatures. There are three kinds of such data:

    grant               header and claims byte for byte as `hsmtoll.signing.grant` makes them
    PKCS#10 request     for the key's own public key
    self-test           constant bytes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pkcs11 import Mechanism

from hsmtoll import der as ders
from hsmtoll.errors import ConfigurationError, DeviceError, PolicyDenied, sanitized
from hsmtoll.hsm.facts import Signature
from hsmtoll.jws import ALGS, RsaPublicKey, digest_info
from hsmtoll.signing.grant import read_grant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hsmtoll.signing.grant import ParsedGrant

__all__ = ["SELF_TEST", "Signable", "Verifier"]

#: The data of the self-test. It is as large as a grant with x5c, because some mechanisms accept
#: only smaller data. It cannot be mistaken for other signed data: a JWS begins with ``eyJ`` and has
#: no blanks, DER begins with 0x30 or 0x31, and the signed data of TLS with random bytes, 64 blanks
#: or a handshake message.
SELF_TEST: Final = b"hsmtoll self-test, not a grant".ljust(9216)

_ATTRIBUTES: Final = 0xA0


@dataclass(frozen=True, slots=True)
class Signable:
    """
    Data that may be signed with *alg*, validated on construction: *data* is a grant, the self-test,
    or with *request_for* a CertificationRequestInfo for that public key.

    Raises PolicyDenied (``not-allowed``) for other data, ConfigurationError for another algorithm.
    *grant* is the parsed grant; None for other data.
    """

    alg: str
    data: bytes
    request_for: RsaPublicKey | None = None
    grant: ParsedGrant | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.alg not in ALGS:
            raise ConfigurationError(f"the algorithm is one of {', '.join(ALGS)}", code="alg")
        if type(self.data) is not bytes or type(self.request_for) not in (RsaPublicKey, type(None)):
            raise _refused("the data is not bytes")
        if self.request_for is not None:
            self.check_request(self.request_for)
        elif self.data != SELF_TEST:
            object.__setattr__(self, "grant", _grant(self.alg, self.data))

    def check_request(self, public: RsaPublicKey) -> None:
        """
        PolicyDenied unless the data is a CertificationRequestInfo (RFC 2986 section 4.1) for
        *public*, without attributes. A TBSCertificate, which has other fields, is refused.
        """
        try:
            ders.check_lengths(self.data)
            version, subject, spki, attributes = ders.parts(self.data)
            right = (
                ders.number(version) == 0
                and subject[0] == ders.SEQUENCE
                and all(each[0] == ders.SET for each in ders.parts(subject))
                and ders.content(attributes, _ATTRIBUTES) == b""
            )
        except ValueError:
            right = False
        if not right:
            raise _refused("the data is not a certificate request")
        if spki != public.spki():
            raise _refused("the request is for another public key")

    def check_grant(
        self, audience: str | None, rules: Callable[[ParsedGrant], None] | None
    ) -> None:
        """
        PolicyDenied unless the data is a grant, with *audience* as ``aud`` unless None; and the
        errors that *rules* raise.
        """
        if self.grant is None:
            raise _refused("the data is not a grant")
        if audience is not None and self.grant.grant.audience != audience:
            found = sanitized(self.grant.grant.audience)
            raise _refused(f"aud is not the one of the settings: {found}")
        if rules is not None:
            rules(self.grant)

    def input_for(self, mechanism: Mechanism) -> bytes:
        """The input of C_Sign: the data, or its DigestInfo if *mechanism* does not hash."""
        raw = mechanism is Mechanism.RSA_PKCS
        return digest_info(self.alg, self.data) if raw else self.data


def _grant(alg: str, unsigned: bytes) -> ParsedGrant:
    try:
        return read_grant(alg, unsigned)
    except ValueError as exc:
        raise _refused(str(exc)) from None


def _refused(why: str) -> PolicyDenied:
    return PolicyDenied(
        f"the device was not asked to sign: {why}",
        hint="it signs only grants, certificate requests for its own key, and its self-test",
        code="not-allowed",
    )


class Verifier:
    """
    Verifies signatures with the public key of the key *name*. If the device hides that, the public
    key that has verified a signature is remembered.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._learned: RsaPublicKey | None = None

    def verified(
        self, alg: str, signed: bytes, made: Signature, offered: Iterable[RsaPublicKey]
    ) -> Signature:
        """
        *made*, padded to the size of the modulus, with the public key that verifies it: that of the
        device (``made.by``), or else one of *offered*; ``by`` is None if there is no public key.
        DeviceError (``signature-wrong``) if none verifies it.
        """
        learned = (self._learned,) if self._learned else ()
        public_keys = (made.by,) if made.by else (*learned, *offered)
        # The remembered key may be that of an earlier private key with the same name.
        self._learned = None
        for public in public_keys:
            whole = public.padded(made.value)
            if public.verify(alg, signed, whole):
                self._learned = public
                return Signature(whole, public)
        if public_keys:
            raise DeviceError(
                f"the device's signature does not verify with the public key of {self._name}",
                hint="The certificate belongs to another key, or the device is faulty.",
                code="signature-wrong",
            )
        return Signature(made.value, None)
