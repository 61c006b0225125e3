"""
Contracts of the tree that no linter knows: the lock, the version, words that stay out.

Run from the top of the tree by `scripts/check`; prints the sizes of the folders, which no check
limits, and one line for each breach.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Unusual sizes: printed for information; no check fails.
LONG: Final = {"files": (500, "lines"), "classes": (25, "methods"), "functions": (60, "lines")}

_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)

# The brackets keep this file from finding itself.
_WORDS: Final = {
    "a promise instead of code": r"\bTOD[O]\b|\bFIXM[E]\b|\bXX[X]\b|raise NotImplemente[d]Error",
    "a path of the machine it was written on": r"/wor[k]/|/far[m]/|/tmp/la[b]",
    # hsmtoll is on no index, so whoever registers the name there would be installed.
    "an installation of hsmtoll by its name": (
        r"\b(?:pip3?|pipx|uv|poetry|pdm) (?:pip |tool )?(?:install|download|wheel|run|add)\b"
        r"(?!.*--no-index)[^#\n]*[\s'\"]hsmtol[l](?=[\[\s'\"=<>~!;,]|$)"
    ),
    # A reader of the repository cannot open these: cite an RFC, a public page or a rule's id.
    "a citation of a document outside the repository": (
        r"\b(?:DESIG[N]|PROTOCO[L])\b|\b(?:HS[M]|FEATURE[S]|STYL[E]|FIELD_TERM[S])\.md\b"
    ),
    "the host of a package registry": r"deb\.debia[n]\.org|pyp[i]\.org|pythonhoste[d]|npmj[s]",
}
#: A suppression has its reason beside it: after a dash, or in the comment on the line above.
_SUPPRESSED: Final = re.compile(
    r"# (?:noqa: [A-Z0-9, ]+?|type: ignore(?:\[[^]]*\])?)(?P<reason>(?: -| #|$).*)$"
)


#: Private names, each of which was replaced by a standard term.
_PRIVATE_NAMES: Final = frozenset(
    """
    Ahead Ask Child Desk Door Elsewhere Engine FirstUp Flight GATE Hosts Keeper Kept Ledger
    Lineage Look Lost Moment Page Prepared Remarks Remembered SecondChoice Silent SpentOnce
    ThrowAway Turn UNSPENT Way Wish World _APART _Errand _Guard _House _LOOK _Order _PATIENCE
    _Patient _REREAD _Remarks _Rest _Unfit _Visit _check_way _cures _fly _hurry _is_placed
    _left_in_peace _lent _likely _looked _looked_after _meet _met _remembered_for _results_alone
    _say_goodbye _settled _speaks _stay _told _took _turn_away brake dark_in engine engine_of
    foretold hands heal introduce lend look_after mended met_by said see_out speaking spoken
    stand_in told told_attribute told_value too_much
    """.split()  # noqa: SIM905 - a list of 70 strings is longer than a screen
)


def lines_of(text: str) -> int:
    """Non-blank lines."""
    return sum(1 for line in text.splitlines() if line.strip())


def sizes(package: Path) -> Iterator[str]:
    """Lines of each folder, and what is unusually long. Information, no limit."""
    folders: Counter[str] = Counter()
    long: dict[str, dict[str, int]] = {"files": {}, "classes": {}, "functions": {}}
    for path in sorted(package.rglob("*.py")):
        name, text = path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")
        lines = text.splitlines()
        folders[path.relative_to(package.parent).parent.as_posix()] += lines_of(text)
        long["files"][name] = lines_of(text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(each, _FUNCTIONS) for each in node.body)
                long["classes"][f"{name}:{node.name}"] = methods
            elif isinstance(node, _FUNCTIONS):
                size = lines_of("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                long["functions"][f"{name}:{node.name}"] = size
    total = sum(folders.values())
    yield f"lines: {total}: " + ", ".join(f"{name} {n}" for name, n in sorted(folders.items()))
    for kind, (limit, unit) in LONG.items():
        found = [f"{name} {n}" for name, n in long[kind].items() if n > limit]
        if found:
            yield f"{kind} of more than {limit} {unit}: {', '.join(found)}"


def lock(top: Path) -> Iterator[str]:
    """Every requirement of pyproject.toml is locked, in a version it allows, with hashes."""
    stated = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))
    project, groups = stated["project"], stated["dependency-groups"]
    running = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    building = stated["build-system"]["requires"]
    own = {group: groups.pop(group) for group in ("vectors", "mutation") if group in groups}
    seen: dict[str, str] = {}
    for name, wanted in (
        ("scripts/requirements.txt", [*running, *building, *chain(*groups.values())]),
        *((f"scripts/requirements-{group}.txt", needed) for group, needed in own.items()),
        ("scripts/requirements-run.txt", running),
        ("scripts/requirements-build.txt", building),
        ("docker/tools/requirements.txt", building),
    ):
        text = (top / name).read_text(encoding="utf-8").replace("\\\n", " ")
        locked = {}
        for line in text.splitlines():
            if match := re.match(r"([A-Za-z0-9_.-]+)==(\S+)", line):
                locked[canonicalize_name(match[1])] = match[2]
                if "--hash=sha256:" not in line:
                    yield f"{name}: {match[1]} has no hash"
        for package, have in locked.items():
            if seen.setdefault(package, have) != have:
                yield f"{name}: {package} {have} is {seen[package]} in another lock"
        for requirement in map(Requirement, wanted):
            version_locked = locked.get(canonicalize_name(requirement.name))
            if version_locked is None:
                yield f"{name}: lacks {requirement.name} of pyproject.toml"
            elif version_locked not in requirement.specifier:
                yield f"{name}: {requirement.name} {version_locked} is not {requirement.specifier}"


def images(top: Path) -> Iterator[str]:
    """Every image is built on one base, which its digest fixes."""
    bases = set()
    for name in ("docker/Dockerfile", "hsmtoll/testing/softhsm_image/Dockerfile"):
        text = (top / name).read_text(encoding="utf-8")
        base = "".join(re.findall(r"^ARG TOLL_BASE=(\S+)$", text, re.MULTILINE))
        bases.add(base)
        if not re.fullmatch(r"[^@]+@sha256:[0-9a-f]{64}", base):
            yield f"{name}: {base} has no digest"
        known = {"${TOLL_BASE}", *re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)}
        for used in re.findall(r"^(?:FROM |COPY --from=)(\S+)", text, re.MULTILINE):
            if used not in known:
                yield f"{name}: {used} is neither the base nor a stage"
    if len(bases) != 1:
        yield f"two bases: {' '.join(sorted(bases))}"


def versions(top: Path) -> Iterator[str]:
    """What is installed is this tree's version; pyproject.toml alone states it."""
    stated = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]
    if version("hsmtoll") != stated:
        yield f"hsmtoll {version('hsmtoll')} is installed, pyproject.toml says {stated}"


