"""
Checks of module, device, PIN and key: everything below the certificate.
"""

from __future__ import annotations

from typing import Final

from hsmtoll.doctor.findings import (
    NO_DEVICE,
    Check,
    KeyDiagnosis,
    failed,
    failure_of,
    ok,
    skip,
    warn,
)
from hsmtoll.errors import ConfigurationError, DeviceError, HsmTollError, sanitized

__all__ = ["CHECKS"]


def check_module(diagnosis: KeyDiagnosis) -> Check:
    """The module loads."""
    if diagnosis.seen is None:
        return skip("module", NO_DEVICE)
    if broken := failure_of(diagnosis, "module", "key"):
        return broken
    module = diagnosis.seen.module
    if module is None:
        return ok("module", "loads")
    made = f"{sanitized(module.description)} {module.version[0]}.{module.version[1]}".strip()
    return ok("module", f"{sanitized(module.path)} loads ({made})")


def check_spy(diagnosis: KeyDiagnosis) -> Check:
    """No pkcs11-spy logs the PIN."""
    if diagnosis.seen is None:
        return skip("module-spy", NO_DEVICE)
    if not diagnosis.seen.spied:
        return ok("module-spy", "no pkcs11-spy between hsmtoll and the device")
    line = "pkcs11-spy is between hsmtoll and the device: it writes every PIN to its log"
    hint = "unset PKCS11SPY, and name the device's own module in HSMTOLL_HSM__MODULE"
    if diagnosis.settings.environment == "sandbox":
        return warn("module-spy", "module-spy", line, hint)
    return failed("module-spy", ConfigurationError(line, hint=hint, code="module-spy"))


def check_device(diagnosis: KeyDiagnosis) -> Check:
    """The PKCS#11 token that the URI names is present."""
    if diagnosis.seen is None:
        return skip("device", NO_DEVICE)
    if broken := failure_of(diagnosis, "device", "key"):
        return broken
    token = diagnosis.seen.token
    if token is None:
        return ok("device", f"{sanitized(diagnosis.seen.uri.device_only())} is there")
    firmware = ".".join(map(str, token.firmware))
    return ok("device", f"{sanitized(token.uri)} is there, firmware {firmware}")


_PIN_WARNINGS: Final = {
    "count-low": ("pin-count-low", "a wrong PIN was given since the last login"),
    "to-be-changed": ("pin-to-be-changed", "the device requires that the PIN be changed"),
}


def check_pin(diagnosis: KeyDiagnosis) -> Check:
    """The PIN is there, accepted, and not about to be locked."""
    if diagnosis.seen is None:
        return skip("pin", NO_DEVICE)
    if broken := failure_of(diagnosis, "pin", "key"):
        return broken
    token = diagnosis.seen.token
    if token is not None and token.pin_state in _PIN_WARNINGS:
        code, line = _PIN_WARNINGS[token.pin_state]
        hint = "check that no other program has an old PIN; two more wrong ones may lock the device"
        return warn("pin", code, line, hint)
    if token is not None and not token.login_required:
        return ok("pin", "the device requires none")
    if not diagnosis.seen.logged_in:
        return ok("pin", "other code of this process had logged in; this PIN was not verified")
    return ok("pin", "accepted")


def check_key(diagnosis: KeyDiagnosis) -> Check:
    """The URI matches one private key, and its public key is known."""
    if diagnosis.seen is None:
        return skip("key", NO_DEVICE)
    if broken := failure_of(diagnosis, "key", "key"):
        return broken
    key = diagnosis.key
    if key is not None and key.public is None:
        return warn(
            "key",
            "public-key-hidden",
            f"{sanitized(key.uri)} is there, but the device hides its public half: only the first "
            "grant shows whether key and certificate belong together",
            "set HSMTOLL_HSM__PUBLIC_KEY to a PEM file with the public key",
        )
    return ok("key", f"{sanitized(key.uri)} is there" if key else "there")


def check_key_type(diagnosis: KeyDiagnosis) -> Check:
    """The key is RSA: Maskinporten accepts only RS256, RS384 and RS512 (M20)."""
    if diagnosis.seen is None:
        return skip("key-type", NO_DEVICE)
    return failure_of(diagnosis, "key-type", "key") or ok(
        "key-type", f"RSA, which {diagnosis.settings.alg} needs"
    )


