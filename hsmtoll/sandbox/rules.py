"""
The table of rules that the sandbox enforces, each a pure function of request, state and time.

    sources ──► rule ──► request_rules, certificate_rules, claim_rules, customs_rules ──► rules

M: Maskinporten; T: Customs; B and F: switches for what no document settles, B about certificates, F
about the flow. `scripts/rules_page.py` writes `hsmtoll/docs/rules.md` from this table.

A rule *refuses* a request, *permits* what a stricter server might refuse, or *describes* the form
of an answer. A rule that is switched off has no effect: so tests can show what depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hsmtoll.sandbox import certificate_rules, claim_rules, customs_rules, request_rules, sources
from hsmtoll.sandbox.claim_rules import replay_key
from hsmtoll.sandbox.rule import Reason, Rule, RuleContext

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hsmtoll.sandbox.facts import Call, TokenRequest
    from hsmtoll.sandbox.rule import Stage

__all__ = ["SENTENCES", "TABLE", "Refusal", "Rule", "RuleContext", "refuse", "replay_key"]

#: In the order of enforcement.
_ROWS: Final = (
    *request_rules.RULES,
    *certificate_rules.RULES,
    *claim_rules.RULES,
    *customs_rules.RULES,
)

#: The rules by id.
TABLE: Final[Mapping[str, Rule]] = {
    rule.id: rule for rule in sorted(_ROWS, key=lambda rule: rule.id)
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer of a rule. *description* has no trace id yet."""

    rule: Rule
    status: int
    error: str
    code: str | None
    description: str


def refuse(stage: Stage, request: TokenRequest | Call, context: RuleContext) -> Refusal | None:
    """The refusal by the first rule of *stage* that refuses *request*; None if none does."""
    for rule in _ROWS:
        if rule.stage != stage or rule.check is None:
            continue
        # A permission has a check as well: it refuses where the permission is switched off.
        if context.on(rule.id) == (rule.kind == "permits"):
            continue
        found = rule.check(request, context)
        if found is not None:
            reason = Reason(found) if isinstance(found, str) else found
            return Refusal(
                rule,
                reason.status or rule.status,
                reason.error or rule.error,
                reason.code or rule.code,
                reason.text + _quoted(rule.id),
            )
    return None


_CLAIMS_ONLY: Final = (
    "Adding claims not present in the following documentation will result in a response of "
    "400 Bad request with error description containing Invalid assertion."
)

#: What a client in use may do otherwise, and the sentence by which it is refused all the same.
SENTENCES: Final[Mapping[str, tuple[str, str]]] = {
    "M20": ("RS256, RS384 and RS512 are supported by Maskinporten.", sources.GRANT),
    "M24": (
        "reject the encoded data if it contains characters outside the base alphabet",
        "https://www.rfc-editor.org/rfc/rfc4648#section-3.3",
    ),
    "M37": (_CLAIMS_ONLY, sources.GRANT),
    "M51": ("Using the token-endpoint url as audience is no longer valid.", sources.TOKENS),
    "M52": ("must only contain a single value", sources.TOKENS),
    "M53": (_CLAIMS_ONLY, sources.GRANT),
    "M54": ("Maximum 120 seconds allowed. (exp - iat <= 120 )", sources.GRANT),
    "M70": ("Currently only array supported.", sources.GRANT),
}


def _quoted(rule: str) -> str:
    """The sentence behind *rule*; like every reason in brackets, not the real service's words."""
    if rule not in SENTENCES:
        return ""
    sentence, page = SENTENCES[rule]
    return f' [sandbox: "{sentence}" {page}]'
