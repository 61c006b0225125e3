"""
Checks of a signing host's own files, which do not depend on each other. Nothing is written, and a
host that runs is not disturbed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hsmtoll import directories, files
from hsmtoll.doctor.findings import Check, failed, ok, skip, warn
from hsmtoll.errors import (
    AuditBroken,
    CertificateError,
    ClockError,
    ConfigurationError,
    HsmTollError,
    sanitized,
)
from hsmtoll.expiry import NOTICE_DAYS
from hsmtoll.host.audit import noted_checkpoint, private_key, verify_recent
from hsmtoll.host.audit_log import segments_of
from hsmtoll.host.emergency_stop import check_stop_directory, stop_file, stopped_by
from hsmtoll.host.expiry_log import first_to_end
from hsmtoll.host.policy import Policy
from hsmtoll.host.quota import DAY
from hsmtoll.host.required import check_complete, needed
from hsmtoll.host.sockets import server_context
from hsmtoll.x509.revocation import next_updates

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from hsmtoll.settings import Settings

__all__ = ["HostSetup", "examine_host"]

_NO_TLS: Final = "HSMTOLL_HOST__LISTEN is not set: callers come over a Unix socket"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSetup:
    """
    What the checks are about: the host's *settings*, the time, whether the clock is *synchronised*,
    and whether it *needs_clock*: a profile of test or prod signs by it.
    """

    settings: Settings
    now: datetime
    synchronised: Callable[[], bool]
    needs_clock: bool = True

    @property
    def has_tls(self) -> bool:
        host = self.settings.host
        # With socket activation the address is the service manager's.
        return host.listen is not None or host.cert is not None


def examine_host(setup: HostSetup) -> tuple[Check, ...]:
    """Run every check of the host's own files."""
    return tuple(_run(name, check, setup) for name, check in _CHECKS)


def _run(name: str, check: Callable[[HostSetup], Check], setup: HostSetup) -> Check:
    try:
        return check(setup)
    except HsmTollError as exc:
        return failed(name, exc)
    except OSError as exc:
        return failed(name, ConfigurationError(f"{name}: cannot be read ({exc.strerror})"))


def _check_settings(setup: HostSetup) -> Check:
    """Every setting that the host requires is set."""
    host = setup.settings.host
    sockets = not (host.socket or host.listen)
    check_complete(host, sockets=sockets)
    places = [sanitized(each) for each in (host.socket, host.listen) if each is not None]
    where = " and ".join(places) or "the sockets of the service manager"
    return ok("host-settings", f"complete; callers come to {where}")


def _check_policy(setup: HostSetup) -> Check:
    """The policy is valid, and the host's account cannot change it."""
    path = needed(setup.settings.host.policy, "policy")
    policy = Policy.load(path)
    line = (
        f"{sanitized(path)}: {len(policy.profiles)} profiles, {len(policy.callers)} callers, "
        f"sha256 {policy.sha256[:16]}"
    )
    if os.geteuid() != 0 and os.access(path, os.W_OK):
        hint = "another account should own it, so that the host cannot allow itself more"
        return warn("policy", "policy-writable", f"{line}; this account can change it", hint)
    return ok("policy", line)


def _check_audit_key(setup: HostSetup) -> Check:
    """The key of the checkpoints is an Ed25519 key, and nobody else can read it."""
    path = needed(setup.settings.host.audit_key, "audit_key")
    private_key(path)
    return ok("audit-key", f"{sanitized(path)}: Ed25519")


def _check_audit(setup: HostSetup) -> Check:
    """The audit log can be continued: the records of the last day verify."""
    directory = needed(setup.settings.host.audit_dir, "audit_dir")
    files.check_own(directory, "HSMTOLL_HOST__AUDIT_DIR")
    if not directory.exists():
        return ok("audit", f"{sanitized(directory)}: does not exist yet; the host makes it")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise AuditBroken(
            f"audit {sanitized(directory)}: this account cannot write it",
            hint="run doctor as the host's account, which must own the directory",
            code="audit-unwritable",
        )
    key = private_key(needed(setup.settings.host.audit_key, "audit_key"))
    noted = noted_checkpoint(setup.settings)
    if not segments_of(directory) and not noted.exists():
        return ok("audit", f"{sanitized(directory)}: no records yet")
    report = verify_recent(directory, key, noted, since=setup.now.timestamp() - DAY)
    line = f"{sanitized(directory)}: records {report.after + 1} to {report.seq} verify"
    if not noted.exists():
        return warn(
            "audit",
            "audit-not-noted",
            f"{line}; no note of the last checkpoint is at {sanitized(noted)}: records may have "
            "been cut off",
            "compare it with an audit head in the system log: `hsmtoll audit verify --head`",
        )
    return ok("audit", line)


def _check_tls(setup: HostSetup) -> Check:
    """Certificate, key, callers' CA and revocation list can be used together."""
    if not setup.has_tls:
        return skip("tls", _NO_TLS)
    host = setup.settings.host
    cert, key, ca = (
        needed(host.cert, "cert"), needed(host.key, "key"), needed(host.client_ca, "client_ca"),
    )  # fmt: skip
    server_context(cert, key, ca, host.client_crl)
    return ok(
        "tls", "the certificate fits its key; callers show certificates of HSMTOLL_HOST__CLIENT_CA"
    )


