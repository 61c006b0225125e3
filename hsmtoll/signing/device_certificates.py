"""
The certificates on a device, and its key: read in steps, from those with the key to all others.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hsmtoll.errors import DeviceError, foreign
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
    What the *device* shows: its certificates, with *near* first those that lie with the key alone
    (`Device.certificates`), and its key. For those whom that does not do: the same after a login
    that its flags do not ask for; at last with the certificates of the module's other devices.
    *given* is what a file has.
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
        _log.info("looking for certificates on the module's other devices")
        yield (*stored, *others), key


def readable(stored: Iterable[StoredCertificate]) -> list[Certificate]:
    """The certificates that can be parsed; others are skipped."""
    return [each for _, each, _ in _parsed(stored) if each is not None]


def _parsed(
    stored: Iterable[StoredCertificate],
) -> Iterator[tuple[StoredCertificate, Certificate | None, str]]:
    """Each with its certificate, or with why it cannot be read."""
    for one in stored:
        if one.problem is not None:
            yield one, None, one.problem
            continue
        try:
            yield one, Certificate.load(one.der), ""
        except ValueError as exc:
            _log.info("certificate %r is passed over: %s", foreign(one.label), exc)
            yield one, None, str(exc)


def unread_of(
    stored: Iterable[StoredCertificate],
    supplied: Bundle,
    key: KeyFacts | None = None,
    named: Sequence[StoredCertificate] = (),
) -> tuple[leaf_choice.Unread, ...]:
    """
    The certificates that do not parse. One is taken for the *key*'s own by CKA_ID, label or
    modulus, or where it is *named*.
    """
    modulus = None
    if key is not None and key.public is not None:
        modulus = key.public.modulus.to_bytes((key.public.bits + 7) // 8, "big")

    def of_key(raw: bytes) -> bool:
        return modulus is not None and modulus in raw

    found = []
    for each, certificate, why in _parsed(stored):
        if certificate is not None:
            continue
        own = each in named or of_key(each.der)
        if key is not None:
            own |= bool(key.id and each.id == key.id)
            own |= bool(key.label and each.label == key.label)
        where = f"certificate '{foreign(each.label)}' on the device"
        found.append(leaf_choice.Unread(where, why, own))
    found += [leaf_choice.Unread(u.where, u.why, of_key(u.der)) for u in supplied.unreadable]
    return tuple(found)


def public_keys(certificates: Iterable[Certificate]) -> tuple[RsaPublicKey, ...]:
    """The RSA keys of *certificates*, each once, in no order."""
    return tuple({c.public_key for c in certificates if c.public_key is not None})
