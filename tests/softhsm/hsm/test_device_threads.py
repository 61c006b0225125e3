"""Threads on one module: python-pkcs11 alone crashes SoftHSM here within half a second."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.kit.grants import DEFINED

if TYPE_CHECKING:
    from pathlib import Path

    from tests.softhsm.conftest import DeviceSoftHsm

# scripts/soak lets them run a minute each.
SECONDS = os.environ.get("TOLL_SOAK_SECONDS", "3")

_THREADS = (
    DEFINED
    + """
import sys, threading, time
from pathlib import Path
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.uri import KeyUri
module, state, threads, seconds = sys.argv[1:]
keys = ["object=acme", "object=nopublic", "id=%02", "id=%03"]
devices = [
    InProcessDevice(DeviceSettings(Path(module), KeyUri.parse("pkcs11:token=lab;" + key)),
           pin=PinValue.of("1234"), pin_log=PinLog(Path(state)))
    for key in keys
]
until, good, bad = time.monotonic() + float(seconds), [], []

def work(n):
    device = devices[n % len(devices)]
    try:
        public, count = device.key().public, 0
        while time.monotonic() < until:
            unsigned = a_grant(f"{n}.{count}")
            assert public.verify("RS256", unsigned, device.sign("RS256", unsigned).value)
            count += 1
            if count % 50 == 0:
                device.certificates()
            if n == 1 and count % 20 == 0:
                device.close()
        good.append(count)
    except BaseException as error:
        bad.append(repr(error))

running = [threading.Thread(target=work, args=(n,)) for n in range(int(threads))]
[t.start() for t in running]
[t.join() for t in running]
assert not bad, bad[:3]
assert len(good) == int(threads) and min(good) > 0, good
print(sum(good))
"""
)

_UNLOCKED = """
import sys, threading, time, pkcs11
from pkcs11 import Mechanism, ObjectClass
token = pkcs11.lib(sys.argv[1]).get_token(token_label="lab")
anchor = token.open(user_pin="1234")
until, bad = time.monotonic() + 10, []

def work():
    try:
        session = token.open()
        key = session.get_key(object_class=ObjectClass.PRIVATE_KEY, label="acme")
        while time.monotonic() < until and not bad:
            key.sign(b"x", mechanism=Mechanism.SHA256_RSA_PKCS)
    except BaseException as error:
        bad.append(error)

running = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in running]
[t.join() for t in running]
sys.stdout.flush()
import os
os._exit(1 if bad else 0)
"""


@pytest.mark.parametrize("threads", [2, 8, 32])
def test_every_signature_of_every_thread_verifies(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, threads: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _THREADS, str(device_softhsm.module), str(tmp_path),
         str(threads), SECONDS],
        env=device_softhsm.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= threads


def test_without_our_lock_the_same_module_breaks(device_softhsm: DeviceSoftHsm) -> None:
    argv = [sys.executable, "-c", _UNLOCKED, str(device_softhsm.module)]
    try:
        done = subprocess.run(
            argv, env=device_softhsm.environment, capture_output=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        return  # threads that wait for each other inside the module: broken as well
    assert done.returncode != 0


def test_a_thread_that_waits_too_long_is_told_so_and_the_other_goes_on(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    import threading

    from hsmtoll.errors import DeviceError
    from hsmtoll.hsm.device import DeviceSettings
    from hsmtoll.hsm.in_process import InProcessDevice
    from hsmtoll.hsm.module import PKCS11_LOCK
    from hsmtoll.hsm.pin_log import PinLog
    from hsmtoll.hsm.uri import KeyUri

    device = InProcessDevice(
        DeviceSettings(device_softhsm.module, KeyUri.parse("pkcs11:token=lab"), deadline=0.05),
        pin=None,
        pin_log=PinLog(tmp_path),
    )
    caught: list[DeviceError] = []

    def ask() -> None:
        try:
            device.certificates()
        except DeviceError as error:
            caught.append(error)

    with PKCS11_LOCK.held(1):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert [error.code for error in caught] == ["device-busy"]
    assert caught[0].retryable
    assert "ISOLATION=process" in (caught[0].hint or "")
    assert device.certificates()
    device.close()
