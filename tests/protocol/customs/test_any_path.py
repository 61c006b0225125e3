"""APIs that are newer than the catalogue, and those whose scope the guide does not name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll import ApiRefused, OutcomeUnknown, UsageError, apis
from tests.kit.commands import hsmtoll
from tests.kit.customs_messages import message

if TYPE_CHECKING:
    from hsmtoll import TollClient
    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.clock import SettableClock

ROAD = "toll:eu/movement/road/v2"


def command(*argv: str, stdin: str = "") -> tuple[int, str, str]:
    done = hsmtoll(*argv, stdin=stdin)
    return done.returncode, done.stdout, done.stderr


def arrival(mrn: str, **members: Any) -> dict[str, Any]:
    return {
        "documentIssueDate": "2026-05-04T18:00:00Z",
        "mrn": mrn,
        "dateAndTimeOfArrival": "2026-05-04T18:05:00Z",
        "customsOfficeOfArrival": "NO371001",
        **members,
    }


@pytest.fixture
def toll(toll_clock: SettableClock, toll_client: TollClient) -> TollClient:
    """A client whose waiting costs no time."""
    del toll_clock
    return toll_client


def test_a_transport_arrives_and_its_goods_are_entered(toll: TollClient) -> None:
    mrn = toll.submit("road", "POST", "transport", json=message("transport")).mrn
    assert mrn is not None
    where = f"/api/movement/road/status/v2/entry/status/{mrn}"
    assert toll.call("GET", where).json() == {"validEntry": False, "mrn": mrn}

    toll.submit("arrival", "POST", "arrival", json=arrival(mrn), scope=ROAD)

    entered = toll.call("GET", where).json()
    assert (entered["validEntry"], entered["customsOfficeOfEntry"]) == (True, "NO371001")
    assert toll.api("arrival", scope=ROAD).get(f"entry/status/{mrn}").json() == entered


@pytest.mark.parametrize("missing", ["mrn", "dateAndTimeOfArrival", "customsOfficeOfArrival"])
def test_an_arrival_names_the_transport_the_time_and_the_office(
    toll: TollClient, missing: str
) -> None:
    short = arrival("26NO4TU2HUD59UCBT8")
    del short[missing]
    with pytest.raises(ApiRefused) as caught:
        toll.submit("arrival", "POST", "arrival", json=short, scope=ROAD)
    assert missing in (caught.value.hint or "")
    assert "beskrivelse-av-ankomst-api-EN.html" in (caught.value.hint or "")


def test_an_arrival_needs_a_scope_that_somebody_names(toll: TollClient) -> None:
    for ask in (
        lambda: toll.submit("arrival", "POST", "arrival", json=arrival("26NO4TU2HUD59UCBT8")),
        lambda: toll.api("arrival"),
        lambda: toll.call("GET", "/api/movement/arrival/v1/entry/status/X"),
    ):
        with pytest.raises(UsageError, match="names no scope"):
            ask()


def test_safe_sea_net_is_for_norwegian_clients(toll: TollClient) -> None:
    with pytest.raises(Exception, match="no scope exists for HSMTOLL_IDENTITY=eseal"):
        toll.submit("maritime-ssnn", "POST", "transport", json={"visitId": "1"})


@pytest.mark.usefixtures("toll_settings")
def test_a_call_with_a_scope_reaches_a_path_that_no_catalogue_has(toll_sandbox: Sandbox) -> None:
    path = "/api/movement/newer/v1/thing"
    code, _, errors = command("call", "GET", path)
    assert code == 2
    assert "not in the table of APIs" in errors
    assert "--scope" in errors

    code, _, errors = command("call", "--scope", ROAD, "GET", path)
    assert (code, "404" in errors) == (71, True)
    (seen,) = [each for each in toll_sandbox.received if each.kind == "call"]
    assert (seen.method, seen.path) == ("GET", path)

    # The control: where something is, its answer is printed.
    code, out, _ = command("call", "--scope", ROAD, "GET", "/api/movement/road/v2/test-auth")
    assert (code, out) == (0, "")


@pytest.mark.usefixtures("toll_settings")
def test_no_path_leads_to_another_host(toll_sandbox: Sandbox) -> None:
    for path in ("@localhost:1/x", ".example/x", "//localhost:1/x", "x"):
        code, _, errors = command("call", "--scope", ROAD, "GET", path)
        assert code == 2, errors
    assert [each for each in toll_sandbox.received if each.kind == "call"] == []


@pytest.mark.usefixtures("toll_settings")
def test_a_submission_may_name_its_scope(toll_sandbox: Sandbox) -> None:
    given = json.dumps(arrival("26NO4TU2HUD59UCBT8"))
    code, out, _ = command("submit", "arrival", "POST", "arrival", "--scope", ROAD, stdin=given)
    assert code == 0
    assert out == "SUCCESS 26NO4TU2HUD59UCBT8\n"
    assert command("submit", "arrival", "POST", "arrival", stdin=given)[0] == 2
    assert len(toll_sandbox.state.arrivals) == 1


def test_the_catalogue_says_which_guide_it_follows() -> None:
    code, out, _ = command("apis")
    assert code == 0
    assert apis.VERSION in out.splitlines()[-1]
    assert "toll:movement/maritimessnn" in out
    assert "/api/movement/arrival/v1" in out


@pytest.mark.usefixtures("toll_settings", "toll_sandbox")
@pytest.mark.parametrize("api", ["road", "air", "rail"])
def test_a_test_call_that_is_not_documented_says_so(api: str) -> None:
    code, out, errors = command("test-auth", api)
    assert (code, out) == (0, "200 OK\n")
    assert ("not documented" in errors) == (api != "road")


def test_a_relation_whose_result_never_comes_is_unknown(toll: TollClient) -> None:
    # relation/validation-status stands on no page: it is asked, and a 404 is no failure.
    toll.token("road")
    with pytest.raises(OutcomeUnknown) as caught:
        toll.submit("road", "POST", "relation", json=message("relation"), timeout=0.5)
    assert caught.value.exit_code == 73
