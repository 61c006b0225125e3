"""
Enrolment: create a key on the device, request its certificate, import certificate and chain.

    generate ──► URI ──► csr ──► (the issuer) ──► import_chain ──► hsmtoll doctor
                    └──► jwk ──► (Samarbeidsportalen, for a client known by a kid)

Certificate requests are built here and signed on the device, which never returns the private key.
"""

from __future__ import annotations

import base64
import logging
import re
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from asn1crypto import algos, core, keys, x509
from asn1crypto import csr as pkcs10

from hsmtoll.errors import CertificateError, DeviceError, HsmTollError, UsageError, sanitized
from hsmtoll.x509 import certificate_checks, path_building
from hsmtoll.x509.certificate import Certificate
from hsmtoll.x509.certificate_files import bundle_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from pathlib import Path

    from hsmtoll.apis import Identity
    from hsmtoll.hsm.device import Device
    from hsmtoll.hsm.facts import KeyFacts, StoredCertificate
    from hsmtoll.hsm.uri import KeyUri
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.x509.certificate_files import Unreadable

__all__ = ["BITS", "Imported", "csr", "generate", "import_chain", "jwk", "uri_to_set"]

_log = logging.getLogger("hsmtoll.enrolment")

#: RSA key sizes that Maskinporten accepts and devices generate; the first is the default.
BITS: Final = (3072, 2048, 4096)

# asn1crypto carries no types.
_Algorithm: Any = algos.SignedDigestAlgorithm
_Attributes: Any = pkcs10.CRIAttributes
_Bits: Any = core.OctetBitString
_Info: Any = pkcs10.CertificationRequestInfo
_Name: Any = x509.Name
_Null: Any = core.Null
_Pair: Any = x509.NameTypeAndValue
_PublicKeyInfo: Any = keys.PublicKeyInfo
_Relative: Any = x509.RelativeDistinguishedName
_Request: Any = pkcs10.CertificationRequest
_Sequence: Any = x509.RDNSequence
_String: Any = x509.DirectoryString

# X.680 section 41.4.
_PRINTABLE: Final = re.compile(r"[A-Za-z0-9 '()+,\-./:=?]+")

# EN 319 412-1 section 5.1.4: type of the register, country, number.
_LEGAL_PERSON: Final = re.compile(r"(?:[A-Z]{3}|[A-Z]{2}:)[A-Z]{2}-.+")

_SIGNED_WITH: Final = {"RS256": "sha256_rsa", "RS384": "sha384_rsa", "RS512": "sha512_rsa"}


_WHOLE_CHAIN: Final = (
    "get the CA certificates from the issuer's site, root included, put them into one PEM file "
    "with the leaf, and import that file; with HSMTOLL_X5C=without-root no root is needed"
)


@dataclass(frozen=True, slots=True)
class Imported:
    """
    The result of `import_chain`: certificates *written* now, *present* before, and *left* out
    because the device had no room; name the latter in a file (HSMTOLL_HSM__CERTIFICATES).
    """

    chain: path_building.Chain
    written: tuple[Certificate, ...]
    present: tuple[Certificate, ...]
    left: tuple[Certificate, ...]


def generate(
    device: Device,
    *,
    bits: int = 3072,
    label: str | None = None,
    id: bytes | None = None,  # noqa: A002 - the word of RFC 7512 and of the command
    always_authenticate: bool = False,
) -> KeyUri:
    """
    Generate an RSA key on *device*: sensitive, never extractable, for signing only.

    *label* and *id* default to those of the device's URI; without either the id is random.
    Returns the key's URI, for HSMTOLL_HSM__KEY. Raises UsageError (also for a label with
    unprintable characters), DeviceError ``key-exists`` (nothing is overwritten), ``key-refused``
    or ``key-too-able``, and the errors of the login.
    """
    if bits not in BITS:
        listed = ", ".join(map(str, sorted(BITS)))
        raise UsageError(f"key generate: {bits} bits; a key has one of {listed}")
    named = label or device.uri.object
    if not named:
        raise UsageError(
            "key generate: the key needs a label",
            hint="put object=LABEL into HSMTOLL_HSM__KEY, or set HSMTOLL_HSM__KEY_LABEL",
        )
    if not named.isprintable():
        # Includes surrogates (invalid UTF-8), with which python-pkcs11 would crash.
        raise UsageError("key generate: a label is one line of printable characters, in UTF-8")
    return device.generate(
        bits=bits,
        label=named,
        key_id=id or device.uri.id,
        always_authenticate=always_authenticate,
    )


def uri_to_set(device: Device, made: KeyUri) -> KeyUri | None:
    """
    The URI that selects the new key *made* on *device*; None if the device's own URI already
    selects exactly that key.
    """
    try:
        found = device.key().uri
    except HsmTollError:
        found = None
    if found is not None and (found.object, found.id) == (made.object, made.id):
        return None
    asked = device.uri
    return replace(asked, object=made.object, id=made.id if asked.id else None, type=None)