def words(top: Path) -> Iterator[str]:
    """No promise, no path of a machine, no registry; each suppression has its reason."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=top, capture_output=True, check=True, text=True,
    )  # fmt: skip
    for name in sorted(filter(None, listed.stdout.split("\0"))):
        try:
            text = (top / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            for what, pattern in _WORDS.items():
                if re.search(pattern, line):
                    yield f"{name}:{number}: {what}"
        if name.endswith(".py"):
            yield from (
                f"{name}:{number}: a suppression without a reason" for number in _bare(lines)
            )


def names(top: Path) -> Iterator[str]:
    """No name of a private language: each has a standard term (OAuth, PKCS#11, X.509, daemons)."""
    for path in sorted({*top.glob("hsmtoll/**/*.py"), *top.glob("tests/**/*.py")}):
        with path.open("rb") as source:
            for token in tokenize.tokenize(source.readline):
                if token.type == tokenize.NAME and token.string in _PRIVATE_NAMES:
                    yield (
                        f"{path.relative_to(top)}:{token.start[0]}: {token.string}: "
                        "the field has another word for it"
                    )


def _bare(lines: list[str]) -> Iterator[int]:
    """Line numbers of suppressions without a reason of their own."""
    for number, line in enumerate(lines, 1):
        if not (found := _SUPPRESSED.search(line)):
            continue
        above = lines[number - 2].strip() if number > 1 else ""
        reason = found["reason"].strip(" -#") or above.startswith("#")
        if not reason or reason in ("as above", "see above"):
            yield number


def main(top: Path) -> int:
    """Print sizes and breaches. 1 if there are breaches."""
    breaches = [*lock(top), *images(top), *versions(top), *words(top), *names(top)]
    for line in (*sizes(top / "hsmtoll"), *breaches):
        print(line)
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main(Path.cwd()))
