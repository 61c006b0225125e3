"""
Write `hsmtoll/docs/rules.md`: the rule ids that code, tests and documents cite.

Run from the top of the tree after a change to the sandbox's table of rules or to the duties below.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from hsmtoll.sandbox.rules import TABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE: Final = Path("hsmtoll/docs/rules.md")

#: How an id is cited. Nothing else in the tree may have this form, but percent-encoded bytes.
CITED: Final = re.compile(r"(?<!%)\b(?:[MTC]\d{2}|[BF]\d)\b")

_TOLL: Final = "https://toll.github.io/api/"
_INTEGRATION: Final = f"{_TOLL}maskinporten/teknisk-integrasjon-EN.html"


class Duty(NamedTuple):
    """A rule that the client keeps itself, and that no server can check. Columns as in `Rule`."""

    id: str
    sentence: str
    basis: str
    sources: tuple[str, ...] = ()


#: The client's own duties: those that are cited. The sandbox enforces none of them.
DUTIES: Final = (
    Duty(
        "C07",
        "compare this machine's clock with the Date header of the answers; below 5 s nothing is "
        "proven",
        "I",
        ("RFC 9110 section 6.6.1",),
    ),
    Duty(
        "C11",
        "renew a token 60 s before its end, or at half of a lifetime that is shorter than 120 s",
        "D/I",
        (_INTEGRATION,),
    ),
    Duty(
        "C15",
        "send the bare words token-exchange and access_token; compare issued_token_type with "
        "nothing",
        "D",
        (_INTEGRATION,),
    ),
    Duty(
        "C17",
        "pair Maskinporten's test environment with Customs' test environment, production with "
        "production",
        "D",
        (_INTEGRATION,),
    ),
    Duty(
        "C18",
        "ask for toll:eu/ scopes as an eSeal, for toll: scopes without eu/ as a Norwegian client",
        "D",
        (_INTEGRATION,),
    ),
    Duty(
        "C20",
        "ask for a result after 1 to 2 s, then less often, and not without end; 404 means not "
        "ready",
        "D/I",
        (f"{_TOLL}mo/hvordan-sende-inn-meldinger-EN.html",),
    ),
    Duty(
        "C21",
        "do not repeat a submission whose answer was lost: its outcome is unknown",
        "I",
        ("RFC 9110 section 9.2.2",),
    ),
    Duty(
        "C22",
        "check the declaration id, document type, file type, size and order of parts before an "
        "upload",
        "D",
        (f"{_TOLL}document/document-api-EN.html",),
    ),
    Duty(
        "C24",
        "save the marker of the routing feed, and only after its batch was taken",
        "D/I",
        (f"{_TOLL}mo/fremlegging-og-kontrolldirigering-EN.html",),
    ),
    Duty("C25", "warn 60 days before a certificate ends", "I"),
    Duty(
        "C27",
        "use digdir:verksemd.eu to test an eSeal at Maskinporten alone: Customs does not exchange "
        "it",
        "D",
        (_INTEGRATION,),
    ),
)

_BASES: Final = {"D": "documented", "O": "observed", "I": "inferred"}

_HEAD: Final = """\
# Rules

Code, tests and these documents cite rules by their ids. `scripts/rules_page.py` writes this page
from the sandbox's table of rules (`hsmtoll/sandbox/rules.py`); a test compares them.

| basis | means |
| --- | --- |
| documented | a page of Digdir or Customs, or an RFC that they follow, states it |
| observed | public code, a certificate, a log or a report shows it |
| inferred | no public source states it; the source, where there is one, makes it probable |

Two words mean that a part has one basis and a part the other: often the requirement is documented,
and the answer to a request that breaks it is inferred.
"""


def page() -> str:
    """The page, in Markdown."""
    table = TABLE.values()
    parts = (
        ("M: Maskinporten", (rule for rule in table if rule.id.startswith("M"))),
        ("T: Norwegian Customs", (rule for rule in table if rule.id.startswith("T"))),
        (
            "B and F: switches of the sandbox, about certificates and about the flow",
            (rule for rule in table if rule.id[0] in "BF"),
        ),
        ("C: duties of the client, which no server checks", DUTIES),
    )
    sections = [_section(title, rows) for title, rows in parts]
    return "\n".join([_HEAD, *sections])


def _section(title: str, rows: Iterable[object]) -> str:
    return "\n".join(
        [f"## {title}", "", "| id | rule | basis | source |", "| --- | --- | --- | --- |",
         *map(_row, rows), ""],
    )  # fmt: skip


def _row(row: object) -> str:
    id_, sentence, basis, sources = (
        getattr(row, name) for name in ("id", "sentence", "basis", "sources")
    )
    words = ", ".join(_BASES[each] for each in basis.split("/"))
    return f"| {id_} | {sentence} | {words} | {'; '.join(sources) or 'none is known'} |"


def citations(top: Path) -> Iterator[tuple[str, str]]:
    """Each id that is cited, with the file that cites it. Neither the page nor its sources."""
    own = {PAGE, Path("scripts/rules_page.py")}
    own |= {path.relative_to(top) for path in (top / "hsmtoll/sandbox").glob("*rules.py")}
    folders = (top / name for name in ("hsmtoll", "tests", "scripts", "docker"))
    files = [path for folder in folders for path in folder.rglob("*")]
    for path in sorted([top / "README.md", *files]):
        name = path.relative_to(top)
        if name not in own and path.suffix in {".md", ".py", ".c", ".sh", ".toml"}:
            for found in CITED.findall(path.read_text(encoding="utf-8")):
                yield found, name.as_posix()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
