"""
The exceptions of hsmtoll, and `sanitized`, which sanitizes untrusted text. Imports nothing of ours.

    HsmTollError
    ├── UsageError              2  the command line or an argument is invalid
    ├── ConfigurationError     10  a setting is missing, invalid or contradicts another
    ├── PinIncorrect           20  the device refused the PIN; it was tried once
    ├── PinNotTried            21  locked, final try, or refused before: not sent to the device
    ├── DeviceError            30  module, p11_token, key or signature
    ├── CertificateError       40  leaf or chain
    ├── ClockError             50  this machine's clock and Maskinporten's differ
    ├── GrantRefused           60  Maskinporten refused the grant, or its answer is invalid
    │   └── ScopeNotGranted    61  Maskinporten refused this scope
    ├── ExchangeRefused        70  Customs refused the exchange, or its answer is invalid
    ├── ApiRefused             71  a Customs API refused the call
    ├── SubmissionFailed       72  a submission was processed and failed
    ├── OutcomeUnknown         73  it may have been received: look it up, do not repeat it
    ├── TryAgainLater          75  rate limit, or still being processed
    ├── NetworkError           80  no answer, or a broken one
    ├── PolicyDenied           90  refused by the signing host's policy, or the host is not genuine
    └── AuditBroken            91  the audit log was changed, or cannot be written

The number is the exit code of the command line, one for each class; a test compares the drawing
with the classes.

The program decides by the class and four attributes, which are set where the error is raised.
``code`` is for people, logs and other programs; a module compares it only with codes of its own.

signed      A signature may have been spent: the rate limit counts it. True by default; false for
            the classes that occur before the device signs (usage, settings, PIN, certificate,
            audit).
retryable   A new attempt of the same request, from the grant on, may succeed.
who         Who must act: you, issuer, digdir or customs; None if the message says it.
scope       What failed, and so what may be done instead:

            request      the request; repeated, it fails again (the default)
            caller       the caller; the same request of other callers is not affected
            device       the device, its PIN or its key; another device may work
            certificate  the certificate; another one may work
            service      a server, the network, or a clock; another server may work
            attempt      this attempt only; it shows nothing about device, server or request

`to_data` and `from_data` are the one form in which an error is sent to another process or stored.
`from_data` checks what it reads; missing members get the safe value: signed, not retryable.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, ClassVar, Final, Literal, get_args

__all__ = [
    "ApiRefused",
    "AuditBroken",
    "CertificateError",
    "ClockError",
    "ConfigurationError",
    "DeviceError",
    "ExchangeRefused",
    "GrantRefused",
    "HsmTollError",
    "NetworkError",
    "OutcomeUnknown",
    "PinIncorrect",
    "PinNotTried",
    "PolicyDenied",
    "ScopeNotGranted",
    "SubmissionFailed",
    "TryAgainLater",
    "UsageError",
]

#: Who must act.
Who = Literal["you", "issuer", "digdir", "customs"]
#: What failed; see the top of this module.
Scope = Literal["request", "caller", "device", "certificate", "service", "attempt"]


class HsmTollError(Exception):
    """
    The base class of all errors that this package raises.

    The message is one line: what was attempted, what happened. It never contains a secret. *hint*,
    one line or several, is what to do. Hints are also notes of the exception (PEP 678), so that
    tracebacks show them.

    *code* is stable: Maskinporten's, such as ``MP-012``, or one of hsmtoll, such as
    ``key-missing``; the class has a default. *retry_after* is in seconds. *signed*, *retryable*,
    *who* and *scope* are described at the top of this module; ``None`` means the class's default.
    """

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "internal"
    default_signed: ClassVar[bool] = True
    default_scope: ClassVar[Scope] = "request"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        code: str | None = None,
        who: Who | None = None,
        trace_id: str | None = None,
        jti: str | None = None,
        correlation_id: str | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
        signed: bool | None = None,
        scope: Scope | None = None,
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code or self.default_code
        self.who = who
        self.trace_id = trace_id
        self.jti = jti
        self.correlation_id = correlation_id
        self.retryable = retryable
        self.retry_after = retry_after
        self.signed = self.default_signed if signed is None else signed
        self.scope: Scope = scope or self.default_scope
        for line in self.hints:
            self.add_note(f"hint: {line}")

    @property
    def hints(self) -> tuple[str, ...]:
        """What to do, a line each; the last one has the ids that a support desk needs."""
        ids = {"trace id": self.trace_id, "correlation id": self.correlation_id, "jti": self.jti}
        given = ", ".join(f"{name} {value}" for name, value in ids.items() if value)
        return (*(self.hint or "").splitlines(), *((f"for support: {given}",) if given else ()))


class UsageError(HsmTollError):
    """The command line, or an argument of a method, is invalid."""

    exit_code = 2
    default_code = "usage"
    default_signed = False


class ConfigurationError(HsmTollError):
    """A setting is missing, invalid, or contradicts another one."""

    exit_code = 10
    default_code = "setting-invalid"
    default_signed = False


class PinIncorrect(HsmTollError):
    """The device refused the PIN. It was tried once and will not be tried again."""

    exit_code = 20
    default_code = "pin-incorrect"
    default_signed = False
    default_scope = "device"


class PinNotTried(HsmTollError):
    """The PIN is locked, at its final try, or was refused before: it was not sent to the device."""

    exit_code = 21
    default_code = "pin-not-tried"
    default_signed = False
    default_scope = "device"


class DeviceError(HsmTollError):
    """The module, the device, the key or a signature failed."""

    exit_code = 30
    default_code = "device-failed"
    default_scope = "device"


class CertificateError(HsmTollError):
    """The leaf, or the chain above it, cannot be used."""

    exit_code = 40
    default_code = "certificate"
    default_signed = False
    default_scope = "certificate"


class ClockError(HsmTollError):
    """This machine's clock and Maskinporten's differ by more than can be corrected."""

    exit_code = 50
    default_code = "clock"
    default_scope = "service"


class GrantRefused(HsmTollError):
    """Maskinporten refused the grant, or its answer cannot be used."""

    exit_code = 60
    default_code = "grant-refused"


class ScopeNotGranted(GrantRefused):
    """Maskinporten refused this scope for this client (MP-200, MP-201, MP-250, MP-251)."""

    exit_code = 61
    default_code = "scope-not-granted"


class ExchangeRefused(HsmTollError):
    """Customs refused to exchange the token, or its answer cannot be used."""

    exit_code = 70
    default_code = "exchange-refused"


class ApiRefused(HsmTollError):
    """A Customs API refused the call: 401 after one renewal, 403, or another 4xx."""

    exit_code = 71
    default_code = "api-refused"


class SubmissionFailed(HsmTollError):
    """A submission was received, processed, and failed; *errors* has the reasons, by field."""

    exit_code = 72
    default_code = "submission-failed"
    errors: tuple[str, ...] = ()


class OutcomeUnknown(HsmTollError):
    """A submission may have been received. Look it up; never repeat it blindly."""

    exit_code = 73
    default_code = "outcome-unknown"


class TryAgainLater(HsmTollError):
    """Rate limited, or not ready yet. Nothing is wrong with the request."""

    exit_code = 75
    default_code = "try-again-later"


class NetworkError(HsmTollError):
    """No answer, a broken connection, or an answer that was too late or too large."""

    exit_code = 80
    default_code = "network"
    default_scope = "service"


class PolicyDenied(HsmTollError):
    """The signing host's policy refused, or the host is not the expected one."""

    exit_code = 90
    default_code = "policy-denied"


