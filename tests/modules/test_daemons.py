"""The daemon behind a device dies and comes back; its users are told, and need not start again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.modules.conftest import CARDS, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.modules.conftest import Smartcard, Stack

pytestmark = pytest.mark.timeout(300)

SIGN = {"alg": "RS256", "jti": "one"}


@pytest.fixture(params=CARDS)
def card(stacks: Callable[[str], Stack], request: pytest.FixtureRequest) -> Iterator[Smartcard]:
    made: Smartcard = stacks(request.param)  # type: ignore[assignment]  # as it is named
    yield made
    if made.daemon.poll() is not None:
        made.start_daemon()
    # A card of this kind that lost its reader in the middle may count that as a try.
    made.unblock()


def test_pcscd_is_dead_and_back_and_the_card_signs_again_by_itself(
    card: Smartcard, tmp_path: Path
) -> None:
    with card.driver(tmp_path) as driver:
        first = driver.does("sign", **SIGN)
        card.kill_daemon()
        assert driver.error("sign", **SIGN)["exit"] == 30
        # From now on nobody waits for what is not there.
        for _ in range(50):
            error = driver.error("sign", **SIGN)
            assert (error["exit"], error["code"]) == (30, "device-down")
        # Asked again while it is still dead, it is still down.
        driver.does("advance", seconds=31)
        assert driver.error("sign", **SIGN)["exit"] == 30
        with card.driver(tmp_path) as newcomer:
            assert newcomer.error("sign", **SIGN)["exit"] == 30
            card.start_daemon()
            # A new pcscd, the card in its reader: nobody started anything else.
            wait_for(card.seen)
            for each in (driver, newcomer):
                each.does("advance", seconds=31)
                assert each.does("sign", **SIGN) == first


def test_pcscd_that_was_back_before_anybody_asked_is_noticed_by_nobody(
    card: Smartcard, tmp_path: Path
) -> None:
    with card.driver(tmp_path) as driver:
        first = driver.does("sign", **SIGN)
        card.kill_daemon()
        card.start_daemon()
        wait_for(card.seen)
        assert driver.does("sign", **SIGN) == first
