"""
Maskinporten's error codes: meaning, cause, and who must act. Data only.

Sources: the troubleshooting page below https://docs.digdir.no/docs/Maskinporten/, and observed
responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hsmtoll.errors import Who

__all__ = ["REFUSALS", "VERSION", "Refusal", "refusal"]

#: Date of the page that this table follows. Update it with every change of a row.
VERSION: Final = "2024-10"


@dataclass(frozen=True, slots=True)
class Refusal:
    """
    One code: its *meaning* in words, what to *do*, and *who* must act.

    *retry*: one new grant may succeed. *scope*: only the scope is refused. *certificate*: the
    certificate is rejected; another one may be accepted. *doctor*: ``hsmtoll doctor`` may find the
    cause.
    """

    code: str
    meaning: str
    do: str
    who: Who = "you"
    retry: bool = False
    scope: bool = False
    certificate: bool = False
    doctor: bool = False


REFUSALS: Final = {
    row.code: row
    for row in (
        Refusal(
            "MP-011",
            "a value in the grant cannot be read",
            "check the options of the grant: HSMTOLL_CONSUMER_ORG, HSMTOLL_RESOURCE, HSMTOLL_SCOPE",
        ),
        Refusal(
            "MP-012",
            "this grant was used before",
            "a new grant is made for every attempt; two programs with one jti source would explain it",
            retry=True,
        ),
        Refusal(
            "MP-100",
            "the client is not known in this environment",
            "check HSMTOLL_ISS (the client id; an eSeal has none) and HSMTOLL_ENVIRONMENT: test and prod have clients of their own",
        ),
        Refusal(
            "MP-110",
            "the audience of the grant is not this Maskinporten",
            "check HSMTOLL_ENVIRONMENT, or HSMTOLL_ENDPOINTS__ISSUER with its trailing slash",
        ),
        Refusal(
            "MP-120",
            "the certificate is not accepted: issuer not trusted here, revoked, expired, chain incomplete, "
            "or of the wrong environment",
            "eSeals: an EU trusted list must have the very CA that issued it, and the production certificate "
            "is used in test as well; Norwegian clients: a certificate of this environment",
            doctor=True,
            certificate=True,
        ),
        Refusal(
            "MP-121",
            "the registered key has expired: keys live one year from posting",
            "post the same key again at Samarbeidsportalen (`hsmtoll key jwk` prints it), or a new one",
        ),
        Refusal(
            "MP-122",
            "the certificate belongs to another organisation than the client",
            "use the certificate of the organisation that owns HSMTOLL_ISS",
            certificate=True,
        ),
        Refusal(
            "MP-123",
            "the x5c header cannot be read",
            "run `hsmtoll chain` and look for a certificate that does not belong there",
            certificate=True,
        ),
        Refusal(
            "MP-124",
            "the signature was not accepted, or the certificate is expired or of the wrong environment",
            "see that key and certificate belong together, and that the certificate is valid here",
            doctor=True,
            certificate=True,
        ),
        Refusal(
            "MP-130",
            "the grant had expired when it arrived",
            "check this machine's clock; a device that signs slowly shows the same",
            retry=True,
        ),
        Refusal(
            "MP-200",
            "the client does not have this scope",
            "Norwegian clients add the scope at Samarbeidsportalen; for an eSeal the API's owner must enable it",
            scope=True,
        ),
        Refusal(
            "MP-201",
            "the scope belongs to another kind of integration",
            "register a Maskinporten client and ask for the scope there",
            scope=True,
        ),
        Refusal(
            "MP-250",
            "Customs has not granted this organisation access to the scope",
            "ask Customs (digitoll@toll.no) for access, naming the organisation and the scope",
            who="customs",
            scope=True,
        ),
        Refusal(
            "MP-251",
            "the consumer has not delegated this access to the supplier",
            "the organisation in --consumer-org or HSMTOLL_CONSUMER_ORG delegates the access in Altinn",
            scope=True,
        ),
        Refusal(
            "MP-301",
            "unknown type in authorization_details",
            "its type is urn:altinn:systemuser or urn:altinn:consent",
        ),
        Refusal(
            "MP-302",
            "unknown field in authorization_details",
            "a system user has type, systemuser_org and externalRef, a consent type, id and from",
        ),
        Refusal(
            "MP-303",
            "bad value in authorization_details",
            'systemuser_org is {"authority": "iso6523-actorid-upis", "ID": "0192:<nine digits>"}, and the customer has a system user in Altinn',
        ),
    )
}

# Observed error texts without a code, and the code that each stands for. Lower case.
_BY_TEXT: Final = (
    ("grant is used before", "MP-012"),
    ("jwt is expired", "MP-130"),
    ("jwt has expired", "MP-130"),
    ("expired key", "MP-121"),
    ("client not found", "MP-100"),
    ("invalid jwt claim aud", "MP-110"),
    ("invalid jwt signature", "MP-124"),
    ("not been granted access", "MP-250"),
    ("has not delegated", "MP-251"),
    ("invalid scopes for client", "MP-200"),
    ("not allowed for maskinporten", "MP-201"),
)

_WITHOUT_CODE: Final = (
    (
        "no key identifier (kid) provided",
        "the client is registered for keys, but a certificate was sent",
        "set HSMTOLL_KID to the registered key id, or to thumbprint",
    ),
    (
        "unknown key identifier",
        "the key id is not registered on the client",
        "check HSMTOLL_KID, or register the key: `hsmtoll key jwk` prints it",
    ),
    (
        "too long lifetime",
        "the grant lives longer than allowed",
        "this machine's clock jumped while signing; try again",
    ),
    (
        "combination consumer_org",
        "consumer_org is the client's own organisation",
        "leave it out (--consumer-org, HSMTOLL_CONSUMER_ORG)",
    ),
)

#: Observed error texts for a grant from a clock that runs fast. Lower case.
ISSUED_IN_FUTURE: Final = ("issue time is in the future", "issue time is after now")


def refusal(code: str | None, text: str) -> Refusal | None:
    """The row for *code* (``MP-012``), or for a *text* known to stand for one; ``None`` if unknown."""
    if code in REFUSALS:
        return REFUSALS[code]
    words = text.lower()
    for part, known in _BY_TEXT:
        if part in words:
            return REFUSALS[known]
    for part, meaning, do in _WITHOUT_CODE:
        if part in words:
            return Refusal(code or "", meaning, do)
    return None
