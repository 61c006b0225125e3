"""
Reads the certificates on a device, and its key, in steps that read more if the chain is incomplete.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hsmtoll.errors import DeviceError, sanitized
from hsmtoll.x509 import leaf_choice
from hsmtoll.x509.certificate import Certificate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hsmtoll.hsm.device import Device
    from hsmtoll.hsm.facts import KeyFacts, StoredCertificate
    from hsmtoll.jws import RsaPublicKey
    from hsmtoll.x509.certificate_files import Bundle

__all__ = ["public_keys", "read_certificates_and_key", "readable", "unread_of"]

_log = logging.getLogger(__name__)


def read_certificates_and_key(
    device: Device, given: Sequence[Certificate], *, near: bool = False
) -> Iterator[tuple[tuple[StoredCertificate, ...], KeyFacts]]:
    """
    Yield the certificates on *device* and its key, each time with more certificates, for callers
    that stop when they have a chain: with *near* first only those with the key (see
    `Device.certificates`); then all; then all after a login, if the token did not require one; last
    with those of the module's other tokens. *given*: certificates of a file, whose public keys
    select between several private keys.
    """

    def seen(*, near: bool = False) -> tuple[tuple[StoredCertificate, ...], KeyFacts]:
        stored = device.certificates(near=near)
        generation = device.generation
        key = device.key(candidates=public_keys([*readable(stored), *given]))
        if device.generation != generation:
            # A login in between may have made more certificates visible.
            stored = device.certificates(near=near)
        return stored, key

    if near:
        yield seen(near=True)
    stored, key = seen()
    yield stored, key
    generation = device.generation
    device.certificates(force_login=True)
    if device.generation != generation:
        stored, key = seen()
        yield stored, key
    try:
        others = device.other_certificates()
    except DeviceError:
        return
    if others:
        _log.info("using certificates of the module's other devices as well")
        yield (*stored, *others), key


def readable(stored: Iterable[StoredCertificate]) -> list[Certificate]:
    """The certificates that can be parsed; others are skipped."""
    return [each for _, each, _ in _parsed(stored) if each is not None]


def _parsed(
    stored: Iterable[StoredCertificate],
) -> Iterator[tuple[StoredCertificate, Certificate | None, str]]:
    """Each with its parsed certificate, or None and the reason."""
    for one in stored:
        if one.problem is not None:
            yield one, None, one.problem
            continue
        try:
            yield one, Certificate.load(one.der), ""
        except ValueError as exc:
            _log.info("certificate %r is skipped: %s", sanitized(one.label), exc)
            yield one, None, str(exc)


def unread_of(
    stored: Iterable[StoredCertificate],
    supplied: Bundle,
    key: KeyFacts | None = None,
    named: Sequence[StoredCertificate] = (),
) -> tuple[leaf_choice.Unread, ...]:
    """
    The certificates that cannot be parsed. One counts as the *key*'s own if it is in *named*, or
    has the CKA_ID, the label or the modulus of the key.
    """
    modulus = None
    if key is not None and key.public is not None:
        modulus = key.public.modulus.to_bytes((key.public.bits + 7) // 8, "big")

    def has_modulus(raw: bytes) -> bool:
        return modulus is not None and modulus in raw

    found = []
    for each, certificate, why in _parsed(stored):
        if certificate is not None:
            continue
        own = each in named or has_modulus(each.der)
        if key is not None:
            own |= bool(key.id and each.id == key.id)
            own |= bool(key.label and each.label == key.label)
        where = f"certificate '{sanitized(each.label)}' on the device"
        found.append(leaf_choice.Unread(where, why, own))
    found += [leaf_choice.Unread(u.where, u.why, has_modulus(u.der)) for u in supplied.unreadable]
    return tuple(found)


def public_keys(certificates: Iterable[Certificate]) -> tuple[RsaPublicKey, ...]:
    """The RSA keys of *certificates*, each once, in no order."""
    return tuple({c.public_key for c in certificates if c.public_key is not None})