def csr(
    device: Device,
    *,
    country: str,
    organization: str,
    common_name: str,
    organization_identifier: str,
    unit: str | None = None,
    serial_number: str | None = None,
    alg: str = "RS256",
) -> str:
    """
    A PKCS#10 request (RFC 2986) for the device's key, signed there, as PEM.

    The subject is a legal person's (EN 319 412-3): *organization_identifier* such as
    ``NTRSE-5566778899``, as registered with the issuer. Raises UsageError for values that a
    distinguished name cannot hold, and the device's errors.
    """
    if not _LEGAL_PERSON.fullmatch(organization_identifier):
        _log.warning(
            "--organization-identifier %s: EN 319 412-1 has register, country and number, such as "
            "NTRSE-5566778899; ask the issuer before the certificate is ordered",
            sanitized(organization_identifier),
        )
    public = _public(device)
    # EN 319 412-3 section 4.2.1, in the order of its own examples.
    subject = _name(
        (
            ("country_name", "--country", _country(country)),
            ("organization_name", "--organization", organization),
            ("organization_identifier", "--organization-identifier", organization_identifier),
            ("organizational_unit_name", "--unit", unit),
            ("serial_number", "--serial-number", serial_number),
            ("common_name", "--common-name", common_name),
        )
    )
    info = _Info(
        {
            "version": "v1",
            "subject": subject,
            "subject_pk_info": _PublicKeyInfo.load(public.spki()),
            "attributes": _Attributes([]),
        }
    )
    signature = device.sign_request(alg, info.dump(), public=public)
    request = _Request(
        {
            "certification_request_info": info,
            "signature_algorithm": _Algorithm(
                {"algorithm": _SIGNED_WITH[alg], "parameters": _Null()}
            ),
            "signature": _Bits(signature),
        }
    )
    return _pem("CERTIFICATE REQUEST", request.dump())


def import_chain(
    device: Device,
    data: bytes,
    *,
    name: str = "key import",
    file: Path | None = None,
    now: datetime,
    identity: Identity = "eseal",
    mode: path_building.X5cMode = "full",
    root_sha256: str | None = None,
) -> Imported:
    """
    Store a leaf and its chain, given in any order in *data*, on the device that has the leaf's
    key. *name* is the name of the data in errors, *file* its path, if it is a file.

    The leaf gets the key's label and CKA_ID. Certificates that are present are not changed, so
    that a second import changes nothing; new ones are read back. Raises ConfigurationError for
    unreadable data, CertificateError ``certificate-foreign`` if no key on the device belongs to
    any of them, the errors of leaf and chain (except not yet valid), and DeviceError
    ``certificate-refused`` if not even the leaf is accepted, ``certificate-lost`` if one that was
    written or present is missing afterwards.
    """
    bundle = bundle_in(data, name)
    given = tuple(dict.fromkeys(bundle.certificates))
    found = _matching(given, device.private_keys()) or _hidden_match(device, given)
    leaf, key = _leaf(given, bundle.unreadable, found)
    there = [each for stored in device.certificates() if (each := _read(stored.der))]
    faults = [
        fault
        for fault in certificate_checks.leaf_faults(leaf, identity=identity, now=now)
        if fault.code != "certificate-not-yet-valid"
    ]
    preferred = frozenset(each.sha256 for each in given)
    chain = path_building.build(
        leaf,
        [*given, *there],
        now=max(now, leaf.not_before),
        root_sha256=root_sha256,
        preferred=preferred,
    )
    faults += certificate_checks.chain_faults(chain, identity=identity, now=now, mode=mode)
    if faults:
        first = faults[0]
        if first.code in ("chain-incomplete", "chain-broken"):
            first = replace(first, hint=_WHOLE_CHAIN)
        raise first.error()
    named = [(leaf.der, key.label, key.id)]
    named += [(each.der, _label(each), _ca_id(each)) for each in chain.certificates[1:]]
    instead = _in_a_file(file)
    stored = device.store(tuple(named), hint=instead)
    if stored.lost:
        raise _not_kept(stored.lost, [*chain.certificates, *there], instead)
    return Imported(
        chain, *(_of(chain, ders) for ders in (stored.written, stored.present, stored.left))
    )


def _in_a_file(file: Path | None) -> str:
    """The hint if the device cannot store the certificates."""
    where = sanitized(file.absolute()) if file is not None else "a file with the whole chain"
    return (
        f"the device need not hold certificates: set HSMTOLL_HSM__CERTIFICATES to {where}; or store"
        " them with the device's own tool"
    )


def _not_kept(lost: Sequence[bytes], known: Sequence[Certificate], hint: str) -> DeviceError:
    names = {each.der: each.subject for each in known}
    gone = "; ".join(dict.fromkeys(names.get(der, "another certificate") for der in lost))
    return DeviceError(
        "key import: the device accepted the certificates and does not have all of them; missing:"
        f" {sanitized(gone)}",
        hint=hint,
        code="certificate-lost",
    )


