"""
Checks of the settings: whether they fit each other, the key and the services.
"""

from __future__ import annotations

from dataclasses import replace

from hsmtoll.doctor.facts import scopes_asked
from hsmtoll.doctor.findings import Check, KeyDiagnosis, failed, ok, skip, warn
from hsmtoll.errors import ConfigurationError, HsmTollError, PolicyDenied, sanitized
from hsmtoll.expiry import KEY_LIFETIME, KEY_NOTICE, days_left
from hsmtoll.required import missing
from hsmtoll.signing.grant import Grant
from hsmtoll.signing.verification import MAX_CLOCK_DIFFERENCE, wrong_clock
from hsmtoll.token import TokenRequest

__all__ = ["check_grant", "check_host", "check_kid", "check_scopes", "check_settings"]


def check_settings(diagnosis: KeyDiagnosis) -> Check:
    """Environment, identity and options are consistent (C17)."""
    settings = diagnosis.settings
    wrong = diagnosis.facts.error
    if wrong is None or wrong.code == "setting-missing":
        # Report all missing settings, not only the first.
        wrong = missing(settings, device=not diagnosis.facts.seen) or wrong
    if wrong is None and settings.identity == "eseal" and settings.kid is not None:
        wrong = ConfigurationError(
            "HSMTOLL_KID: an eSeal has no client that keys could be registered on",
            hint="unset HSMTOLL_KID, or set HSMTOLL_IDENTITY=norwegian",
            code="kid-eseal",
        )
    if wrong is not None:
        check = failed("settings", wrong)
        if wrong.code == "setting-missing" and settings.host.policy is not None:
            host = "on a signing host, `doctor --all-profiles` checks the policy's profiles"
            check = replace(check, hint="\n".join(filter(None, (host, check.hint))))
        return check
    how = "known by a registered key (kid)" if diagnosis.kid else "known by certificates (x5c)"
    if settings.signer.url:
        how = f"by a signing host that returns a {settings.signer.mode}"
    return ok("settings", f"{settings.identity} in {settings.environment}, {how}")


def check_host(diagnosis: KeyDiagnosis) -> Check:
    """
    Each signing host is reachable and authenticated, and its clock is right. No signature is
    requested; whether the policy permits one shows with --online.
    """
    hosts = diagnosis.facts.hosts
    if not hosts:
        return skip("signing-host", "a device of this machine signs, no signing host")
    right, failures = [], []
    for probe in hosts:
        ahead = (probe.ahead or 0.0) - diagnosis.facts.skew
        if probe.error is not None:
            failures.append(probe.error)
        elif abs(ahead) > MAX_CLOCK_DIFFERENCE:
            failures.append(wrong_clock(probe.name, ahead))
        else:
            right.append(probe.name)
    # Another identity than expected is an alarm, even if other hosts are as expected.
    alarms = [each for each in failures if isinstance(each, PolicyDenied | ConfigurationError)]
    if alarms or not right:
        return failed("signing-host", (alarms or failures)[0])
    line = f"{', '.join(right)}: reachable, with the expected identity and clock"
    if failures:
        hint = failures[0].hint or ""
        return warn("signing-host", "signing-host-down", f"{failures[0]}; {line}", hint)
    return ok("signing-host", line)


def check_kid(diagnosis: KeyDiagnosis) -> Check:
    """The kid of a registered key, and whether it may end soon (M39)."""
    if not diagnosis.kid:
        return skip("kid", "certificates identify the key")
    kid = diagnosis.settings.kid
    public = diagnosis.key.public if diagnosis.key else None
    if kid == "thumbprint" and public is not None:
        kid = public.thumbprint()
    rule = "a registered key expires one year after it was posted, which only Maskinporten knows"
    use = diagnosis.seen.key_use if diagnosis.seen else None
    if use is None or use.first is None:
        return ok("kid", f"{sanitized(kid)}; {rule}")
    days = days_left(use.first + KEY_LIFETIME, diagnosis.facts.now)
    line = f"{sanitized(kid)}, first used here on {use.first:%Y-%m-%d}; {rule}"
    if diagnosis.facts.now < use.first + KEY_NOTICE:
        return ok("kid", line, days=days)
    hint = (
        "post a new key, or this one again, at Samarbeidsportalen (`hsmtoll key jwk` prints it); "
        f"after this one was posted again, remove {sanitized(use.file)}"
    )
    return warn("kid", "key-ends-soon", line, hint, days=days)


def check_scopes(diagnosis: KeyDiagnosis) -> Check:
    """The scopes belong to the family of the identity (C18, M66, M67)."""
    try:
        named = scopes_asked(diagnosis.facts)
    except HsmTollError as exc:
        return failed("scope", exc)
    if not named:
        return ok("scope", "none is set; each command names its own")
    return ok("scope", f"{', '.join(named)}, for {diagnosis.identity} clients")


def check_grant(diagnosis: KeyDiagnosis) -> Check:
    """Maskinporten accepts the claims that follow from the settings (M50 to M72)."""
    settings = diagnosis.settings
    request = TokenRequest("toll:any", settings.resource, settings.consumer_org)
    x5c = diagnosis.chain.x5c(settings.x5c_mode) if diagnosis.chain else ("",)
    try:
        Grant(
            settings.alg,
            settings.iss or "by the certificate",
            "audience",
            request,
            kid=settings.kid,
            x5c=() if diagnosis.kid else x5c,
        )
        own = diagnosis.chain.leaf.orgno() if diagnosis.chain else None
        if settings.consumer_org is not None and settings.consumer_org == own:
            raise ConfigurationError(
                "HSMTOLL_CONSUMER_ORG is the certificate's own organisation",
                hint="unset it: it is for a token on behalf of another organisation",
                code="consumer-org-own",
            )
    except HsmTollError as exc:
        return failed("grant", exc)
    return ok("grant", f"{settings.alg}, the documented claims and no others")
