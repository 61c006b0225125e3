"""
X.509 parsing: DER to an immutable value. No validation.

No file, clock or device is used, and nothing is trusted.
Chains are built in `hsmtoll.x509.path_building`.
"""

from __future__ import annotations

import base64
import contextlib
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from hsmtoll import der
from hsmtoll.errors import foreign
from hsmtoll.jws import RsaPublicKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from hsmtoll.apis import Identity

__all__ = [
    "MAX_DER",
    "MAX_EXPONENT",
    "MAX_MODULUS",
    "MAX_NAME",
    "Certificate",
    "Pss",
    "QcStatements",
    "Signature",
]

_A = TypeVar("_A")
_T = TypeVar("_T")

#: Bytes. Nothing that is longer is read.
MAX_DER: Final = 64 * 1024

#: Characters of one attribute of a name. X.520 allows 64 for most and 128 for some; issuers
#: overstep that, but not by so much, and comparing names costs the square of their length.
MAX_NAME: Final = 256

#: Bits of an RSA key's modulus and exponent; verifying takes time in proportion to the exponent's
#: and to the square of the modulus'.
MAX_MODULUS: Final = 8192
MAX_EXPONENT: Final = 64

# RFC 4514 section 3 and what stands beside it in enterprise certificates.
_SHORT: Final = {
    "2.5.4.3": "CN",
    "2.5.4.4": "SN",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "STREET",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.42": "GN",
    "2.5.4.97": "organizationIdentifier",
    "0.9.2342.19200300.100.1.1": "UID",
    "0.9.2342.19200300.100.1.25": "DC",
    "1.2.840.113549.1.9.1": "emailAddress",
}
_COMMON_NAME: Final = "2.5.4.3"
_SERIAL_NUMBER: Final = "2.5.4.5"
_COUNTRY: Final = "2.5.4.6"
_ORGANIZATION: Final = "2.5.4.10"
_UNIT: Final = "2.5.4.11"
_ORGANIZATION_IDENTIFIER: Final = "2.5.4.97"

# X.680 table 1: the universal tags that hold characters, and how they hold them.
_CHARACTERS: Final = {
    12: "utf-8",
    18: "ascii",
    19: "latin-1",
    20: "latin-1",
    22: "latin-1",
    26: "latin-1",
    28: "utf-32-be",
    30: "utf-16-be",
}

# RFC 5280 section 4.2.1.3, in the order of the bits.
_KEY_USAGE: Final = (
    "digitalSignature",
    "nonRepudiation",
    "keyEncipherment",
    "dataEncipherment",
    "keyAgreement",
    "keyCertSign",
    "cRLSign",
    "encipherOnly",
    "decipherOnly",
)

_CURVE: Final = {
    "1.2.840.10045.3.1.1": ("P-192", 192),
    "1.3.132.0.33": ("P-224", 224),
    "1.2.840.10045.3.1.7": ("P-256", 256),
    "1.3.132.0.34": ("P-384", 384),
    "1.3.132.0.35": ("P-521", 521),
    "1.3.132.0.10": ("secp256k1", 256),
    "1.3.36.3.3.2.8.1.1.7": ("brainpoolP256r1", 256),
    "1.3.36.3.3.2.8.1.1.11": ("brainpoolP384r1", 384),
    "1.3.36.3.3.2.8.1.1.13": ("brainpoolP512r1", 512),
}
_EDWARDS: Final = {"1.3.101.112": ("ed25519", 256), "1.3.101.113": ("ed448", 456)}
_RSA: Final = {"1.2.840.113549.1.1.1": "rsa", "1.2.840.113549.1.1.10": "rsa-pss"}
_EC: Final = "1.2.840.10045.2.1"

_SCHEME: Final = {
    "1.2.840.113549.1.1.4": ("pkcs1v15", "md5"),
    "1.2.840.113549.1.1.5": ("pkcs1v15", "sha1"),
    "1.2.840.113549.1.1.11": ("pkcs1v15", "sha256"),
    "1.2.840.113549.1.1.12": ("pkcs1v15", "sha384"),
    "1.2.840.113549.1.1.13": ("pkcs1v15", "sha512"),
    "1.2.840.113549.1.1.14": ("pkcs1v15", "sha224"),
    "1.2.840.10045.4.1": ("ecdsa", "sha1"),
    "1.2.840.10045.4.3.1": ("ecdsa", "sha224"),
    "1.2.840.10045.4.3.2": ("ecdsa", "sha256"),
    "1.2.840.10045.4.3.3": ("ecdsa", "sha384"),
    "1.2.840.10045.4.3.4": ("ecdsa", "sha512"),
    "1.3.101.112": ("ed25519", ""),
    "1.3.101.113": ("ed448", ""),
}
_PSS: Final = "1.2.840.113549.1.1.10"
_MGF1: Final = "1.2.840.113549.1.1.8"
_DIGEST: Final = {
    "1.3.14.3.2.26": "sha1",
    "2.16.840.1.101.3.4.2.4": "sha224",
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}

