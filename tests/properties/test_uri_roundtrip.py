"""Claims about every RFC 7512 URI."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hsmtoll.errors import ConfigurationError
from hsmtoll.hsm.uri import KeyUri

_text = st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
_paths = st.none() | st.text(
    st.characters(exclude_characters="\0|", exclude_categories=["Cs"]), max_size=20
).map(lambda tail: "/" + tail)
uris = st.builds(
    KeyUri,
    token=_text,
    manufacturer=_text,
    model=_text,
    serial=_text,
    object=_text,
    slot_description=_text,
    id=st.none() | st.binary(max_size=40),
    slot_id=st.none() | st.integers(0, 2**64 - 1),
    library_version=st.none() | st.tuples(st.integers(0, 255), st.integers(0, 255)),
    type=st.sampled_from([None, "private", "cert", "public"]),
    module_path=_paths,
    pin_source=_paths,
)


@given(uris)
def test_every_uri_survives_being_written_and_read(uri: KeyUri) -> None:
    text = str(uri)
    assert KeyUri.parse(text) == uri
    assert text.isascii()
    assert text.split() == [text]


@given(st.text())
def test_any_text_is_a_uri_or_one_line_of_ours(text: str) -> None:
    try:
        uri = KeyUri.parse("pkcs11:" + text)
    except ConfigurationError as error:
        message = str(error)
    else:
        message = "one line"
        assert KeyUri.parse(str(uri)) == uri
    assert len(message.splitlines()) == 1


@given(uris, uris)
def test_two_uris_with_one_text_are_one_uri(one: KeyUri, other: KeyUri) -> None:
    assert (str(one) == str(other)) == (one == other)
