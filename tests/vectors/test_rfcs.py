"""The examples of the RFCs themselves."""

from __future__ import annotations

import base64

import pytest

from hsmtoll import jws
from hsmtoll.errors import ConfigurationError
from hsmtoll.hsm.uri import KeyUri
from hsmtoll.jws import RsaPublicKey

#: RFC 7512 section 3, in its order, and what is read of it.
READ = {
    "pkcs11:": KeyUri(),
    "pkcs11:object=my-pubkey;type=public": KeyUri(object="my-pubkey", type="public"),
    "pkcs11:object=my-key;type=private?pin-source=file:/etc/token": KeyUri(
        object="my-key", type="private", pin_source="/etc/token"
    ),
    "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;"
    "model=1.0;object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial="
    "?pin-source=file:/etc/token_pin": KeyUri(
        token="The Software PKCS#11 Softtoken", manufacturer="Snake Oil, Inc.", model="1.0",
        object="my-certificate", type="cert", id=bytes.fromhex("69953e5cf4bdec91"), serial="",
        pin_source="/etc/token_pin",
    ),
    "pkcs11:object=my-sign-key;type=private?module-path=/mnt/libmypkcs11.so.1": KeyUri(
        object="my-sign-key", type="private", module_path="/mnt/libmypkcs11.so.1"
    ),
    "pkcs11:slot-description=Sun%20Metaslot": KeyUri(slot_description="Sun Metaslot"),
    "pkcs11:library-manufacturer=Snake%20Oil,%20Inc.;library-description=Soft%20Token%20Library;"
    "library-version=1.23": KeyUri(
        library_manufacturer="Snake Oil, Inc.", library_description="Soft Token Library",
        library_version=(1, 23),
    ),
    "pkcs11:token=My%20token%25%20created%20by%20Joe;library-version=3;"
    "id=%01%02%03%Ba%dd%Ca%fe%04%05%06": KeyUri(
        token="My token% created by Joe", library_version=(3, 0),
        id=bytes.fromhex("010203baddcafe040506"),
    ),
    "pkcs11:token=A%20name%20with%20a%20substring%20%25%3B;object=my-certificate;type=cert": KeyUri(
        token="A name with a substring %;", object="my-certificate", type="cert"
    ),
    "pkcs11:token=Name%20with%20a%20small%20A%20with%20acute:%20%C3%A1;object=my-certificate;"
    "type=cert": KeyUri(
        token="Name with a small A with acute: \N{LATIN SMALL LETTER A WITH ACUTE}",
        object="my-certificate", type="cert",
    ),
}  # fmt: skip

#: By decision: no PIN in a URI, a module by its path alone, and no attribute that nobody reads.
REFUSED = {
    "pkcs11:object=my-sign-key;type=private?module-name=mypkcs11": "module-name",
    "pkcs11:token=Software%20PKCS%2311%20softtoken;manufacturer=Snake%20Oil,%20Inc."
    "?pin-value=the-pin": "pin-value",
    "pkcs11:token=my-token;object=my-certificate;type=cert;vendor-aaa=value-a"
    "?pin-source=file:/etc/token_pin&vendor-bbb=value-b": "vendor-aaa",
}


@pytest.mark.parametrize(("uri", "read"), READ.items())
def test_an_example_of_rfc_7512_is_read_and_written_and_read_again(uri: str, read: KeyUri) -> None:
    assert KeyUri.parse(uri) == read
    assert KeyUri.parse(str(read)) == read


@pytest.mark.parametrize(("uri", "attribute"), REFUSED.items())
def test_an_example_of_rfc_7512_that_is_refused_is_refused_by_the_attributes_name(
    uri: str, attribute: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"'{attribute}'") as caught:
        KeyUri.parse(uri)
    assert "the-pin" not in f"{caught.value} {caught.value.hint}"


def _key(modulus: str) -> RsaPublicKey:
    return RsaPublicKey(int.from_bytes(base64.urlsafe_b64decode(modulus + "=="), "big"), 65537)


def test_the_example_of_rfc_7638_section_3_1_has_its_thumbprint() -> None:
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJEC"
        "PebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2Qvz"
        "qY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZ"
        "u0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    assert _key(modulus).thumbprint() == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    # The control: another key has another one.
    assert _key(modulus[:-1] + "s").thumbprint() != _key(modulus).thumbprint()


def test_the_example_of_rfc_7515_appendix_a_2_is_read_and_verified() -> None:
    key = _key(
        "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm"
        "4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5"
        "rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGh"
        "yxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"
    )
    unsigned = (
        "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFt"
        "cGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
    )
    signature = (
        "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp"
        "5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMH"
        "lb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w"
        "9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"
    )
    header, claims = jws.read_unverified(f"{unsigned}.{signature}")
    assert header == {"alg": "RS256"}
    assert claims == {"iss": "joe", "exp": 1300819380, "http://example.com/is_root": True}
    raw = base64.urlsafe_b64decode(signature + "==")
    assert key.verify("RS256", unsigned.encode(), raw)
    assert not key.verify("RS256", unsigned.encode() + b"x", raw)