class AuditBroken(HsmTollError):
    """The audit log was changed, or cannot be written."""

    exit_code = 91
    default_code = "audit-broken"
    default_signed = False
    default_scope = "service"


# ---------------------------------------------------------------------- errors as data

_TEXTS: Final = ("hint", "trace_id", "jti", "correlation_id")
_CODE: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
#: Characters. Hints that list what was found are long.
_LONGEST: Final = 8000
_DAY: Final = 86_400.0


def to_data(exc: HsmTollError) -> dict[str, Any]:
    """*exc* as JSON values, without its cause and its traceback."""
    names = (*_TEXTS, "code", "who", "retryable", "retry_after", "signed", "scope")
    members = {name: getattr(exc, name) for name in names}
    return {"class": type(exc).__name__, "message": str(exc), **members}


def from_data(data: object, *, unknown: type[HsmTollError] = HsmTollError) -> HsmTollError:
    """
    The error that `to_data` wrote, for any *data*: of the class *unknown* if the class is not one
    of hsmtoll, with the safe value for members that are missing or of another type.
    """
    members: dict[Any, Any] = data if isinstance(data, dict) else {}
    name = members.get("class")
    kind = next((each for each in _tree() if each.__name__ == name), unknown)
    texts = {each: _text(members.get(each)) for each in _TEXTS}
    code, who, scope = (members.get(each) for each in ("code", "who", "scope"))
    wait: Any = members.get("retry_after")
    known: dict[str, Any] = {
        **texts,
        "code": code if isinstance(code, str) and _CODE.fullmatch(code) else None,
        "who": who if who in get_args(Who) else None,
        "retryable": members.get("retryable") is True,
        "retry_after": wait if type(wait) in (int, float) and 0 <= wait <= _DAY else None,
        "signed": members.get("signed") is not False,
        "scope": scope if scope in get_args(Scope) else None,
    }
    return kind(_text(members.get("message")) or "it gives no reason", **known)


