"""A clock that is a little off still gets a token; one that is far off is told so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hsmtoll.client import TollClient
from hsmtoll.errors import ClockError
from hsmtoll.testing.clock import SettableClock
from tests.kit.soft_client import token_service_of

if TYPE_CHECKING:
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox


def iats(sandbox: Sandbox) -> list[int]:
    claims = [each.claims for each in sandbox.received if each.kind == "grant"]
    return [int(each["iat"]) for each in claims if each]


def off_by(sandbox_clock: SettableClock, seconds: float) -> SettableClock:
    """A machine whose clock is *seconds* ahead of the sandbox's."""
    return SettableClock(sandbox_clock.now().wall + seconds)


@pytest.mark.parametrize("ahead", [45, 290])
def test_a_clock_that_is_fast_gets_a_token_with_one_warning(
    toll_sandbox: Sandbox, toll_clock: SettableClock, caplog: pytest.LogCaptureFixture, ahead: int
) -> None:
    token_service, signer = token_service_of(toll_sandbox, clock=off_by(toll_clock, ahead))
    with caplog.at_level("WARNING", logger="hsmtoll"):
        client = TollClient(token_service)
        client.token("road")
        client.token("air")
    assert len(signer.signed) == 3, "one was spent on learning"
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("hsmtoll")]
    assert len(messages) == 1
    assert messages[0].startswith(f"clock: this machine is {ahead} s ahead of Maskinporten")
    assert client.status().skew == pytest.approx(-ahead, abs=1)
    assert iats(toll_sandbox)[-1] == pytest.approx(toll_clock.now().wall, abs=2)


def test_a_clock_that_is_slow_gets_a_token_and_learns_from_it(
    toll_sandbox: Sandbox, toll_clock: SettableClock
) -> None:
    token_service, signer = token_service_of(toll_sandbox, clock=off_by(toll_clock, -45))
    client = TollClient(token_service)
    client.token("road")
    client.token("air")
    assert len(signer.signed) == 2
    assert iats(toll_sandbox)[-1] == pytest.approx(toll_clock.now().wall, abs=2)


def test_a_clock_that_is_right_is_not_corrected(
    toll_sandbox: Sandbox, toll_clock: SettableClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The control: seconds of the header and of the way are noise."""
    token_service, signer = token_service_of(toll_sandbox, clock=off_by(toll_clock, 2))
    with caplog.at_level("WARNING", logger="hsmtoll"):
        TollClient(token_service).token("road")
    assert (len(signer.signed), token_service.skew.seconds, caplog.records) == (1, 0.0, [])


@pytest.mark.parametrize(("off", "side"), [(3600, "ahead of"), (-3600, "behind")])
def test_a_clock_that_is_an_hour_off_is_error_50(
    toll_sandbox: Sandbox, toll_clock: SettableClock, off: int, side: str
) -> None:
    token_service, signer = token_service_of(toll_sandbox, clock=off_by(toll_clock, off))
    with pytest.raises(ClockError, match=f"3600 s {side} Maskinporten") as caught:
        TollClient(token_service).token("road")
    assert caught.value.exit_code == 50
    assert len(signer.signed) == 1
    assert token_service.skew.seconds == 0


def test_what_was_learned_is_known_to_the_next_process_of_this_machine(
    toll_sandbox: Sandbox, toll_clock: SettableClock, tmp_path: Path
) -> None:
    clock = off_by(toll_clock, 45)
    for spent in (2, 1):
        token_service, signer = token_service_of(
            toll_sandbox, clock=clock, skew_file=tmp_path / "state" / "skew"
        )
        TollClient(token_service).token("road")
        assert len(signer.signed) == spent
    # The control: another machine, with a state of its own, learns for itself.
    token_service, signer = token_service_of(
        toll_sandbox, clock=clock, skew_file=tmp_path / "other" / "skew"
    )
    TollClient(token_service).token("road")
    assert len(signer.signed) == 2


def test_a_clock_that_was_put_right_is_corrected_no_longer(
    toll_sandbox: Sandbox, toll_clock: SettableClock
) -> None:
    clock = off_by(toll_clock, -45)
    token_service, _ = token_service_of(toll_sandbox, clock=clock)
    client = TollClient(token_service)
    client.token("road")
    assert token_service.skew.seconds == pytest.approx(45, abs=1)
    clock.set_wall(toll_clock.now().wall)
    client.token("air")
    assert token_service.skew.seconds == 0


def test_maskinportens_clock_counts_and_not_that_of_customs(
    toll_sandbox: Sandbox, toll_clock: SettableClock
) -> None:
    token_service, signer = token_service_of(toll_sandbox, clock=toll_clock)
    toll_sandbox.fault("clock", "exchange", seconds=100)
    TollClient(token_service).token("road")
    assert (token_service.skew.seconds, len(signer.signed)) == (0, 1)


def test_a_short_token_of_an_eseal_is_fresh_for_half_its_life(
    toll_sandbox: Sandbox, toll_clock: SettableClock
) -> None:
    token_service, signer = token_service_of(toll_sandbox, clock=toll_clock)
    client = TollClient(token_service)
    token = client.token("road")
    toll_clock.advance(token.lifetime - token.margin - 1)
    assert client.token("road") is token
    assert len(signer.signed) == 1
