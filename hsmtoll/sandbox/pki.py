"""
Test authorities: for eSeals (ETSI EN 319 412), Norwegian enterprises (SEID 2.0), and TLS.

No real authority or organisation is named. Private keys of authorities stay in memory unless the
caller writes them.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID, ObjectIdentifier

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

__all__ = [
    "ESEAL_ORG_ID",
    "NORWEGIAN_ORG_NO",
    "PROD_POLICY",
    "TEST_POLICY",
    "Authority",
    "eseal_authority",
    "issue_tls",
    "norwegian_authority",
    "pem",
    "tls_authority",
    "unrelated_ca",
]

Environment = Literal["test", "prod"]
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

#: The organisations of the examples. They do not exist.
ESEAL_ORG_ID: Final = "NTRSE-5566778899"
NORWEGIAN_ORG_NO: Final = "987654325"

#: Certificate policies accepted in the test environment alone, and in production alone.
TEST_POLICY: Final = "2.16.578.1.29.913.210.1.0"
PROD_POLICY: Final = "2.16.578.1.29.13.210.1.0"

_QCP_L: Final = "0.4.0.194112.1.1"
_NCP: Final = "0.4.0.2042.1.1"
_QC_STATEMENTS: Final = ObjectIdentifier("1.3.6.1.5.5.7.1.3")
_UNKNOWN: Final = ObjectIdentifier("1.3.6.1.4.1.99999.1")
_DAY: Final = timedelta(days=1)
_HASH: Final = hashes.SHA256()

_USAGES: Final = {
    "digitalSignature": "digital_signature",
    "nonRepudiation": "content_commitment",
    "keyEncipherment": "key_encipherment",
    "dataEncipherment": "data_encipherment",
    "keyAgreement": "key_agreement",
    "keyCertSign": "key_cert_sign",
    "cRLSign": "crl_sign",
}


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Authority:
    """
    A root and an intermediate CA, which issues leaves.

    *kind* is ``eseal`` or ``norwegian``; *environment* is used for Norwegian ones only.
    """

    kind: Literal["eseal", "norwegian"]
    environment: Environment
    root: x509.Certificate
    intermediate: x509.Certificate
    _key: PrivateKey = field(repr=False)
    _pss: bool = False

    @property
    def chain(self) -> tuple[x509.Certificate, x509.Certificate]:
        """The CA certificates above a leaf: (intermediate, root)."""
        return self.intermediate, self.root

    def issue(
        self,
        public_key: PublicKey | bytes,
        *,
        organization: str | None = None,
        organization_id: str | Sequence[str] | None = "",
        country: str | None = None,
        common_name: str | None = None,
        organizational_unit: str | None = None,
        serial: int | None = None,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        key_usage: Iterable[str] | None = None,
        critical_usage: bool = True,
        ca: bool = False,
        qualified: bool = False,
        qc_type: Literal["esign", "eseal", "web"] = "eseal",
        policies: Sequence[str] | None = None,
        unknown_critical: bool = False,
        self_signed_by: PrivateKey | None = None,
    ) -> x509.Certificate:
        """
        Issue a leaf for *public_key* (a key, or DER of its SubjectPublicKeyInfo).

        *organization_id* becomes organizationIdentifier: empty for the example organisation,
        None for none at all, a sequence for several. *key_usage* holds X.509's own names;
        empty for an extension-less leaf. *qualified* adds QcCompliance and *qc_type*. With
        *self_signed_by* the leaf is its own issuer. Times are aware datetimes; by default
        valid from yesterday for two years.
        """
        key = load_der_public_key(public_key) if isinstance(public_key, bytes) else public_key
        if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
            raise TypeError(f"a leaf for {type(key).__name__}: RSA and EC keys are issued here")
        subject = self._subject(
            organization, organization_id, country, common_name, organizational_unit
        )
        builder = _leaf(
            subject,
            subject if self_signed_by else self.intermediate.subject,
            key,
            serial=serial or x509.random_serial_number(),
            begin=not_before or _now() - _DAY,
            end=not_after or _now() + 730 * _DAY,
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), ca)
        if usage := self._usage() if key_usage is None else set(key_usage):
            builder = builder.add_extension(_usage(usage), critical=critical_usage)
        if listed := self._policies(qualified=qualified) if policies is None else policies:
            builder = builder.add_extension(_policy(listed), critical=False)
        builder = builder.add_extension(_qc(qualified, qc_type), critical=False)
        builder = _pointers(builder)
        if unknown_critical:
            odd = x509.UnrecognizedExtension(_UNKNOWN, b"\x05\x00")
            builder = builder.add_extension(odd, critical=True)
        issuer_key = self_signed_by or self._key
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        return _signed(builder, issuer_key, pss=self._pss and self_signed_by is None)

    def _subject(
        self,
        organization: str | None,
        organization_id: str | Sequence[str] | None,
        country: str | None,
        common_name: str | None,
        unit: str | None,
    ) -> x509.Name:
        norwegian = self.kind == "norwegian"
        if organization_id == "":
            organization_id = f"NTRNO-{NORWEGIAN_ORG_NO}" if norwegian else ESEAL_ORG_ID
        ids = (organization_id,) if isinstance(organization_id, str) else organization_id or ()
        name = organization or ("Eksempel AS" if norwegian else "Eksempel AB")
        land = country or ("NO" if norwegian else "SE")
        return _subject(land, name, common_name or name, ids, unit)

    def _usage(self) -> set[str]:
        return {"digitalSignature"} | (set() if self.kind == "norwegian" else {"nonRepudiation"})

    def _policies(self, *, qualified: bool) -> tuple[str, ...]:
        if self.kind == "eseal":
            return (_QCP_L if qualified else _NCP,)
        return (TEST_POLICY if self.environment == "test" else PROD_POLICY, _NCP)


def eseal_authority(
    name: str = "Eksempel Tillit",
    *,
    algorithm: Literal["rsa", "rsa-pss", "ec"] = "rsa",
    bits: int = 2048,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> Authority:
    """A new authority for eSeals; *algorithm* is that of its signatures."""
    return _authority(
        "eseal", "test", name, "SE",
        algorithm=algorithm, bits=bits, not_before=not_before, not_after=not_after,
    )  # fmt: skip


def norwegian_authority(
    environment: Environment = "test",
    name: str = "Eksempel Virksomhet",
    *,
    algorithm: Literal["rsa", "rsa-pss", "ec"] = "rsa",
    bits: int = 2048,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> Authority:
    """A new SEID 2.0 authority, whose leaves carry the policy of *environment*."""
    return _authority(
        "norwegian", environment, name, "NO",
        algorithm=algorithm, bits=bits, not_before=not_before, not_after=not_after,
    )  # fmt: skip


def _authority(
    kind: Literal["eseal", "norwegian"],
    environment: Environment,
    name: str,
    country: str,
    *,
    algorithm: str,
    bits: int,
    not_before: datetime | None,
    not_after: datetime | None,
) -> Authority:
    begin, end = not_before or _now() - 365 * _DAY, not_after or _now() + 3650 * _DAY
    pss = algorithm == "rsa-pss"
    root_key, key = _new_key(algorithm, bits), _new_key(algorithm, bits)
    label = name if environment == "test" and kind == "norwegian" else f"{name} -"
    suffix = " TEST" if environment == "test" and kind == "norwegian" else ""
    top = _subject(country, name, f"{label} Root CA{suffix}", (), None)
    below = _subject(country, name, f"{label} Legal Person CA{suffix}", (), None)
    root = _ca(top, top, root_key.public_key(), root_key, begin=begin, end=end, depth=1, pss=pss)
    intermediate = _ca(
        below, top, key.public_key(), root_key, begin=begin, end=end, depth=0, pss=pss
    )
    return Authority(kind, environment, root, intermediate, key, pss)


def unrelated_ca(name: str = "Helt Annen Rot") -> x509.Certificate:
    """A CA certificate that belongs to no chain."""
    key = _new_key("ec", 0)
    subject = _subject("DK", name, f"{name} CA", (), None)
    begin = _now() - 30 * _DAY
    return _ca(
        subject,
        subject,
        key.public_key(),
        key,
        begin=begin,
        end=begin + 3650 * _DAY,
        depth=1,
        pss=False,
    )


@lru_cache(maxsize=1)
def tls_authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The CA behind the sandbox's own TLS, one for the process."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(None, "hsmtoll sandbox", "hsmtoll sandbox TLS CA", (), None)
    begin = _now() - _DAY
    end = begin + 3650 * _DAY
    return _ca(
        subject, subject, key.public_key(), key, begin=begin, end=end, depth=0, pss=False
    ), key


def issue_tls(
    hosts: Sequence[str] = ("localhost", "127.0.0.1", "::1"),
    *,
    not_after: datetime | None = None,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A server certificate of `tls_authority` for *hosts* (names or addresses), and its key."""
    ca, ca_key = tls_authority()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(None, "hsmtoll sandbox", hosts[0], (), None)
    begin, end = _now() - _DAY, not_after or _now() + 365 * _DAY
    serial = x509.random_serial_number()
    builder = _leaf(subject, ca.subject, key.public_key(), serial=serial, begin=begin, end=end)
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage({"digitalSignature"}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.OID_SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
    )
    return _signed(builder, ca_key, pss=False), key


