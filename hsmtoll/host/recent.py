"""The last grants and refusals of the audit log, for the status page."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Recent"]

_KEPT: Final = 8

Records = deque[dict[str, Any]]


def _records() -> Records:
    return deque(maxlen=_KEPT)


@dataclass(frozen=True, slots=True)
class Recent:
    """The last few records of grants and tokens that were *granted*, and of those *refused*."""

    granted: Records = field(default_factory=_records)
    refused: Records = field(default_factory=_records)

    def add(self, record: Mapping[str, Any]) -> None:
        """Note an audit record, newer than all before it."""
        event, outcome = record["event"], str(record["outcome"])
        if event == "release" or (event == "result" and outcome == "signed"):
            self.granted.append(dict(record))
        elif event == "refused":
            self.refused.append(dict(record))