def jwk(device: Device, *, alg: str = "RS256") -> dict[str, str]:
    """
    The public key as a JWK (RFC 7517) with its RFC 7638 thumbprint as kid, ready to be
    registered; HSMTOLL_KID=thumbprint signs with the same kid.
    """
    public = _public(device)
    return {**public.jwk(), "use": "sig", "alg": alg, "kid": public.thumbprint()}


def _public(device: Device) -> RsaPublicKey:
    stored = device.certificates()
    facts = device.key(candidates=_public_keys(stored))
    if facts.public is None:
        # A device may show more certificates after the login.
        stored = device.certificates()
        beside = [
            each
            for each in stored
            if (each.id and each.id == facts.id) or (each.label and each.label == facts.label)
        ]
        public = _proven(device, _public_keys(beside) or _public_keys(stored))
        if public is None:
            raise DeviceError(
                "key: the device does not show its public half",
                hint="set HSMTOLL_HSM__PUBLIC_KEY to a PEM file with the public key",
                code="public-key-hidden",
            )
        return public
    return facts.public


def _public_keys(stored: Iterable[StoredCertificate]) -> tuple[RsaPublicKey, ...]:
    read = [each for one in stored if (each := _read(one.der))]
    return tuple(dict.fromkeys(each.public_key for each in read if each.public_key is not None))


def _proven(device: Device, candidates: tuple[RsaPublicKey, ...]) -> RsaPublicKey | None:
    """The one of *candidates* that verifies a signature of the device's key."""
    if not candidates:
        return None
    try:
        return device.self_test("RS256", candidates=candidates)
    except DeviceError as exc:
        if exc.code != "signature-wrong":
            raise
        return None


def _matching(
    given: Iterable[Certificate], there: Iterable[KeyFacts]
) -> list[tuple[Certificate, KeyFacts]]:
    keys_there = [key for key in there if key.public is not None]
    return [(each, key) for each in given for key in keys_there if key.public == each.public_key]


def _hidden_match(
    device: Device, given: Sequence[Certificate]
) -> list[tuple[Certificate, KeyFacts]]:
    """The leaf of *given* for the device's key, if the device hides the public key."""
    candidates = tuple(each.public_key for each in given if each.public_key and not each.is_ca)
    try:
        key = device.key(candidates=candidates)
    except DeviceError:
        return []  # the caller reports that no certificate matches
    public = None if key.public else _proven(device, candidates)
    return [(each, key) for each in given if public is not None and each.public_key == public]


def _read(der: bytes) -> Certificate | None:
    try:
        return Certificate.load(der)
    except ValueError:
        return None


def _country(value: str) -> str:
    if len(value) != 2 or not value.isascii() or not value.isupper():
        raise UsageError(f"--country {sanitized(value)}: two capital letters, such as SE or NO")
    return value


def _name(parts: Iterable[tuple[str, str, str | None]]) -> Any:
    relative = []
    for kind, option, value in parts:
        if value is None:
            continue
        if not value.strip() or not value.isprintable() or len(value) > 200:
            raise UsageError(f"{option}: one line of printable characters is expected")
        # RFC 5280 appendix A: these two are PrintableString; all else is UTF-8.
        form = "printable_string" if kind in ("country_name", "serial_number") else "utf8_string"
        if form == "printable_string" and not _PRINTABLE.fullmatch(value):
            raise UsageError(
                f"{option}: only letters a to z, digits, blanks and '()+,-./:=? are allowed"
            )
        held = _String(name=form, value=value)
        pair = _Pair({"type": kind, "value": held})
        relative.append(_Relative([pair]))
    return _Name(name="", value=_Sequence(relative))


def _leaf(
    given: Sequence[Certificate],
    unreadable: Sequence[Unreadable],
    found: Sequence[tuple[Certificate, KeyFacts]],
) -> tuple[Certificate, KeyFacts]:
    if not found:
        raise CertificateError(
            f"key import: none of the {len(given)} certificates belongs to a key on the device"
            + "".join(f"; {each.where} cannot be read: {each.why}" for each in unreadable[:3]),
            hint="a certificate belongs to the key that signed its request (hsmtoll key csr); "
            "`hsmtoll objects` lists the keys",
            code="certificate-foreign",
            who="you",
        )
    if len(found) > 1:
        raise CertificateError(
            f"key import: {len(found)} certificates belong to keys on the device",
            hint="import one leaf with its chain at a time",
            code="certificate-ambiguous",
            who="you",
        )
    return found[0]


def _label(certificate: Certificate) -> str:
    return (certificate.common_name or certificate.subject)[:64]


def _ca_id(certificate: Certificate) -> bytes:
    # Another one than the key's, which would make it look like the key's own certificate.
    return certificate.subject_key_id or bytes.fromhex(certificate.sha256)[:20]


def _of(chain: path_building.Chain, ders: Iterable[bytes]) -> tuple[Certificate, ...]:
    wanted = frozenset(ders)
    return tuple(each for each in chain.certificates if each.der in wanted)


def _pem(what: str, der: bytes) -> str:
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode("ascii"), 64))
    return f"-----BEGIN {what}-----\n{body}\n-----END {what}-----\n"
