"""
One rule of the services as a value, and what it may look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from cryptography.x509.oid import NameOID

from hsmtoll.sandbox import facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryptography.hazmat.primitives.asymmetric import rsa

    from hsmtoll.sandbox.facts import TokenRequest
    from hsmtoll.sandbox.settings import Settings
    from hsmtoll.sandbox.state import Client, State

__all__ = ["CLIENT_FAILED", "FORM", "Reason", "Rule", "RuleContext", "Rules", "Stage"]

Stage = Literal["grant", "exchange", "call", "answer"]

FORM: Final = "application/x-www-form-urlencoded"
CLIENT_FAILED: Final = "Invalid assertion. Client authentication failed."
_NORWEGIAN: Final = re.compile(r"2\.16\.578\.1\.(26|29|1\.1\.1)\..+")


@dataclass(frozen=True, slots=True)
class RuleContext:
    """What a rule may look at besides the request. *now*: epoch seconds."""

    state: State
    settings: Settings
    issuer: str
    now: float
    maskinporten_keys: Mapping[str, rsa.RSAPublicKey] = field(default_factory=dict)

    def on(self, rule: str) -> bool:
        """Whether *rule* is in force."""
        return rule not in self.settings.without

    def client(self, request: TokenRequest) -> Client | None:
        """The registered client that the grant names."""
        iss = request.jws.claims.get("iss")
        return self.state.clients.get(iss) if isinstance(iss, str) else None

    def norwegian(self, request: TokenRequest) -> bool:
        """
        Whether the grant is judged as a Norwegian client's: its iss is registered, or it has a
        kid. Otherwise a certificate that asks for a scope of eSeals is one, whoever issued it:
        Buypass and Commfides are on Customs' list for foreign businesses. How Maskinporten decides
        is not public; for other scopes the policy's arc says whose certificate it is (inferred).
        """
        if self.client(request) or request.leaf is None:
            return True
        if any(scope in self.state.eseal_scopes for scope in request.scopes):
            return False
        return any(_NORWEGIAN.fullmatch(policy) for policy in facts.policies(request.leaf))

    def tolerates(self, deviation: str) -> bool:
        """Whether the profile lets a deviation pass."""
        return deviation in self.settings.tolerate

    def organisation(self, request: TokenRequest) -> str:
        """The organisation that sends *request*: number of the client, or the eSeal's id."""
        client = self.client(request)
        if client is not None:
            return client.org_no
        if request.leaf is None:
            return ""
        if self.norwegian(request):
            return facts.org_no(request.leaf) or ""
        return next(iter(facts.values(request.leaf, NameOID.ORGANIZATION_IDENTIFIER)), "")


class Reason(NamedTuple):
    """
    Why a request is refused: *text* for error_description. The others, where they are given,
    replace those of the rule.
    """

    text: str
    status: int | None = None
    error: str | None = None
    code: str | None = None


#: A plain text is a Reason with nothing else; None: the rule has no objection.
Check = Callable[[Any, RuleContext], Reason | str | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """
    One row. *basis*: D documented, O observed, I inferred. *sources*: public addresses and sections
    of RFCs; none where nothing public is known, then *basis* is I. *code* is Maskinporten's.
    """

    id: str
    sentence: str
    basis: str
    sources: tuple[str, ...]
    kind: Literal["refuses", "permits", "describes"]
    stage: Stage
    status: int = 400
    error: str = "invalid_grant"
    code: str | None = None
    check: Check | None = None


class Rules(list[Rule]):
    """Rules in their order of enforcement; a module of rules fills one."""

    def checked_by(
        self,
        id_: str,
        sentence: str,
        basis: str,
        *sources: str,
        stage: Stage = "grant",
        status: int = 400,
        error: str = "invalid_grant",
        code: str | None = None,
        kind: Literal["refuses", "permits"] = "refuses",
    ) -> Callable[[Check], Check]:
        """Add a rule whose check is the decorated function."""

        def add(check: Check) -> Check:
            self.append(
                Rule(id_, sentence, basis, sources, kind, stage, status, error, code, check)
            )
            return check

        return add

    def describes(self, id_: str, sentence: str, basis: str, *sources: str) -> None:
        """Add a rule about the form of an answer: nothing is checked, `RuleContext.on` is asked."""
        self.append(Rule(id_, sentence, basis, sources, "describes", "answer"))
