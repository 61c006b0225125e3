"""Hints for misspelt names."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["did_you_mean"]

#: Similarity of two names, as `difflib` defines it: one wrong letter in a short word.
_CUTOFF: Final = 0.75
#: Names. More would be a list and no suggestion.
_MOST: Final = 3
#: Characters. Shorter beginnings match too many names.
_SHORTEST_PREFIX: Final = 3


def did_you_mean(word: str, known: Iterable[str], otherwise: str | None = None) -> str | None:
    """
    ``did you mean NAME?`` for up to three names of *known* that resemble *word*, else *otherwise*.

    Case, ``HSMTOLL_`` and punctuation are ignored. In this order: equal names, the last part of a
    dotted name, a beginning, similar spelling.
    """
    names = sorted(known)
    folded = {name: _folded(name) for name in names}
    asked = _folded(word)
    last = [name for name in names if asked and asked == _folded(re.split(r"__|\.", name)[-1])]
    begun = [
        name for name in names if len(asked) >= _SHORTEST_PREFIX and folded[name].startswith(asked)
    ]
    # Two names may be equal when folded: the first one is suggested.
    alike = difflib.get_close_matches(asked, list(folded.values()), n=1, cutoff=_CUTOFF)
    for near in (
        [name for name in names if asked and folded[name] == asked],
        last,
        sorted(begun, key=len)[:1] if len(begun) <= _MOST else [],
        [name for name in names if folded[name] in alike][:1],
    ):
        if 0 < len(near) <= _MOST:
            return f"did you mean {' or '.join(near)}?"
    return otherwise


def _folded(name: str) -> str:
    return re.sub(r"[^\w]|_", "", name.casefold().removeprefix("hsmtoll_"))
