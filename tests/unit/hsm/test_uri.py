"""RFC 7512 URIs: what is read, what is refused, and what they match."""

from __future__ import annotations

import pytest

from hsmtoll.errors import ConfigurationError
from hsmtoll.hsm.uri import KeyUri

EVERYTHING = (
    "pkcs11:library-manufacturer=Acme;library-description=Cryptoki;library-version=2.40;"
    "slot-manufacturer=Maker;slot-description=Reader%200;slot-id=7;manufacturer=M;model=X1;"
    "serial=0042;token=My%20token;object=acme-2026;id=%01%ab%FF;type=private"
    "?module-path=/usr/lib/m.so&pin-source=file:/run/secrets/pin"
)


def test_every_attribute_of_the_rfc_is_read() -> None:
    assert KeyUri.parse(EVERYTHING) == KeyUri(
        library_manufacturer="Acme",
        library_description="Cryptoki",
        library_version=(2, 40),
        slot_manufacturer="Maker",
        slot_description="Reader 0",
        slot_id=7,
        manufacturer="M",
        model="X1",
        serial="0042",
        token="My token",
        object="acme-2026",
        id=b"\x01\xab\xff",
        type="private",
        module_path="/usr/lib/m.so",
        pin_source="/run/secrets/pin",
    )


@pytest.mark.parametrize(
    "text", [EVERYTHING, "pkcs11:", "pkcs11:id=%3b%3F", "pkcs11:token=a%3Bb%2Fc"]
)
def test_the_normalised_text_means_the_same(text: str) -> None:
    read = KeyUri.parse(text)
    assert KeyUri.parse(str(read)) == read
    assert str(KeyUri.parse(str(read))) == str(read)


def test_the_order_of_attributes_and_the_case_of_the_scheme_do_not_matter() -> None:
    assert KeyUri.parse("PKCS11:object=k;token=t") == KeyUri.parse("pkcs11:token=t;object=k")


def test_an_id_may_mix_letters_and_bytes() -> None:
    assert KeyUri.parse("pkcs11:id=ab%00c").id == b"ab\x00c"


def test_letters_beyond_ascii_are_utf8() -> None:
    assert KeyUri.parse("pkcs11:object=n%C3%B8kkel") == KeyUri.parse("pkcs11:object=nøkkel")


def test_pin_source_is_a_file_as_path_or_uri() -> None:
    for text in ("/run/pin", "file:/run/pin", "file:///run/pin", "file://localhost/run/pin"):
        assert KeyUri.parse(f"pkcs11:?pin-source={text}").pin_source == "/run/pin"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token=t", "does not start with 'pkcs11:'"),
        ("pkcs11:tokn=t", "'tokn' is not an attribute"),
        ("pkcs11:token=a;token=b", "'token' is given twice"),
        ("pkcs11:token=%2", "without two hex digits"),
        ("pkcs11:token=%zz", "without two hex digits"),
        ("pkcs11:token=%ff", "'token' is not UTF-8"),
        ("pkcs11:object=\udce6", "'object' is not UTF-8"),
        ("pkcs11:\udce6=t", "is not an attribute"),
        ("pkcs11:token=a%00", "NUL"),
        ("pkcs11:token", "'token' has no value"),
        ("pkcs11:slot-id=0x1", "'slot-id' is a decimal number"),
        ("pkcs11:library-version=two", "'library-version' is a decimal number"),
        ("pkcs11:library-version=2.", "'library-version' is a decimal number"),
        ("pkcs11:type=key", "'type' is one of"),
        ("pkcs11:module-path=/m.so", "wrong side of the '?'"),
        ("pkcs11:?token=t", "wrong side of the '?'"),
        ("pkcs11:?pin-source=pin", "absolute path"),
        ("pkcs11:?pin-source=|cat%20/pin", "absolute path"),
        ("pkcs11:?pin-source=https://host/pin", "absolute path"),
        ("pkcs11:?pin-source=file://host/pin", "a file of this machine"),
        ("pkcs11:?pin-source=file://[x/pin", "not the URI of a file"),
        ("pkcs11:?module-name=softhsm", "'module-name' is refused"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        KeyUri.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == "uri"
    assert caught.value.exit_code == 10


def test_a_pin_in_the_uri_is_refused_with_the_reason_and_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as caught:
        KeyUri.parse("pkcs11:token=t?pin-value=98761234")
    assert "logs" in str(caught.value)
    assert "98761234" not in f"{caught.value} {caught.value.hint} {caught.value!r}"
    assert "pin-source" in (caught.value.hint or "")


def test_an_escape_in_a_name_is_not_sent_to_the_terminal() -> None:
    with pytest.raises(ConfigurationError) as caught:
        KeyUri.parse("pkcs11:\x1b[31m=t")
    assert "\x1b" not in str(caught.value)


def test_what_is_not_named_matches_everything_and_what_is_named_must_agree() -> None:
    uri = KeyUri.parse("pkcs11:token=lab;serial=12")
    assert uri.matches(token="lab", serial="12", model="anything")
    assert uri.matches(token="lab   \0", serial="12")
    assert not uri.matches(token="lab", serial="13")
    assert not uri.matches(token="LAB", serial="12")


def test_a_label_is_compared_to_its_last_blank() -> None:
    uri = KeyUri.parse("pkcs11:object=acme")
    assert uri.matches(object="acme")
    assert not uri.matches(object="acme ")
    assert KeyUri.parse("pkcs11:object=acme%20").matches(object="acme ")
    # An empty one names what has none.
    assert KeyUri.parse("pkcs11:object=").matches(object="")
    assert not KeyUri.parse("pkcs11:object=").matches(object="acme")


def test_a_library_version_without_minor_is_that_of_minor_zero() -> None:
    # RFC 7512 section 2.3; p11-kit reads it so as well.
    assert KeyUri.parse("pkcs11:library-version=2").library_version == (2, 0)
    assert KeyUri.parse("pkcs11:library-version=2").matches(library_version=(2, 0))
    assert not KeyUri.parse("pkcs11:library-version=2").matches(library_version=(2, 6))
    assert KeyUri.parse("pkcs11:library-version=2.6").matches(library_version=(2, 6))
    assert not KeyUri.parse("pkcs11:library-version=2.5").matches(library_version=(2, 6))


def test_a_named_id_of_no_bytes_is_not_the_same_as_no_id() -> None:
    assert KeyUri.parse("pkcs11:id=").id == b""
    assert not KeyUri.parse("pkcs11:id=").matches(id=b"\x01")
    assert KeyUri.parse("pkcs11:").matches(id=b"\x01")


def test_the_device_of_a_key_is_named_without_the_key() -> None:
    device = KeyUri.parse(EVERYTHING).device_only()
    assert not device.names_object
    assert device.serial == "0042"
    assert KeyUri.parse(EVERYTHING).names_object
