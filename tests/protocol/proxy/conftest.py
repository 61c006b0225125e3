"""The services behind the proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kit.raw_services import RawServices

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hsmtoll.settings import Settings


@pytest.fixture
def raw(
    toll_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RawServices]:
    """Services that answer what the test tells them to."""
    del toll_settings
    with RawServices(tmp_path) as services:
        for name, value in services.environ().items():
            monkeypatch.setenv(name, value)
        yield services
