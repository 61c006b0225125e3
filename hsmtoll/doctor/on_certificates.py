"""
Checks of the leaf and its chain, with the functions that the signer itself uses.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from hsmtoll.doctor.facts import candidates_of, pool_of
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
from hsmtoll.errors import CertificateError, sanitized
from hsmtoll.expiry import NOTICE_DAYS, days_left
from hsmtoll.x509 import leaf_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hsmtoll.x509.certificate import Certificate

__all__ = ["CHECKS"]

_NO_CERTIFICATE: Final = "a key registered with a kid needs no certificate"


def leaf_check(
    check: str,
) -> Callable[[Callable[[KeyDiagnosis, Certificate], Check]], Callable[[KeyDiagnosis], Check]]:
    """Decorate a check of the leaf: skip it with a kid, fail it with the chain's error."""

    def decorated(
        judge: Callable[[KeyDiagnosis, Certificate], Check],
    ) -> Callable[[KeyDiagnosis], Check]:
        def asked(diagnosis: KeyDiagnosis) -> Check:
            if diagnosis.kid:
                return skip(check, _NO_CERTIFICATE)
            if diagnosis.seen is None:
                return skip(check, NO_DEVICE)
            if broken := failure_of(diagnosis, check, "chain"):
                return broken
            leaf = diagnosis.chain.leaf if diagnosis.chain else _intended_leaf(diagnosis)
            return judge(diagnosis, leaf) if leaf else skip(check, "there is no certificate")

        asked.__doc__ = judge.__doc__
        return asked

    return decorated


def _intended_leaf(diagnosis: KeyDiagnosis) -> Certificate | None:
    """The leaf that the settings select, although it has no valid chain."""
    hsm = diagnosis.settings.hsm
    try:
        return leaf_choice.choose(
            diagnosis.candidates,
            identity=diagnosis.identity,
            now=diagnosis.facts.now,
            pinned_sha256=hsm.certificate_sha256,
        )
    except CertificateError:
        found = sorted(diagnosis.candidates, key=lambda each: each.not_before, reverse=True)
        return found[0] if found else None


