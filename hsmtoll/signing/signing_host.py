"""
The connection to one signing host: authentication, request, response or error.

    peer credentials (Unix socket) or TLS ──► one request ──► response, NetworkError, PolicyDenied

The host is authenticated before anything is sent. All text in its responses is untrusted.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from hsmtoll import tls
from hsmtoll.clock import offset_of, retry_after
from hsmtoll.errors import ConfigurationError, HsmTollError, NetworkError, PolicyDenied, sanitized
from hsmtoll.jsonio import read_lenient
from hsmtoll.signing import replies
from hsmtoll.signing.host_trust import no_access, trusted_at, verify_peer
from hsmtoll.transport import ConnectionOptions, HttpClient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hsmtoll.clock import Clock
    from hsmtoll.http_messages import HttpResponse
    from hsmtoll.settings import SignerHost
    from hsmtoll.token import TokenRequest

__all__ = ["HostProbe", "SigningHost", "audit_place", "object_in", "request_body"]

#: Protocol version of this client; a host's may be one older or one newer.
VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProbe:
    """Result of a probe without signing: protocol *version*; seconds its clock is *ahead*."""

    name: str
    version: int | None = None
    ahead: float | None = None
    error: HsmTollError | None = None


class SigningHost:
    """
    One address of a signing host: connects, and authenticates the host.

    *timeout* limits each wait, *deadline* a whole request, in seconds. No proxy is used, and
    redirects are not followed.
    """

    def __init__(
        self,
        url: str,
        settings: SignerHost,
        *,
        clock: Clock,
        ca_file: Path | None = None,
        timeout: float = 10.0,
        deadline: float = 60.0,
    ) -> None:
        parts = urlsplit(url)
        self.name = f"signing host {sanitized(url)}"
        self.place = Path(unquote(parts.path)) if parts.scheme == "unix" else None
        self._base = "http://localhost" if self.place else f"https://{parts.netloc}"
        self._settings = settings
        self._clock = clock
        self._ca_file = ca_file
        self._timeout = timeout
        self._deadline = deadline

    def ask(self, what: str, body: Mapping[str, Any]) -> HttpResponse:
        """
        Request a ``grant`` or a ``token``; returns the response with status 200.

        Raises PolicyDenied if the host cannot be authenticated or its policy refuses, NetworkError
        if no host responds, and the errors that the host reports: of its device (30), clock (50),
        the token requests (60, 70), rate limits (75) and audit (91).
        """
        url, headers = f"{self._base}/v1/{what}", {"hsmtoll-version": str(VERSION)}
        answer = self._send(
            lambda http_client: http_client.post_json(url, body, server=_SERVER, headers=headers)
        )
        self._check_version(answer, what)
        if answer.status != 200:
            raise self._refused(answer)
        return answer

    def probe(self) -> HostProbe:
        """Check version, authentication and clock of the host; nothing is signed."""
        sent = self._clock.now()
        try:
            answer = self._send(
                lambda http_client: http_client.get(f"{self._base}/v1", server=_SERVER)
            )
            version = self._check_version(answer)
        except HsmTollError as exc:
            return HostProbe(name=self.name, error=exc)
        ahead = offset_of(answer.headers, sent=sent, received=self._clock.now())
        return HostProbe(name=self.name, version=version, ahead=ahead)

    def _send(self, send: Callable[[HttpClient], HttpResponse]) -> HttpResponse:
        # New connection options for each request: a renewed client certificate is read again.
        try:
            http_client = HttpClient(
                connection_options=self._connection_options(),
                timeout=self._timeout,
                deadline=self._deadline,
            )
            return send(http_client)
        except NetworkError as exc:
            raise self._unreached(exc) from exc

    def _connection_options(self) -> ConnectionOptions:
        if self.place is None:
            return ConnectionOptions(context=self._context)
        trusted = trusted_at(self.place, self._settings.uid, self.name)
        return ConnectionOptions(
            uds=self.place, check_connection=partial(verify_peer, trusted=trusted, name=self.name)
        )

    def _context(self) -> ssl.SSLContext:
        settings = self._settings
        if settings.client_cert is None:
            # Settings refuse this; only other users of this class can get here.
            raise ConfigurationError("HSMTOLL_SIGNER__CLIENT_CERT: required with https")
        return tls.host_context(
            ca_file=settings.ca_file,
            more=self._ca_file,
            certificate=settings.client_cert,
            key=settings.client_key,
        )

    def _check_version(self, answer: HttpResponse, what: str | None = None) -> int | None:
        """The host's protocol version; NetworkError (``host-version``) if not compatible."""
        header = answer.headers.get("hsmtoll-version", "")
        version = int(header) if re.fullmatch(r"[0-9]{1,4}", header) else None
        apart = version is not None and abs(version - VERSION) > 1
        unknown = what is not None and answer.status == 404
        if answer.status == 426 or apart or unknown:
            which = f"version {version}" if version is not None else "no version that is known here"
            why = f"it does not know /v1/{what}" if unknown and not apart else f"it speaks {which}"
            raise NetworkError(
                f"{self.name}: {why}, this client speaks version {VERSION}",
                hint="one version older or newer is understood: update hsmtoll on the older side; "
                "or this is no signing host",
                code="host-version",
                signed=answer.status == 200,
            )
        return version

    def _refused(self, answer: HttpResponse) -> HsmTollError:
        """The host's error response as an error of this package."""
        body = object_in(answer)
        reply = replies.read(answer.status, body.get("error"))
        what = sanitized(body.get("error_description") or "it gives no reason")
        hint = body.get("hint")
        wait = retry_after(answer.headers, now=self._clock.now().wall)
        return reply.error(
            f"{self.name}: {answer.status}, {what}",
            hint=f"it says: {sanitized(hint)}" if isinstance(hint, str) and hint else None,
            code=reply.code,
            retryable=reply.retryable,
            retry_after=wait if reply.waits else None,
            signed=reply.signed,
            scope=reply.scope,
        )

    def _unreached(self, exc: NetworkError) -> HsmTollError:
        """Name the host in a network error; PolicyDenied if its TLS certificate is not trusted."""
        cause = _tls_reason(exc)
        if exc.code == "tls-untrusted" and _is_other_name(exc):
            return PolicyDenied(
                f"{self.name}: its TLS certificate is for another name",
                hint="HSMTOLL_SIGNER__URL has the name that stands in the host's certificate "
                "(subjectAltName)",
                code="host-untrusted",
                signed=False,
            )
        if exc.code == "tls-untrusted":
            why = _verify_message(exc)
            return PolicyDenied(
                f"{self.name}: its TLS certificate is not trusted{f' ({why})' if why else ''}",
                hint="HSMTOLL_SIGNER__CA_FILE names the CA that the host's certificate is from",
                code="host-untrusted",
                signed=False,
            )
        if cause in ("TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL"):
            return PolicyDenied(
                f"{self.name}: it does not speak TLS 1.3",
                hint="older versions are not used with a signing host",
                code="host-untrusted",
                signed=False,
            )
        if "ALERT" in cause:
            return PolicyDenied(
                f"{self.name}: it does not take the certificate shown ({sanitized(cause)})",
                hint="its custodian knows which CA it takes callers from: see "
                "HSMTOLL_SIGNER__CLIENT_CERT, and whether that is valid and not revoked",
                code="caller-untrusted",
                signed=False,
            )
        if _is_denied(exc):
            return no_access(self.name)
        reason = str(exc).partition(": ")[2] or str(exc)
        return NetworkError(
            f"{self.name}: {reason}",
            hint=_HINTS.get(exc.code, "see that the host runs, and that this is its address"),
            code=exc.code,
            retryable=exc.retryable,
            signed=exc.signed,
        )