_ALTERNATIVE_NAMES: Final = "2.5.29.17"
_QC_STATEMENTS: Final = "1.3.6.1.5.5.7.1.3"
# RFC 5280 section 4.2: what a reader of certificates is expected to know.
_UNDERSTOOD: Final = frozenset(
    f"2.5.29.{arc}" for arc in (9, 14, 15, 17, 18, 19, 30, 31, 32, 33, 35, 36, 37, 46, 54)
) | {"1.3.6.1.5.5.7.1.1", "1.3.6.1.5.5.7.1.11", _QC_STATEMENTS}

_EXTENSION_NAMES: Final = {
    "2.5.29.14": "subjectKeyIdentifier",
    "2.5.29.31": "cRLDistributionPoints",
    "2.5.29.32": "certificatePolicies",
    "2.5.29.35": "authorityKeyIdentifier",
    "2.5.29.37": "extKeyUsage",
    "1.3.6.1.5.5.7.1.1": "authorityInfoAccess",
    _ALTERNATIVE_NAMES: "subjectAltName",
    _QC_STATEMENTS: "qcStatements",
}

# EN 319 412-5 section 4.2.3 and EN 319 412-1 section 5.1.
_QC_TYPE: Final = {
    "0.4.0.1862.1.6.1": "esign",
    "0.4.0.1862.1.6.2": "eseal",
    "0.4.0.1862.1.6.3": "web",
}
_SEMANTICS_OID: Final = "1.3.6.1.5.5.7.11.2"
_SEMANTICS: Final = {"0.4.0.194121.1.1": "natural person", "0.4.0.194121.1.2": "legal person"}

# A relative name: one or more (type, value as characters or None, value as DER).
_Rdn = tuple[tuple[str, str | None, bytes], ...]


class Signature(NamedTuple):
    """
    How a certificate was signed. *Not verified* here.

    *scheme*: ``pkcs1v15 pss ecdsa ed25519 ed448``, or ``unknown``, which is also said
    when the two places that name the algorithm disagree (RFC 5280 section 4.1.1.2).
    *digest*: ``sha256`` …, empty where the scheme has its own. *salt* is in bytes.
    """

    scheme: str
    digest: str
    mask_digest: str
    salt: int
    value: bytes


class Pss(NamedTuple):
    """
    RSASSA-PSS parameters (RFC 4055 section 3.1). A digest is empty where it is not known here;
    for a key, *salt* is the least number of bytes.
    """

    digest: str
    mask_digest: str
    salt: int


