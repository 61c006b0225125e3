"""One client acts for many: customers, resources and system users, each with a token of its own."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll import GrantRefused, ScopeNotGranted, UsageError
from hsmtoll.app import App
from hsmtoll.settings import load
from tests.kit.commands import hsmtoll
from tests.kit.customs_messages import message

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hsmtoll import TollClient
    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.testing.faults import Faults
    from hsmtoll.testing.identity import TemporaryIdentity

SCOPE = "toll:movement/road/v2"
ANNA, BJARNE, NOBODY = "910000001", "910000002", "910000009"
SUPPLIER = "987654325"


def system_user(org: str) -> dict[str, Any]:
    return {
        "type": "urn:altinn:systemuser",
        "systemuser_org": {"authority": "iso6523-actorid-upis", "ID": f"0192:{org}"},
    }


def claims_of(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


@pytest.fixture
def agent(
    toll_norwegian: TemporaryIdentity,
    toll_sandbox: Sandbox,
    toll_faults: Faults,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[TollClient]:
    """A Norwegian forwarder to whom two customers have delegated the road."""
    for customer in (ANNA, BJARNE):
        toll_sandbox.delegate(customer, SUPPLIER, SCOPE)
    variables = {
        **toll_norwegian.environ(),
        **toll_sandbox.environ(),
        **toll_faults.environ(),
        "HSMTOLL_CONFIG": os.devnull,
        "HSMTOLL_STATE": str(tmp_path / "state"),
        "HSMTOLL_CACHE": f"file://{tmp_path}/cache",
    }
    for name in [each for each in os.environ if each.startswith("HSMTOLL_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with App(load()).client() as client:
        yield client


def granted(sandbox: Sandbox) -> list[dict[str, Any]]:
    """The claims of the grants that were accepted."""
    good = [each for each in sandbox.received if each.kind == "grant" and each.status == 200]
    return [dict(each.claims or {}) for each in good]


def test_one_client_serves_many_customers_with_one_login(
    agent: TollClient, toll_sandbox: Sandbox, toll_faults: Faults
) -> None:
    own = agent.token("road")
    tokens = {org: agent.token("road", consumer_org=org) for org in (ANNA, BJARNE)}

    assert claims_of(own.value)["sub"] == SUPPLIER
    assert {org: claims_of(token.value)["sub"] for org, token in tokens.items()} == {
        ANNA: ANNA,
        BJARNE: BJARNE,
    }
    # Held, each under its own name: no signature more.
    for org, token in tokens.items():
        assert agent.token("road", consumer_org=org).value == token.value
    assert agent.token("road").value == own.value
    assert [each.get("consumer_org") for each in granted(toll_sandbox)] == [None, ANNA, BJARNE]
    assert toll_faults.count("C_Login") == 1


def test_calls_and_submissions_are_made_for_whom_they_say(
    agent: TollClient, toll_sandbox: Sandbox
) -> None:
    path = "/api/movement/road/v2/test-auth"
    assert agent.call("GET", path, consumer_org=ANNA).status_code == 200
    assert agent.submit(
        "road", "POST", "transport", json=message("transport"), consumer_org=BJARNE
    ).mrn
    assert agent.api("road", consumer_org=ANNA).get("test-auth").status_code == 200
    assert agent.call("GET", path).status_code == 200

    subjects = [(each.claims or {}).get("sub") for each in toll_sandbox.received
                if each.kind == "call"]  # fmt: skip
    assert subjects[0] == ANNA
    assert set(subjects[1:-2]) == {BJARNE}
    assert subjects[-2:] == [ANNA, SUPPLIER]


def test_tasks_say_for_whom_as_threads_do(agent: TollClient, toll_sandbox: Sandbox) -> None:
    del agent

    async def both() -> list[str]:
        async with App(load()).aclient() as client:
            path = "/api/movement/road/v2/test-auth"
            assert (await client.call("GET", path, consumer_org=ANNA)).status_code == 200
            made = await asyncio.gather(
                *(client.token("road", consumer_org=org) for org in (ANNA, BJARNE))
            )
            return [claims_of(each.value)["sub"] for each in made]

    assert asyncio.run(both()) == [ANNA, BJARNE]
    assert len(granted(toll_sandbox)) == 2


def test_a_customer_that_has_not_delegated_is_refused_in_the_documented_words(
    agent: TollClient,
) -> None:
    with pytest.raises(ScopeNotGranted) as caught:
        agent.token("road", consumer_org=NOBODY)
    assert caught.value.code == "MP-251"
    message = (
        f"Consumer {NOBODY} has not delegated access to the scope {SCOPE} to supplier {SUPPLIER}"
    )
    assert message in str(caught.value)
    # The control: others are not touched by it.
    assert agent.token("road", consumer_org=ANNA).value


def test_a_system_user_is_asked_for_by_its_customer(
    agent: TollClient, toll_sandbox: Sandbox
) -> None:
    first = agent.token("road", authorization_details=[system_user(ANNA)])
    assert agent.token("road", authorization_details=system_user(ANNA)).value == first.value
    second = agent.token("road", authorization_details=[system_user(BJARNE)])
    assert second.value != first.value

    asked = [each["authorization_details"] for each in granted(toll_sandbox)]
    assert asked == [[system_user(ANNA)], [system_user(BJARNE)]]


@pytest.mark.parametrize(
    ("details", "code", "text"),
    [
        ({"type": "urn:altinn:nobody"}, "MP-301", "Unknown authorization details type"),
        (
            {**system_user(ANNA), "colour": "blue"},
            "MP-302",
            "Unknown fields in the authorization details",
        ),
        (
            {**system_user(ANNA), "systemuser_org": {"authority": "x", "ID": ANNA}},
            "MP-303",
            "Invalid authorization details values",
        ),
    ],
)
def test_details_that_maskinporten_refuses_are_told_with_what_to_correct(
    agent: TollClient, details: dict[str, Any], code: str, text: str
) -> None:
    with pytest.raises(GrantRefused) as caught:
        agent.token("road", authorization_details=details)
    assert caught.value.code == code
    assert text in str(caught.value)
    assert "systemuser" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "options",
    [
        {"consumer_org": "12345678"},
        {"consumer_org": "12345678x"},
        {"resource": ["https://a.example b"]},
        {"authorization_details": [{"systemuser_org": 1}]},
        {"authorization_details": "urn:altinn:systemuser"},
        {"authorization_details": [{"type": "x", "more": object()}]},
        {"authorization_details": [{"type": "x", "more": "y" * 5000}]},
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_the_device(
    agent: TollClient, toll_faults: Faults, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        agent.token("road", **options)
    assert toll_faults.count("C_Login") == 0


def test_an_option_wins_over_the_settings_and_an_empty_one_is_none(
    agent: TollClient, toll_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    del agent
    monkeypatch.setenv("HSMTOLL_CONSUMER_ORG", ANNA)
    monkeypatch.setenv("HSMTOLL_RESOURCE", "https://a.example")
    with App(load()).client() as client:
        client.token("road")
        client.token("road", consumer_org=BJARNE)
        client.token("road", consumer_org="", resource=())
        client.token("road", resource=["https://b.example", "https://c.example"])
    seen = [(each.get("consumer_org"), each.get("resource")) for each in granted(toll_sandbox)]
    assert seen == [
        (ANNA, ["https://a.example"]),
        (BJARNE, ["https://a.example"]),
        (None, None),
        (ANNA, ["https://b.example", "https://c.example"]),
    ]


def test_commands_say_for_whom(agent: TollClient, toll_sandbox: Sandbox, tmp_path: Path) -> None:
    del agent
    file = tmp_path / "details.json"
    file.write_text(json.dumps([system_user(ANNA)]))
    token = hsmtoll("token", "road", "--consumer-org", ANNA)
    assert claims_of(token.stdout)["sub"] == ANNA
    # The same from the cache; another customer's is another.
    assert hsmtoll("token", "road", "--consumer-org", ANNA).stdout == token.stdout
    other = hsmtoll("token", "road", "--consumer-org", BJARNE)
    assert claims_of(other.stdout)["sub"] == BJARNE

    signed = hsmtoll("sign", "road", "--authorization-details", f"@{file}", "--resource", "urn:x:y")
    assert claims_of(signed.stdout)["authorization_details"] == [system_user(ANNA)]
    assert claims_of(signed.stdout)["resource"] == ["urn:x:y"]
    path = "/api/movement/road/v2/test-auth"
    assert hsmtoll("call", "GET", path, "--consumer-org", ANNA).returncode == 0
    given = json.dumps(message("transport"))
    sent = hsmtoll("submit", "road", "POST", "transport", "--consumer-org", BJARNE, stdin=given)
    assert sent.returncode == 0
    calls = [each for each in toll_sandbox.received if each.kind == "call"]
    assert [(each.claims or {})["sub"] for each in calls[:2]] == [ANNA, BJARNE]

    for wrong in (["--consumer-org", "1"], ["--authorization-details", "{"]):
        assert hsmtoll("token", "road", *wrong).returncode == 2
