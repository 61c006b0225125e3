"""What a team writes that has never seen hsmtoll's own tests."""

import pytest

import hsmtoll


def test_our_key_opens_the_road(toll_client):
    toll_client.api("road").get("test-auth").raise_for_status()
    assert toll_client.status().signatures == 1


def test_we_meet_a_locked_device_before_our_users_do(toll_client, toll_faults):
    toll_faults.set("pin-locked")
    with pytest.raises(hsmtoll.PinNotTried):
        toll_client.token("road")
    assert toll_faults.count("C_Login") == 0


def test_we_meet_an_outage_as_well(toll_client, toll_sandbox):
    toll_sandbox.fault("503", "token")
    with pytest.raises(hsmtoll.NetworkError):
        toll_client.token("road")


def test_time_is_ours_to_turn(toll_clock, toll_client):
    first = toll_client.token("road")
    toll_clock.advance(700)
    assert toll_client.token("road").expires_at > first.expires_at


def test_a_norwegian_has_a_chain_of_three(toll_norwegian):
    assert len(toll_norwegian.chain) == 3
    assert toll_norwegian.environ()["HSMTOLL_IDENTITY"] == "norwegian"