class QcStatements(NamedTuple):
    """EN 319 412-5: *types* are ``esign eseal web`` or an OID; *semantics* who is named."""

    compliance: bool = False
    qscd: bool = False
    types: tuple[str, ...] = ()
    semantics: str | None = None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Certificate:
    """
    One X.509 certificate. Two are equal when their DER is.

    *subject* and *issuer* are for showing: RFC 4514 order, escaped, at most 300
    characters. All other words (*common_name*, *organization_identifiers* …) are
    verbatim, because Maskinporten compares them so: escape them before they are shown.
    *subject_key* and *issuer_key* are for comparing: two names that are equal by
    RFC 5280 section 7.1 have the same one, though their bytes may differ. Of the subject's
    *alternative_names* only directory names are kept, for comparing.

    *tbs*, *spki_der* and the names are compared and proven as the bytes that came, never
    encoded again. *unreadable* are OIDs of extensions that inform and could not be read whole.
    *pss* restricts an RSASSA-PSS key; None where it is not restricted.
    """

    der: bytes
    sha256: str
    version: int
    subject: str
    issuer: str
    subject_key: tuple[Any, ...]
    issuer_key: tuple[Any, ...]
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
    permitted: tuple[tuple[Any, ...], ...] | None
    excluded: tuple[tuple[Any, ...], ...]
    alternative_names: tuple[tuple[Any, ...], ...]
    unreadable: frozenset[str]

    @classmethod
    def load(cls, raw: bytes) -> Certificate:
        """
        Read *raw*, DER, to the end, so that nothing can fail later.

        Raises ValueError for what is not exactly one certificate: other bytes, more bytes
        after it, an extension twice, more than 64 KiB, and for what costs more than any
        certificate: `MAX_NAME`, `MAX_MODULUS`, `MAX_EXPONENT`.
        """
        if len(raw) > MAX_DER:
            raise ValueError(f"not read: {len(raw)} bytes are more than {MAX_DER}")
        try:
            return _read(bytes(raw))
        except (ValueError, IndexError, OverflowError) as exc:
            told = foreign(exc) if type(exc) is ValueError else "a field of it has another form"
            raise ValueError(f"not a certificate: {told}") from exc

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
        """OIDs of critical extensions that RFC 5280 does not know, or that cannot be read."""
        return tuple(sorted(self.critical - (_UNDERSTOOD - self.unreadable)))

    @property
    def unreadable_names(self) -> tuple[str, ...]:
        """The extensions of `unreadable`, as RFC 5280 and RFC 3739 call them."""
        return tuple(sorted(_EXTENSION_NAMES.get(oid, oid) for oid in self.unreadable))

    @property
    def qualified_eseal(self) -> bool:
        """QcCompliance and QcType eSeal: Maskinporten will say ``QCForESeal`` (M87)."""
        return self.qc.compliance and "eseal" in self.qc.types

    def allows(self, below: Certificate) -> bool:
        """Its name constraints (RFC 5280 section 4.2.1.10) of directory names, for *below*."""
        if self.permitted is None and not self.excluded:
            return True
        if _ALTERNATIVE_NAMES in below.unreadable:
            return False
        permitted = None if self.permitted is None else _Trees(self.permitted)
        excluded = _Trees(self.excluded)
        return all(
            (permitted is None or permitted.hold(name)) and not excluded.hold(name)
            for name in (below.subject_key, *below.alternative_names)
            # An empty subject is none; an empty base holds every name.
            if name
        )

    def valid_at(self, now: datetime) -> bool:
        """RFC 5280 section 4.1.2.5: both ends belong to the validity."""
        return self.not_before <= now <= self.not_after

    def days_left(self, now: datetime) -> int:
        """Whole days until the end; negative when it has passed."""
        return (self.not_after - now).days

    def orgno(self) -> str | None:
        """
        The Norwegian organisation number: 9 digits, or None.

        In Digdir's order: SEID 1.0 ``serialNumber``, an organisation name
        that ends in `` - 123456789``, then SEID 2.0 ``organizationIdentifier``.
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
        What Maskinporten will write into ``consumer.ID`` (M85, M86), or None.

        An eSeal's organizationIdentifier is verbatim; None if there are none or several.
        """
        if identity == "norwegian":
            number = self.orgno()
            return None if number is None else f"0192:{number}"
        if len(self.organization_identifiers) != 1 or not self.organization_identifiers[0]:
            return None
        return self.organization_identifiers[0]

    def client_amr(self, identity: Identity) -> str:
        """What Maskinporten will write into ``client_amr`` (M85, M87)."""
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
        """Show whose it is, and which."""
        return f"<Certificate {self.subject!r} sha256={self.sha256[:16]}…>"


class _Trees:
    """Subtrees of directory names. Thousands of names are looked for among thousands of them."""

    def __init__(self, bases: Iterable[tuple[Any, ...]]) -> None:
        self._bases = frozenset(bases)
        # Few of them are different, because all bases together have 64 KiB.
        self._lengths = {len(base) for base in self._bases}

    def hold(self, name: tuple[Any, ...]) -> bool:
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
    subject, issuer = _names(fields.subject), _names(fields.issuer)
    extensions, critical = _extensions(fields.extensions)
    key_type, key_bits, public_key, pss = _public_key(fields.spki)
    is_ca, path_length = _basic_constraints(extensions.get("2.5.29.19"))
    permitted, excluded = _name_constraints(extensions.get("2.5.29.30"))
    informing = _Informing(extensions)
    purposes = informing.read("2.5.29.37", lambda item: [der.oid(item)])
    policies = informing.read("2.5.29.32", lambda item: [der.oid(der.parts(item)[0])])
    key_ids = informing.read("2.5.29.35", _authority_key_id)
    qc = _qc_statements(informing)

    def first(oid: str) -> str | None:
        return next(_values(subject, oid), None)

    return Certificate(
        der=raw,
        sha256=sha256(raw).hexdigest(),
        version=fields.version,
        subject=_shown(subject),
        issuer=_shown(issuer),
        subject_key=_comparable(subject),
        issuer_key=_comparable(issuer),
        common_name=first(_COMMON_NAME),
        organization_name=first(_ORGANIZATION),
        organizational_unit=first(_UNIT),
        organization_identifiers=tuple(_values(subject, _ORGANIZATION_IDENTIFIER)),
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
        signature=_signature(fields),
        is_ca=is_ca,
        path_length=path_length,
        key_usage=_key_usage(extensions.get("2.5.29.15")),
        ext_key_usage=purposes if "2.5.29.37" in extensions else None,
        policies=policies,
        subject_key_id=_subject_key_id(informing),
        authority_key_id=key_ids[0] if key_ids else None,
        qc=qc,
        ocsp_urls=informing.read("1.3.6.1.5.5.7.1.1", _ocsp_urls),
        crl_urls=informing.read("2.5.29.31", _crl_urls),
        critical=critical,
        permitted=permitted,
        excluded=excluded,
        alternative_names=informing.read(_ALTERNATIVE_NAMES, _directory_name),
        # Last: all of them have been read by now.
        unreadable=frozenset(informing.unreadable),
    )


