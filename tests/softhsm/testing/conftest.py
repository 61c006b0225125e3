"""A SoftHSM device behind the module that counts calls and makes faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hsmtoll.testing.faults import Faults
from hsmtoll.testing.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> SoftHsm:
    made = SoftHsm.create(tmp_path_factory.mktemp("faulty") / "softhsm")
    made.generate_key("k", b"\x01")
    return made


@pytest.fixture(scope="module")
def shim(device: SoftHsm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with Faults(device.module, tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.fixture
def faults(shim: Faults) -> Iterator[Faults]:
    """From zero for each test."""
    shim.reset_counts()
    yield shim
    shim.clear()
