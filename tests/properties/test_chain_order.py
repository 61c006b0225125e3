"""Any order, strangers and duplicates: one chain."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from hsmtoll.x509.path_building import build
from tests.kit import pki
from tests.kit.pki import NOW, authority, ec_key, leaf

if TYPE_CHECKING:
    from hsmtoll.x509.certificate import Certificate


@lru_cache
def _whole() -> tuple[Certificate, ...]:
    return pki.good()


@lru_cache
def _strangers() -> tuple[Certificate, ...]:
    return (
        *(authority(common, ec_key(5)) for common in ("Inter", "Root", "Other")),
        *(leaf(common, ec_key(5)) for common in ("Inter", "Root", "Other")),
        authority("Inter", ec_key(1), "Root", ec_key(0), ca=False),
        authority("Inter", ec_key(1), "Root", ec_key(9)),
        authority("Root", ec_key(0), "Inter", ec_key(1)),
        authority("Other", ec_key(6), "Root", ec_key(0)),
        authority("Example AB", pki.rsa_key()),
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_with_strangers_and_duplicates_gives_one_chain(data: st.DataObject) -> None:
    whole = _whole()
    strangers = data.draw(st.lists(st.sampled_from(_strangers())))
    doubles = data.draw(st.lists(st.sampled_from(whole)))
    pool = data.draw(st.permutations([*whole, *strangers, *doubles]))
    chain = build(whole[0], pool, now=NOW)
    assert chain.certificates == whole
    assert chain.complete
    assert chain.unused == len(set(strangers))


@given(st.permutations([*range(3), *range(3)]), st.sets(st.integers(0, 2), max_size=2))
@settings(max_examples=60, deadline=None)
def test_a_chain_with_a_certificate_missing_ends_below_the_gap(
    order: list[int], missing: set[int]
) -> None:
    whole = _whole()
    chain = build(whole[0], [whole[n] for n in order if n not in missing], now=NOW)
    reached = next((n for n in (1, 2) if n in missing), 3)
    assert chain.certificates == whole[:reached]
    assert chain.complete == (reached == 3)