def _check_certificate(setup: HostSetup) -> Check:
    """The host's own certificate, and those sent with it, are valid for a while."""
    return _until(
        setup, "tls-certificate", setup.settings.host.cert, "cert",
        "order the next one, put it in place and reload: `hsmtoll help operations`",
    )  # fmt: skip


def _check_client_ca(setup: HostSetup) -> Check:
    """The CA certificates of the callers are valid for a while."""
    return _until(
        setup, "tls-client-ca", setup.settings.host.client_ca, "client_ca",
        "add the CA's next certificate, issue the callers' from it, then remove this one",
    )  # fmt: skip


def _until(setup: HostSetup, check: str, path: Path | None, setting: str, hint: str) -> Check:
    """When the first of the certificates in *path*, the host's *setting*, expires."""
    if not setup.has_tls:
        return skip(check, _NO_TLS)
    name = f"HSMTOLL_HOST__{setting.upper()}"
    first = first_to_end(needed(path, setting), name)
    days = first.days_left(setup.now)
    line = f"'{first.subject}' is valid until {first.not_after:%Y-%m-%d}, {days} days left"
    if first.not_after < setup.now:
        line = f"{name}: '{first.subject}' expired on {first.not_after:%Y-%m-%d}"
        return failed(check, CertificateError(line, hint=hint, code=f"{check}-expired"), days=days)
    if days < NOTICE_DAYS:
        return warn(check, f"{check}-ends-soon", line, hint, days=days)
    return ok(check, line, days=days)


def _check_crl(setup: HostSetup) -> Check:
    """No revocation list has expired: with an old one, every caller is refused."""
    host = setup.settings.host
    if not setup.has_tls:
        return skip("tls-crl", _NO_TLS)
    sources = [
        (path, name)
        for path, name in (
            (host.client_crl, "HSMTOLL_HOST__CLIENT_CRL"),
            (host.client_ca, "HSMTOLL_HOST__CLIENT_CA"),
        )
        if path is not None
    ]
    ends = [
        (end, name) for path, name in sources for end in _next_updates(files.read(path, name), name)
    ]
    if not ends:
        return skip("tls-crl", "there is no revocation list")
    end, name = min(ends)
    days = (end - setup.now).days
    if end < setup.now:
        exc = CertificateError(
            f"{name}: the revocation list expired at {end:%Y-%m-%d %H:%M} UTC: every caller over "
            "TLS is refused",
            hint="fetch the CA's newest list, put it in place and reload",
            code="tls-crl-expired",
        )
        return failed("tls-crl", exc, days=days)
    return ok("tls-crl", f"the next list is due by {end:%Y-%m-%d %H:%M} UTC", days=days)


def _next_updates(data: bytes, name: str) -> list[datetime]:
    try:
        return next_updates(data)
    except ValueError:
        raise ConfigurationError(f"{name}: a revocation list cannot be read") from None


def _check_clock(setup: HostSetup) -> Check:
    """The clock is synchronised, or the settings say that something else keeps it."""
    if setup.settings.host.clock != "synchronised":
        return ok("host-clock", "not checked, as HSMTOLL_HOST__CLOCK says")
    if setup.synchronised():
        return ok("host-clock", "synchronised, according to the kernel")
    if not setup.needs_clock:
        return skip("host-clock", "not synchronised; no profile is for test or prod")
    exc = ClockError(
        "the clock is not synchronised: nothing is signed",
        hint="run NTP, or set HSMTOLL_HOST__CLOCK=unchecked if it is kept by something that the "
        "kernel does not know of",
        code="clock-unsynchronised",
    )
    return failed("host-clock", exc)


def _check_stop(setup: HostSetup) -> Check:
    """The stop directory is the custodian's, and nothing is stopped."""
    path = stop_file(setup.settings)
    check_stop_directory(path)
    why = stopped_by(path)
    if why is not None:
        line = f"signing is stopped: {why} ({sanitized(path)})"
        return warn("stop", "stopped", line, "`hsmtoll resume` ends a stop")
    return ok("stop", f"not stopped; {sanitized(path)} would stop it")


def _check_state(setup: HostSetup) -> Check:
    """Refused PINs and the last checkpoint can be remembered."""
    path = setup.settings.state or directories.state_directory()
    files.check_own(path, "HSMTOLL_STATE")
    if not (path.is_dir() and os.access(path, os.R_OK | os.W_OK | os.X_OK)):
        raise ConfigurationError(
            f"HSMTOLL_STATE {sanitized(path)}: not a directory that this account can write",
            hint="an existing directory of the host's account, 0700, outside of the audit's",
            code="state-unwritable",
        )
    return ok("state", sanitized(path))


_CHECKS: Final = (
    ("host-settings", _check_settings),
    ("policy", _check_policy),
    ("audit-key", _check_audit_key),
    ("audit", _check_audit),
    ("tls", _check_tls),
    ("tls-certificate", _check_certificate),
    ("tls-client-ca", _check_client_ca),
    ("tls-crl", _check_crl),
    ("host-clock", _check_clock),
    ("stop", _check_stop),
    ("state", _check_state),
)