def _tree() -> list[type[HsmTollError]]:
    found = [HsmTollError]
    for each in found:
        found += [kind for kind in each.__subclasses__() if kind.__module__ == __name__]
    return found


def _text(value: object) -> str | None:
    """*value*, safe to show; ``None`` if it is no text."""
    if not isinstance(value, str):
        return None
    return "\n".join(map(_printable, value[:_LONGEST].split("\n")))


def _printable(line: str) -> str:
    return "".join(char if char.isprintable() else _escaped(char) for char in line)


# ---------------------------------------------------------------------- untrusted text

#: Characters. Longer text is cut.
_LONGEST_SHOWN: Final = 300
#: Characters. A part of a secret of this length is removed.
_MIN_LEAK: Final = 12
#: Inside a word ``eyJ`` is a JWT only with a second part: a key's thumbprint may hold the letters.
_JWT = re.compile(
    r"(?<![A-Za-z0-9_\-])eyJ[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]*)*"
    r"|eyJ[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]+)+"
)
_LEFT_OUT: Final = "[left out]"


def import_optional(module: str, missing: HsmTollError) -> Any:
    """The *module*, which needs an extra; raises *missing* if that is not installed."""
    try:
        return import_module(module)
    except ImportError as exc:
        raise missing from exc


def install_extra(name: str) -> str:
    """
    The hint of an error about a missing optional dependency.

    It names no command: hsmtoll is on no package index, and may come from a clone or a wheel.
    """
    return f"install the extra `{name}` the way hsmtoll was installed (see `hsmtoll help install`)"


def sanitized(text: object, *secrets: str) -> str:
    """
    Untrusted text (from a server, a certificate, a label), safe to show.

    One line of at most 300 characters; control characters and terminal escapes are escaped. Every
    run of 12 characters that is part of one of *secrets* is removed, as is a shorter secret, and
    everything that looks like a JWT.
    """
    known = [secret for secret in secrets if secret]
    # Whole JWTs first: without a header that a secret shares, the rest would not look like one.
    words = _JWT.sub(_LEFT_OUT, str(text)[: 100 * _LONGEST_SHOWN])
    for secret in known:
        words = _without(words, secret)
    words = " ".join(words.split())
    words = _printable(words)
    return words if len(words) <= _LONGEST_SHOWN else words[: _LONGEST_SHOWN - 1] + "…"


def _without(words: str, secret: str) -> str:
    if len(secret) <= _MIN_LEAK:
        return words.replace(secret, _LEFT_OUT)
    runs = {secret[at : at + _MIN_LEAK] for at in range(len(secret) - _MIN_LEAK + 1)}
    kept: list[str] = []
    at = 0
    while at < len(words):
        if words[at : at + _MIN_LEAK] not in runs:
            kept.append(words[at])
            at += 1
            continue
        at += _MIN_LEAK
        while at < len(words) and words[at - _MIN_LEAK + 1 : at + 1] in runs:
            at += 1
        kept.append(_LEFT_OUT)
    return "".join(kept)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