@leaf_check("certificate")
def check_certificate(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """There is a certificate for the key; the line says why this one was chosen."""
    why = "; ".join(diagnosis.chain.notes) if diagnosis.chain else ""
    line = f"{leaf.subject} (sha256 {leaf.sha256[:16]}) belongs to the key"
    unread = [each.where for seen in diagnosis.facts.seen for each in seen.unread]
    on_device = [where for where in unread if where.endswith(" on the device")]
    for place, found in (("on the device", on_device), ("in the file", set(unread) - {*on_device})):
        if found:
            named = "; ".join(sorted(found)[:3])
            why = "; ".join(
                filter(None, (why, f"{len(found)} {place} cannot be read ({sanitized(named)})"))
            )
    for each in diagnosis.chain.certificates if diagnosis.chain else (leaf,):
        if each.unreadable:
            names = sanitized(", ".join(each.unreadable_names))
            return warn(
                "certificate",
                "certificate-extension",
                f"{line}; of '{each.subject}' these extensions cannot be read: {names}",
                "Maskinporten may not read them either: show this line to the issuer "
                "(`openssl asn1parse -i` shows their bytes)",
            )
    return ok("certificate", f"{line}; {why}" if why else line)


@leaf_check("certificate-key")
def check_certificate_key(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """Its key is RSA and large enough (M33)."""
    del diagnosis
    return ok("certificate-key", f"RSA, {leaf.key_bits} bits")


@leaf_check("certificate-kind")
def check_certificate_kind(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """It is not self-signed and not a CA's (M34)."""
    del diagnosis
    return ok("certificate-kind", f"issued by {leaf.issuer}")


@leaf_check("consumer-id")
def check_consumer(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """The ``consumer.ID`` that Maskinporten will report (M74, M75, M85, M86)."""
    return ok(
        "consumer-id", f"Maskinporten will use {sanitized(leaf.consumer_id(diagnosis.identity))}"
    )


@leaf_check("certificate-usage")
def check_certificate_usage(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """keyUsage permits signing; it is critical where Digdir's validator requires that."""
    usage = leaf.key_usage
    if diagnosis.identity == "norwegian" and (usage is None or "2.5.29.15" not in leaf.critical):
        return warn(
            "certificate-usage",
            "certificate-usage-critical",
            "there is no keyUsage" if usage is None else "its keyUsage is not critical",
            "Digdir's validator of Norwegian certificates requires a critical keyUsage (MP-120): "
            "ask the issuer",
        )
    return ok("certificate-usage", ", ".join(sorted(usage)) if usage else "no keyUsage, so any")


@leaf_check("certificate-critical")
def check_certificate_critical(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """No critical extension that Maskinporten does not know (M35)."""
    del diagnosis, leaf
    return ok("certificate-critical", "no critical extension that Maskinporten does not know")


@leaf_check("certificate-validity")
def check_validity(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """It is valid now; warns before it expires (M29, C25)."""
    now = diagnosis.facts.now
    days = leaf.days_left(now)
    until = f"valid until {leaf.not_after:%Y-%m-%d}, {days} days left"
    waiting = successor_of(diagnosis, leaf)
    if days >= NOTICE_DAYS or waiting is not None:
        return ok("certificate-validity", until, days=days)
    return warn(
        "certificate-validity",
        "certificate-ends-soon",
        until,
        "order the next one now, for this key or a new one, and import it beside this one",
        days=days,
    )


def successor_of(diagnosis: KeyDiagnosis, leaf: Certificate) -> Certificate | None:
    """The certificate, of any configured key, that replaces *leaf* without a change of settings."""
    facts = diagnosis.facts
    later = [
        each
        for seen in facts.seen
        for each in candidates_of(facts, seen)
        if each.not_after > leaf.not_after
        and each.consumer_id(diagnosis.identity) == leaf.consumer_id(diagnosis.identity)
        and each.not_before <= leaf.not_after
        and _usable_from_first_day(diagnosis, pool_of(facts, seen), each)
    ]
    pinned = facts.settings.hsm.certificate_sha256
    if pinned is not None:
        later = [each for each in later if each.sha256 == pinned and each != leaf]
    return min(later, key=lambda each: each.not_before, default=None)


def _usable_from_first_day(
    diagnosis: KeyDiagnosis, pool: Iterable[Certificate], leaf: Certificate
) -> bool:
    """Whether the signer will accept *leaf* and its chain from its first day on."""
    settings = diagnosis.settings
    try:
        leaf_choice.checked(
            [leaf],
            pool,
            identity=diagnosis.identity,
            now=max(leaf.not_before, diagnosis.facts.now),
            mode=settings.x5c_mode,
            root_sha256=settings.hsm.root_sha256,
            preferred=frozenset(each.sha256 for each in diagnosis.facts.pem),
        )
    except CertificateError:
        return False
    return True


@leaf_check("roll-over")
def check_roll_over(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """The certificate that will be used next, and from when."""
    following = successor_of(diagnosis, leaf)
    if following is None:
        end = f"{leaf.not_after:%Y-%m-%d}"
        return ok("roll-over", f"there is no successor; this certificate expires on {end}")
    # An older one waits until this one ends (`leaf_choice.ranked`: the newest is best).
    newer = following.not_before > leaf.not_before
    when = max(following.not_before, diagnosis.facts.now) if newer else leaf.not_after
    return ok(
        "roll-over", f"sha256 {following.sha256[:16]} takes over at {when:%Y-%m-%d %H:%M} UTC"
    )


@leaf_check("qualified")
def check_qualified(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """The ``client_amr`` that Maskinporten will report (M85, M87); QcType (EN 319 412-5)."""
    amr = leaf.client_amr(diagnosis.identity)
    if diagnosis.identity == "eseal":
        kinds = leaf.qc.types
        wrong = leaf.qc.semantics == "natural person" or {"esign", "web"} & set(kinds)
        if leaf.qc.compliance and wrong:
            return failed(
                "qualified",
                CertificateError(
                    f"'{leaf.subject}' is qualified, but not as an eSeal "
                    f"({sanitized(', '.join(kinds) or leaf.qc.semantics)})",
                    hint="order an eSeal for a legal person, not one for signatures or web sites",
                    code="certificate-not-eseal",
                    who="issuer",
                ),
            )
    held = ", on a QSCD according to its QCStatements" if leaf.qc.qscd else ""
    return ok("qualified", f"client_amr will be {amr}{held}")


def check_chain(diagnosis: KeyDiagnosis) -> Check:
    """The chain is complete, valid and verified (M26 to M28)."""
    if diagnosis.kid:
        return skip("chain", _NO_CERTIFICATE)
    if diagnosis.seen is None:
        return skip("chain", NO_DEVICE)
    if broken := failure_of(diagnosis, "chain", "chain"):
        return broken
    chain = diagnosis.chain
    if chain is None:
        return skip("chain", "there is no certificate")
    if diagnosis.settings.x5c == "leaf" or leaf_choice.ALONE in chain.notes:
        why = "HSMTOLL_X5C=leaf" if diagnosis.settings.x5c == "leaf" else leaf_choice.ALONE
        return ok("chain", f"{why}; Customs' guide has the certificate, Digdir's page the chain")
    if chain.cut_short:
        return warn(
            "chain",
            "chain-cut-short",
            "verified, but not all of so many certificates were searched for a better one",
            "name the chain in HSMTOLL_HSM__CERTIFICATES",
        )
    end = chain.root.subject if chain.root else "no root"
    sent = len(chain.x5c(diagnosis.settings.x5c_mode))
    weakest = chain.weakest_not_after
    days = days_left(weakest, diagnosis.facts.now)
    if weakest < min(chain.leaf.not_after, diagnosis.facts.now + timedelta(days=NOTICE_DAYS)):
        return warn(
            "chain",
            "chain-ends-soon",
            f"a CA certificate in it expires on {weakest:%Y-%m-%d}, before the leaf",
            "get the issuer's new CA certificates and name them in HSMTOLL_HSM__CERTIFICATES",
            days=days,
        )
    line = f"{len(chain.certificates)} certificates, verified up to {end}; {sent} sent"
    return ok("chain", line, days=days)


# Certificate policies that Digdir's public validator (seid2lib) accepts, by environment. An arc
# that ends in a dot stands for everything below it.
_BUYPASS: Final = ("2.16.578.1.26.1.3.2", "2.16.578.1.26.1.3.5")
_POLICIES: Final = {
    "prod": (
        *_BUYPASS,
        "2.16.578.1.29.13.200",
        "2.16.578.1.29.13.200.",
        "2.16.578.1.29.13.210",
        "2.16.578.1.29.13.210.",
        "2.16.578.1.29.13.220.",
        "2.16.578.1.29.13.1.1.0",
        "2.16.578.1.29.13.1",
    ),
    "test": (
        *_BUYPASS,
        "2.16.578.1.26.1.0.3.2",
        "2.16.578.1.29.913.200.",
        "2.16.578.1.29.913.210.",
        "2.16.578.1.29.913.220.",
        "2.16.578.1.29.913.1.1.0",
        "2.16.578.1.29.13.1.1.0",
        "2.16.578.1.1.1.1.100",
    ),
}


def _accepted(leaf: Certificate, environment: str) -> bool:
    return any(
        policy == known or (known.endswith(".") and policy.startswith(known))
        for policy in leaf.policies
        for known in _POLICIES[environment]
    )


def _issued_for(leaf: Certificate) -> str | None:
    """The environment of a known Norwegian CA, by the issuer's name."""
    name = leaf.issuer.lower()
    if not any(known in name for known in ("buypass class 3", "commfides")):
        return None
    return "test" if "test" in name else "prod"


@leaf_check("environment")
def check_environment(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """Norwegian certificates fit the environment (M31, M36); eSeals are the same in both (M32)."""
    environment = "prod" if diagnosis.settings.environment == "prod" else "test"
    issued_for = _issued_for(leaf)
    if diagnosis.identity == "eseal" and issued_for == "test":
        exc = CertificateError(
            f"'{leaf.subject}' is from a test CA, which is on no EU trusted list (MP-120)",
            hint="eSeals use their production certificate in test as well",
            code="certificate-environment",
        )
        return failed("environment", exc)
    if diagnosis.identity == "eseal":
        return ok("environment", "an eSeal's certificate serves test and prod alike")
    other = "test" if environment == "prod" else "prod"
    if issued_for == other:
        exc = CertificateError(
            f"'{leaf.subject}' is a certificate for {other}, and Norwegian ones are for one "
            f"environment: Maskinporten refuses it in {environment} (MP-120)",
            hint=f"use a {environment} certificate, or set HSMTOLL_ENVIRONMENT={other}",
            code="certificate-environment",
        )
        return failed("environment", exc)
    # The lists are a copy of Digdir's: Maskinporten may accept more by now.
    listed = sanitized(", ".join(leaf.policies) or "none")
    if not _accepted(leaf, environment) and _accepted(leaf, other):
        return warn(
            "environment",
            "certificate-environment",
            f"'{leaf.subject}' has a policy of {other} certificates ({listed}), as far as known",
            f"use a {environment} certificate, or set HSMTOLL_ENVIRONMENT={other}",
        )
    if not _accepted(leaf, environment):
        return warn(
            "environment",
            "certificate-policy",
            f"'{leaf.subject}' has no policy that is known to be accepted (it has {listed})",
            "the enterprise certificates (virksomhetssertifikat) of Buypass and Commfides have one",
        )
    return ok("environment", f"a certificate for {environment}")


#: The European Commission's browser of all trusted lists.
_TRUSTED_LISTS: Final = "https://eidas.ec.europa.eu/efda/trust-services/browse/eidas/tls"


@leaf_check("trusted-list")
def check_trusted_list(diagnosis: KeyDiagnosis, leaf: Certificate) -> Check:
    """
    The issuer is on an EU trusted list. A certificate does not show that, and a provider may have
    listed and unlisted services; only Maskinporten's answer to a grant does.
    """
    if diagnosis.identity != "eseal":
        return skip(
            "trusted-list", "for eSeals; Norwegian certificates are checked by their policies"
        )
    answers = diagnosis.facts.answers
    if answers is not None and answers.self_test is None and answers.consumer is not None:
        return ok("trusted-list", "Maskinporten accepts the issuer")
    return skip(
        "trusted-list",
        f"--online shows whether Maskinporten accepts the issuer; EU trusted lists: look for "
        f"{leaf.issuer} at {_TRUSTED_LISTS}",
    )


def check_revocation(diagnosis: KeyDiagnosis) -> Check:
    """No certificate of the chain is revoked (M30)."""
    statuses = diagnosis.facts.revocation
    if diagnosis.kid or statuses is None or diagnosis.chain is None:
        return skip(
            "revocation", _NO_CERTIFICATE if diagnosis.kid else "checked with --crl or --online"
        )
    mine = [each for each in statuses if each.certificate in diagnosis.chain.certificates]
    for each in mine:
        status = each.status
        if status is not None and status.revoked_at is not None:
            why = f" ({sanitized(status.reason)})" if status.reason else ""
            exc = CertificateError(
                f"'{each.certificate.subject}' was revoked at "
                f"{status.revoked_at:%Y-%m-%d %H:%M} UTC{why}, says its issuer's {status.source}",
                hint="Maskinporten will refuse it (MP-120): order a new one, with a new key if "
                "this one may be in other hands",
                code="certificate-revoked",
                who="issuer",
            )
            return failed("revocation", exc)
    for each in mine:
        if each.problem is not None:
            line = f"no status of '{each.certificate.subject}': {each.problem}"
            hint = "fetch the issuer's list by other means and give it with --crl"
            return warn("revocation", "revocation-unknown", line, hint)
    for each in mine:
        if each.status is not None and each.status.stale:
            line = f"the issuer's status of '{each.certificate.subject}' is out of date"
            return warn("revocation", "revocation-stale", line, "fetch the newest list")
    sources = ", ".join(sorted({each.status.source for each in mine if each.status}))
    return ok("revocation", f"{len(mine)} certificates are not revoked, according to {sources}")


CHECKS: Final = (
    ("certificate", check_certificate),
    ("certificate-key", check_certificate_key),
    ("certificate-kind", check_certificate_kind),
    ("consumer-id", check_consumer),
    ("certificate-usage", check_certificate_usage),
    ("certificate-critical", check_certificate_critical),
    ("certificate-validity", check_validity),
    ("qualified", check_qualified),
    ("chain", check_chain),
    ("environment", check_environment),
    ("trusted-list", check_trusted_list),
    ("roll-over", check_roll_over),
    ("revocation", check_revocation),
)
