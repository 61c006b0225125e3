"""Runs mutmut over a sample of its mutants, and tells which no test noticed (scripts/mutation)."""

from __future__ import annotations

import ast
import difflib
import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MUTMUT: Final = str(Path(sys.executable).with_name("mutmut"))
#: How a test run may end, by mutmut's own numbers: as before, or without a test that runs there.
SURVIVED, NO_TEST = 0, 33
_WORDS: Final = re.compile(r"(?:, )?(?:hint=)?(?:'a text'|None)")


def modules() -> Iterator[tuple[Path, dict[str, int | None]]]:
    """Each module that was changed, with how its mutants ended: None was not tried."""
    for meta in sorted(Path("mutants/hsmtoll").rglob("*.meta")):
        ended = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
        if ended:
            yield meta.with_suffix(""), ended


def sample(step: int, patterns: Sequence[str]) -> list[str]:
    """Each *step*-th mutant of those that match."""
    names = (name for _, ended in modules() for name in ended)
    matching = [
        name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]
    return matching[::step]


class _WithoutWords(ast.NodeTransformer):
    """Every text of more than one word becomes the same."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        worded = isinstance(node.value, str) and " " in node.value
        return ast.Constant("a text") if worded else node

    def visit_JoinedStr(self, _: ast.JoinedStr) -> ast.AST:
        return ast.Constant("a text")


def _functions(module: Path) -> dict[str, Any]:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name: node for node in ast.walk(tree) if isinstance(node, kinds)}


def _lines(function: Any, *, words: bool) -> list[str]:
    copied: Any = ast.parse(ast.unparse(function)).body[0]
    copied.name = "f"
    return ast.unparse(copied if words else _WithoutWords().visit(copied)).splitlines()


def _changed(before: list[str], after: list[str]) -> list[str]:
    diff = difflib.unified_diff(before, after, n=0, lineterm="")
    return [line for line in diff if not line.startswith(("---", "+++", "@@"))]


def change(functions: dict[str, Any], mutant: str) -> list[str]:
    """The lines that differ; none where only the words of a message do, or the message is gone."""
    name = mutant.rpartition(".")[2]
    before = functions[f"{name.rpartition('__mutmut_')[0]}__mutmut_orig"]
    bare = _changed(*(_lines(each, words=False) for each in (before, functions[name])))
    without = [
        [_WORDS.sub("", line[1:]) for line in bare if line.startswith(sign)] for sign in "-+"
    ]
    if without[0] == without[1]:
        return []
    return _changed(*(_lines(each, words=True) for each in (before, functions[name])))


def main(step: int, patterns: Sequence[str]) -> None:
    """Make the mutants, try a sample, tell."""
    # A name that nothing has: mutmut makes the mutants, sees which test runs what, and stops.
    subprocess.run([MUTMUT, "run", "none"], check=False, stderr=subprocess.DEVNULL)
    tried = set(sample(step, patterns or ["*"]))
    if not tried:
        sys.exit("mutation: no mutant is named so, or the tests fail without a change")
    subprocess.run([MUTMUT, "run", *sorted(tried)], check=True)
    survivors: dict[str, list[str]] = {}
    print(f"\n{'module':36} {'all':>5} {'tried':>6} {'noticed':>8} {'words':>6} {'survived':>9}")
    for module, ended in modules():
        mine = [name for name in ended if name in tried]
        functions = _functions(module) if mine else {}
        unnoticed = {
            name: change(functions, name) for name in mine if ended[name] in (SURVIVED, NO_TEST)
        }
        left = {name: lines for name, lines in unnoticed.items() if lines}
        survivors |= left
        name = module.relative_to("mutants").as_posix()
        noticed, words = len(mine) - len(unnoticed), len(unnoticed) - len(left)
        print(f"{name:36} {len(ended):5} {len(mine):6} {noticed:8} {words:6} {len(left):9}")
    for name, lines in survivors.items():
        print(f"\n{name}", *lines, sep="\n    ")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
