"""The breaker and the steps, with a clock that is moved; no device."""

from __future__ import annotations

import inspect
import logging
import threading

import pytest
from pkcs11 import exceptions as p11

from hsmtoll.errors import DeviceError, HsmTollError, PinIncorrect, PinNotTried
from hsmtoll.hsm.codes import recoverable, translated
from hsmtoll.hsm.recovery import CircuitBreaker, should_retry
from hsmtoll.testing.clock import SettableClock

GONE = DeviceError("Signing: the module answered DeviceRemoved", code="device-gone", retryable=True)
MISSING = DeviceError("no private key fits", code="key-missing")

#: Every answer that a new session, login or module may cure. What is not here is not repeated.
RECOVERABLE = {
    p11.PKCS11Error,
    p11.DeviceError,
    p11.DeviceMemory,
    p11.DeviceRemoved,
    p11.ExceededMaxIterations,
    p11.FunctionCancelled,
    p11.FunctionFailed,
    p11.FunctionRejected,
    p11.GeneralError,
    p11.HostMemory,
    p11.KeyHandleInvalid,
    p11.NoSuchToken,
    p11.ObjectHandleInvalid,
    p11.OperationActive,
    p11.OperationNotInitialized,
    p11.SessionClosed,
    p11.SessionCount,
    p11.SessionExists,
    p11.SessionHandleInvalid,
    p11.SessionReadOnlyExists,
    p11.SessionReadWriteSOExists,
    p11.SlotIDInvalid,
    p11.TokenNotPresent,
    p11.TokenNotRecognised,
    p11.UserTooManyTypes,
}


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock(1_800_000_000.0)


@pytest.fixture
def breaker(clock: SettableClock) -> CircuitBreaker:
    return CircuitBreaker("pkcs11:token=lab", boot=lambda: clock.now().boot)


def down(breaker: CircuitBreaker) -> bool:
    try:
        breaker.admit()
    except DeviceError as exc:
        return exc.code == "device-down"
    return False


def test_the_list_of_what_may_be_cured_is_complete_over_every_class_there_is() -> None:
    every = {
        kind
        for _, kind in inspect.getmembers(p11, inspect.isclass)
        if issubclass(kind, p11.PKCS11Error)
    }
    assert len(every) > 60
    assert {kind for kind in every if recoverable(kind())} == RECOVERABLE
    assert {kind for kind in every if recoverable(translated(kind(), "x"))} == RECOVERABLE


def test_after_a_failure_the_next_callers_are_told_at_once_and_why(
    breaker: CircuitBreaker, clock: SettableClock
) -> None:
    assert not down(breaker)
    breaker.record_error(GONE)
    clock.advance(0.9)
    with pytest.raises(DeviceError, match="is down: Signing: the module answered DeviceRemoved"):
        breaker.admit()


def test_it_lets_one_caller_try_by_itself_and_closes_when_that_one_is_answered(
    breaker: CircuitBreaker, clock: SettableClock, caplog: pytest.LogCaptureFixture
) -> None:
    breaker.record_error(GONE)
    clock.advance(1)
    assert not down(breaker)
    seen: list[bool] = []
    other = threading.Thread(target=lambda: seen.append(down(breaker)))
    other.start()
    other.join()
    assert seen == [True]
    assert not down(breaker)
    with caplog.at_level(logging.WARNING):
        breaker.worked()
    assert not breaker.open
    assert "device-back" in caplog.text


def test_its_pauses_grow_to_ten_seconds_and_start_anew_after_success(
    breaker: CircuitBreaker, clock: SettableClock
) -> None:
    pauses = []
    for _ in range(6):
        breaker.record_error(GONE)
        waited = 0
        while down(breaker):
            clock.advance(1)
            waited += 1
        pauses.append(waited)
    assert pauses == [1, 2, 4, 8, 10, 10]
    breaker.worked()
    breaker.record_error(GONE)
    clock.advance(1)
    assert not down(breaker)


def test_it_says_once_that_the_device_is_down(
    breaker: CircuitBreaker, clock: SettableClock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        breaker.record_error(GONE)
        clock.advance(20)
        breaker.admit()
    assert caplog.text.count("device-down") == 1


@pytest.mark.parametrize(
    "answer",
    [PinIncorrect("no", code="pin-incorrect"), PinNotTried("no", code="pin-locked"), MISSING],
    ids=str,
)
def test_a_device_that_answers_no_is_not_down(
    breaker: CircuitBreaker, answer: HsmTollError
) -> None:
    breaker.record_error(answer)
    assert not breaker.open


def test_a_trial_that_was_interrupted_is_left_to_the_next_caller(
    breaker: CircuitBreaker, clock: SettableClock
) -> None:
    breaker.record_error(GONE)
    clock.advance(1)
    breaker.admit()
    breaker.record_error(KeyboardInterrupt())
    seen: list[bool] = []
    other = threading.Thread(target=lambda: seen.append(down(breaker)))
    other.start()
    other.join()
    assert seen == [False]


@pytest.mark.parametrize("code", ["module-crashed", "device-hung"])
def test_a_process_that_died_or_hung_once_is_the_next_callers_new_process(
    breaker: CircuitBreaker, code: str
) -> None:
    died = DeviceError("signing: the process died", code=code)
    breaker.failed(died)
    assert not down(breaker)
    breaker.worked()
    breaker.failed(died)
    assert not down(breaker)
    breaker.failed(died)
    assert down(breaker)


def test_each_step_is_taken_once_in_order() -> None:
    taken: list[str] = []

    def first(exc: HsmTollError) -> bool:
        taken.append(f"first after {exc}")
        return True

    def helpless(_exc: HsmTollError) -> bool:
        return False

    def last(exc: HsmTollError) -> bool:
        taken.append(f"last after {exc}")
        return True

    steps = iter((first, helpless, last))
    errors = [DeviceError(f"number {n}", code="device-gone", retryable=True) for n in range(1, 4)]
    assert [should_retry(each, steps) for each in errors] == [True, True, False]
    assert taken == ["first after number 1", "last after number 2"]


@pytest.mark.parametrize("kind", [PinIncorrect, PinNotTried])
def test_no_step_is_taken_after_an_error_about_a_pin(kind: type[HsmTollError]) -> None:
    taken: list[HsmTollError] = []

    def step(exc: HsmTollError) -> bool:
        taken.append(exc)
        return True

    assert not should_retry(kind("the PIN", code="pin"), iter((step,)))
    assert not taken
    # The control: nobody looked at it, and it says that another try is worth it.
    assert should_retry(kind("the PIN", code="pin", retryable=True), iter((step,)))
