"""A key made by hsmtoll on real stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.modules.conftest import Stack

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("name", ["softhsm", "p11-kit", "opencryptoki", "nss", "tpm"])
def test_a_key_is_made_that_stays_inside_and_signs(
    stacks: Callable[[str], Stack], tmp_path: Path, name: str
) -> None:
    with stacks(name).driver(tmp_path) as driver:
        made = driver.does("generate", label="made", id="0c")
        # Nothing is overwritten: the control.
        assert driver.error("generate", label="made", id="0d")["code"] == "key-exists"
    with stacks(name).driver(tmp_path, uri=made) as driver:
        assert driver.does("key")["protected"]
        assert driver.does("sign", alg="RS256", jti="one")