def check_key_size(diagnosis: KeyDiagnosis) -> Check:
    """The key has 2048 bits or more (M33)."""
    if diagnosis.seen is None:
        return skip("key-size", NO_DEVICE)
    bits = diagnosis.key.bits if diagnosis.key else None
    return failure_of(diagnosis, "key-size", "key") or ok(
        "key-size", f"{bits} bits" if bits else "not reported; the certificate's is checked below"
    )


def check_key_usage(diagnosis: KeyDiagnosis) -> Check:
    """The key may sign (CKA_SIGN); a PIN is available if it is needed for each signature."""
    if diagnosis.seen is None:
        return skip("key-usage", NO_DEVICE)
    if broken := failure_of(diagnosis, "key-usage", "key"):
        return broken
    if (
        diagnosis.key is not None
        and diagnosis.key.always_authenticate
        and not diagnosis.seen.pin_given
    ):
        return failed(
            "key-usage",
            DeviceError(
                f"the key {sanitized(diagnosis.key.uri)} requires a PIN for every signature",
                hint="set HSMTOLL_HSM__SIGNING_PIN_FILE; a pinpad cannot be used here",
                code="signing-pin",
            ),
        )
    return ok("key-usage", "it may sign")


def check_key_protection(diagnosis: KeyDiagnosis) -> Check:
    """The key is not extractable and never was (CKA_EXTRACTABLE, CKA_NEVER_EXTRACTABLE)."""
    if diagnosis.seen is None:
        return skip("key-protection", NO_DEVICE)
    if broken := failure_of(diagnosis, "key-protection", "key"):
        return broken
    key = diagnosis.key
    if key is not None and not key.protected:
        return warn(
            "key-protection",
            "key-exportable-allowed",
            "the device does not report that the key cannot be exported; the settings allow that",
            "generate a key on the device and unset HSMTOLL_HSM__ALLOW_EXPORTABLE_KEY",
        )
    if key is not None and "key-imported" in key.warnings:
        return warn(
            "key-protection",
            "key-imported",
            "the key was imported, or the device does not report that it was not",
            "copies may exist: `hsmtoll key generate` makes a key that never leaves the device",
        )
    return ok("key-protection", "made on the device, never extractable, as the module reports")


def check_mechanism(diagnosis: KeyDiagnosis) -> Check:
    """The device has a mechanism for HSMTOLL_ALG: with the hash, or CKM_RSA_PKCS (DigestInfo)."""
    if diagnosis.key is None:
        return skip("mechanism", NO_DEVICE)
    alg = diagnosis.settings.alg
    whole = f"SHA{alg.removeprefix('RS')}_RSA_PKCS"
    if whole in diagnosis.key.mechanisms:
        return ok("mechanism", f"the device has {whole} for {alg}")
    if "RSA_PKCS" in diagnosis.key.mechanisms:
        return ok(
            "mechanism", f"the device has RSA_PKCS: for {alg}, hsmtoll computes the DigestInfo"
        )
    return failed(
        "mechanism",
        DeviceError(
            f"the device has neither {whole} nor RSA_PKCS: {alg} cannot be signed",
            hint="`hsmtoll objects` shows what the device can do",
            code="mechanism",
        ),
    )


def check_signature(diagnosis: KeyDiagnosis) -> Check:
    """The device signs data of the size of a grant with x5c (only at the user's request)."""
    if diagnosis.seen is None:
        return skip("signature", NO_DEVICE)
    signed = diagnosis.seen.signed
    if isinstance(signed, HsmTollError):
        return failed("signature", signed)
    if signed is not None:
        verified = "it verifies" if signed else "no public key is known to verify it with"
        return ok("signature", f"made over a text as large as a grant with x5c; {verified}")
    if diagnosis.facts.answers is not None:
        return skip("signature", "only the grants of --online are signed; --sign signs before them")
    return skip("signature", "no signature was made: `hsmtoll doctor --sign` makes one")


CHECKS: Final = (
    ("module", check_module),
    ("module-spy", check_spy),
    ("device", check_device),
    ("pin", check_pin),
    ("key", check_key),
    ("key-type", check_key_type),
    ("key-size", check_key_size),
    ("key-usage", check_key_usage),
    ("key-protection", check_key_protection),
    ("mechanism", check_mechanism),
    ("signature", check_signature),
)
