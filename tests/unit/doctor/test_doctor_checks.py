"""The doctor's checks over facts: each fault has its own code, and a good setup has none."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from hsmtoll import errors
from hsmtoll.doctor import Check, Facts, Report, examine
from hsmtoll.doctor.facts import KeyUse, Revocation, Seen, ServiceAnswers
from hsmtoll.doctor.findings import failed
from hsmtoll.doctor.report import CHECKS
from hsmtoll.errors import CertificateError, ScopeNotGranted
from hsmtoll.http_messages import HttpResponse, Post
from hsmtoll.settings import Settings
from hsmtoll.tokens.exchange import read_subject
from hsmtoll.x509 import revocation
from tests.kit import doctor_cases
from tests.kit.doctor_cases import (
    BROKEN,
    DAY,
    GOOD,
    NOW,
    enterprise,
    key,
    ours,
    revocation_list,
    seals,
    setup,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def findings(facts: Facts) -> dict[str, str]:
    """Code → verdict, of what is not well."""
    return {c.code: c.verdict for c in examine(facts) if c.verdict in ("warn", "fail")}


@pytest.mark.parametrize("build", GOOD.values(), ids=GOOD)
def test_the_doctor_is_silent_about_a_good_setup(build: Callable[[], doctor_cases.Setup]) -> None:
    assert findings(build().facts) == {}


@pytest.mark.parametrize("build", BROKEN.values(), ids=BROKEN)
def test_each_fault_is_caught_by_its_own_code_and_no_other(
    build: Callable[[], doctor_cases.Setup],
) -> None:
    made = build()
    found = findings(made.facts)
    if made.code == "certificate-key":
        # It shows only where the device hides its key's size, which is told as well.
        found.pop("public-key-hidden")
    assert found == {made.code: made.verdict}


def test_there_are_enough_faults_of_certificates_and_claims() -> None:
    seen_by_maskinporten = [name for name, build in BROKEN.items() if build().refused]
    assert len(seen_by_maskinporten) >= 20


@pytest.mark.parametrize("build", BROKEN.values(), ids=BROKEN)
def test_every_fault_says_what_to_do_and_who(build: Callable[[], doctor_cases.Setup]) -> None:
    made = build()
    finding = next(c for c in examine(made.facts) if c.code == made.code)
    assert finding.who
    # The device's own words are stand-ins here; its hints are tested with the device.
    assert finding.hint or finding.line == "it said no"
    assert len(finding.line.splitlines()) == 1


@pytest.mark.parametrize("build", BROKEN.values(), ids=BROKEN)
def test_what_hangs_on_a_broken_link_is_skipped(build: Callable[[], doctor_cases.Setup]) -> None:
    verdicts = [check.verdict for check in examine(build().facts)]
    after = verdicts[verdicts.index("fail") + 1 :] if "fail" in verdicts else []
    assert set(after) <= {"skip"}
    assert len(verdicts) >= len(CHECKS)


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        ("no environment", 10),
        ("a wrong PIN", 20),
        ("a locked PIN", 21),
        ("no key of that name", 30),
        ("expired", 40),
        ("a clock ten minutes slow", 50),
        ("an imported key", 0),
    ],
)
def test_the_exit_code_is_that_of_the_first_failures_class(name: str, exit_code: int) -> None:
    facts = BROKEN[name]().facts
    assert Report(examine(facts), facts).exit_code == exit_code


def test_the_doctor_raises_what_the_signer_would_raise() -> None:
    """Both judge by `chain.checked`: the code and the words are the same."""
    from hsmtoll.x509 import leaf_choice

    for name, build in BROKEN.items():
        made = build()
        seen = made.facts.seen[0]
        if seen.key is None or seen.key.public is None or made.kid or not made.facts.settings.iss:
            continue
        raised = None
        try:
            leaf_choice.checked(
                leaf_choice.for_key(seen.certificates, seen.key.public),
                seen.certificates,
                identity=made.facts.settings.identity or "eseal",
                now=made.facts.now,
                mode=made.facts.settings.x5c,
            )
        except CertificateError as exc:
            raised = str(exc)
        lines = [c.line for c in examine(made.facts) if c.verdict == "fail"]
        assert raised is None or lines == [raised], name


def test_consumer_id_and_amr_are_shown_as_maskinporten_will() -> None:
    lines = {c.check: c.line for c in examine(setup(qualified=True).facts)}
    assert "NTRSE-5566778899" in lines["consumer-id"]
    assert "QCForESeal" in lines["qualified"]
    norwegian = {c.check: c.line for c in examine(setup(family="norwegian").facts)}
    assert "0192:987654325" in norwegian["consumer-id"]
    assert "virksomhetssertifikat" in norwegian["qualified"]


def test_a_certificate_for_test_is_predicted_to_fail_in_prod() -> None:
    good = setup(family="norwegian")
    settings = Settings.model_validate(
        {"environment": "prod", "identity": "norwegian", "iss": "client"}
    )
    # By a policy alone: the list of policies is a copy, which warns.
    assert findings(replace(good.facts, settings=settings)) == {"certificate-environment": "warn"}
    for policy in ("2.16.578.1.29.13.210.1.0", "2.16.578.1.29.13.210", "2.16.578.1.29.13.200"):
        prod = setup(family="norwegian", policies=(policy,))
        assert findings(replace(prod.facts, settings=settings)) == {}
    newer = setup(family="norwegian", policies=("2.16.578.1.29.13.999",))
    assert findings(replace(newer.facts, settings=settings)) == {"certificate-policy": "warn"}


@pytest.mark.parametrize("above", ["nothing", "the root alone", "the issuer alone"])
def test_a_norwegian_certificate_whose_chain_is_not_at_hand_is_sent_alone(above: str) -> None:
    given = {
        "nothing": [],
        "the root alone": [enterprise().root],
        "the issuer alone": [enterprise().intermediate],
    }[above]
    made = setup(family="norwegian", above=given)
    assert findings(made.facts) == {}
    (line,) = [check.line for check in examine(made.facts) if check.check == "chain"]
    assert "sent without its chain" in line
    assert "documented" not in line
    # The control: whoever asks for the whole chain needs it, and so does an eSeal.
    asked = setup(family="norwegian", above=given, settings={"x5c": "full"})
    assert findings(asked.facts) == {"chain-incomplete": "fail"}
    assert "HSMTOLL_X5C" in str([c.hint for c in examine(asked.facts) if c.check == "chain"])
    assert findings(setup(above=[]).facts) == {"chain-incomplete": "fail"}
    whole = setup(family="norwegian")
    (line,) = [check.line for check in examine(whole.facts) if check.check == "chain"]
    assert "3 sent" in line


def test_buypass_shares_a_policy_so_that_its_issuer_decides() -> None:
    from hsmtoll.sandbox.pki import norwegian_authority

    for name, environment, fine in (
        ("Buypass Class 3 Test4", "test", True),
        ("Buypass Class 3 Test4", "prod", False),
        ("Buypass Class 3", "prod", True),
        ("Buypass Class 3", "test", False),
    ):
        authority = norwegian_authority("prod", name)
        made = setup(family="norwegian", authority=authority, policies=["2.16.578.1.26.1.3.2"])
        settings = Settings.model_validate(
            {"environment": environment, "identity": "norwegian", "iss": "client"}
        )
        found = findings(replace(made.facts, settings=settings))
        assert found == ({} if fine else {"certificate-environment": "fail"})


def test_an_eseal_of_a_test_ca_is_predicted_to_fail_in_test_as_well() -> None:
    """No EU trusted list knows it; the production CA of the same issuer is taken."""
    from hsmtoll.sandbox.pki import eseal_authority

    of_test = setup(authority=eseal_authority("Buypass Class 3 Test4"))
    assert findings(of_test.facts) == {"certificate-environment": "fail"}
    assert findings(setup(authority=eseal_authority("Buypass Class 3")).facts) == {}


def test_the_choice_between_certificates_is_explained() -> None:
    old = seals().issue(key().public_key(), not_before=NOW - 300 * DAY)
    made = setup()
    seen = made.facts.seen[0]
    both = replace(seen, certificates=(*seen.certificates, ours(old)))
    line = next(
        c.line for c in examine(replace(made.facts, seen=(both,))) if c.check == "certificate"
    )
    assert "not used" in line
    assert "it is older" in line
    assert ours(old).sha256[:16] in line


def test_the_next_certificate_is_named_with_its_day_and_silences_the_warning() -> None:
    ending = setup("certificate-ends-soon", verdict="warn", not_after=NOW + 30 * DAY)
    coming = seals().issue(key().public_key(), not_before=NOW + 10 * DAY)
    seen = ending.facts.seen[0]
    both = replace(seen, certificates=(*seen.certificates, ours(coming)))
    checks = examine(replace(ending.facts, seen=(both,)))
    line = next(c.line for c in checks if c.check == "roll-over")
    assert f"{NOW + 10 * DAY:%Y-%m-%d}" in line
    assert ours(coming).sha256[:16] in line
    assert [c for c in checks if c.verdict in ("warn", "fail")] == []
    # A stranger's certificate is no successor.
    other = seals().issue(
        key().public_key(), not_before=NOW + 10 * DAY, organization_id="NTRSE-0000000001"
    )
    wrong = replace(seen, certificates=(*seen.certificates, ours(other)))
    assert findings(replace(ending.facts, seen=(wrong,))) == {"certificate-ends-soon": "warn"}


def test_the_first_usable_key_of_several_is_judged_and_the_others_are_told() -> None:
    good = setup().facts
    gone = Seen(uri=doctor_cases.URI, error=errors.DeviceError("away", code="device-missing"))
    assert findings(replace(good, seen=(gone, *good.seen))) == {"key-unusable": "warn"}
    report = Report(examine(replace(good, seen=(gone, *good.seen))), good)
    assert report.exit_code == 0
    assert Report(examine(replace(good, seen=(gone, gone))), good).exit_code == 30


def test_keys_of_different_organisations_are_refused() -> None:
    good = setup().facts
    other = setup(signer=key(1), organization_id="NTRSE-0000000001").facts
    assert findings(replace(good, seen=(*good.seen, *other.seen))) == {"keys-differ": "fail"}
    same = setup(signer=key(1)).facts
    assert findings(replace(good, seen=(*good.seen, *same.seen))) == {}


def test_a_key_that_waits_for_its_certificate_is_no_fault() -> None:
    good = setup().facts
    waits = setup("certificate-not-yet-valid", signer=key(1), not_before=NOW + 5 * DAY).facts
    checks = examine(replace(good, seen=(*waits.seen, *good.seen)))
    assert [c for c in checks if c.verdict in ("warn", "fail")] == []
    assert any("waits" in c.line for c in checks)


def test_with_a_kid_no_certificate_is_asked_for_and_its_age_is_unknown() -> None:
    made = setup(family="norwegian", settings={"kid": "thumbprint"})
    bare = replace(made.facts, seen=(replace(made.facts.seen[0], certificates=()),))
    checks = examine(bare)
    assert [c for c in checks if c.verdict in ("warn", "fail")] == []
    line = next(c.line for c in checks if c.check == "kid")
    assert "one year" in line
    assert doctor_cases.public(key()).thumbprint() in line


@pytest.mark.parametrize(
    ("days", "verdict"), [(329.99, "ok"), (330.01, "warn"), (364.5, "warn"), (400, "warn")]
)
def test_a_registered_key_is_told_330_days_after_its_first_use(days: float, verdict: str) -> None:
    made = setup(family="norwegian", settings={"kid": "k-1"})
    use = KeyUse(kid="k-1", first=NOW - timedelta(days=days), file=Path("/state/key-1"))
    facts = replace(made.facts, seen=(replace(made.facts.seen[0], key_use=use),))
    check = next(c for c in examine(facts) if c.check == "kid")
    assert check.verdict == verdict
    assert check.days == (timedelta(days=365) - timedelta(days=days)).days
    assert (check.hint is not None and "/state/key-1" in check.hint) == (verdict == "warn")


@pytest.mark.parametrize(("days", "verdict"), [(60.5, "ok"), (59.5, "warn")])
def test_a_certificate_is_told_60_days_before_its_end_with_the_days_as_a_number(
    days: float, verdict: str
) -> None:
    facts = setup(not_after=NOW + days * DAY).facts
    report = Report(examine(facts), facts)
    members = next(c for c in report.as_json()["checks"] if c["check"] == "certificate-validity")
    assert (members["verdict"], members["days"]) == (verdict, int(days))
    strict = replace(report, strict=True)
    assert (report.exit_code, strict.exit_code) == (0, 0 if verdict == "ok" else 3)
    assert strict.as_json()["exit_code"] == strict.exit_code


def test_each_scope_asked_for_is_granted_or_names_who_must_act() -> None:
    refused = ScopeNotGranted("no access", code="MP-250", who="customs", hint="ask Customs")
    scopes = (("toll:eu/movement/road/v2", None), ("toll:eu/movement/air", refused))
    answers = ServiceAnswers(
        metadata=doctor_cases._METADATA,
        offset=0.0,
        health=200,
        consumer="NTRSE-5566778899",
        amr="CForESeal",
        scopes=scopes,
    )
    facts = replace(setup().facts, answers=answers)
    checks = {c.check: c for c in examine(facts)}
    assert checks["scope toll:eu/movement/road/v2"].verdict == "ok"
    air = checks["scope toll:eu/movement/air"]
    assert (air.verdict, air.code, air.who) == ("fail", "MP-250", "customs")
    assert Report(tuple(checks.values()), facts).exit_code == 61


def test_the_json_has_a_schema_and_the_lines_show_hints_only_where_something_is_to_be_done() -> (
    None
):
    facts = BROKEN["expired"]().facts
    report = Report(examine(facts), facts)
    assert report.as_json()["schema"] == 1
    assert {each["verdict"] for each in report.as_json()["checks"]} == {"ok", "fail", "skip"}
    hints = [line for line in report.lines() if line.startswith("        ")]
    assert hints == ["        order a new one; it may be for the same key or a new one"]


def test_failures_stand_last_and_what_they_kept_from_being_reached_is_one_line() -> None:
    facts = BROKEN["no environment"]().facts
    report = Report(examine(facts), facts)
    lines = [line for line in report.lines() if not line.startswith("        ")]
    *before, unreached, failure, summary, first = lines

    assert failure.startswith("fail  settings (setting-missing): HSMTOLL_ENVIRONMENT: required")
    assert unreached == f"skip  {len(CHECKS) - 1} checks not reached: settings comes first"
    assert not [line for line in before if line.startswith("fail")]
    assert summary == f"0 ok, 0 warnings, 1 failed, {len(CHECKS) - 1} skipped"
    assert first.startswith("first: test, prod or sandbox")
    # For a program each check stays one element, and the summary is the same.
    as_json = report.as_json()
    assert len(as_json["checks"]) == len(CHECKS)
    counts = {"ok": 0, "warn": 0, "fail": 1, "skip": len(CHECKS) - 1}
    assert as_json["summary"] == {**counts, "first": first.removeprefix("first: ")}


def test_a_good_setup_ends_with_its_summary_and_nothing_to_do() -> None:
    facts = next(iter(GOOD.values()))().facts
    report = Report(examine(facts), facts)
    assert re.fullmatch(r"\d+ ok, 0 warnings, 0 failed, \d+ skipped", report.lines()[-1])
    assert report.as_json()["summary"]["first"] is None


def test_every_setting_that_is_missing_is_named_at_once() -> None:
    facts = Facts(settings=Settings(), now=NOW)
    check = examine(facts)[0]
    names = ("ENVIRONMENT", "IDENTITY", "HSM__MODULE", "HSM__KEY")
    assert all(f"HSMTOLL_{name}" in check.line for name in names)
    assert [line.split(":")[0] for line in (check.hint or "").splitlines()] == [
        f"HSMTOLL_{name}" for name in names
    ]


@pytest.mark.parametrize("code", ["MP-120", "MP-124"])
def test_the_doctor_never_tells_to_ask_the_doctor(code: str) -> None:
    body = {"error": "invalid_grant", "error_description": "no", "error_uri": f"https://x/{code}"}
    post = Post("Maskinporten", "https://x/token", {}, "secret")
    with pytest.raises(errors.GrantRefused) as caught:
        read_subject(HttpResponse(400, {}, json.dumps(body).encode()), post)
    # The control: elsewhere that is what to do.
    assert "hsmtoll doctor" in (caught.value.hint or "")
    facts = replace(setup().facts, answers=ServiceAnswers(metadata={}, self_test=caught.value))
    report = Report(tuple(failed("self-test", caught.value) for _ in "x"), facts)
    assert "hsmtoll doctor" not in "".join(report.lines()) + json.dumps(report.as_json())
    assert "To do: " in "".join(report.lines())


def test_whether_a_trusted_list_has_the_issuer_is_not_claimed_before_maskinporten_says_so() -> None:
    good = setup()

    def check_with(answers: ServiceAnswers | None) -> Check:
        facts = replace(good.facts, answers=answers)
        return next(check for check in examine(facts) if check.check == "trusted-list")

    offline = check_with(None)
    assert (offline.verdict, "--online" in offline.line) == ("skip", True)
    assert "https://eidas.ec.europa.eu/" in offline.line
    refused = errors.GrantRefused("refused", code="MP-120")
    assert check_with(ServiceAnswers(self_test=refused)).verdict == "skip"
    assert check_with(ServiceAnswers(consumer="NTRSE-5566778899")).verdict == "ok"


def test_a_proxy_that_is_set_and_not_used_is_a_warning_until_it_is_not_needed() -> None:
    good = setup().facts

    def check_of(facts: Facts) -> Check:
        return next(check for check in examine(facts) if check.check == "proxy")

    unused = replace(good, unused_proxy="https_proxy")
    warned = check_of(unused)
    assert (warned.verdict, warned.code) == ("warn", "proxy-unused")
    assert warned.line == "https_proxy is set and not used"
    assert "HSMTOLL_PROXY=environment" in (warned.hint or "")
    assert check_of(good).verdict == "ok"
    assert check_of(replace(unused, answers=ServiceAnswers(metadata={}))).verdict == "ok"


def test_evidence_holds_the_key_as_reported_and_no_secret() -> None:
    canary = "4711-canary"
    made = setup(settings={"hsm": {"pin": canary}, "proxy": f"http://u:{canary}@proxy:1"})
    filed = Report(examine(made.facts), made.facts).evidence()
    assert canary not in repr(filed)
    assert filed["settings"]["hsm"]["pin"] == "set, not shown"
    reported = filed["keys"][0]["key_as_reported_by_the_module"]
    assert reported["never_extractable"] is True
    assert len(filed["chain"]) == 3
    assert filed["keys"][0]["device"]["firmware"] == "1.0"
    assert filed["versions"]["hsmtoll"]


# ----- revocation -------------------------------------------------------------------------


def _pair() -> tuple[Any, Any, Any]:
    leaf = seals().issue(key().public_key())
    return leaf, ours(leaf), ours(seals().intermediate)


def test_a_list_tells_revoked_from_not_revoked_in_both_encodings() -> None:
    raw, leaf, issuer = _pair()
    other = seals().issue(key().public_key())
    for encoding in (Encoding.DER, Encoding.PEM):
        gone = revocation_list(seals(), raw).public_bytes(encoding)
        stands = revocation_list(seals(), other).public_bytes(encoding)
        status = revocation.by_crl(gone, leaf, issuer, now=NOW)
        assert (status.revoked_at, status.reason) == (NOW - DAY, "keyCompromise")
        assert revocation.by_crl(stands, leaf, issuer, now=NOW).revoked_at is None


def test_a_list_of_another_issuer_or_of_nothing_is_refused() -> None:
    raw, leaf, issuer = _pair()
    forged = revocation_list(doctor_cases.twin_seals(), raw).public_bytes(Encoding.DER)
    for data in (forged, b"", b"<html>", b"0" * (revocation.MAX_BYTES + 1)):
        with pytest.raises(ValueError, match=r"list|signed|KiB"):
            revocation.by_crl(data, leaf, issuer, now=NOW)


def test_an_old_list_is_called_stale() -> None:
    _, leaf, issuer = _pair()
    old = revocation_list(seals(), next_update=NOW - timedelta(hours=1)).public_bytes(Encoding.DER)
    assert revocation.by_crl(old, leaf, issuer, now=NOW).stale
    made = setup()
    status = revocation.by_crl(old, leaf, issuer, now=NOW)
    mine = made.facts.seen[0].certificates[0]
    facts = replace(made.facts, revocation=(Revocation(certificate=mine, status=status),))
    assert findings(facts) == {"revocation-stale": "warn"}


def _ocsp(raw: Any, status: ocsp.OCSPCertStatus, *, by: Any = None) -> bytes:
    gone = status is ocsp.OCSPCertStatus.REVOKED
    authority = by or seals()
    return (
        ocsp.OCSPResponseBuilder()
        .add_response(
            raw,
            seals().intermediate,
            hashes.SHA1(),  # noqa: S303 - it names the certificate in RFC 6960
            status,
            NOW - DAY,
            NOW + DAY,
            NOW - DAY if gone else None,
            None,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, authority.intermediate)
        .sign(authority._key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def test_an_ocsp_answer_is_taken_from_the_issuer_alone() -> None:
    raw, leaf, issuer = _pair()
    good = _ocsp(raw, ocsp.OCSPCertStatus.GOOD)
    gone = _ocsp(raw, ocsp.OCSPCertStatus.REVOKED)
    assert revocation.by_ocsp(good, leaf, issuer, now=NOW).revoked_at is None
    assert revocation.by_ocsp(gone, leaf, issuer, now=NOW).revoked_at == NOW - DAY
    forged = _ocsp(raw, ocsp.OCSPCertStatus.GOOD, by=doctor_cases.twin_seals())
    elsewhere = _ocsp(seals().issue(key().public_key()), ocsp.OCSPCertStatus.GOOD)
    unknown = _ocsp(raw, ocsp.OCSPCertStatus.UNKNOWN)
    for data in (forged, elsewhere, unknown, b"", b"<html>", good + bytes(64 * 1024)):
        with pytest.raises(ValueError, match=r"signed|another|know|not|parsing|more than 64 KiB"):
            revocation.by_ocsp(data, leaf, issuer, now=NOW)


def test_an_ocsp_question_reads_back_as_the_certificate_asked_for() -> None:
    import base64
    from urllib.parse import unquote

    raw, leaf, issuer = _pair()
    url = revocation.ocsp_url("http://ocsp.example/path/", leaf, issuer)
    assert url.startswith("http://ocsp.example/path/")
    asked = ocsp.load_der_ocsp_request(base64.b64decode(unquote(url.rpartition("/")[2])))
    assert asked.serial_number == raw.serial_number


def test_nothing_known_of_revocation_is_a_warning_and_not_a_pass() -> None:
    made = setup()
    mine = made.facts.seen[0].certificates[0]
    facts = replace(made.facts, revocation=(Revocation(certificate=mine, problem="no answer"),))
    assert findings(facts) == {"revocation-unknown": "warn"}


def test_a_malformed_extension_is_warned_about_and_named() -> None:
    made = setup()
    seen = made.facts.seen[0]
    leaf, *above = seen.certificates
    odd = replace(leaf, unreadable=frozenset({"1.3.6.1.5.5.7.1.3"}))
    facts = replace(made.facts, seen=(replace(seen, certificates=(odd, *above)),))
    assert findings(facts) == {"certificate-extension": "warn"}
    line = next(c.line for c in examine(facts) if c.check == "certificate")
    assert "these extensions cannot be read: qcStatements" in line