# RFC 5280 section 4.1.2.5: to the second, in UTC, and in no other form.
_TIME: Final = re.compile(
    rb"(?:\x17\x0d|\x18\x0f([0-9]{2}))"
    rb"([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})Z"
)


def _time(value: bytes) -> datetime:
    found = _TIME.fullmatch(value)
    if found is None:
        raise ValueError("its validity is not in the form of DER")
    century, *rest = found.groups()
    year, month, day, hour, minute, second = map(int, rest)
    if century is None:
        century = 19 if year >= 50 else 20
    return datetime(100 * int(century) + year, month, day, hour, minute, second, tzinfo=UTC)


def _extensions(field: bytes | None) -> tuple[dict[str, bytes], frozenset[str]]:
    """The contents of extensions by their OID, and the OIDs of those that are critical."""
    found: dict[str, bytes] = {}
    critical: set[str] = set()
    for extension in der.parts(field) if field is not None else ():
        name, *flag, value = der.parts(extension)
        oid = der.oid(name)
        if oid in found:
            raise ValueError(f"extension {oid} is there twice")
        if len(flag) > 1:
            raise ValueError(f"extension {oid} has fields that no extension has")
        found[oid] = der.content(value, der.OCTET_STRING)
        if flag and any(der.content(flag[0], der.BOOLEAN)):
            critical.add(oid)
    return found, frozenset(critical)


class _Informing:
    """
    Extensions that inform and decide nothing: what can be read of them is, and what cannot is
    named by its OID in *unreadable*.
    """

    def __init__(self, extensions: Mapping[str, bytes]) -> None:
        self.extensions = extensions
        self.unreadable: set[str] = set()

    def read(self, oid: str, item: Callable[[bytes], Iterable[_T]]) -> tuple[_T, ...]:
        """What *item* finds in each member of a SEQUENCE OF."""
        found: list[_T] = []
        raw = self.extensions.get(oid)
        for each in self.value(oid, der.parts, raw) or () if raw is not None else ():
            found += self.value(oid, lambda one: tuple(item(one)), each) or ()
        return tuple(found)

    def value(self, oid: str, read: Callable[[_A], _T], of: _A) -> _T | None:
        """What *read* gives; None where it fails."""
        try:
            return read(of)
        except (ValueError, IndexError):
            self.unreadable.add(oid)
            return None


def _names(value: bytes) -> tuple[_Rdn, ...]:
    return tuple(
        tuple(_attribute(item) for item in der.parts(relative, der.SET))
        for relative in der.parts(value)
    )


def _attribute(item: bytes) -> tuple[str, str | None, bytes]:
    name, raw = der.parts(item)
    oid, codec, text = der.oid(name), _CHARACTERS.get(raw[0]), None
    if codec is not None:
        # What is no text in its own encoding is shown and compared as bytes.
        with contextlib.suppress(UnicodeDecodeError):
            text = der.content(raw, raw[0]).decode(codec)
    if text is not None and len(text) > MAX_NAME:
        raise ValueError(
            f"{_SHORT.get(oid, oid)} in a name has {len(text)} characters, more than {MAX_NAME}"
        )
    return oid, text, raw


def _values(name: tuple[_Rdn, ...], oid: str) -> Iterator[str]:
    for relative in name:
        for found, value, _ in relative:
            if found == oid and value is not None:
                yield value


