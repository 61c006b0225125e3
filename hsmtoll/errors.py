"""
The exceptions of hsmtoll, and `foreign`, which sanitizes untrusted text. Imports nothing of ours.

    HsmTollError
    ├── UsageError              2  the command line makes no sense
    ├── ConfigurationError     10  a setting is missing, misspelt or contradicts another
    ├── PinIncorrect           20  the device refused the PIN; it was tried once
    ├── PinNotTried            21  locked, final try, or refused before: the device was not asked
    ├── DeviceError            30  module, p11_token, key or signature
    ├── CertificateError       40  leaf or chain
    ├── ClockError             50  this machine's clock and theirs disagree
    ├── GrantRefused           60  Maskinporten said no, or answered nonsense
    │   └── ScopeNotGranted    61  Maskinporten said no to this scope
    ├── ExchangeRefused        70  Customs said no to the exchange, or answered nonsense
    ├── ApiRefused             71  a Customs API said no
    ├── SubmissionFailed       72  a submission was processed and failed
    ├── OutcomeUnknown         73  it may have been received: look it up, do not repeat it
    ├── TryAgainLater          75  throttled, out of budget, or still being processed
    ├── NetworkError           80  nobody answered, or not as agreed
    ├── PolicyDenied           90  the signing host, or a check of it, said no
    └── AuditBroken            91  the audit log was changed, or cannot be written

The number is the exit code of the command line, one class each; the drawing is
compared with the classes by a test.

What the rest of the program decides by are the class and four attributes, which are set where
the error is raised. ``code`` is for people, logs and programs outside; a module compares it only
with codes of its own.

signed      A signature may have been spent: the rate limit counts it. True unless the raising
            code knows better; false for the classes that come before the device signs (usage,
            settings, PIN, certificate, audit).
retryable   A new attempt of the same request, from the grant on, may succeed.
who         Who must act: you, issuer, digdir or customs; None where the message says it.
scope       What the error says something about, and so what may be done instead:

            request      what was asked for; asked again, it fails again (the default)
            caller       who asked; others with the same request are not concerned
            device       the device, its PIN or its key; another device may do
            certificate  the certificate; another one may do
            service      a server, the way to it, or a clock; another server may do
            attempt      this attempt alone; nothing was learned about device, server or request

`to_data` and `from_data` are the one form in which an error crosses to another process or lies in
a store. What comes back from there is checked, and what is missing gets the safe value: signed,
not retryable.
"""

from __future__ import annotations

import re
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
    "foreign",
]

#: Who must act.
Who = Literal["you", "issuer", "digdir", "customs"]
#: What an error says something about; see the top of this module.
Scope = Literal["request", "caller", "device", "certificate", "service", "attempt"]


