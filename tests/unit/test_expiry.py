"""The first use of a registered key is remembered, once and by its name."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hsmtoll.expiry import KeyUses

if TYPE_CHECKING:
    from pathlib import Path

_ISSUER = "https://test.maskinporten.no/"
_FIRST = datetime(2026, 1, 10, 8, tzinfo=UTC)


def test_the_first_use_of_a_key_is_kept_for_later_processes_and_not_replaced(
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    KeyUses(state, _ISSUER, "client").used("k-1", _FIRST.timestamp())
    later = KeyUses(state, _ISSUER, "client")
    later.used("k-1", _FIRST.timestamp() + 86_400)
    assert later.first("k-1") == _FIRST
    assert stat.S_IMODE(later.path("k-1").stat().st_mode) == 0o600
    # The controls: another key, client or Maskinporten.
    assert later.first("k-2") is None
    assert KeyUses(state, _ISSUER, "other").first("k-1") is None
    assert KeyUses(state, "https://maskinporten.no/", "client").first("k-1") is None


def test_a_file_that_says_nothing_is_learned_anew(tmp_path: Path) -> None:
    uses = KeyUses(tmp_path, _ISSUER, "client")
    for nothing in ("", "yesterday", "2026-01-10T08:00:00", "\u00e6"):
        uses.path("k-1").write_text(nothing, encoding="utf-8")
        assert uses.first("k-1") is None
        KeyUses(tmp_path, _ISSUER, "client").used("k-1", _FIRST.timestamp())
        assert uses.first("k-1") == _FIRST


def test_a_state_directory_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    uses = KeyUses(blocked / "below", _ISSUER, "client")
    uses.used("k-1", _FIRST.timestamp())
    assert uses.first("k-1") is None
