"""x509-limbo: paths, time, and constraints of directory names, in any order."""

from __future__ import annotations

import base64
import random
from datetime import UTC, datetime
from typing import Any

import pytest

from hsmtoll.errors import CertificateError
from hsmtoll.x509.certificate import Certificate
from hsmtoll.x509.certificate_checks import chain_faults, leaf_faults
from hsmtoll.x509.path_building import build
from tests.kit import vectors

SUITE = vectors.data("x509-limbo.json")
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in SUITE["cases"]}
#: When the suite was made: for cases that name no time.
MADE = datetime(2026, 6, 29, tzinfo=UTC)
OF_ANY_LEAF = {
    "certificate-critical", "certificate-expired", "certificate-kind", "certificate-not-yet-valid",
}  # fmt: skip


def _loaded(place: int) -> Certificate | None:
    try:
        return Certificate.load(base64.b64decode(SUITE["certificates"][place]))
    except ValueError:
        return None


def _proven(case: dict[str, Any], order: random.Random) -> bool:
    now = datetime.fromisoformat(case["time"]) if case["time"] else MADE
    leaf = _loaded(case["leaf"])
    trusted = [found for place in case["trusted"] if (found := _loaded(place))]
    others = [found for place in case["others"] if (found := _loaded(place))]
    if leaf is None or OF_ANY_LEAF & {
        fault.code for fault in leaf_faults(leaf, identity="eseal", now=now)
    }:
        return False
    pool = [*trusted, *others]
    order.shuffle(pool)
    for root in trusted:
        try:
            chain = build(leaf, pool, now=now, root_sha256=root.sha256)
        except CertificateError:  # chain-pin: no path to this root
            continue
        if not chain_faults(chain, identity="eseal", now=now):
            return True
    return False


def test_what_was_taken_is_there() -> None:
    assert len(CASES) == 65
    assert {case["valid"] for case in CASES.values()} == {True, False}


@pytest.mark.parametrize("seed", range(3))
def test_each_path_ends_as_the_suite_says_in_any_order(seed: int) -> None:
    order = random.Random(seed)
    vectors.judge(
        "x509-limbo", {name: (case["valid"], _proven(case, order)) for name, case in CASES.items()}
    )