class HsmTollError(Exception):
    """
    The base of everything this package raises on purpose.

    The message is one line: what was attempted, what happened. It never holds
    a secret. What to do about it is *hint*: one line, or several. Hints are
    notes of the exception as well (PEP 678), so that tracebacks show them.

    *code* is stable and made for machines: ``MP-012`` where Maskinporten gave
    one, otherwise a word of ours such as ``key-missing``; without one, the
    class's own. *retry_after* is in seconds. *signed*, *retryable*, *who* and
    *scope* are described at the top of this module; ``None`` is the class's own.
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
        """What to do, a line each; the last names the ids that a support desk asks for."""
        ids = {"trace id": self.trace_id, "correlation id": self.correlation_id, "jti": self.jti}
        given = ", ".join(f"{name} {value}" for name, value in ids.items() if value)
        return (*(self.hint or "").splitlines(), *((f"for support: {given}",) if given else ()))


class UsageError(HsmTollError):
    """The command line makes no sense."""

    exit_code = 2
    default_code = "usage"
    default_signed = False


class ConfigurationError(HsmTollError):
    """A setting is missing, misspelt, or contradicts another one."""

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
    """The PIN is locked, at its final try, or was refused before: the device was not asked."""

    exit_code = 21
    default_code = "pin-not-tried"
    default_signed = False
    default_scope = "device"


class DeviceError(HsmTollError):
    """The module, the device, the key or a signature it made."""

    exit_code = 30
    default_code = "device-failed"
    default_scope = "device"


class CertificateError(HsmTollError):
    """The leaf, or the chain above it."""

    exit_code = 40
    default_code = "certificate"
    default_signed = False
    default_scope = "certificate"


class ClockError(HsmTollError):
    """This machine's clock and Maskinporten's are further apart than can be corrected."""

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
    """A submission was received, processed, and failed; *errors* says why, field by field."""

    exit_code = 72
    default_code = "submission-failed"
    errors: tuple[str, ...] = ()


class OutcomeUnknown(HsmTollError):
    """A submission may have been received. Look it up; never repeat it blindly."""

    exit_code = 73
    default_code = "outcome-unknown"


class TryAgainLater(HsmTollError):
    """Throttled, out of budget, or not ready yet. Nothing is wrong with the request."""

    exit_code = 75
    default_code = "try-again-later"


class NetworkError(HsmTollError):
    """Nobody answered, the line broke, or the answer came too late or too large."""

    exit_code = 80
    default_code = "network"
    default_scope = "service"


class PolicyDenied(HsmTollError):
    """The signing host refused by its policy, or is not the host it should be."""

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
#: Characters. A hint that lists what was found is long; more is no hint.
_LONGEST: Final = 8000
_DAY: Final = 86_400.0


def to_data(exc: HsmTollError) -> dict[str, Any]:
    """*exc* as values of JSON; its cause and its traceback stay behind."""
    names = (*_TEXTS, "code", "who", "retryable", "retry_after", "signed", "scope")
    said = {name: getattr(exc, name) for name in names}
    return {"class": type(exc).__name__, "message": str(exc), **said}


def from_data(data: object, *, unknown: type[HsmTollError] = HsmTollError) -> HsmTollError:
    """
    The error that `to_data` wrote, whatever *data* is: *unknown* for a class that is none of
    ours, the safe value for what is missing or of another type.
    """
    said: dict[Any, Any] = data if isinstance(data, dict) else {}
    name = said.get("class")
    kind = next((each for each in _tree() if each.__name__ == name), unknown)
    texts = {each: _text(said.get(each)) for each in _TEXTS}
    code, who, scope = (said.get(each) for each in ("code", "who", "scope"))
    wait: Any = said.get("retry_after")
    known: dict[str, Any] = {
        **texts,
        "code": code if isinstance(code, str) and _CODE.fullmatch(code) else None,
        "who": who if who in get_args(Who) else None,
        "retryable": said.get("retryable") is True,
        "retry_after": wait if type(wait) in (int, float) and 0 <= wait <= _DAY else None,
        "signed": said.get("signed") is not False,
        "scope": scope if scope in get_args(Scope) else None,
    }
    return kind(_text(said.get("message")) or "it gives no reason", **known)


def _tree() -> list[type[HsmTollError]]:
    found = [HsmTollError]
    for each in found:
        found += [kind for kind in each.__subclasses__() if kind.__module__ == __name__]
    return found


def _text(value: object) -> str | None:
    """Lines that are safe to show; ``None`` for what is no text."""
    if not isinstance(value, str):
        return None
    return "\n".join(map(_printable, value[:_LONGEST].split("\n")))


def _printable(line: str) -> str:
    return "".join(char if char.isprintable() else _escaped(char) for char in line)


# ---------------------------------------------------------------------- foreign words

_CUT: Final = 300
_RUN: Final = 12
#: Inside a word ``eyJ`` is a JWT only with a second part: a key's thumbprint may hold the letters.
_JWT = re.compile(
    r"(?<![A-Za-z0-9_\-])eyJ[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]*)*"
    r"|eyJ[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]+)+"
)
_LEFT_OUT: Final = "[left out]"


def install_extra(name: str) -> str:
    """
    The hint of an error about a missing optional dependency.

    It names no command: hsmtoll is on no package index, and only the reader knows whether the copy
    at hand came from a clone or from a wheel.
    """
    return f"install the extra `{name}` the way hsmtoll was installed (see `hsmtoll help install`)"


def foreign(text: object, *secrets: str) -> str:
    """
    Words that came from outside (a server, a certificate, a label), safe to show.

    One line: control characters and terminal escapes are escaped; at most 300
    characters; every run of 12 characters that also stands in one of *secrets*
    is left out, as is a shorter secret, and whatever looks like a JWT.
    """
    known = [secret for secret in secrets if secret]
    # Whole JWTs first: one that shares a header with a secret would not be known by its rest.
    words = _JWT.sub(_LEFT_OUT, str(text)[: 100 * _CUT])
    for secret in known:
        words = _without(words, secret)
    words = " ".join(words.split())
    words = _printable(words)
    return words if len(words) <= _CUT else words[: _CUT - 1] + "…"


def _without(words: str, secret: str) -> str:
    if len(secret) <= _RUN:
        return words.replace(secret, _LEFT_OUT)
    runs = {secret[at : at + _RUN] for at in range(len(secret) - _RUN + 1)}
    kept: list[str] = []
    at = 0
    while at < len(words):
        if words[at : at + _RUN] not in runs:
            kept.append(words[at])
            at += 1
            continue
        at += _RUN
        while at < len(words) and words[at - _RUN + 1 : at + 1] in runs:
            at += 1
        kept.append(_LEFT_OUT)
    return "".join(kept)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