def _comparable(name: tuple[_Rdn, ...]) -> tuple[Any, ...]:
    # RFC 5280 section 7.1 and RFC 4518: the kind of string does not count, nor do case and
    # the number of spaces. Being generous is safe: a signature must agree before it matters.
    return tuple(
        tuple(
            sorted((oid, raw if text is None else _prepared(text)) for oid, text, raw in relative)
        )
        if len(relative) > 1
        else tuple((oid, raw if text is None else _prepared(text)) for oid, text, raw in relative)
        for relative in name
    )


def _prepared(text: str) -> bytes:
    mapped = "".join(
        " " if char.isspace() else char
        for char in text
        if char.isspace() or unicodedata.category(char) not in ("Cc", "Cf")
    )
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", mapped).casefold())
    return " ".join(folded.split()).encode("utf-8", "surrogatepass")


def _shown(name: tuple[_Rdn, ...]) -> str:
    return foreign(
        ",".join(
            "+".join(
                f"{_SHORT.get(oid, oid)}={f'#{raw.hex()}' if text is None else _rfc4514(text)}"
                for oid, text, raw in relative
            )
            for relative in reversed(name)
        )
    )


def _rfc4514(text: str) -> str:
    escaped = re.sub(r'([\\,+"<>;])', r"\\\1", text)
    if escaped[:1] in ("#", " "):
        escaped = "\\" + escaped
    return escaped[:-1] + "\\ " if escaped.endswith(" ") and len(text) > 1 else escaped


