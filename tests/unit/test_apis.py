"""The catalogue of APIs: each has the scope of its family, and nothing is guessed."""

from __future__ import annotations

import pytest

from hsmtoll import apis
from hsmtoll.apis import APIS, Identity
from hsmtoll.errors import ConfigurationError, UsageError

NAMES = [
    "road",
    "road-query",
    "air",
    "air-query",
    "rail",
    "rail-query",
    "maritime",
    "maritime-query",
    "presentation",
    "routing",
    "document",
    "arrival",
    "maritime-ssnn",
    "maritime-ssnn-query",
    "declaration-feed",
    "verksemd.eu",
]


def test_the_names_are_those_of_the_guide() -> None:
    assert [api.name for api in APIS] == NAMES


@pytest.mark.parametrize("api", APIS, ids=lambda api: str(api.name))
def test_only_road_scopes_end_in_a_version(api: apis.Api) -> None:
    for scope in (api.norwegian, api.eseal):
        assert scope is None or scope.endswith("/v2") == api.name.startswith("road")


@pytest.mark.parametrize(
    ("identity", "scope"),
    [("eseal", "toll:eu/movement/road/v2"), ("norwegian", "toll:movement/road/v2")],
)
def test_a_name_means_the_scope_of_the_family(identity: Identity, scope: str) -> None:
    assert apis.scope_of("road", identity) == scope


@pytest.mark.parametrize(
    ("identity", "scope"),
    [
        ("norwegian", "toll:eu/movement/road/v2"),
        ("eseal", "toll:movement/road/v2"),
        ("norwegian", "digdir:verksemd.eu"),
        ("norwegian", "verksemd.eu"),
    ],
)
def test_a_scope_of_the_other_family_is_refused(identity: Identity, scope: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        apis.scope_of(scope, identity)

    assert caught.value.code == "scope-family"


def test_the_hint_names_the_twin_scope() -> None:
    with pytest.raises(ConfigurationError) as caught:
        apis.scope_of("toll:eu/movement/air", "norwegian")

    assert caught.value.hint == "use toll:movement/air"


def test_an_unknown_scope_is_allowed_if_its_family_fits() -> None:
    assert apis.scope_of("toll:eu/movement/new", "eseal") == "toll:eu/movement/new"


def test_an_api_that_is_not_ready_is_refused_with_that_reason() -> None:
    for word in ("declaration-feed", "toll:declaration.feed"):
        with pytest.raises(UsageError, match="not yet ready"):
            apis.scope_of(word, "norwegian")


def test_a_misspelt_name_gets_the_nearest_one() -> None:
    with pytest.raises(UsageError) as caught:
        apis.scope_of("maritim", "eseal")

    assert caught.value.hint == "did you mean maritime?"


@pytest.mark.parametrize("scope", ["toll:eu/a toll:eu/b", "toll:eu/a\n", "toll:eu/\x1b[2J"])
def test_one_scope_a_token(scope: str) -> None:
    with pytest.raises(UsageError):
        apis.scope_of(scope, "eseal")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/api/movement/road/v2/test-auth", "road"),
        ("/api/movement/road/status/v2/transport/x", "road-query"),
        ("/api/movement/air/v1/transport", "air"),
        ("/api/movement/routing/v1/house-consignment?marker=1", "routing"),
        ("/api/goodsdeclaration/document/v2/declaration-id/1/document", "document"),
    ],
)
def test_a_path_tells_its_api(path: str, name: str) -> None:
    assert apis.api_of_path(path).name == name


@pytest.mark.parametrize("path", ["/", "/api/movement/road/v22/x", "/api/movement/roadv2", "x"])
def test_a_path_of_no_api_is_refused_with_the_way_around(path: str) -> None:
    with pytest.raises(UsageError, match="not in the table of APIs") as caught:
        apis.api_of_path(path)
    assert "--scope" in (caught.value.hint or "")
    assert apis.VERSION in str(caught.value)


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("/api/movement/road/v2/test-auth", "/api/movement/road/v2"),
        ("/api/movement/new/v3/thing?x=1", "/api/movement/new/v3"),
        ("/", "/"),
    ],
)
def test_with_a_scope_any_path_is_one(path: str, base: str) -> None:
    assert apis.at(path).base == base


@pytest.mark.parametrize(
    "path", ["", "x", "@evil.example/", ".evil.example/", "//x", "/a\\b", "/ "]
)
def test_no_path_may_change_whose_the_origin_is(path: str) -> None:
    with pytest.raises(UsageError):
        apis.at(path)


def test_an_api_without_a_documented_scope_asks_for_one() -> None:
    for identity in ("eseal", "norwegian"):
        with pytest.raises(UsageError, match="names no scope") as caught:
            apis.scope_of("arrival", identity)
        assert "--scope" in (caught.value.hint or "")
    assert apis.scope_of("maritime-ssnn", "norwegian") == "toll:movement/maritimessnn"
    with pytest.raises(ConfigurationError):
        apis.scope_of("maritime-ssnn", "eseal")
