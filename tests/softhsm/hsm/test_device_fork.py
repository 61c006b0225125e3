"""Forks: the child starts afresh where that is harmless, and the parent does not notice."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.kit.accounts import importable
from tests.kit.grants import DEFINED
from tests.softhsm.conftest import CROWD

if TYPE_CHECKING:
    from pathlib import Path

    from tests.softhsm.conftest import DeviceSoftHsm

_HEAD = (
    DEFINED
    + """
import os, sys, threading, time
from tests.kit.forks import fork_in_c
from pathlib import Path
from hsmtoll.errors import HsmTollError
from hsmtoll.hsm.device import DeviceSettings
from hsmtoll.hsm.in_process import InProcessDevice
from hsmtoll.hsm.pin_log import PinLog
from hsmtoll.hsm.pin import PinValue
from hsmtoll.hsm.uri import KeyUri
module, state = Path(sys.argv[1]), Path(sys.argv[2])
def make():
    uri = KeyUri.parse("pkcs11:token=lab;object=acme")
    return InProcessDevice(
        DeviceSettings(module, uri), pin=PinValue.of("1234"), pin_log=PinLog(state)
    )
def check(device):
    for n in range(20):
        data = a_grant(str(n))
        assert device.key().public.verify("RS256", data, device.sign("RS256", data).value)
def child(device):
    check(device)
    device.close()
def forked(device, fork=os.fork):
    pid = fork()
    if not pid:
        try:
            child(device)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid
"""
)

# As gunicorn does with preload: the application is used once, then the workers are forked.
_PRELOAD = """
device = make()
check(device)
workers = []
for n in range(4):
    pid = forked(device)
    workers.append(pid)
check(device)
assert [os.waitpid(pid, 0)[1] for pid in workers] == [0] * 4
check(device)
"""

# Each login rewrites the file that the others are reading: who starts may see half of a device.
_CROWDS = """
device = make()
check(device)
for _ in range(int(sys.argv[3])):
    ready, go = os.pipe()
    workers = []
    for n in range(8):
        pid = os.fork()
        if not pid:
            try:
                os.close(go)
                os.read(ready, 1)
                device.sign("RS256", a_grant())
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        workers.append(pid)
    os.close(ready)
    os.close(go)
    assert [os.waitpid(pid, 0)[1] for pid in workers] == [0] * 8
"""

_BUSY = """
device = make()
check(device)
done, bad = threading.Event(), []
def work():
    try:
        while not done.is_set():
            check(device)
    except BaseException as error:
        bad.append(repr(error))
threads = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in threads]
for n in range(20):
    pid = forked(device)
    assert os.waitpid(pid, 0)[1] == 0
done.set()
[t.join() for t in threads]
assert not bad, bad
"""

# No hook runs, so nobody has waited for the lock: here a thread of the parent has it.
_WITHOUT_HOOKS = """
from hsmtoll.hsm.module import PKCS11_LOCK
device = make()
check(device)
held, end = threading.Event(), threading.Event()
def hold():
    with PKCS11_LOCK.held(60):
        held.set()
        end.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
pid = forked(device, fork_in_c)
assert os.waitpid(pid, 0)[1] == 0
end.set()
thread.join()
check(device)
"""

_MULTIPROCESSING = """
import multiprocessing
def task(n):
    device = make()
    check(device)
    device.close()
    return n
if __name__ == "__main__":
    check(make())
    context = multiprocessing.get_context(sys.argv[3])
    with context.Pool(2) as pool:
        assert pool.map(task, range(4)) == [0, 1, 2, 3]
        pool.close()
        pool.join()
    check(make())
"""

# What is known of a module is its manufacturer; a TPM's is not on the list.
_HARMFUL = """
from hsmtoll.hsm import module as modules
device = make()
check(device)
opened = modules.open_module(module)
class Tpm:
    manufacturer_id = "tpm2-software.github.io"
    def __init__(self, lib): self.lib = lib
    def __getattr__(self, name): return getattr(self.lib, name)
opened.lib = Tpm(opened.lib)
pid = os.fork()
if not pid:
    try:
        device.sign("RS256", a_grant())
        os._exit(1)
    except HsmTollError as error:
        print(error.exit_code, error.code, "spawn" in error.hint, flush=True)
        os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
check(device)
"""


def run(softhsm: DeviceSoftHsm, folder: Path, program: str, *more: str) -> str:
    script = folder / "script.py"
    script.write_text(_HEAD + program)
    done = subprocess.run(
        [sys.executable, str(script), str(softhsm.module), str(folder / "state"), *more],
        env={**softhsm.environment, **importable()},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_workers_forked_from_a_preloaded_application_sign_and_so_does_the_parent(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    run(device_softhsm, tmp_path, _PRELOAD)


def test_workers_that_all_begin_at_one_moment_find_their_device(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    run(device_softhsm, tmp_path, _CROWDS, str(CROWD))


def test_a_fork_in_the_middle_of_signing_threads_is_safe(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    run(device_softhsm, tmp_path, _BUSY)


def test_workers_of_a_server_that_runs_no_hooks_of_python_sign(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    run(device_softhsm, tmp_path, _WITHOUT_HOOKS)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing_works_in_each_of_its_ways(
    device_softhsm: DeviceSoftHsm, tmp_path: Path, method: str
) -> None:
    run(device_softhsm, tmp_path, _MULTIPROCESSING, method)


def test_where_a_fresh_start_could_harm_the_parent_the_child_is_told_what_to_do(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    assert run(device_softhsm, tmp_path, _HARMFUL) == "30 forked True\n"


def test_a_child_that_only_closes_what_it_inherited_does_not_log_the_parent_out(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    program = """
device = make()
check(device)
pid = os.fork()
if not pid:
    device.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
check(device)
"""
    run(device_softhsm, tmp_path, program)


def test_a_module_first_opened_in_the_child_needs_no_permission(
    device_softhsm: DeviceSoftHsm, tmp_path: Path
) -> None:
    program = """
device = make()
pid = os.fork()
if not pid:
    child(device)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
check(device)
"""
    run(device_softhsm, tmp_path, program)
