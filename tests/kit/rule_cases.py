"""
For each rule of the sandbox that refuses (or permits), a good request and its bad twin.

The grants are made here by hand with `cryptography`: neither hsmtoll's client nor the sandbox's own
JOSE has a part in them.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from hsmtoll.sandbox.pki import Authority, eseal_authority, norwegian_authority, unrelated_ca
from hsmtoll.sandbox.state import Client

if TYPE_CHECKING:
    from cryptography import x509

NOW: Final = int(datetime.now(UTC).timestamp())
ROAD: Final = "toll:eu/movement/road/v2"
NO_ROAD: Final = "toll:movement/road/v2"
ORG_NO: Final = "987654325"
FORM: Final = "application/x-www-form-urlencoded"
JWT_BEARER: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"


@cache
def key(number: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    """Key *number* of this process."""
    del number
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def seals() -> Authority:
    """The trusted authority for eSeals."""
    return eseal_authority()


@cache
def enterprise(environment: str = "test") -> Authority:
    """The trusted Norwegian authority."""
    return norwegian_authority("prod" if environment == "prod" else "test")


@cache
def unknown() -> Authority:
    """An authority that nobody trusts."""
    return eseal_authority("Ukjent Tillit")


def clients() -> list[Client]:
    """One that proves itself by certificate, one by key (a fresh one and an old one)."""
    public = key().public_key()
    keys = {"fresh": (public, float(NOW)), "old": (public, NOW - 400 * 86_400.0)}
    return [
        Client("cert-client", ORG_NO, frozenset({NO_ROAD, "toll:eu/x", "openid"})),
        Client("key-client", ORG_NO, frozenset({NO_ROAD}), keys),
        Client("poor-client", ORG_NO, frozenset({NO_ROAD}), granted=frozenset()),
    ]


@dataclass(frozen=True)
class TokenRequestParts:
    """A token request in parts; `assertion` signs it."""

    header: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)
    chain: tuple[x509.Certificate, ...] = ()
    x5c: Any = None
    signer: Any = None
    method: str = "POST"
    media_type: str = FORM
    grant_type: str = JWT_BEARER
    authorization: bool = False
    mangle: str = ""

    def but(self, **changes: Any) -> TokenRequestParts:
        """A twin with something else; claims and header are merged, None removes."""
        for name in ("header", "claims"):
            if name in changes:
                merged = {**getattr(self, name), **changes[name]}
                changes[name] = {k: v for k, v in merged.items() if v is not None}
        return replace(self, **changes)

    def assertion(self, issuer: str) -> str:
        """Compact JWS; an ``aud`` of ISSUER, alone or in a list, becomes *issuer*."""
        header, claims = dict(self.header), dict(self.claims)
        if self.chain:
            header["x5c"] = [b64(cert) for cert in self.chain]
        if self.x5c is not None:
            header["x5c"] = self.x5c
        aud = claims.get("aud")
        if aud == "ISSUER":
            claims["aud"] = issuer
        elif aud == ["ISSUER"]:
            claims["aud"] = [issuer]
        data = ".".join(segment(json.dumps(part).encode()) for part in (header, claims))
        signed = signature(self.signer or key(), str(header.get("alg")), data.encode())
        return f"{data}.{segment(signed)}{self.mangle}"

    def form(self, issuer: str) -> dict[str, str]:
        """What is posted."""
        return {"grant_type": self.grant_type, "assertion": self.assertion(issuer)}


def b64(cert: x509.Certificate) -> str:
    """Standard base64 of DER."""
    return base64.b64encode(cert.public_bytes(Encoding.DER)).decode()


def segment(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signature(signer: Any, alg: str, data: bytes) -> bytes:
    """By RSA under *alg*, by EC for the twin with the wrong kind of key."""
    if isinstance(signer, ec.EllipticCurvePrivateKey):
        return signer.sign(data, ec.ECDSA(hashes.SHA256()))
    digest = {"RS384": hashes.SHA384(), "RS512": hashes.SHA512()}.get(alg, hashes.SHA256())
    made: bytes = signer.sign(data, padding.PKCS1v15(), digest)
    return made


def leaf(authority: Authority | None = None, **options: Any) -> tuple[x509.Certificate, ...]:
    """Leaf, intermediate, root."""
    authority = authority or seals()
    public = options.pop("public_key", key().public_key())
    return (authority.issue(public, **options), *authority.chain)


@cache
def eseal() -> TokenRequestParts:
    """A good eSeal grant."""
    claims = {"aud": "ISSUER", "iss": "Eksempel AB", "scope": ROAD, "iat": NOW, "exp": NOW + 120}
    return TokenRequestParts({"alg": "RS256"}, {**claims, "jti": "j-1"}, leaf())


@cache
def certificate() -> TokenRequestParts:
    """A good Norwegian grant with a certificate."""
    return eseal().but(claims={"iss": "cert-client", "scope": NO_ROAD}, chain=leaf(enterprise()))


@cache
def by_key() -> TokenRequestParts:
    """A good Norwegian grant with kid."""
    return eseal().but(
        header={"kid": "fresh"}, claims={"iss": "key-client", "scope": NO_ROAD}, chain=()
    )


@dataclass(frozen=True)
class Twins:
    """*good* passes; *bad* is refused by *rule* and passes without it. *settings* for both."""

    rule: str
    good: TokenRequestParts
    bad: TokenRequestParts
    status: int = 400
    code: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    revoked: x509.Certificate | None = None


def _other_key() -> tuple[x509.Certificate, ...]:
    return leaf(public_key=key(1).public_key())


def _of_nobody() -> tuple[x509.Certificate, ...]:
    """A Norwegian leaf alone, of a CA that is not known."""
    return leaf(norwegian_authority("test", "Ukjent"))[:1]


def grants() -> list[Twins]:
    """The table for Maskinporten."""
    e, c, k = eseal(), certificate(), by_key()
    then = datetime.now(UTC)
    small, curve = key(2, 1024), ec.generate_private_key(ec.SECP256R1())
    whole = [b64(cert) for cert in e.chain]
    url = [*whole[:2], whole[2][:64] + "\n" + whole[2][64:]]
    revoked = leaf()
    self_made = seals().issue(key().public_key(), self_signed_by=key())
    details = {"type": "urn:altinn:consent", "id": "1", "from": "2"}
    return [
        Twins("M04", e, e.but(method="PUT"), 405),
        Twins("M05", e, e.but(media_type="application/json"), 415),
        Twins("M06", e, e.but(grant_type="client_credentials")),
        Twins("M07", e, e.but(mangle="="), code="MP-011"),
        Twins("M20", e, e.but(header={"alg": "PS256"})),
        Twins("M21", k, k.but(header={"kid": None})),
        Twins("M22", k, k.but(chain=leaf(enterprise()))),
        Twins("M23", e, e.but(x5c=[*whole, 7]), code="MP-123"),
        Twins("M24", e, e.but(x5c=url), code="MP-123"),
        Twins("M25", e, e.but(chain=_other_key()), code="MP-124"),
        Twins("M26", e, e.but(chain=(*e.chain[:2], unrelated_ca(), e.chain[2])), code="MP-120"),
        Twins("M27", e, e.but(chain=e.chain[:1]), code="MP-120"),
        Twins("M28", c.but(chain=c.chain[:1]), c.but(chain=_of_nobody()), code="MP-120"),
        Twins(
            "M29",
            e,
            e.but(
                chain=leaf(
                    not_after=then - timedelta(days=1), not_before=then - 9 * timedelta(days=1)
                )
            ),
            code="MP-120",
        ),
        Twins("M29", e, e.but(chain=leaf(not_before=then + timedelta(days=1))), code="MP-120"),
        Twins("M30", e, e.but(chain=revoked), code="MP-120", revoked=revoked[0]),
        Twins("M31", c, c.but(chain=leaf(enterprise("prod"))), code="MP-120"),
        Twins("M32", e, e.but(chain=leaf(unknown())), code="MP-120"),
        Twins(
            "M33", e, e.but(chain=leaf(public_key=small.public_key()), signer=small), code="MP-120"
        ),
        Twins(
            "M33", e, e.but(chain=leaf(public_key=curve.public_key()), signer=curve), code="MP-120"
        ),
        Twins("M34", e, e.but(chain=leaf(ca=True)), code="MP-120"),
        Twins("M34", e, e.but(chain=(self_made,)), code="MP-120"),
        Twins("M35", c, c.but(chain=leaf(enterprise(), unknown_critical=True)), code="MP-120"),
        Twins("M36", c, c.but(chain=leaf(enterprise(), policies=["1.2.3"])), code="MP-120"),
        Twins("M37", e.but(header={"typ": "JWT"}), e.but(header={"typ": "JOSE"})),
        Twins("M37", k.but(header={"typ": "JWT"}), k.but(header={"x5t": "x"})),
        Twins("M38", k, k.but(header={"kid": "nobody's"})),
        Twins("M39", k, k.but(header={"kid": "old"}), code="MP-121"),
        Twins("M40", k, k.but(header={"kid": None}, chain=leaf(enterprise()))),
        Twins("M50", e, e.but(claims={"iat": None}), code="MP-011"),
        Twins("M51", e, e.but(claims={"aud": "https://maskinporten.no"}), code="MP-110"),
        Twins("M52", e, e.but(claims={"aud": ["ISSUER"]}), code="MP-110"),
        Twins("M53", e, e.but(claims={"nbf": NOW})),
        Twins("M54", e, e.but(claims={"exp": NOW + 121})),
        Twins("M54", e, e.but(claims={"exp": NOW})),
        Twins("M55", e, e.but(claims={"iat": NOW + 60, "exp": NOW + 120})),
        Twins("M57", e, e.but(claims={"iat": NOW - 200, "exp": NOW - 100}), code="MP-130"),
        Twins("M60", e, e.but(claims={"iat": str(NOW)}), code="MP-011"),
        Twins("M60", e, e.but(claims={"exp": NOW + 60.5}), code="MP-011"),
        Twins("M61", c, c.but(claims={"iss": "nobody"}), code="MP-100"),
        Twins(
            "M62",
            c,
            c.but(chain=leaf(enterprise(), organization_id="NTRNO-999999999")),
            code="MP-122",
        ),
        Twins("M63", c, c.but(claims={"scope": "toll:movement/air"}), code="MP-200"),
        Twins("M64", c, c.but(claims={"scope": "openid"}), code="MP-201"),
        Twins("M65", c, c.but(claims={"iss": "poor-client"}), 403, "MP-250"),
        Twins("M65", c, c.but(claims={"consumer_org": "999999999"}), 403, "MP-251"),
        Twins("M66", e, e.but(claims={"scope": NO_ROAD}), code="MP-200"),
        Twins("M67", c, c.but(claims={"scope": "toll:eu/x"}), code="MP-200"),
        Twins("M69", e, e.but(claims={"scope": " "}), code="MP-011"),
        Twins("M70", e, e.but(claims={"resource": "https://api.invalid"})),
        Twins("M71", e, e.but(claims={"pid": "123"})),
        Twins("M73", e, e.but(claims={"authorization_details": [{"type": "x"}]}), code="MP-301"),
        Twins(
            "M73", e, e.but(claims={"authorization_details": [{**details, "x": 1}]}), code="MP-302"
        ),
        Twins(
            "M73",
            e,
            e.but(claims={"authorization_details": [{**details, "id": ""}]}),
            code="MP-303",
        ),
        Twins("M74", e, e.but(chain=leaf(organization_id=None)), code="MP-120"),
        Twins("M75", e, e.but(chain=leaf(organization_id=["NTRSE-1", "NTRSE-2"])), code="MP-120"),
        Twins(
            "B1",
            e,
            e.but(chain=leaf(key_usage=["keyEncipherment"])),
            code="MP-120",
            settings={"key_usage_enforced": True},
        ),
        Twins("B4", e, e.but(chain=leaf(qualified=True, qc_type="web")), code="MP-120"),
    ]
