"""
X.509 parsing: DER to an immutable value. No validation.

No file, clock or device is used, and nothing is trusted.
Chains are built in `hsmtoll.x509.path_building`.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from hsmtoll import der
from hsmtoll.errors import sanitized
from hsmtoll.x509 import algorithms, extensions, names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hsmtoll.apis import Identity
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.x509.algorithms import Pss, Signature
    from hsmtoll.x509.extensions import QcStatements
    from hsmtoll.x509.names import Comparable

__all__ = ["MAX_DER", "Certificate"]

#: Bytes. Larger certificates are refused.
MAX_DER: Final = 64 * 1024

_COMMON_NAME: Final = "2.5.4.3"
_SERIAL_NUMBER: Final = "2.5.4.5"
_COUNTRY: Final = "2.5.4.6"
_ORGANIZATION: Final = "2.5.4.10"
_UNIT: Final = "2.5.4.11"
_ORGANIZATION_IDENTIFIER: Final = "2.5.4.97"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Certificate:
    """
    One X.509 certificate. Two certificates are equal if their DER is equal.

    *subject* and *issuer* are for display: RFC 4514 order, escaped, at most 300 characters. All
    other texts (*common_name*, *organization_identifiers* …) are verbatim, as Maskinporten compares
    them: escape them before display. *subject_key* and *issuer_key* are for comparison: names that
    are equal by RFC 5280 section 7.1 have equal keys, even if their bytes differ.
    *alternative_names* are the directory names of subjectAltName, for comparison.

    *tbs* and *spki_der* are the original bytes, never encoded again. *unreadable*: OIDs of
    informational extensions that could not be parsed completely. *pss*: the parameters that an
    RSASSA-PSS key is restricted to; None without restriction.
    """

    der: bytes
    sha256: str
    version: int
    subject: str
    issuer: str
    subject_key: Comparable
    issuer_key: Comparable
    common_name: str | None
    organization_name: str | None
    organizational_unit: str | None
    organization_identifiers: tuple[str, ...]
    country: str | None
    subject_serial_number: str | None
    serial: int
    not_before: datetime
    not_after: datetime
    public_key: RsaPublicKey | None
    spki_der: bytes
    key_type: str
    key_bits: int
    pss: Pss | None
    tbs: bytes
    signature: Signature
    is_ca: bool
    path_length: int | None
    key_usage: frozenset[str] | None
    ext_key_usage: tuple[str, ...] | None
    policies: tuple[str, ...]
    subject_key_id: bytes | None
    authority_key_id: bytes | None
    qc: QcStatements
    ocsp_urls: tuple[str, ...]
    crl_urls: tuple[str, ...]
    critical: frozenset[str]
    permitted: tuple[Comparable, ...] | None
    excluded: tuple[Comparable, ...]
    alternative_names: tuple[Comparable, ...]
    unreadable: frozenset[str]

    @classmethod
    def load(cls, raw: bytes) -> Certificate:
        """
        Parse the DER *raw* completely, so that no later access can fail.

        Raises ValueError unless *raw* is exactly one certificate: for trailing bytes, a repeated
        extension, more than 64 KiB, and for values beyond `MAX_NAME`, `MAX_MODULUS` or
        `MAX_EXPONENT`, which no certificate needs and which cost much time.
        """
        if len(raw) > MAX_DER:
            raise ValueError(f"not read: {len(raw)} bytes are more than {MAX_DER}")
        try:
            return _read(bytes(raw))
        except (ValueError, IndexError, OverflowError) as exc:
            why = sanitized(exc) if type(exc) is ValueError else "a field of it has another form"
            raise ValueError(f"not a certificate: {why}") from exc

    @property
    def self_issued(self) -> bool:
        """Whether subject and issuer are the same name; `path_building` verifies signatures."""
        return self.subject_key == self.issuer_key

    @property
    def serial_hex(self) -> str:
        """The serial number as tools print it: hex, an even number of digits."""
        digits = f"{abs(self.serial):x}"
        return f"{'-' * (self.serial < 0)}{'0' * (len(digits) % 2)}{digits}"

    @property
    def unknown_critical(self) -> tuple[str, ...]:
        """OIDs of critical extensions that RFC 5280 does not define, or that cannot be parsed."""
        return tuple(sorted(self.critical - (extensions.UNDERSTOOD - self.unreadable)))

    @property
    def unreadable_names(self) -> tuple[str, ...]:
        """The extensions of `unreadable`, as RFC 5280 and RFC 3739 call them."""
        return tuple(sorted(extensions.EXTENSION_NAMES.get(oid, oid) for oid in self.unreadable))

    @property
    def qualified_eseal(self) -> bool:
        """QcCompliance and QcType eSeal: Maskinporten will say ``QCForESeal`` (M87)."""
        return self.qc.compliance and "eseal" in self.qc.types

    def allows(self, below: Certificate) -> bool:
        """Whether its name constraints for directory names permit *below* (RFC 5280, 4.2.1.10)."""
        if self.permitted is None and not self.excluded:
            return True
        if extensions.ALTERNATIVE_NAMES in below.unreadable:
            return False
        permitted = None if self.permitted is None else _Subtrees(self.permitted)
        excluded = _Subtrees(self.excluded)
        return all(
            (permitted is None or permitted.contain(name)) and not excluded.contain(name)
            for name in (below.subject_key, *below.alternative_names)
            # An empty subject is not a name; an empty base contains every name.
            if name
        )

    def valid_at(self, now: datetime) -> bool:
        """Whether *now* is within the validity, both ends included (RFC 5280 section 4.1.2.5)."""
        return self.not_before <= now <= self.not_after

    def days_left(self, now: datetime) -> int:
        """Whole days until notAfter; negative after it."""
        return (self.not_after - now).days

    def orgno(self) -> str | None:
        """
        The Norwegian organisation number: 9 digits, or None.

        Sources in Digdir's order: SEID 1.0 ``serialNumber``, an organisation name that ends in
        `` - 123456789``, SEID 2.0 ``organizationIdentifier``.
        """
        if re.fullmatch(r"[0-9]{9}", self.subject_serial_number or ""):
            return self.subject_serial_number
        if found := re.search(r" - ([0-9]{9})\Z", self.organization_name or ""):
            return found[1]
        for identifier in self.organization_identifiers:
            if found := re.fullmatch(r"(?:NTRNO-|PSDNO-FSA-)?([0-9]{9})", identifier):
                return found[1]
        return None

    def consumer_id(self, identity: Identity) -> str | None:
        """
        The ``consumer.ID`` that Maskinporten derives from the certificate (M85, M86), or None.

        For an eSeal, the organizationIdentifier verbatim; None unless there is exactly one.
        """
        if identity == "norwegian":
            number = self.orgno()
            return None if number is None else f"0192:{number}"
        if len(self.organization_identifiers) != 1 or not self.organization_identifiers[0]:
            return None
        return self.organization_identifiers[0]

    def client_amr(self, identity: Identity) -> str:
        """The ``client_amr`` that Maskinporten derives from the certificate (M85, M87)."""
        if identity == "norwegian":
            return "virksomhetssertifikat"
        return "QCForESeal" if self.qualified_eseal else "CForESeal"

    def pem(self) -> str:
        """The certificate as PEM (RFC 7468), with a newline at the end."""
        text = base64.b64encode(self.der).decode("ascii")
        lines = "\n".join(text[at : at + 64] for at in range(0, len(text), 64))
        return f"-----BEGIN CERTIFICATE-----\n{lines}\n-----END CERTIFICATE-----\n"

    def __eq__(self, other: object) -> bool:
        """Compare the DER."""
        return isinstance(other, Certificate) and self.der == other.der

    def __hash__(self) -> int:
        """Agree with `__eq__`."""
        return hash(self.der)

    def __repr__(self) -> str:
        """Subject and the beginning of the SHA-256."""
        return f"<Certificate {self.subject!r} sha256={self.sha256[:16]}…>"


class _Subtrees:
    """Subtrees of directory names, in sets: thousands of names may meet thousands of subtrees."""

    def __init__(self, bases: Iterable[Comparable]) -> None:
        self._bases = frozenset(bases)
        # Few different lengths, because all bases together have at most 64 KiB.
        self._lengths = {len(base) for base in self._bases}

    def contain(self, name: Comparable) -> bool:
        """Whether *name* begins with one of the bases."""
        return any(name[:length] in self._bases for length in self._lengths)


@lru_cache(maxsize=512)
def _read(raw: bytes) -> Certificate:
    der.check_lengths(raw)
    fields = der.certificate_fields(raw)
    ends = der.parts(fields.validity)
    if len(ends) != 2:
        raise ValueError("its validity is not a time")
    not_before, not_after = map(_time, ends)
    subject, issuer = names.read(fields.subject), names.read(fields.issuer)
    found, critical = extensions.read(fields.extensions)
    key_type, key_bits, public_key, pss = algorithms.public_key(fields.spki)
    is_ca, path_length = extensions.basic_constraints(found.get("2.5.29.19"))
    permitted, excluded = extensions.name_constraints(found.get("2.5.29.30"))
    informational = extensions.Informational(found)
    purposes = informational.read("2.5.29.37", lambda item: [der.oid(item)])
    policies = informational.read("2.5.29.32", lambda item: [der.oid(der.parts(item)[0])])
    key_ids = informational.read("2.5.29.35", extensions.authority_key_id)
    qc = extensions.qc_statements(informational)

    def first(oid: str) -> str | None:
        return next(names.values(subject, oid), None)

    return Certificate(
        der=raw,
        sha256=sha256(raw).hexdigest(),
        version=fields.version,
        subject=names.shown(subject),
        issuer=names.shown(issuer),
        subject_key=names.comparable(subject),
        issuer_key=names.comparable(issuer),
        common_name=first(_COMMON_NAME),
        organization_name=first(_ORGANIZATION),
        organizational_unit=first(_UNIT),
        organization_identifiers=tuple(names.values(subject, _ORGANIZATION_IDENTIFIER)),
        country=first(_COUNTRY),
        subject_serial_number=first(_SERIAL_NUMBER),
        serial=der.number(fields.serial),
        not_before=not_before,
        not_after=not_after,
        public_key=public_key,
        spki_der=fields.spki,
        key_type=key_type,
        key_bits=key_bits,
        pss=pss,
        tbs=fields.tbs,
        signature=algorithms.signature(fields),
        is_ca=is_ca,
        path_length=path_length,
        key_usage=extensions.key_usage(found.get("2.5.29.15")),
        ext_key_usage=purposes if "2.5.29.37" in found else None,
        policies=policies,
        subject_key_id=extensions.subject_key_id(informational),
        authority_key_id=key_ids[0] if key_ids else None,
        qc=qc,
        ocsp_urls=informational.read("1.3.6.1.5.5.7.1.1", extensions.ocsp_urls),
        crl_urls=informational.read("2.5.29.31", extensions.crl_urls),
        critical=critical,
        permitted=permitted,
        excluded=excluded,
        alternative_names=informational.read(
            extensions.ALTERNATIVE_NAMES, extensions.directory_name
        ),
        # Last, when all informational extensions have been parsed.
        unreadable=frozenset(informational.unreadable),
    )


# RFC 5280 section 4.1.2.5: UTCTime or GeneralizedTime, in UTC, with seconds, without fractions.
_TIME: Final = re.compile(
    rb"(?:\x17\x0d|\x18\x0f([0-9]{2}))"
    rb"([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})Z"
)


def _time(value: bytes) -> datetime:
    found = _TIME.fullmatch(value)
    if found is None:
        raise ValueError("its validity is not a DER time")
    century, *rest = found.groups()
    year, month, day, hour, minute, second = map(int, rest)
    if century is None:
        century = 19 if year >= 50 else 20
    return datetime(100 * int(century) + year, month, day, hour, minute, second, tzinfo=UTC)
