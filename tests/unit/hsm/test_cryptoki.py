"""What hsmtoll needs of python-pkcs11 beyond what is documented there."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from pkcs11 import PKCS11Error, types

from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.cryptoki import _inner as inner


@pytest.mark.parametrize("name", ["FunctionFailed", "SignMixin"])
def test_python_pkcs11_still_has_the_names_that_it_does_not_document(name: str) -> None:
    found = hasattr(inner, name)
    assert found, f"python-pkcs11 {version('python-pkcs11')} has no _pkcs11.{name}: see {cryptoki}"


def test_a_key_of_which_nothing_says_that_it_signs_is_given_the_librarys_way_to_sign() -> None:
    class Key(types.PrivateKey):
        def __init__(self, wrapper: object) -> None:
            self.wrapper = wrapper

    plain = Key("wrapper")
    assert not hasattr(plain, "sign")
    able = cryptoki.with_sign(plain)
    assert (able.wrapper, type(able).sign) == ("wrapper", inner.SignMixin.sign)
    assert cryptoki.with_sign(able) is able


def test_a_search_passes_over_every_error_of_an_attribute_and_a_program_does_not() -> None:
    before = inner.FunctionFailed
    with cryptoki._tolerant():
        assert inner.FunctionFailed is PKCS11Error
    assert inner.FunctionFailed is before
