"""
Evidence for auditors: the key as the module reports it, the chain, the device, the settings.

No secret is included: for a secret setting, only that it is set.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from hsmtoll import apis
from hsmtoll.tokens import mp_codes

if TYPE_CHECKING:
    from hsmtoll.doctor.facts import Facts, Seen
    from hsmtoll.hsm.facts import KeyFacts
    from hsmtoll.x509.certificate import Certificate
    from hsmtoll.x509.path_building import Chain

__all__ = ["KEY_FLAGS", "TIME_FORMAT", "certificate_members", "evidence"]

#: RFC 3339, UTC.
TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"
_PACKAGES: Final = ("hsmtoll", "python-pkcs11", "cryptography", "asn1crypto", "httpx")
#: Attributes of a key's protection, by their names in `hsm.facts.KeyFacts`.
KEY_FLAGS: Final = (
    "sensitive",
    "always_sensitive",
    "extractable",
    "never_extractable",
    "local",
    "sign",
    "always_authenticate",
)


def evidence(facts: Facts, chain: Chain | None) -> dict[str, Any]:
    """The members of the report besides its checks; None for unknown values."""
    return {
        "made_at": facts.now.strftime(TIME_FORMAT),
        "versions": {
            **{name: _version(name) for name in _PACKAGES},
            "python": platform.python_version(),
            "table_of_apis": apis.VERSION,
            "table_of_refusals": mp_codes.VERSION,
        },
        "settings": _settings(facts.settings),
        "keys": [_key(seen) for seen in facts.seen],
        "chain": [
            {**certificate_members(each), "pem": each.pem()}
            for each in (chain.certificates if chain else ())
        ],
        "chain_is_complete": chain.complete if chain else None,
    }


def certificate_members(certificate: Certificate) -> dict[str, str]:
    """A certificate of the chain, in the form that all JSON output uses."""
    return {
        "subject": certificate.subject,
        "issuer": certificate.issuer,
        "serial": certificate.serial_hex,
        "not_before": certificate.not_before.strftime(TIME_FORMAT),
        "not_after": certificate.not_after.strftime(TIME_FORMAT),
        "sha256": certificate.sha256,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _settings(group: Any) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name in type(group).model_fields:
        value = getattr(group, name)
        if hasattr(value, "get_secret_value"):
            members[name] = "set, not shown"
        elif hasattr(type(value), "model_fields"):
            members[name] = _settings(value)
        elif isinstance(value, tuple):
            members[name] = list(value)
        else:
            members[name] = (
                value if value is None or isinstance(value, bool | int | float) else str(value)
            )
    return members


def _key(seen: Seen) -> dict[str, Any]:
    token, module = seen.token, seen.module
    return {
        "asked_for": str(seen.uri),
        "module": module
        and {
            "path": module.path,
            "manufacturer": module.manufacturer,
            "description": module.description,
            "version": _dotted(module.version),
            "cryptoki": _dotted(module.cryptoki),
        },
        "device": token
        and {
            "uri": str(token.uri),
            "firmware": _dotted(token.firmware),
            "pin": token.pin_state,
            "refused_pins": token.refused,
            "login_required": token.login_required,
        },
        "key_as_reported_by_the_module": seen.key and _attributes(seen.key),
        "error": seen.error and str(seen.error),
    }


def _attributes(key: KeyFacts) -> dict[str, Any]:
    return {
        "uri": str(key.uri),
        "type": key.key_type,
        "bits": key.bits,
        **{name: getattr(key, name) for name in KEY_FLAGS},
        "public_key_thumbprint": key.public and key.public.thumbprint(),
        "mechanisms": sorted(key.mechanisms),
        "warnings": list(key.warnings),
    }


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
