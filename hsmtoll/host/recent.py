"""The last grants and refusals of the audit log, for the status page."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

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

    def add(self, record: dict[str, Any]) -> None:
        """Note an audit record, newer than all before it."""
        event, outcome = record["event"], record["outcome"]
        if event == "release" or (event == "result" and outcome == "signed"):
            self.granted.append(record)
        elif event == "refused":
            self.refused.append(record)
