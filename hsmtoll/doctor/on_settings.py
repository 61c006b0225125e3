"""
Checks of what was set: whether the settings fit each other, the key and the services.
"""

from __future__ import annotations

from hsmtoll.doctor.facts import scopes_asked
from hsmtoll.doctor.findings import Check, Way, failed, ok, skip
from hsmtoll.errors import ConfigurationError, HsmTollError, foreign
from hsmtoll.grant import Grant
from hsmtoll.tokens import TokenRequest

__all__ = ["check_grant", "check_kid", "check_scopes", "check_settings"]


def check_settings(way: Way) -> Check:
    """Environment, identity and the options belong together (PROTOCOL A.4, A.5, C17)."""
    settings = way.settings
    problem: ConfigurationError | None = None
    if way.facts.error is not None:
        return failed("settings", way.facts.error)
    if settings.environment is None or settings.identity is None:
        name = "HSMTOLL_ENVIRONMENT" if settings.environment is None else "HSMTOLL_IDENTITY"
        problem = ConfigurationError(
            f"{name}: required, and not set",
            hint="test, prod or sandbox" if "ENV" in name else "eseal or norwegian",
            code="setting-missing",
        )
    elif settings.identity == "eseal" and settings.kid is not None:
        problem = ConfigurationError(
            "HSMTOLL_KID: an eSeal has no client that keys could be registered on",
            hint="unset HSMTOLL_KID, or set HSMTOLL_IDENTITY=norwegian",
            code="kid-eseal",
        )
    elif settings.identity == "norwegian" and settings.iss is None:
        problem = ConfigurationError(
            "HSMTOLL_ISS: required with HSMTOLL_IDENTITY=norwegian",
            hint="set it to the client id from Samarbeidsportalen",
            code="setting-missing",
        )
    elif settings.environment == "sandbox" and not all(settings.endpoints.model_dump().values()):
        problem = ConfigurationError(
            "HSMTOLL_ENDPOINTS__ISSUER, __TOKEN and __CUSTOMS: required with the sandbox",
            hint="`hsmtoll sandbox` prints the values to export",
            code="setting-missing",
        )
    if problem is not None:
        return failed("settings", problem)
    how = "a registered key (kid)" if way.kid else "certificates (x5c)"
    return ok("settings", f"{settings.identity} in {settings.environment}, known by {how}")


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
    x5c = way.chain.x5c(settings.x5c) if way.chain else ("",)
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