def _public_key(spki: bytes) -> tuple[str, int, RsaPublicKey | None, Pss | None]:
    """Type, bits, the RSA key if it is one, and what an RSASSA-PSS key is restricted to."""
    algorithm, key = der.parts(spki)
    name, *parameters = der.parts(algorithm)
    oid, raw = der.oid(name), der.content(key, der.BIT_STRING)[1:]
    if oid in _RSA:
        # A modulus without its leading zero is read as everybody else reads it: as positive.
        modulus, exponent = (
            int.from_bytes(der.content(each, der.INTEGER), "big") for each in der.parts(raw)
        )
        if not (modulus and exponent):
            raise ValueError("its RSA key is not made of positive numbers")
        for what, value, most in (
            ("its RSA key", modulus, MAX_MODULUS),
            ("the exponent of its RSA key", exponent, MAX_EXPONENT),
        ):
            if value.bit_length() > most:
                raise ValueError(f"{what} has {value.bit_length()} bits, more than {most}")
        restricted = _RSA[oid] == "rsa-pss" and parameters
        pss = _pss(parameters[0]) if restricted else None
        return _RSA[oid], modulus.bit_length(), RsaPublicKey(modulus, exponent), pss
    if oid == _EC:
        curve = parameters[0] if parameters else b""
        if curve[:1] != bytes([der.OID]):
            return "ec", 8 * (len(raw) // 2), None, None
        named = der.oid(curve)
        known, bits = _CURVE.get(named, (named, 8 * (len(raw) // 2)))
        return f"ec:{known}", bits, None, None
    known, bits = _EDWARDS.get(oid, (oid, 8 * len(raw)))
    return known, bits, None, None


def _signature(fields: der.CertificateFields) -> Signature:
    value = der.content(fields.signature, der.BIT_STRING)[1:]
    unknown = Signature("unknown", "", "", 0, value)
    if fields.signature_algorithm != fields.algorithm:
        return unknown
    name, *parameters = der.parts(fields.algorithm)
    oid = der.oid(name)
    if oid != _PSS:
        scheme, digest = _SCHEME.get(oid, ("unknown", ""))
        return Signature(scheme, digest, digest, 0, value)
    # RFC 4055 section 3.1: in a signature they must be present.
    pss = _pss(parameters[0]) if parameters else None
    if pss is None or not (pss.digest and pss.mask_digest):
        return unknown
    return Signature("pss", pss.digest, pss.mask_digest, pss.salt, value)


def _pss(parameters: bytes) -> Pss:
    """RFC 4055 section 3.1; a digest is empty where the algorithm is not known here."""
    try:
        given = {each[0]: der.content(each, each[0]) for each in der.parts(parameters)}
        digest = mask_digest = "sha1"
        if 0xA0 in given:
            digest = _DIGEST.get(der.oid(der.parts(given[0xA0])[0]), "")
        if 0xA1 in given:
            function, inner = der.parts(given[0xA1])
            known = der.oid(function) == _MGF1
            mask_digest = _DIGEST.get(der.oid(der.parts(inner)[0]), "") if known else ""
        salt = der.number(given[0xA2]) if 0xA2 in given else 20
        # The trailer field has one value, and its DER encoding is to be absent.
        odd = 0xA3 in given and der.number(given[0xA3]) != 1
    except (ValueError, IndexError):
        return Pss("", "", 0)
    if odd or salt < 0 or given.keys() - {0xA0, 0xA1, 0xA2, 0xA3}:
        return Pss("", "", 0)
    return Pss(digest, mask_digest, salt)


def _basic_constraints(raw: bytes | None) -> tuple[bool, int | None]:
    """Whether it is a CA's, and its pathLenConstraint."""
    ca, length = False, None
    for each in der.parts(raw) if raw is not None else ():
        if each[0] == der.BOOLEAN:
            ca = any(der.content(each, der.BOOLEAN))
        else:
            length = der.number(each)
    return ca, length


def _key_usage(raw: bytes | None) -> frozenset[str] | None:
    if raw is None:
        return None
    bits = der.content(raw, der.BIT_STRING)[1:]
    return frozenset(
        name
        for place, name in enumerate(_KEY_USAGE)
        if place // 8 < len(bits) and bits[place // 8] & 0x80 >> place % 8
    )


def _subject_key_id(informing: _Informing) -> bytes | None:
    raw = informing.extensions.get("2.5.29.14")
    if raw is None:
        return None
    return informing.value("2.5.29.14", lambda whole: der.content(whole, der.OCTET_STRING), raw)


def _authority_key_id(item: bytes) -> Iterator[bytes]:
    if item[0] == 0x80:
        yield der.content(item, 0x80)


def _directory_name(name: bytes) -> Iterator[tuple[Any, ...]]:
    """A GeneralName (RFC 5280 section 4.2.1.6) for comparing, if it is a directory name."""
    if name[0] == 0xA4:
        yield _comparable(_names(der.content(name, 0xA4)))


def _name_constraints(
    raw: bytes | None,
) -> tuple[tuple[tuple[Any, ...], ...] | None, tuple[tuple[Any, ...], ...]]:
    """The directory names permitted, None where none is constrained so, and those excluded."""
    found: dict[int, list[tuple[Any, ...]]] = {0xA0: [], 0xA1: []}
    for each in der.parts(raw) if raw is not None else ():
        for tree in der.parts(each, each[0]):
            found[each[0]] += _directory_name(der.parts(tree)[0])
    return tuple(found[0xA0]) or None, tuple(found[0xA1])


def _qc_statements(informing: _Informing) -> QcStatements:
    stated = dict(informing.read(_QC_STATEMENTS, _statement))

    def oids(statement: str) -> tuple[str, ...]:
        items = der.parts(stated[statement]) if stated.get(statement) else ()
        return tuple(der.oid(item) for item in items if item[0] == der.OID)

    # RFC 3739 section 3.2.6.1 puts the identifier inside a statement; there are issuers that
    # write it as a statement of its own.
    semantics = {*stated, *(informing.value(_QC_STATEMENTS, oids, _SEMANTICS_OID) or ())}
    types = informing.value(_QC_STATEMENTS, oids, "0.4.0.1862.1.6") or ()
    return QcStatements(
        compliance="0.4.0.1862.1.1" in stated,
        qscd="0.4.0.1862.1.4" in stated,
        types=tuple(_QC_TYPE.get(oid, oid) for oid in types),
        semantics=next((name for oid, name in _SEMANTICS.items() if oid in semantics), None),
    )


def _statement(item: bytes) -> Iterator[tuple[str, bytes]]:
    oid, *parameters = der.parts(item)
    yield der.oid(oid), parameters[0] if parameters else b""


def _ocsp_urls(item: bytes) -> Iterator[str]:
    method, location = der.parts(item)
    if der.oid(method) == "1.3.6.1.5.5.7.48.1":
        yield from _uri(location)


def _crl_urls(point: bytes) -> Iterator[str]:
    for name in der.parts(point):
        # distributionPoint, and of its two forms the full name.
        for form in der.parts(name, 0xA0) if name[0] == 0xA0 else ():
            for each in der.parts(form, 0xA0) if form[0] == 0xA0 else ():
                yield from _uri(each)


def _uri(name: bytes) -> Iterator[str]:
    # The bytes as they stand: some are no address, and are shown as they are.
    if name[0] == 0x86:
        yield der.content(name, 0x86).decode("latin-1")
