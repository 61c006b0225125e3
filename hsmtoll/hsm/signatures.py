"""
What a device is asked to sign, checked right before the signature is made and in the process that
makes it; and the proof of what came out.

    a grant             header and claims byte for byte as `hsmtoll.signing.grant` makes them
    a PKCS#10 request   for the key's own public half, and nothing else
    the self-test       always the same bytes

Nothing else is signed, whoever asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pkcs11 import Mechanism

from hsmtoll import der as ders
from hsmtoll.errors import ConfigurationError, DeviceError, PolicyDenied, foreign
from hsmtoll.hsm.facts import Signature
from hsmtoll.jws import ALGS, RsaPublicKey, digest_info
from hsmtoll.signing.grant import read_grant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hsmtoll.signing.grant import Read

__all__ = ["SELF_TEST", "Signable", "Verifier"]

#: What is signed to see that a device works. It is as large as a grant with x5c, because there are
#: mechanisms that take less. A JWS has no blanks and begins with ``eyJ``, DER with 0x30 or 0x31, a
#: TLS signature with random bytes, 64 blanks or a handshake message: it is none of them.
SELF_TEST: Final = b"hsmtoll self-test, not a grant".ljust(9216)

_ATTRIBUTES: Final = 0xA0


@dataclass(frozen=True, slots=True)
class Signable:
    """
    What may be signed with *alg*, and nothing else can be made into one: *data* is a grant, the
    self-test, or with *request_for* a CertificationRequestInfo for that public key.

    Raises PolicyDenied (``not-allowed``) for other data, ConfigurationError for another algorithm.
    *grant* is the grant that was read back.
    """

    alg: str
    data: bytes
    request_for: RsaPublicKey | None = None
    grant: Read | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.alg not in ALGS:
            raise ConfigurationError(f"the algorithm is one of {', '.join(ALGS)}", code="alg")
        if type(self.data) is not bytes or type(self.request_for) not in (RsaPublicKey, type(None)):
            raise _refused("it is of another type")
        if self.request_for is not None:
            self.check_request(self.request_for)
        elif self.data != SELF_TEST:
            object.__setattr__(self, "grant", _grant(self.alg, self.data))

    def check_request(self, public: RsaPublicKey) -> None:
        """
        PolicyDenied unless it is a request (RFC 2986 section 4.1) for *public*, without attributes.
        A TBSCertificate has other fields at these places.
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
            raise _refused("it is no request for a certificate")
        if spki != public.spki():
            raise _refused("the request is for another public key")

    def check_grant(self, audience: str | None, rules: Callable[[Read], None] | None) -> None:
        """PolicyDenied unless it is a grant, for *audience* if told; and what the *rules* raise."""
        if self.grant is None:
            raise _refused("it is no grant")
        if audience is not None and self.grant.grant.audience != audience:
            told = foreign(self.grant.grant.audience)
            raise _refused(f"aud is not the one of the settings: {told}")
        if rules is not None:
            rules(self.grant)

    def input_for(self, mechanism: Mechanism) -> bytes:
        """What *mechanism* is given: the data, or its DigestInfo where it does not hash."""
        raw = mechanism is Mechanism.RSA_PKCS
        return digest_info(self.alg, self.data) if raw else self.data


def _grant(alg: str, unsigned: bytes) -> Read:
    try:
        return read_grant(alg, unsigned)
    except ValueError as exc:
        raise _refused(str(exc)) from None


def _refused(why: str) -> PolicyDenied:
    return PolicyDenied(
        f"the device was not asked to sign: {why}",
        hint="it signs grants, requests for a certificate of its own key, and its self-test",
        code="not-allowed",
    )


class Verifier:
    """
    Whether a signature is one, by the public half of the key that *name* means. Where the device
    hides that half, the one that a signature showed to be it is kept.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._learned: RsaPublicKey | None = None

    def verified(
        self, alg: str, signed: bytes, made: Signature, offered: Iterable[RsaPublicKey]
    ) -> Signature:
        """
        *made*, whole, with the key that verifies it: ``made.by``, which the device shows, or else
        one of those *offered*. DeviceError (``signature-wrong``) if none does; ``by`` is ``None``
        if there is none to ask.
        """
        learned = (self._learned,) if self._learned else ()
        halves = (made.by,) if made.by else (*learned, *offered)
        # What an earlier signature taught may have been another key by the same name.
        self._learned = None
        for public in halves:
            whole = public.padded(made.value)
            if public.verify(alg, signed, whole):
                self._learned = public
                return Signature(whole, public)
        if halves:
            raise DeviceError(
                f"the device's signature does not fit the public key of {self._name}",
                hint="The certificate belongs to another key, or the device is faulty.",
                code="signature-wrong",
            )
        return Signature(made.value, None)
