"""Fields of a certificate that decide, each with its defaults and its odd forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from hsmtoll.x509 import algorithms
from hsmtoll.x509.certificate_checks import leaf_faults
from tests.kit import pki
from tests.kit.pki import NOW

if TYPE_CHECKING:
    from hsmtoll.apis import Identity

NORSK = pki.name("Example AS", org="Example AS", serial="987654321", country="NO")


@pytest.mark.parametrize(
    ("parameters", "read"),
    [
        # RFC 4055 section 3.1: SHA-1 and 20 bytes where nothing is said.
        pytest.param("3000", ("sha1", "sha1", 20), id="nothing said"),
        pytest.param("3005a203020120", ("sha1", "sha1", 32), id="a salt"),
        pytest.param("3005a303020101", ("sha1", "sha1", 20), id="the one trailer there is"),
        pytest.param("3009a0073005060328a201", ("", "sha1", 20), id="a digest of another kind"),
        pytest.param("3005a303020102", ("", "", 0), id="another trailer"),
        pytest.param("3005a2030201ff", ("", "", 0), id="a salt of less than nothing"),
        pytest.param("3005a403020101", ("", "", 0), id="a field that there is none of"),
        pytest.param("0500", ("", "", 0), id="no parameters"),
    ],
)
def test_parameters_of_pss_are_read_with_their_defaults_or_not_at_all(
    parameters: str, read: tuple[str, str, int]
) -> None:
    assert algorithms._pss(bytes.fromhex(parameters)) == read


def test_only_keyusage_and_basicconstraints_may_be_critical_in_a_norwegian_leaf() -> None:
    """Of extensions that everybody knows: in an eSeal others may be critical as well."""
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])

    def codes(identity: Identity, *, critical: bool) -> set[str]:
        first = pki.leaf(subject=NORSK, extensions=[(purpose, critical)])
        return {fault.code for fault in leaf_faults(first, identity=identity, now=NOW)}

    assert "certificate-critical" in codes("norwegian", critical=True)
    assert "certificate-critical" not in codes("norwegian", critical=False)
    assert "certificate-critical" not in codes("eseal", critical=True)
