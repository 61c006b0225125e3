"""The stack does its work: a client in a container, programs of the host, and interruptions."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from joserfc import jws
from joserfc.errors import BadSignatureError
from joserfc.jwk import RSAKey

from tests.docker.containers import docker, run_docker, wait_for
from tests.kit.grants import DEFINED

if TYPE_CHECKING:
    from pathlib import Path

    from tests.docker.containers import Stack

# The first test of each command builds and starts everything.
pytestmark = pytest.mark.timeout(600)

#: A program in the middle of its work: one signature for each line that it is given.
WORKER = (
    DEFINED
    + """
import sys
from hsmtoll.app import App
from hsmtoll.errors import HsmTollError
from hsmtoll.settings import load

app = App(load())
device = app.devices[0]
for _ in sys.stdin:
    try:
        device.sign("RS256", a_grant(audience=app.endpoints.issuer))
        print("signed", flush=True)
    except HsmTollError as exc:
        print(f"{exc.exit_code}", flush=True)
"""
)


def hsmtoll(*arguments: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command on this machine."""
    return subprocess.run(
        [sys.executable, "-m", "hsmtoll", *arguments],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_advertised_command_ends_with_the_200(stack: Stack) -> None:
    """The exit code was zero, or the fixture would have failed; the log tells what happened."""
    lines = [
        "making a key on the device",
        "sending a signing request, signed on the device, to the issuer",
        "checking the setup, without a request to Maskinporten",
        "GET /api/movement/road/v2/test-auth -> 200",
        "200 OK",
    ]
    assert [line for line in lines if line not in stack.log] == []


def test_a_client_container_that_fails_says_so(stack: Stack) -> None:
    """The control of the test above: the 200 and the code are not there for everybody."""
    command = "run --rm --no-deps -T -e HSMTOLL_HSM__KEY='pkcs11:token=toll;object=none' app"
    with pytest.raises(Exception, match="returned 30"):
        stack.do(f"{command} test-auth road")


def test_the_host_signs_on_the_containers_device(
    stack: Stack, host_environ: dict[str, str], tmp_path: Path
) -> None:
    signed = hsmtoll("sign", "road", environ=host_environ)
    assert signed.returncode == 0, signed.stderr
    assertion = signed.stdout.strip()
    # A header with a whole chain is longer than most.
    registry = jws.JWSRegistry(algorithms=["RS256"])
    registry.max_header_length = 64 * 1024
    header = jws.extract_compact(assertion.encode(), registry=registry).headers()
    chain = [x509.load_der_x509_certificate(_der(each)) for each in header["x5c"]]

    key = RSAKey.import_key(chain[0].public_bytes(Encoding.PEM))
    claims = json.loads(jws.deserialize_compact(assertion, key, registry=registry).payload)
    assert claims["aud"] == "https://sandbox:8443/"
    head, body, signature = assertion.split(".")
    with pytest.raises(BadSignatureError):
        jws.deserialize_compact(f"{head}.{body[:-2]}AA.{signature}", key, registry=registry)

    roots = stack.do("exec -T sandbox cat /run/sandbox/roots.pem")
    assert _openssl_verifies(tmp_path, roots, chain)
    assert not _openssl_verifies(tmp_path, _pem(chain[0]), chain[:1])


def test_a_wrong_pin_is_refused_over_the_socket(
    host_environ: dict[str, str], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("not-this-one", "ascii")
    refused = hsmtoll("sign", "road", environ={**host_environ, "HSMTOLL_HSM__PIN_FILE": str(wrong)})
    assert refused.returncode == 20, refused.stderr
    # Who had it refused may correct it; nobody else could now, with a PIN that no person typed.
    taken = hsmtoll("sign", "road", environ=host_environ)
    assert taken.returncode == 0, taken.stderr


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_a_restart_in_the_middle_of_work_is_survived_by_device_and_host(
    stack: Stack, host_environ: dict[str, str], how: str
) -> None:
    """
    The work goes on: at once, or after device errors (30) that do not hang; the key, the PIN
    and the certificates are still there for whoever comes next.
    """
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=host_environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines, answers = worker.stdin, worker.stdout
    assert lines is not None
    assert answers is not None

    def signs() -> str:
        lines.write("\n")
        lines.flush()
        return answers.readline().strip()

    with worker:
        assert [signs() for _ in range(3)] == ["signed"] * 3
        container = stack.container("softhsm")
        docker("stop" if how == "restart" else "kill", container)
        assert signs() == "30"
        docker("start", container)
        wait_for(container, "healthy")
        assert signs() in {"signed", "30"}
        lines.close()
    assert worker.returncode == 0
    again = hsmtoll("sign", "road", environ=host_environ)
    assert again.returncode == 0, again.stderr


def test_the_services_run_as_nobody_special_on_a_file_system_that_cannot_be_written(
    stack: Stack,
) -> None:
    for service in ("softhsm", "sandbox"):
        container = stack.container(service)
        assert docker("exec", container, "id", "-u") == "10001"
        refused = run_docker("exec", container, "sh", "-c", "echo x > /usr/local/bin/x")
        assert refused.returncode != 0
        refused = run_docker("exec", "-u", "0", container, "sh", "-c", "echo x > /x")
        assert "Read-only file system" in refused.stderr
        # What must be written, can be.
        assert run_docker("exec", container, "sh", "-c", "echo x > /tmp/x").returncode == 0


def test_a_device_that_does_not_answer_is_not_healthy(stack: Stack) -> None:
    container = stack.container("softhsm")
    assert run_docker("exec", container, "healthcheck.sh").returncode == 0
    other = run_docker("exec", "-e", "TOKEN_LABEL=other", container, "healthcheck.sh")
    assert other.returncode != 0
    closed = run_docker("exec", "-e", "SOCKET=/run/p11/none", container, "healthcheck.sh")
    assert closed.returncode != 0


def _der(x5c: str) -> bytes:
    return base64.b64decode(x5c)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def _openssl_verifies(folder: Path, roots: str, chain: list[x509.Certificate]) -> bool:
    trusted, leaf, between = folder / "roots.pem", folder / "leaf.pem", folder / "between.pem"
    trusted.write_text(roots, "ascii")
    leaf.write_text(_pem(chain[0]), "ascii")
    between.write_text("".join(_pem(each) for each in chain[1:]) or _pem(chain[0]), "ascii")
    done = subprocess.run(
        ["openssl", "verify", "-CAfile", trusted, "-untrusted", between, leaf],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0
