"""
What one certificate says. It is read here, whole, and not judged.

DER in, a frozen value out: no file, no clock, no device and no trust enters this room.
Which certificates belong together is said in `hsmtoll.chain`.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from asn1crypto import core, parser, x509
from asn1crypto.algos import RSASSAPSSParams

from hsmtoll.errors import foreign
from hsmtoll.jws import RsaPublicKey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.apis import Identity

__all__ = ["MAX_DER", "Certificate", "QcStatements", "Signature"]

#: Nothing that is longer is read: 64 KiB (DESIGN 4.5).
MAX_DER: Final = 64 * 1024

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

_KEY_USAGE: Final = {
    "digital_signature": "digitalSignature",
    "non_repudiation": "nonRepudiation",
    "key_encipherment": "keyEncipherment",
    "data_encipherment": "dataEncipherment",
    "key_agreement": "keyAgreement",
    "key_cert_sign": "keyCertSign",
    "crl_sign": "cRLSign",
    "encipher_only": "encipherOnly",
    "decipher_only": "decipherOnly",
}

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

_BASIC_CONSTRAINTS: Final = "2.5.29.19"
_KEY_USAGE_OID: Final = "2.5.29.15"
_QC_STATEMENTS: Final = "1.3.6.1.5.5.7.1.3"
# RFC 5280 section 4.2: what a reader of certificates is expected to know.
_UNDERSTOOD: Final = frozenset(
    f"2.5.29.{arc}" for arc in (9, 14, 15, 17, 18, 19, 30, 31, 32, 33, 35, 36, 37, 46, 54)
) | {"1.3.6.1.5.5.7.1.1", "1.3.6.1.5.5.7.1.11", _QC_STATEMENTS}

# EN 319 412-5 section 4.2.3 and EN 319 412-1 section 5.1.
_QC_TYPE: Final = {
    "0.4.0.1862.1.6.1": "esign",
    "0.4.0.1862.1.6.2": "eseal",
    "0.4.0.1862.1.6.3": "web",
}
_SEMANTICS: Final = {"0.4.0.194121.1.1": "natural person", "0.4.0.194121.1.2": "legal person"}

# A relative name: one or more (type, value as characters or None, value as DER).
_Rdn = tuple[tuple[str, str | None, bytes], ...]


class _Attribute(core.Sequence):
    _fields = [("type", core.ObjectIdentifier), ("value", core.Any)]  # noqa: RUF012 - as asn1crypto declares


class _RelativeName(core.SetOf):
    _child_spec = _Attribute


class _Name(core.SequenceOf):
    _child_spec = _RelativeName


# RFC 5280's AlgorithmIdentifier and RFC 3739's QCStatement have the same shape.
class _Algorithm(core.Sequence):
    _fields = [  # noqa: RUF012 - as asn1crypto declares
        ("oid", core.ObjectIdentifier),
        ("parameters", core.Any, {"optional": True}),
    ]


class _PublicKeyInfo(core.Sequence):
    _fields = [("algorithm", _Algorithm), ("public_key", core.BitString)]  # noqa: RUF012 - as asn1crypto declares


class _RsaNumbers(core.Sequence):
    _fields = [("modulus", core.Integer), ("exponent", core.Integer)]  # noqa: RUF012 - as asn1crypto declares


class _QcStatements(core.SequenceOf):
    _child_spec = _Algorithm


class _Anything(core.SequenceOf):
    _child_spec = core.Any


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
    RFC 5280 section 7.1 have the same one, though their bytes may differ.
    """

    der: bytes
    sha256: str
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

    @classmethod
    def load(cls, der: bytes) -> Certificate:
        """
        Read *der* to the end, so that nothing can fail later.

        Raises ValueError for what is not exactly one certificate: other bytes, more
        bytes after it, an extension twice, more than 64 KiB.
        """
        if len(der) > MAX_DER:
            raise ValueError(f"not read: {len(der)} bytes are more than {MAX_DER}")
        try:
            return _read(bytes(der))
        except Exception as exc:
            # asn1crypto raises KeyError, TypeError, OverflowError and more on hostile bytes.
            raise ValueError(f"not a certificate: {foreign(exc)}") from exc

    @property
    def self_issued(self) -> bool:
        """Whether subject and issuer are the same name. *Not verified*: see `hsmtoll.chain`."""
        return self.subject_key == self.issuer_key

    @property
    def serial_hex(self) -> str:
        """The serial number as tools print it: hex, an even number of digits."""
        digits = f"{abs(self.serial):x}"
        return f"{'-' * (self.serial < 0)}{'0' * (len(digits) % 2)}{digits}"

    @property
    def unknown_critical(self) -> tuple[str, ...]:
        """OIDs of critical extensions that RFC 5280 does not know."""
        return tuple(sorted(self.critical - _UNDERSTOOD))

    @property
    def qualified_eseal(self) -> bool:
        """QcCompliance and QcType eSeal: Maskinporten will say ``QCForESeal`` (M87)."""
        return self.qc.compliance and "eseal" in self.qc.types

    def allows(self, below: Certificate) -> bool:
        """Its name constraints (RFC 5280 section 4.2.1.10) of directory names, for *below*."""
        name = below.subject_key
        inside = any(name[: len(base)] == base for base in self.permitted or ())
        if name and self.permitted is not None and not inside:
            return False
        return not any(name[: len(base)] == base for base in self.excluded)

    def valid_at(self, now: datetime) -> bool:
        """RFC 5280 section 4.1.2.5: both ends belong to the validity."""
        return self.not_before <= now <= self.not_after

    def days_left(self, now: datetime) -> int:
        """Whole days until the end; negative when it has passed."""
        return (self.not_after - now).days

    def orgno(self) -> str | None:
        """
        The Norwegian organisation number: 9 digits, or None.

        In Digdir's order (PROTOCOL B.2): SEID 1.0 ``serialNumber``, an organisation name
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


@lru_cache(maxsize=512)
def _read(der: bytes) -> Certificate:
    _refuse_ber(der)
    outer = _parsed(x509.Certificate, der)
    tbs = outer["tbs_certificate"]
    # asn1crypto passes over what follows the last field that it knows.
    fields = [each[0] for each in _values_in(tbs.contents) if each[0] not in b"\xa0\x81\x82\xa3"]
    if len(_values_in(outer.contents)) != 3 or len(fields) != 6:
        raise ValueError("it has fields that no certificate has")
    for moment in _values_in(tbs["validity"].contents):
        # RFC 5280 section 4.1.2.5: to the second, in UTC, and in no other form.
        if not re.fullmatch(rb"\x17\x0d[0-9]{12}Z|\x18\x0f[0-9]{14}Z", moment):
            raise ValueError("its validity is not in the form of DER")
    subject, issuer = _names(tbs["subject"].dump()), _names(tbs["issuer"].dump())
    extensions, critical = _extensions(tbs["extensions"])
    spki = tbs["subject_public_key_info"].dump()
    key_type, key_bits, public_key = _public_key(spki)
    constraints = _parsed(x509.BasicConstraints, extensions.get(_BASIC_CONSTRAINTS))
    purposes = _parsed(x509.ExtKeyUsageSyntax, extensions.get("2.5.29.37"))
    key_id = _parsed(core.OctetString, extensions.get("2.5.29.14"))
    not_before, not_after = (tbs["validity"][end].native for end in ("not_before", "not_after"))
    for moment in (not_before, not_after):
        if not isinstance(moment, datetime) or moment.tzinfo is None:
            raise ValueError("its validity is not a time")

    def first(oid: str) -> str | None:
        return next(_values(subject, oid), None)

    return Certificate(
        der=der,
        sha256=sha256(der).hexdigest(),
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
        serial=tbs["serial_number"].native,
        not_before=not_before,
        not_after=not_after,
        public_key=public_key,
        spki_der=spki,
        key_type=key_type,
        key_bits=key_bits,
        tbs=tbs.dump(),
        signature=_signature(outer),
        is_ca=bool(constraints and constraints["ca"].native),
        path_length=None if constraints is None else constraints["path_len_constraint"].native,
        key_usage=_key_usage(extensions.get(_KEY_USAGE_OID)),
        ext_key_usage=None if purposes is None else tuple(item.dotted for item in purposes),
        policies=_policies(extensions.get("2.5.29.32")),
        subject_key_id=None if key_id is None else key_id.native,
        authority_key_id=_authority_key_id(extensions.get("2.5.29.35")),
        qc=_qc_statements(extensions.get(_QC_STATEMENTS)),
        ocsp_urls=_ocsp_urls(extensions.get("1.3.6.1.5.5.7.1.1")),
        crl_urls=_crl_urls(extensions.get("2.5.29.31")),
        critical=critical,
        permitted=_subtrees(extensions.get("2.5.29.30"), "permitted_subtrees"),
        excluded=_subtrees(extensions.get("2.5.29.30"), "excluded_subtrees") or (),
    )


def _values_in(contents: bytes) -> list[bytes]:
    """The values that stand in *contents*, each whole. ValueError for a length that is not DER."""
    found: list[bytes] = []
    at = 0
    while at < len(contents):
        if contents[at] & 0x1F == 0x1F:
            raise ValueError("a tag that no certificate has")
        size, head = contents[at + 1], 2
        if size >= 0x80:
            more = contents[at + 2 : at + 2 + (size & 0x7F)]
            size, head = int.from_bytes(more, "big"), 2 + len(more)
            if not more or more[0] == 0 or size < 0x80:
                raise ValueError("BER, not DER: a length is not in its shortest form")
        if at + head + size > len(contents):
            raise ValueError("it ends too early")
        found.append(contents[at : at + head + size])
        at += head + size
    return found


def _refuse_ber(der: bytes) -> None:
    """ValueError unless all lengths are DER (X.690 section 10.1); extensions stay closed."""
    waiting = [der]
    while waiting:
        for each in _values_in(waiting.pop()):
            if each[0] & 0x20:
                head = 2 if each[1] < 0x80 else 2 + (each[1] & 0x7F)
                waiting.append(each[head:])


def _parsed(spec: Any, raw: bytes | None) -> Any:
    return None if raw is None else spec.load(raw, strict=True)


def _extensions(field: Any) -> tuple[dict[str, bytes], frozenset[str]]:
    values: dict[str, bytes] = {}
    critical: set[str] = set()
    for extension in field if isinstance(field, x509.Extensions) else ():
        oid = extension["extn_id"].dotted
        if oid in values:
            raise ValueError(f"extension {oid} is there twice")
        values[oid] = bytes(extension["extn_value"])
        if extension["critical"].native:
            critical.add(oid)
    return values, frozenset(critical)


def _names(der: bytes) -> tuple[_Rdn, ...]:
    return tuple(tuple(_attribute(item) for item in relative) for relative in _parsed(_Name, der))


def _attribute(item: Any) -> tuple[str, str | None, bytes]:
    raw = item["value"].dump()
    parse: Any = parser.parse
    kind, constructed, tag, _, content, _ = parse(raw, strict=True)
    codec = _CHARACTERS.get(tag) if (kind, constructed) == (0, 0) else None
    return item["type"].dotted, None if codec is None else content.decode(codec), raw


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


def _public_key(spki: bytes) -> tuple[str, int, RsaPublicKey | None]:
    info = _parsed(_PublicKeyInfo, spki)
    oid = info["algorithm"]["oid"].dotted
    raw = info["public_key"].contents[1:]
    if oid in _RSA:
        numbers = _parsed(_RsaNumbers, raw)
        modulus, exponent = numbers["modulus"].native, numbers["exponent"].native
        if modulus <= 0 or exponent <= 0:
            raise ValueError("its RSA key is not made of positive numbers")
        return _RSA[oid], modulus.bit_length(), RsaPublicKey(modulus, exponent)
    if oid == _EC:
        parameters = info["algorithm"]["parameters"].dump()
        if parameters[:1] != b"\x06":
            return "ec", 8 * (len(raw) // 2), None
        curve = _parsed(core.ObjectIdentifier, parameters).dotted
        name, bits = _CURVE.get(curve, (curve, 8 * (len(raw) // 2)))
        return f"ec:{name}", bits, None
    name, bits = _EDWARDS.get(oid, (oid, 8 * len(raw)))
    return name, bits, None


def _signature(outer: Any) -> Signature:
    named = outer["signature_algorithm"].dump()
    value = outer["signature_value"].contents[1:]
    unknown = Signature("unknown", "", "", 0, value)
    if named != outer["tbs_certificate"]["signature"].dump():
        return unknown
    algorithm = _parsed(_Algorithm, named)
    oid = algorithm["oid"].dotted
    if oid != _PSS:
        scheme, digest = _SCHEME.get(oid, ("unknown", ""))
        return Signature(scheme, digest, digest, 0, value)
    if isinstance(algorithm["parameters"], core.Void):
        # RFC 4055 section 3.1: in a signature they must be present.
        return unknown
    pss = _parsed(RSASSAPSSParams, algorithm["parameters"].dump())
    mask = pss["mask_gen_algorithm"]
    # The trailer field has one value, and its DER encoding is to be absent.
    if mask["algorithm"].native != "mgf1" or pss["trailer_field"].native != "trailer_field_bc":
        return unknown
    return Signature(
        "pss",
        pss["hash_algorithm"]["algorithm"].native,
        mask["parameters"]["algorithm"].native,
        pss["salt_length"].native,
        value,
    )


def _key_usage(raw: bytes | None) -> frozenset[str] | None:
    found = _parsed(x509.KeyUsage, raw)
    return None if found is None else frozenset(_KEY_USAGE[bit] for bit in found.native)


def _policies(raw: bytes | None) -> tuple[str, ...]:
    found = _parsed(x509.CertificatePolicies, raw)
    return tuple(policy["policy_identifier"].dotted for policy in found or ())


def _authority_key_id(raw: bytes | None) -> bytes | None:
    found = _parsed(x509.AuthorityKeyIdentifier, raw)
    return None if found is None else found["key_identifier"].native


def _subtrees(raw: bytes | None, which: str) -> tuple[tuple[Any, ...], ...] | None:
    """The directory names among them; None where no directory name is constrained so."""
    found = _parsed(x509.NameConstraints, raw)
    if found is None or isinstance(found[which], core.Void):
        return None
    bases = [tree["base"] for tree in found[which]]
    names = [base.chosen.chosen.dump() for base in bases if base.name == "directory_name"]
    return tuple(_comparable(_names(each)) for each in names) or None


def _qc_statements(raw: bytes | None) -> QcStatements:
    stated = {item["oid"].dotted: item["parameters"] for item in _parsed(_QcStatements, raw) or ()}
    # RFC 3739 section 3.2.6.1 puts the identifier inside a statement; there are issuers that
    # write it as a statement of its own.
    semantics = {*stated, *_oids(stated.get("1.3.6.1.5.5.7.11.2"))}
    return QcStatements(
        compliance="0.4.0.1862.1.1" in stated,
        qscd="0.4.0.1862.1.4" in stated,
        types=tuple(_QC_TYPE.get(oid, oid) for oid in _oids(stated.get("0.4.0.1862.1.6"))),
        semantics=next((name for oid, name in _SEMANTICS.items() if oid in semantics), None),
    )


def _oids(sequence: Any) -> tuple[str, ...]:
    if sequence is None or isinstance(sequence, core.Void):
        return ()
    items = (item.dump() for item in _parsed(_Anything, sequence.dump()))
    return tuple(
        _parsed(core.ObjectIdentifier, item).dotted for item in items if item[:1] == b"\x06"
    )


def _ocsp_urls(raw: bytes | None) -> tuple[str, ...]:
    access = _parsed(x509.AuthorityInfoAccessSyntax, raw)
    return tuple(
        url
        for item in access or ()
        if item["access_method"].dotted == "1.3.6.1.5.5.7.48.1"
        for url in _uri(item["access_location"])
    )


def _crl_urls(raw: bytes | None) -> tuple[str, ...]:
    points = _parsed(x509.CRLDistributionPoints, raw)
    return tuple(
        url
        for point in points or ()
        if isinstance(point["distribution_point"], x509.DistributionPointName)
        and point["distribution_point"].name == "full_name"
        for name in point["distribution_point"].chosen
        for url in _uri(name)
    )


def _uri(name: Any) -> Iterator[str]:
    # The bytes as they stand: asn1crypto would rewrite the address, and fail on some.
    if name.name == "uniform_resource_identifier":
        yield name.chosen.contents.decode("latin-1")