_SERVER: Final = "signing host"

_HINTS: Final = {
    "timeout": "HSMTOLL_TIMEOUT sets how long to wait",
    "deadline": "HSMTOLL_DEADLINE sets how long to wait",
    "answer-too-large": "this is no signing host",
    "answer-compressed": "something in between answered: connect to the signing host directly",
}


def request_body(profile: str, request: TokenRequest) -> dict[str, Any]:
    """The JSON body of a request to a signing host."""
    body: dict[str, Any] = {
        "profile": profile,
        "scope": request.scope,
        "consumer_org": request.consumer_org,
        "resource": list(request.resource) or None,
    }
    if request.authorization_details:
        # A host that is one version older refuses members that it does not know.
        body["authorization_details"] = request.details
    return body


def object_in(answer: HttpResponse) -> dict[str, Any]:
    """The JSON object in *answer*; empty if there is none."""
    value = read_lenient(answer.body)
    return value if isinstance(value, dict) else {}


def audit_place(body: Mapping[str, Any]) -> str:
    """The position in the host's audit log, ``seq:head``, for later comparison; ``-`` if none."""
    audit = body.get("audit")
    if not isinstance(audit, dict):
        return "-"
    return sanitized(f"{audit.get('seq')}:{audit.get('head')}")


def _tls_reason(exc: BaseException) -> str:
    """OpenSSL's reason for a TLS error, or ``""``."""
    found: BaseException | None = exc
    while found is not None:
        if isinstance(found, ssl.SSLError):
            return str(found.reason or "")
        found = found.__cause__ or found.__context__
    return ""


#: OpenSSL's verify codes for a certificate of another host name or address
#: (X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH).
_OTHER_NAME: Final = (62, 64)


def _unverified(exc: BaseException) -> ssl.SSLCertVerificationError | None:
    found: BaseException | None = exc
    while found is not None:
        if isinstance(found, ssl.SSLCertVerificationError):
            return found
        found = found.__cause__ or found.__context__
    return None


def _is_other_name(exc: BaseException) -> bool:
    found = _unverified(exc)
    return found is not None and found.verify_code in _OTHER_NAME


def _verify_message(exc: BaseException) -> str:
    found = _unverified(exc)
    return sanitized(found.verify_message) if found is not None else ""


def _is_denied(exc: BaseException) -> bool:
    found: BaseException | None = exc
    while found is not None:
        if isinstance(found, PermissionError):
            return True
        found = found.__cause__ or found.__context__
    return False
