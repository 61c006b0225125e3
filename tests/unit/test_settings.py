"""Settings: one reader of the outside world, every name known, no value shown."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.errors import ConfigurationError
from hsmtoll.files import check_trusted
from hsmtoll.settings import Settings, load, variable

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "hsmtoll.toml"


def refusal(**given: object) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        load(**given)  # type: ignore[arg-type] # wrong values are the point
    return caught.value


def test_arguments_win_over_the_environment_over_the_profile_over_the_file(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    toml.write_text('timeout = 1\ndeadline = 1\niss = "file"\nx5c = "leaf"\n'
                    '[profile.acme]\ndeadline = 2\niss = "profile"\ntimeout = 2\n')  # fmt: skip
    monkeypatch.setenv("HSMTOLL_ISS", "environment")
    monkeypatch.setenv("HSMTOLL_TIMEOUT", "3")

    made = load(config=toml, profile="acme", timeout=4)

    assert (made.timeout, made.iss, made.deadline, made.x5c) == (4, "environment", 2, "leaf")


def test_nested_settings_come_from_variables_tables_and_flat_arguments(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    toml.write_text('[hsm]\ntoken_label = "file"\nkey_label = "file"\n')
    monkeypatch.setenv("HSMTOLL_HSM__KEY_LABEL", "environment")

    made = load(config=toml, hsm__key_id="0A:0b", hsm={"allow_exportable_key": True})

    hsm = made.hsm
    assert (hsm.token_label, hsm.key_label, hsm.key_id) == ("file", "environment", "0a0b")
    assert hsm.allow_exportable_key


def test_lists_are_words_in_the_environment_and_arrays_in_the_file(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    monkeypatch.setenv("HSMTOLL_HSM__KEY", "pkcs11:token=a  pkcs11:token=b\n")
    toml.write_text('resource = ["https://a/", "https://b/"]\n')

    made = load(config=toml)

    assert made.hsm.key == ("pkcs11:token=a", "pkcs11:token=b")
    assert made.resource == ("https://a/", "https://b/")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("HSMTOLL_ENVIROMENT", "did you mean HSMTOLL_ENVIRONMENT?"),
        ("hsmtoll_enviroment", "did you mean HSMTOLL_ENVIRONMENT?"),
        ("HSMTOLL_HSM__PINFILE", "did you mean HSMTOLL_HSM__PIN_FILE?"),
        ("HSMTOLL_HSM_MODULE", "did you mean HSMTOLL_HSM__MODULE?"),
        ("HSMTOLL_CONFG", "did you mean HSMTOLL_CONFIG?"),
    ],
)
def test_a_variable_that_is_not_known_is_an_error_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    monkeypatch.setenv(name, "a-secret-perhaps")
    error = refusal()

    assert name in str(error)
    assert error.hint == hint
    assert "a-secret" not in str(error)


def test_a_variable_that_is_known_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSMTOLL_ENVIRONMENT", "test")
    monkeypatch.setenv("hsmtoll_iss", "x")

    assert (load().environment, load().iss) == ("test", "x")


def test_one_setting_in_two_spellings_is_an_error_that_names_both(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    toml.touch()
    for name, one, other in (
        ("HSMTOLL_ENVIRONMENT", "test", "prod"),
        ("HSMTOLL_CONFIG", str(toml), str(toml)),
    ):
        monkeypatch.setenv(name, one)
        monkeypatch.setenv(name.lower(), "")
        load()

        monkeypatch.setenv(name.lower(), other)
        error = refusal()
        assert name in str(error)
        assert name.lower() in str(error)
        assert error.code == "setting-twice"
        monkeypatch.delenv(name)
        load()


def test_the_configuration_file_is_named_in_any_case_as_all_else_is(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    toml.write_text("timeout = 5\n")
    monkeypatch.setenv("hsmtoll_config", str(toml))
    assert load().timeout == 5

    monkeypatch.setenv("hsmtoll_config", str(toml.with_name("nowhere.toml")))
    assert "no such file" in str(refusal())


@pytest.mark.parametrize(
    "text", ["enviroment = 1", "[hsm]\nmodul = 1", "[profile.x.hsm]\npim = 1", "[profile]\nx = 1"]
)
def test_a_key_that_is_not_known_is_an_error(toml: Path, text: str) -> None:
    toml.write_text(text)

    assert str(toml) in str(refusal(config=toml))


def test_a_profile_that_is_not_there_gets_the_nearest_name(toml: Path) -> None:
    toml.write_text("[profile.acme]\n")

    assert refusal(config=toml, profile="acne").hint == "did you mean acme?"


def test_a_file_that_is_not_toml_is_named_and_not_quoted(toml: Path) -> None:
    toml.write_text('[hsm]\npin = "98765432\n')
    error = refusal(config=toml)

    assert str(toml) in str(error)
    assert "98765432" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "[profile.x]\nresource = " + "[" * 100_000,
        f"hsm.key{'.a' * 2_000} = 1\n[profile.x]\nhsm.key{'.a' * 2_000} = 2\n",
    ],
)
def test_a_file_that_is_nested_without_end_is_refused(toml: Path, text: str) -> None:
    toml.write_text(text)
    assert "nested too deeply" in str(refusal(config=toml, profile="x"))

    toml.write_text("[profile.x]\nresource = []")
    load(config=toml, profile="x")


@pytest.mark.parametrize("name", ["HSMTOLL_RESOURCE", "HSMTOLL_HSM__KEY"])
def test_words_are_text(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "pkcs11:a pkcs11:b")
    load()

    # So are bytes of another encoding handed to a program.
    monkeypatch.setenv(name, "pkcs11:a https://\udcff/")
    assert name in str(refusal())


def test_a_wrong_value_names_the_variable_and_shows_no_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HSMTOLL_HSM__PIN", "98765432")
    monkeypatch.setenv("HSMTOLL_HSM__ISOLATION", "98765432")
    monkeypatch.setenv("HSMTOLL_TIMEOUT", "soon")
    error = refusal()

    message = f"{error} {error.hint}"
    assert "HSMTOLL_HSM__ISOLATION" in message
    assert "HSMTOLL_TIMEOUT" in message
    assert "98765432" not in message
    assert error.__context__ is None or error.__suppress_context__


def test_secrets_show_as_asterisks() -> None:
    made = load(hsm__pin="98765432", cache="file:///98765432", proxy="http://u:98765432@proxy:3128")

    assert "98765432" not in repr(made) + str(made)


@pytest.mark.parametrize("kind", ["pin", "signing_pin"])
def test_a_pin_comes_from_one_source(kind: str) -> None:
    error = refusal(hsm={kind: "1", f"{kind}_prompt": "terminal"})

    assert variable("hsm", f"{kind}_prompt") in str(error)
    load(hsm={kind: "1"})


def test_a_key_is_selected_by_uri_or_by_parts() -> None:
    assert "HSMTOLL_HSM__KEY_ID" in str(refusal(hsm__key="pkcs11:", hsm__key_id="01"))


def test_one_kid_cannot_name_several_keys() -> None:
    keys = "pkcs11:token=a pkcs11:token=b"

    assert "HSMTOLL_KID" in str(refusal(hsm__key=keys, kid="k1"))
    load(hsm__key=keys, kid="thumbprint")


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("hsm__module", "libsofthsm2.so"),
        ("state", "state"),
        ("host__policy", "policy.toml"),
        ("host__stop_file", "./stop"),
    ],
)
def test_what_must_mean_the_same_everywhere_is_named_by_an_absolute_path(
    name: str, relative: str
) -> None:
    assert f"HSMTOLL_{name.upper()}: an absolute path" in str(refusal(**{name: relative}))
    load(**{name: f"/there/{relative}"})


def test_a_directory_of_refused_pins_that_is_empty_in_the_file_is_none(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    toml.write_text('state = ""\n')
    assert "HSMTOLL_STATE" in str(refusal(config=toml))

    # As with every variable, one that is empty is not set.
    toml.write_text('state = "/there"\n')
    monkeypatch.setenv("HSMTOLL_STATE", "")
    assert str(load(config=toml).state) == "/there"


def test_a_path_to_read_once_may_be_relative() -> None:
    load(ca_file="ca.pem", hsm__pin_file="pin", hsm__certificates="chain.pem")


ENDPOINTS = {
    "issuer": "https://localhost:8443/",
    "token": "https://localhost:8443/token",
    "customs": "https://localhost:8444",
}


@pytest.mark.parametrize("environment", ["test", "prod", None])
def test_endpoints_are_given_in_the_sandbox_alone(environment: str | None) -> None:
    assert refusal(environment=environment, endpoints=ENDPOINTS).code == "endpoints-fixed"
    load(environment="sandbox", endpoints=ENDPOINTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"issuer": "https://maskinporten.no/", "token": "https://maskinporten.no/token"},
        {"customs": "https://api.toll\u3002no"},
        {"customs": "https://api.toll\u2024no"},
        {"customs": "https://api.toll%2Eno"},
        {"customs": "https://api.toll%E3%80%82no"},
        {"customs": "https://toll.no%00.localhost"},
        {"customs": "https://api.toll\uff0eno"},
        {"customs": "https://api.toll\uff61no"},
        {"customs": "https://api.t\u00f6ll.no"},
        {"customs": "https://api.toll.no"},
        {"customs": "https://API-TEST.TOLL.NO"},
        {"customs": "https://api.toll.no."},
        {"customs": "https://toll.no:443"},
        {"token": "https://other:8443/token"},
        {"token": "https://localhost:9999/token"},
        {"customs": "http://localhost:8444"},
        {"customs": "https://user@localhost:8444"},
        {"customs": "localhost"},
        {"customs": "https://localhost:999999"},
    ],
)
def test_the_sandbox_lies_neither_under_the_real_names_nor_elsewhere_than_its_issuer(
    changed: dict[str, str],
) -> None:
    refusal(environment="sandbox", endpoints={**ENDPOINTS, **changed})


def test_a_name_that_only_resembles_the_real_ones_is_allowed() -> None:
    load(environment="sandbox", endpoints={**ENDPOINTS, "customs": "https://nottoll.no"})


@pytest.mark.parametrize(
    "url",
    ["memory", "file://host/dir", "file:///", "http://x", "redis://far/0", "sqlite:x", "memory:x"],
)
def test_a_cache_that_is_none_of_ours_is_refused(tmp_path: Path, url: str) -> None:
    refusal(cache=url, cache_key_file=tmp_path)


@pytest.mark.parametrize("option", ["ssl_cert_reqs=none", "ssl_check_hostname=false"])
def test_a_cache_url_cannot_weaken_tls(tmp_path: Path, option: str) -> None:
    load(cache="rediss://far/0", cache_key_file=tmp_path)
    refusal(cache=f"rediss://far/0?{option}", cache_key_file=tmp_path)


@pytest.mark.parametrize("option", ["tiemout=1", "timeout=1", "retry=", "host=far", "path=/x"])
def test_an_option_that_a_cache_url_cannot_have_is_named(tmp_path: Path, option: str) -> None:
    load(cache="redis://localhost/0?db=1&client_name=toll", cache_key_file=tmp_path)

    error = refusal(cache=f"redis://localhost/0?{option}", cache_key_file=tmp_path)
    assert option.partition("=")[0] in str(error)
    assert "client_name" in (error.hint or "")


def test_a_redis_cache_needs_a_key() -> None:
    assert "HSMTOLL_CACHE_KEY_FILE" in str(refusal(cache="redis://localhost/0"))


@pytest.mark.parametrize("proxy", ["socks5://x:1", "proxy:3128", "http://", "http://x:99999"])
def test_a_proxy_is_a_url_or_the_word_environment(proxy: str) -> None:
    load(proxy="environment")
    load(proxy="http://proxy:3128")
    refusal(proxy=proxy)


def test_a_configuration_file_that_others_may_write_is_refused(toml: Path) -> None:
    toml.write_text("timeout = 5\n")
    assert load(config=toml).timeout == 5

    toml.chmod(0o666)
    assert refusal(config=toml).code == "unsafe-file"


def test_so_is_one_in_a_directory_that_others_may_write(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    file = folder / "f"
    file.touch(0o644)
    check_trusted(file, "file")

    folder.chmod(0o777)
    with pytest.raises(ConfigurationError, match="others may change"):
        check_trusted(file, "file")
    folder.chmod(0o755)


@pytest.fixture
def safe(tmp_path: Path) -> Path:
    """A directory of ours with a file of ours in it."""
    folder = tmp_path / "safe"
    folder.mkdir(0o755)
    (folder / "f").touch(0o644)
    return folder


def test_a_link_is_as_safe_as_each_directory_that_it_is_changed_in(
    tmp_path: Path, safe: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "f").symlink_to(safe / "f")
    (shared / "folder").symlink_to("../safe")
    (safe / "on").symlink_to(shared / "folder" / "f")
    (safe / "up").symlink_to("../safe/../shared/f")
    links = (shared / "f", shared / "folder" / "f", safe / "on", safe / "up")
    for each in links:
        check_trusted(each, "file")
    shared.chmod(0o777)
    for each in links:
        with pytest.raises(ConfigurationError, match=f"(?m)others may change {shared}$"):
            check_trusted(each, "file")
    # The control: what is reached without it, and a sticky one, in which ours stays ours.
    check_trusted(safe / "f", "file")
    shared.chmod(0o1777)
    for each in links:
        check_trusted(each, "file")
    if os.geteuid() == 0:
        os.lchown(shared / "f", 41001, 41001)
        for each in (shared / "f", safe / "up"):
            with pytest.raises(ConfigurationError, match="others may change"):
                check_trusted(each, "file")
        check_trusted(safe / "on", "file")


def test_a_link_that_leads_nowhere_or_in_circles_cannot_be_read(safe: Path) -> None:
    (safe / "circle").symlink_to("circle")
    (safe / "nowhere").symlink_to("nothing")
    for name in ("circle", "nowhere"):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            check_trusted(safe / name, "file")


def test_a_missing_configuration_file_is_an_error_only_if_it_was_named(tmp_path: Path) -> None:
    refusal(config=tmp_path / "nowhere.toml")
    assert load().timeout == 10


def test_the_working_directory_is_never_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hsmtoll.toml").write_text("timeout = 5\n")
    monkeypatch.chdir(tmp_path)

    assert load().timeout == 10


@pytest.mark.parametrize("name", ["XDG_CONFIG_HOME", "HOME"])
def test_not_even_where_the_home_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    below = {"XDG_CONFIG_HOME": "hsmtoll", "HOME": ".config/hsmtoll"}[name]
    file = tmp_path / below / "hsmtoll.toml"
    file.parent.mkdir(parents=True)
    file.write_text("timeout = 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv(name, ".")
    assert load().timeout == 10

    monkeypatch.setenv(name, str(tmp_path))
    assert load().timeout == 5


def test_a_relative_place_for_configuration_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".config" / "hsmtoll" / "hsmtoll.toml"
    file.parent.mkdir(parents=True)
    file.write_text("timeout = 5\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "config")

    assert load().timeout == 5


def test_dev_null_is_no_configuration_file_and_hides_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hsmtoll" / "hsmtoll.toml"
    file.parent.mkdir()
    file.write_text("timeout = 5\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load().timeout == 5

    assert load(config=os.devnull).timeout == 10
    monkeypatch.setenv("HSMTOLL_CONFIG", os.devnull)
    assert load().timeout == 10
    assert "no configuration file" in str(refusal(profile="acme"))


_HOST: dict[str, Any] = {"signer__url": "unix:///run/hsmtoll/socket", "signer__profile": "acme"}
_TLS: dict[str, Any] = {
    "signer__url": "https://signer.example:8443",
    "signer__profile": "acme",
    "signer__client_cert": "/c.pem",
}


@pytest.mark.parametrize(
    ("wrong", "right", "named"),
    [
        ({"signer__profile": "acme"}, _HOST, "HSMTOLL_SIGNER__URL"),
        ({"signer__uid": 0}, {**_HOST, "signer__uid": 0}, "HSMTOLL_SIGNER__UID"),
        ({"signer__url": "unix:///s"}, _HOST, "HSMTOLL_SIGNER__PROFILE"),
        ({**_TLS, "signer__client_cert": None}, _TLS, "HSMTOLL_SIGNER__CLIENT_CERT"),
        (
            {**_HOST, "signer__client_key": "/k"},
            {**_HOST, "signer__client_key": "/k", "signer__client_cert": "/c"},
            "HSMTOLL_SIGNER__CLIENT_KEY",
        ),
        ({**_TLS, "signer__uid": 990}, {**_HOST, "signer__uid": 990}, "HSMTOLL_SIGNER__UID"),
        (
            {**_HOST, "signer__mode": "token", "signer__organization": "NTRSE-1"},
            {**_HOST, "signer__mode": "grant", "signer__organization": "NTRSE-1"},
            "HSMTOLL_SIGNER__ORGANIZATION",
        ),
        (
            {**_HOST, "kid": "k", "signer__organization": "NTRSE-1"},
            {**_HOST, "kid": "k"},
            "HSMTOLL_SIGNER__ORGANIZATION",
        ),
        (
            {**_HOST, "signer__url": "unix:///a unix:///a"},
            {**_HOST, "signer__url": "unix:///a unix:///b"},
            "HSMTOLL_SIGNER__URL",
        ),
    ],
)
def test_settings_of_a_signing_host_that_contradict_each_other_are_refused(
    wrong: dict[str, Any], right: dict[str, Any], named: str
) -> None:
    assert load(**right).signer.profile == "acme"
    refused = refusal(**{name: value for name, value in wrong.items() if value is not None})
    assert named in str(refused)
    assert refused.hint or "twice" in str(refused)


@pytest.mark.parametrize(
    "url",
    [
        "http://host:1", "unix://host/s", "unix://s", "unix:///", "unix:///dir/", "https://",
        "https://user@host", "https://host/path", "https://host?x=1", "https://host:99999", "/s",
        "unix:///a#b", "https://[::1", "unix:///" + "a" * 108, "unix:///a%00b",
    ],
)  # fmt: skip
def test_an_address_that_is_none_of_a_signing_host_is_refused(url: str) -> None:
    refused = refusal(**{**_TLS, "signer__url": url})
    assert "HSMTOLL_SIGNER__URL" in str(refused)


def test_every_address_of_a_signing_host_is_taken() -> None:
    urls = "unix:///a%20b/s https://localhost https://[::1]:8443/ https://host:8443"
    assert load(**{**_TLS, "signer__url": urls}).signer.url == tuple(urls.split())


def test_every_setting_has_a_group_and_no_default_environment() -> None:
    assert Settings.model_fields["environment"].default is None


PATHS = [
    *("HSM__MODULE", "HSM__PIN_FILE", "HSM__CERTIFICATES", "CA_FILE", "STATE", "HOST__POLICY"),
    *("SIGNER__CLIENT_KEY", "CACHE_KEY_FILE"),
]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("~/x", "~ is not expanded here; write the whole path"),
        ("~acme/x", "~ is not expanded here; write the whole path"),
        ("/x ", "white space"),
        (" /x", "white space"),
        ('"/x"', "in quotation marks"),
    ],
)
def test_a_path_that_no_file_has_is_explained_before_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(f"HSMTOLL_{name}", value)
    error = refusal()
    assert str(error).startswith(f"HSMTOLL_{name}: ")
    assert says in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ENVIRONMENT", "test"),
        ("HSM__MODULE", "/usr/lib/x.so"),
        ("HSM__KEY", "pkcs11:token=a"),
        ("HSM__PIN", "123456"),
        ("TIMEOUT", "5"),
        ("CONFIG", os.devnull),
        ("PROFILE", "acme"),
    ],
)
def test_a_value_of_a_file_with_windows_line_ends_is_explained(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"HSMTOLL_{name}", f"{value}\r")
    error = refusal()
    assert str(error) == f"variable HSMTOLL_{name}: its value ends with a carriage return"
    assert "Windows line ends" in str(error.hint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ENVIRONMENT", '"test"'), ("IDENTITY", "'eseal'"), ("HSM__KEY", '"pkcs11:token=a"')),
        *(("PROXY", "'http://p:3128'"), ("TIMEOUT", '"5"'), ("CONFIG", '"/x"'), ("CACHE", "''")),
    ],
)
def test_a_value_in_quotation_marks_is_explained(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"HSMTOLL_{name}", value)
    error = refusal()
    assert str(error).startswith(f"HSMTOLL_{name}: is in quotation marks")
    assert "docker's --env-file" in str(error.hint)


def test_a_quotation_mark_inside_a_value_is_a_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSMTOLL_HSM__KEY_LABEL", '5" disk')
    monkeypatch.setenv("HSMTOLL_HSM__PIN_COMMAND", "'my cat' 'my pin'")
    assert load().hsm.key_label == '5" disk'


def test_a_tilde_inside_a_path_is_a_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSMTOLL_HSM__MODULE", "/opt/a b~/x~.so")
    assert str(load().hsm.module) == "/opt/a b~/x~.so"


def test_the_path_of_the_configuration_file_may_not_begin_with_a_tilde(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HSMTOLL_CONFIG", "~/hsmtoll.toml")
    assert refusal().hint == "~ is not expanded here; write the whole path"


@pytest.mark.parametrize("key", ["pkcs11:object=Åkeri nyckel 2027", "pkcs11:token=a pkcs12:b"])
def test_a_blank_in_a_uri_is_explained(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HSMTOLL_HSM__KEY", key)
    error = refusal()
    assert "word 2 of" in str(error)
    assert "%20" in str(error.hint)
    assert "nyckel" not in str(error)


def test_the_environment_chooses_a_profile_and_an_argument_wins(
    monkeypatch: pytest.MonkeyPatch, toml: Path
) -> None:
    toml.write_text("timeout = 1\n[profile.a]\ntimeout = 2\n[profile.b]\ntimeout = 3\n")
    assert load(config=toml).timeout == 1
    monkeypatch.setenv("HSMTOLL_PROFILE", "a")
    assert load(config=toml).timeout == 2
    assert load(config=toml, profile="b").timeout == 3
    monkeypatch.setenv("HSMTOLL_PROFILE", "")
    monkeypatch.setenv("hsmtoll_profile", "b")
    assert load(config=toml).timeout == 3
    monkeypatch.setenv("hsmtoll_profile", "c")
    assert "profile c" in str(refusal(config=toml))
    assert "profile c" in str(refusal())


def test_a_file_with_a_byte_order_mark_is_read(toml: Path) -> None:
    toml.write_bytes(b"\xef\xbb\xbftimeout = 4\r\n")
    assert load(config=toml).timeout == 4


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("ENVIRONMENT = 1", "did you mean environment?"),
        ("HSMTOLL_ENVIRONMENT = 1", "did you mean environment?"),
        ("HSMTOLL_HSM__MODULE = 1", "did you mean hsm.module?"),
        ("[HSM]\nmodule = 1", "did you mean hsm?"),
        ("[hsm]\nMODULE = 1", "did you mean hsm.module?"),
        ("favourite = 1", "`hsmtoll help settings` lists every setting"),
    ],
)
def test_a_key_of_the_file_gets_a_near_name_whatever_its_case(
    toml: Path, text: str, hint: str
) -> None:
    toml.write_text(text)
    assert refusal(config=toml).hint == hint


LINKS = {
    "HSMTOLL_SERVICE_HOST": "10.96.7.1",
    "HSMTOLL_SERVICE_PORT": "8443",
    "HSMTOLL_SERVICE_PORT_HTTPS": "8443",
    "HSMTOLL_PORT": "tcp://10.96.7.1:8443",
    "HSMTOLL_PORT_8443_TCP": "tcp://10.96.7.1:8443",
    "HSMTOLL_PORT_8443_TCP_PROTO": "tcp",
    "HSMTOLL_PORT_8443_TCP_PORT": "8443",
    "HSMTOLL_PORT_8443_TCP_ADDR": "10.96.7.1",
    "HSMTOLL_HOST_SERVICE_HOST": "fd00::7",
    "HSMTOLL_HOST_PORT": "udp://[fd00::7]:53",
}


def test_what_the_kubelet_says_of_a_service_called_hsmtoll_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    assert load() == Settings()
    assert len(caplog.records) == 1
    assert "HSMTOLL_HOST_PORT and 9 more" in caplog.text
    assert "enableServiceLinks: false" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HSMTOLL_PORT", "8443"),
        ("HSMTOLL_PORT", "https://10.96.7.1:8443"),
        ("HSMTOLL_SERVICE_HOST", "hsm.example"),
        ("HSMTOLL_SERVICE_PORT", "https"),
        ("HSMTOLL_PORT_8443_TCP_PROTO", "quic"),
        ("HSMTOLL_PORT_8443_TCP_NAME", "10.96.7.1"),
        ("hsmtoll_service_host", "10.96.7.1"),
        ("HSMTOLL_HOST__PORT", "tcp://10.96.7.1:8443"),
        ("HSMTOLL_PROXI", "tcp://10.96.7.1:8443"),
    ],
)
def test_what_only_looks_like_it_is_still_no_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert refusal().code == "setting-unknown"
