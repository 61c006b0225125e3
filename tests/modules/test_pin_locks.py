"""Devices that lock: what is left of their tries when hsmtoll has met a wrong PIN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.modules.conftest import CARDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.modules.conftest import Opencryptoki, Smartcard, Stack, Tpm

pytestmark = pytest.mark.timeout(300)

SIGN = {"alg": "RS256", "jti": "one"}


def wrong(stack: Stack, state: Path, pin: str, **more: object) -> tuple[int, str]:
    """What one wrong PIN is answered with, by a process of its own."""
    with stack.driver(state, pin=pin, **more) as driver:
        error = driver.error("sign", **SIGN)
    return error["exit"], error["code"]


@pytest.fixture
def flagged(stacks: Callable[[str], Stack]) -> Iterator[Opencryptoki]:
    made: Opencryptoki = stacks("opencryptoki")  # type: ignore[assignment]  # as it is named
    yield made
    # The SO unblocks it to a PIN that its user then changes.
    made.conf("-u", "-S", "56785678", "-n", "12345678")
    made.conf("-p", "-U", "12345678", "-n", made.pin)


def test_opencryptoki_says_low_then_final_then_locked_and_is_not_asked_again(
    flagged: Opencryptoki, tmp_path: Path
) -> None:
    assert wrong(flagged, tmp_path, "99999991") == (20, "pin-incorrect")
    assert wrong(flagged, tmp_path, "99999992") == (20, "pin-incorrect")
    # The right one as well: a last try is for a person to take.
    assert wrong(flagged, tmp_path, flagged.pin) == (21, "pin-final-try")
    assert wrong(flagged, tmp_path, "99999993", use_final_try=True) == (20, "pin-incorrect")
    assert wrong(flagged, tmp_path, flagged.pin, use_final_try=True) == (21, "pin-locked")


def test_the_final_try_is_taken_where_a_person_says_so(
    flagged: Opencryptoki, tmp_path: Path
) -> None:
    for pin in ("99999991", "99999992"):
        wrong(flagged, tmp_path, pin)
    with flagged.driver(tmp_path, use_final_try=True) as driver:
        assert driver.does("sign", **SIGN)


def test_opencryptoki_has_raw_rsa_alone_and_the_digest_is_made_here(
    stacks: Callable[[str], Stack], tmp_path: Path
) -> None:
    with stacks("opencryptoki").driver(tmp_path) as driver:
        mechanisms = driver.does("key")["mechanisms"]
        assert "SHA256_RSA_PKCS" not in mechanisms
        assert "RSA_PKCS" in mechanisms
        assert driver.does("sign", **SIGN)


@pytest.fixture
def chip(stacks: Callable[[str], Stack]) -> Iterator[Tpm]:
    made: Tpm = stacks("tpm")  # type: ignore[assignment]  # as it is named
    # A TPM that lost its power counts that as a try as well.
    made.unblock()
    yield made
    made.unblock()


def test_a_tpm_locks_after_three_different_wrong_pins_and_one_repeated_costs_one(
    chip: Tpm, tmp_path: Path
) -> None:
    for _ in range(5):
        wrong(chip, tmp_path, "111111")
    with chip.driver(tmp_path) as driver:
        assert driver.does("sign", **SIGN)
    chip.unblock()
    codes = [wrong(chip, tmp_path, f"11111{n}")[1] for n in range(2, 6)]
    assert codes[:2] == ["pin-incorrect"] * 2
    assert codes[-1] == "pin-locked"
    assert wrong(chip, tmp_path, chip.pin) == (21, "pin-locked")
    chip.unblock()
    with chip.driver(tmp_path) as driver:
        assert driver.does("sign", **SIGN)


@pytest.fixture(params=CARDS)
def card(stacks: Callable[[str], Stack], request: pytest.FixtureRequest) -> Iterator[Smartcard]:
    made: Smartcard = stacks(request.param)  # type: ignore[assignment]  # as it is named
    yield made
    made.unblock()


def test_a_card_is_spared_its_final_try(card: Smartcard, tmp_path: Path) -> None:
    assert wrong(card, tmp_path, "654321") == (20, "pin-incorrect")
    assert wrong(card, tmp_path, "654322") == (20, "pin-incorrect")
    assert wrong(card, tmp_path, "654323") == (21, "pin-final-try")
    assert wrong(card, tmp_path, card.pin) == (21, "pin-final-try")
    with card.driver(tmp_path, use_final_try=True) as driver:
        assert driver.does("sign", **SIGN)


def test_a_card_that_is_locked_is_not_asked(card: Smartcard, tmp_path: Path) -> None:
    for pin in ("654321", "654322"):
        wrong(card, tmp_path, pin)
    assert wrong(card, tmp_path, "654323", use_final_try=True)[0] in {20, 21}
    assert wrong(card, tmp_path, card.pin, use_final_try=True) == (21, "pin-locked")
    card.unblock()
    # OpenSC answers PinLocked to the wrong PIN that locks it: it stays a wrong one.
    assert wrong(card, tmp_path, "654323") == (21, "pin-refused")
    with card.driver(tmp_path) as driver:
        assert driver.does("sign", **SIGN)
