"""What the soaks judge growth by finds a leak, and takes a step of the allocator for none."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.kit.accounts import importable
from tests.soak.measure import children, slope


def test_steady_growth_is_found_under_noise_and_one_step_is_not_growth() -> None:
    noise = random.Random(4)
    flat = [(float(x), 46e6 + noise.uniform(-1e5, 1e5)) for x in range(200, 1000, 10)]
    stepped = [(x, y + (5e5 if x > 320 else 0)) for x, y in flat]
    leaking = [(x, y + 1500 * x) for x, y in stepped]
    assert abs(slope(flat)) < 200
    assert slope(stepped) < 1024
    assert slope(leaking) > 1024


#: In a process of its own: this one may give memory of other tests back meanwhile.
_HELD = """
from tests.soak.measure import descriptors, in_use, memory

before, used = memory(), in_use()
held = bytearray(b"1") * (32 * 2**20)
assert memory() - before > 16 * 2**20
assert in_use() - used > 16 * 2**20
assert held[-1]
assert descriptors() > 0
"""


def test_what_a_process_holds_is_seen() -> None:
    subprocess.run([sys.executable, "-c", _HELD], env=os.environ | importable(), check=True)


def test_a_child_is_seen_whichever_thread_started_it_and_until_it_is_gone() -> None:
    with ThreadPoolExecutor(1) as pool:
        child = pool.submit(subprocess.Popen, ["sleep", "60"]).result()
        assert child.pid in children()
    try:
        assert child.pid in children()
    finally:
        child.kill()
        child.wait()
    assert child.pid not in children()
