"""A list of keys: the next one signs while one is down, and the first again when it is back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from hsmtoll import PinIncorrect
from hsmtoll.app import App
from hsmtoll.settings import load
from hsmtoll.token import TokenRequest
from tests.kit.signing_host import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hsmtoll.settings import Settings
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity

ROAD = TokenRequest("toll:eu/movement/road/v2")


@pytest.fixture
def app(
    toll_settings: Settings,
    toll_faults: Faults,
    toll_eseal: TemporaryIdentity,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[App]:
    """The same key twice: behind the shim, and behind the module itself."""
    del toll_settings
    monkeypatch.delenv("HSMTOLL_HSM__MODULE")
    uri = toll_eseal.device.uri(toll_eseal.key_label)
    keys = [f"{uri}?module-path={path}" for path in (toll_faults.module, toll_eseal.device.module)]
    # Two names of one library need two processes.
    made = App(load(hsm__key=keys, hsm__isolation="process"))
    yield made
    made.close()


def test_the_next_key_signs_while_one_is_down_and_the_first_again_when_it_is_back(
    app: App, toll_faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    signer = app.signer
    assert signer.sign(ROAD, jti="1").assertion
    assert toll_faults.count("C_SignInit") == 1
    toll_faults.set("token-removed")
    with caplog.at_level(logging.WARNING, "hsmtoll.signing.failover"):
        for _ in range(3):
            assert signer.sign(ROAD, jti="1").assertion
    assert [
        each.getMessage()[:22] for each in caplog.records if each.name == "hsmtoll.signing.failover"
    ] == ["key 2 of 2 signs now: "]
    before = toll_faults.count("C_SignInit")

    toll_faults.clear("token-removed")
    caplog.clear()
    eventually(
        lambda: signer.sign(ROAD, jti="1").assertion and toll_faults.count("C_SignInit") > before
    )
    messages = [
        each.getMessage() for each in caplog.records if each.name == "hsmtoll.signing.failover"
    ]
    assert messages == ["key 1 of 2 signs now"]


def test_a_device_that_is_down_is_not_asked_by_every_call(app: App, toll_faults: Faults) -> None:
    signer = app.signer
    signer.sign(ROAD, jti="1")
    toll_faults.set("token-removed")
    signer.sign(ROAD, jti="1")

    def asks() -> bool:
        """Whether another call asks the device that is down."""
        before = toll_faults.count("C_GetSlotList")
        assert signer.sign(ROAD, jti="1").assertion
        return toll_faults.count("C_GetSlotList") > before

    # It is left alone for a second, then for two, …, ten: longer than a call takes.
    assert [asks() for _ in range(20)].count(True) <= 10
    # The control: it is asked again.
    eventually(asks)


def test_a_wrong_pin_does_not_move_on_to_the_next_device(app: App, toll_faults: Faults) -> None:
    toll_faults.set("pin-wrong")
    with pytest.raises(PinIncorrect):
        app.signer.sign(ROAD, jti="1")
