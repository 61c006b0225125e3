"""
Checks of what was set: whether the settings fit each other, the key and the services.
"""

from __future__ import annotations

from hsmtoll.doctor.facts import scopes_asked
from hsmtoll.doctor.findings import Check, Way, failed, ok, skip, warn
from hsmtoll.errors import ConfigurationError, HsmTollError, PolicyDenied, foreign
from hsmtoll.required import missing
from hsmtoll.signing.grant import Grant
from hsmtoll.signing.verification import MAX_CLOCK_DIFFERENCE, wrong_clock
from hsmtoll.token import TokenRequest

__all__ = ["check_grant", "check_host", "check_kid", "check_scopes", "check_settings"]


def check_settings(way: Way) -> Check:
    """Environment, identity and the options belong together (C17)."""
    settings = way.settings
    wrong = way.facts.error
    if wrong is None or wrong.code == "setting-missing":
        # All of them, and not only the one that was met first.
        wrong = missing(settings, device=not way.facts.seen) or wrong
    if wrong is None and settings.identity == "eseal" and settings.kid is not None:
        wrong = ConfigurationError(
            "HSMTOLL_KID: an eSeal has no client that keys could be registered on",
            hint="unset HSMTOLL_KID, or set HSMTOLL_IDENTITY=norwegian",
            code="kid-eseal",
        )
    if wrong is not None:
        return failed("settings", wrong)
    how = "a registered key (kid)" if way.kid else "certificates (x5c)"
    if settings.signer.url:
        how = f"what a signing host has, asked for a {settings.signer.mode}"
    return ok("settings", f"{settings.identity} in {settings.environment}, known by {how}")


def check_host(way: Way) -> Check:
    """
    Each signing host is there, is the one it should be, and its clock is right. Nothing is asked
    to be signed; that it may be is for its policy to say, with --online.
    """
    hosts = way.facts.hosts
    if not hosts:
        return skip("signing-host", "a device of this machine signs, no signing host")
    told, troubles = [], []
    for probe in hosts:
        ahead = (probe.ahead or 0.0) - way.facts.skew
        if probe.error is not None:
            troubles.append(probe.error)
        elif abs(ahead) > MAX_CLOCK_DIFFERENCE:
            troubles.append(wrong_clock(probe.name, ahead))
        else:
            told.append(probe.name)
    # A host that is not the one it should be is an alarm, however many others there are.
    alarms = [each for each in troubles if isinstance(each, PolicyDenied | ConfigurationError)]
    if alarms or not told:
        return failed("signing-host", (alarms or troubles)[0])
    answers = f"{', '.join(told)} answer{'s' if len(told) == 1 else ''}, who and when as expected"
    if troubles:
        hint = troubles[0].hint or ""
        return warn("signing-host", "signing-host-down", f"{troubles[0]}; {answers}", hint)
    return ok("signing-host", answers)


def check_kid(way: Way) -> Check:
    """What is known of a registered key: not its age (M39)."""
    if not way.kid:
        return skip("kid", "certificates name the key")
    kid = way.settings.kid
    public = way.key.public if way.key else None
    if kid == "thumbprint" and public is not None:
        kid = public.thumbprint()
    return ok(
        "kid",
        f"{foreign(kid)}; registered keys live one year from posting, and when it was posted "
        "does not show here",
    )


def check_scopes(way: Way) -> Check:
    """Scopes belong to the family of the identity (C18, M66, M67)."""
    try:
        named = scopes_asked(way.facts)
    except HsmTollError as exc:
        return failed("scope", exc)
    if not named:
        return ok("scope", "none is set; each command names its own")
    return ok("scope", f"{', '.join(named)}, of the family of {way.identity}")


def check_grant(way: Way) -> Check:
    """The claims that the settings make are ones that Maskinporten takes (M50 to M72)."""
    settings = way.settings
    request = TokenRequest("toll:any", settings.resource, settings.consumer_org)
    x5c = way.chain.x5c(settings.x5c_mode) if way.chain else ("",)
    try:
        Grant(
            settings.alg,
            settings.iss or "by the certificate",
            "audience",
            request,
            kid=settings.kid,
            x5c=() if way.kid else x5c,
        )
        own = way.chain.leaf.orgno() if way.chain else None
        if settings.consumer_org is not None and settings.consumer_org == own:
            raise ConfigurationError(
                "HSMTOLL_CONSUMER_ORG is the certificate's own organisation",
                hint="unset it: it names another organisation that is acted for",
                code="consumer-org-own",
            )
    except HsmTollError as exc:
        return failed("grant", exc)
    return ok("grant", f"{settings.alg}, the documented claims and no others")