def pem(*certificates: x509.Certificate) -> bytes:
    """Certificates as PEM, in the order given."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _new_key(algorithm: str, bits: int) -> PrivateKey:
    if algorithm == "ec":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def _subject(
    country: str | None,
    organization: str,
    common_name: str,
    ids: Sequence[str],
    unit: str | None,
) -> x509.Name:
    parts = [(NameOID.COUNTRY_NAME, country), (NameOID.ORGANIZATION_NAME, organization)]
    parts += [(NameOID.ORGANIZATION_IDENTIFIER, value) for value in ids]
    parts += [(NameOID.ORGANIZATIONAL_UNIT_NAME, unit), (NameOID.COMMON_NAME, common_name)]
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts if value])


def _leaf(
    subject: x509.Name,
    issuer: x509.Name,
    key: CertificatePublicKeyTypes,
    *,
    serial: int,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _ca(
    subject: x509.Name,
    issuer: x509.Name,
    key: CertificatePublicKeyTypes,
    signer: PrivateKey,
    *,
    begin: datetime,
    end: datetime,
    depth: int,
    pss: bool,
) -> x509.Certificate:
    builder = (
        _leaf(subject, issuer, key, serial=x509.random_serial_number(), begin=begin, end=end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=depth), critical=True)
        .add_extension(_usage({"keyCertSign", "cRLSign"}), critical=True)
        .add_extension(_policy(["2.5.29.32.0"]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    return _signed(builder, signer, pss=pss)


def _signed(builder: x509.CertificateBuilder, key: PrivateKey, *, pss: bool) -> x509.Certificate:
    if pss:
        scheme = padding.PSS(padding.MGF1(_HASH), padding.PSS.DIGEST_LENGTH)
        return builder.sign(key, _HASH, rsa_padding=scheme)
    return builder.sign(key, _HASH)


def _usage(names: set[str]) -> x509.KeyUsage:
    flags = {attribute: name in names for name, attribute in _USAGES.items()}
    return x509.KeyUsage(**flags, encipher_only=False, decipher_only=False)


def _policy(oids: Sequence[str]) -> x509.CertificatePolicies:
    return x509.CertificatePolicies(
        [x509.PolicyInformation(ObjectIdentifier(oid), None) for oid in oids]
    )


def _pointers(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    # Required by EN 319 412-2; names under .invalid never resolve (RFC 2606).
    where = "http://authority.invalid"
    return builder.add_extension(
        x509.AuthorityInformationAccess(
            [
                x509.AccessDescription(
                    AuthorityInformationAccessOID.OCSP,
                    x509.UniformResourceIdentifier(f"{where}/ocsp"),
                ),
                x509.AccessDescription(
                    AuthorityInformationAccessOID.CA_ISSUERS,
                    x509.UniformResourceIdentifier(f"{where}/ca.cer"),
                ),
            ]
        ),
        critical=False,
    ).add_extension(
        x509.CRLDistributionPoints(
            [
                x509.DistributionPoint(
                    [x509.UniformResourceIdentifier(f"{where}/ca.crl")], None, None, None
                )
            ]
        ),
        critical=False,
    )


def _der(tag: int, body: bytes) -> bytes:
    # Short form is enough: the statements stay below 128 bytes.
    return bytes((tag, len(body))) + body


def _oid(dotted: str) -> bytes:
    first, second, *rest = map(int, dotted.split("."))
    body = b""
    for arc in (40 * first + second, *rest):
        part = bytes((arc & 0x7F,))
        while arc := arc >> 7:
            part = bytes((0x80 | arc & 0x7F,)) + part
        body += part
    return _der(0x06, body)


def _qc(qualified: bool, qc_type: str) -> x509.UnrecognizedExtension:
    """QCStatements (EN 319 412-5): semantics identifier of legal persons, and what qualifies."""
    semantics = _der(0x30, _oid("0.4.0.194121.1.2"))
    statements = _der(0x30, _oid("1.3.6.1.5.5.7.11.2") + semantics)
    if qualified:
        kind = {"esign": 1, "eseal": 2, "web": 3}[qc_type]
        statements += _der(0x30, _oid("0.4.0.1862.1.1"))
        kinds = _der(0x30, _oid(f"0.4.0.1862.1.6.{kind}"))
        statements += _der(0x30, _oid("0.4.0.1862.1.6") + kinds)
    return x509.UnrecognizedExtension(_QC_STATEMENTS, _der(0x30, statements))
