"""
The page about Kubernetes, followed to the letter on a machine of its own: its commands are typed,
and a stand-in for kubectl and the kubelet does with the manifests what they say.

What only a cluster can do is left to it: the network, and the images.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from cryptography import x509

from hsmtoll.host.system import clock_is_synchronised
from tests.kit import kubelet, kubernetes
from tests.kit.machine import Machine, certify, verified
from tests.kit.readers import Block, blocks, commands, pages
from tests.kit.signing_host import ME, PROFILE, ROAD_SCOPE, RunningHost, entry, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PAGE: Final = pages()["kubernetes"]
ON_HOST: Final = "kubectl -n signing exec signing-host-0 --"
#: The variables of the image, and where SoftHSM, which stands for the HSM, has its tokens.
IMAGE: Final = {
    "PATH": "/opt/hsmtoll/bin:/usr/local/bin:/usr/bin:/bin",
    "HOME": "/nonexistent",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HSMTOLL_STATE": "/var/lib/hsmtoll",
    "SOFTHSM2_CONF": "/opt/hsm/softhsm2.conf",
}
_NODE: Final = """
export PATH=/opt/hsmtoll/bin:$PATH
useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent toll
install -D -m 0644 /usr/lib/softhsm/libsofthsm2.so /opt/hsm/libpkcs11.so
echo 'directories.tokendir = /home/hsm' > /opt/hsm/softhsm2.conf
install -d -o toll -g toll -m 0700 /home/hsm
setpriv --reuid=toll --regid=toll --clear-groups env SOFTHSM2_CONF=/opt/hsm/softhsm2.conf \
    softhsm2-util --init-token --free --label customs --so-pin 73914206 --pin 482913
echo '127.0.0.1 signing-host.signing.svc' >> /etc/hosts
mkdir -p /run/kubelet docker/kubernetes
printf '%s\\n' '#!/opt/hsmtoll/bin/python' 'import runpy' \\
    'runpy.run_path("/opt/hsm/kubelet.py", run_name="__main__")' > /opt/hsmtoll/bin/kubectl
chmod 0755 /opt/hsmtoll/bin/kubectl
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Where the page was followed until its signing host has signed, and its client asked."""
    with Machine.made(tmp_path_factory) as made:
        made.do(_NODE)
        image(made, IMAGE)
        program = Path(kubelet.__file__).read_text("utf-8")
        made.do(f"printf %s {shlex.quote(program)} > /opt/hsm/kubelet.py")
        for each in kubernetes.FOLDER.iterdir():
            shutil.copy2(each, made.folder / "docker" / "kubernetes")
        if not clock_is_synchronised():
            # As the page says for a node whose kernel does not know who keeps the clock.
            manifest(made, "[host]\n", '[host]\n    clock = "unchecked"\n')
        for block in (*typed("Signing host"), *typed("Client")):
            if "key import" in block.text:
                certify(made)
            made.follow(block)
        yield made


def image(machine: Machine, variables: Mapping[str, str]) -> None:
    """What containers have from now on."""
    machine.do(f"printf %s {shlex.quote(json.dumps(variables))} > /run/kubelet/image.json")


def manifest(machine: Machine, old: str, new: str) -> None:
    """Change signing-host.yaml as its user would."""
    path = machine.folder / "docker" / "kubernetes" / "signing-host.yaml"
    text = path.read_text("utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), "utf-8")


def typed(title: str) -> Iterator[Block]:
    """The commands of a section of the page."""
    (text,) = (part for part in PAGE.split("\n## ") if part.startswith(f"{title}\n"))
    yield from blocks(text, "sh")


def in_client(machine: Machine, command: str) -> tuple[int, str]:
    """What the sidecar's command says; without a token it needs nothing but the signing host."""
    return machine.run(f"kubectl -n customs exec deploy/app -c proxy -- {command}")


def log(machine: Machine) -> str:
    return machine.do("cat /run/kubelet/pods/signing/signing-host-0/signing-host.log")


@pytest.mark.needs_root
def test_the_page_ends_with_a_grant_that_the_program_has_asked_for(machine: Machine) -> None:
    leaf = x509.load_pem_x509_certificates((machine.folder / "acme.pem").read_bytes())[0]
    code, grant = in_client(machine, "hsmtoll sign road")
    assert code == 0, grant
    assert verified(grant, leaf) == ROAD_SCOPE
    # The program, which has no certificate: all that is missing here is Maskinporten.
    url = "http://127.0.0.1:8880/api/movement/road/v2/test-auth"
    answer = machine.do(f"curl -s -i {url}")
    assert "Hsmtoll-Error: unreachable" in answer, answer
    assert "Maskinporten" in answer
    probe = kubernetes.container(kubernetes.pod(kubernetes.CLIENT), "proxy")["livenessProbe"]
    assert in_client(machine, shlex.join(probe["exec"]["command"]))[0] == 0
    signed = machine.do(f"{ON_HOST} hsmtoll audit list").splitlines()[-1]
    assert "san:dns:app.acme.example" in signed
    assert ROAD_SCOPE in signed
    assert signed.endswith("signed")


@pytest.mark.needs_root
def test_a_pod_can_change_nothing_but_its_volumes_and_no_container_has_the_others(
    machine: Machine,
) -> None:
    for path in ("/etc/x", "/etc/hsmtoll/x", "/etc/hsmtoll-secret/x", "/opt/hsmtoll/x", "/run/x"):
        code, output = machine.run(f"{ON_HOST} touch {path}")
        assert (code, "Read-only" in output) == (1, True), output
    for folder in ("tmp", "var/lib/hsmtoll"):
        machine.do(f"{ON_HOST} touch /{folder}/x && {ON_HOST} rm /{folder}/x")
    modes = machine.do(f"{ON_HOST} stat -L -c '%U:%G %a' /etc/hsmtoll-secret/pin").strip()
    assert modes == "root:toll 440"
    status = machine.do(f"{ON_HOST} cat /proc/1/status")
    assert "CapBnd:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert in_client(machine, "cat /etc/hsmtoll-secret/pin")[0] != 0


@pytest.mark.needs_root
def test_stop_and_a_changed_policy_reach_the_pod_as_the_page_says(machine: Machine) -> None:
    stopping, reloading, restarting, taking = typed("While the host runs")
    (stop, _), (resume, _), (listing, _) = commands(stopping)
    machine.do(stop)
    # A refusal with its reason, and no connection that is refused.
    code, output = in_client(machine, "hsmtoll sign road")
    assert code == 90, output
    assert "stop" in output
    machine.do(resume)
    assert in_client(machine, "hsmtoll sign road")[0] == 0
    assert "stopped" in machine.do(listing)

    manifest(machine, '["road"]', '["road", "air"]')
    apply, look, reload = (command for command, _ in commands(reloading))
    assert in_client(machine, "hsmtoll sign air")[0] == 90
    machine.do(apply)
    assert '"air"' in machine.do(look)
    assert in_client(machine, "hsmtoll sign air")[0] == 90
    machine.do(reload)
    eventually(lambda: in_client(machine, "hsmtoll sign air")[0] == 0)

    # A kubelet that gives the volume to the group at every mount.
    machine.do("chmod -R g+rwX /run/kubelet/claims/data")
    machine.follow(restarting)
    assert in_client(machine, "hsmtoll sign air")[0] == 0
    machine.follow(taking)
    # The control: a record that was altered is found where it was brought to.
    verify = next(command for command, _ in commands(taking) if "verify" in command)
    machine.do("sed -i s/app.acme/any.acme/ audit/*.jsonl")
    assert machine.run(verify)[0] == 91


@pytest.mark.needs_root
def test_the_variables_of_a_service_called_hsmtoll_keep_no_host_from_its_work(
    machine: Machine,
) -> None:
    ports = kubernetes.one(kubernetes.HOST, "Service")["spec"]["ports"]
    links = kubernetes.service_variables("hsmtoll", "10.96.7.1", ports)
    image(machine, IMAGE | links)
    (restarting,) = (each for each in typed("While the host runs") if "rollout" in each.text)
    machine.follow(restarting)
    assert "ignored, Kubernetes sets it for a Service of that name" in log(machine)
    assert in_client(machine, "hsmtoll sign road")[0] == 0
    # The control: what only looks like them ends the pod.
    image(machine, IMAGE | {"HSMTOLL_SERVICE_HOST": "signer.example"})
    machine.do(commands(restarting)[0][0])
    eventually(lambda: "HSMTOLL_SERVICE_HOST: there is no such setting" in log(machine))
    image(machine, IMAGE)
    machine.follow(restarting)


@pytest.mark.needs_root
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        pytest.param(" fsGroup: 10001", " fsGroup:", "(Permission denied)", id="group"),
        pytest.param(
            "secretName: signing-host, defaultMode: 0400",
            "secretName: signing-host, defaultMode: 0444",
            "others may read it (mode 0444)", id="mode",
        ),
        pytest.param("/var/lib/hsmtoll/state", "/etc/state", "Read-only file system", id="state"),
    ],
)  # fmt: skip
def test_without_what_the_page_says_of_volumes_the_pod_ends_and_says_why(
    machine: Machine, old: str, new: str, words: str
) -> None:
    (restarting,) = (each for each in typed("While the host runs") if "rollout" in each.text)
    before = log(machine)
    for was, becomes in ((old, new), (new, old)):
        manifest(machine, was, becomes)
        machine.do("kubectl apply -f docker/kubernetes/signing-host.yaml")
        if becomes == new:
            eventually(lambda: words in log(machine).removeprefix(before))
    machine.do(commands(restarting)[1][0])


def test_a_policy_that_is_replaced_by_a_rename_counts_after_a_reload(
    make_host: Callable[..., RunningHost],
) -> None:
    """For every account: the files of a ConfigMap, without its owner and modes."""
    host = make_host()
    volume = host.home / "etc" / "volume"
    volume.mkdir()

    def lay(*scopes: str) -> None:
        policy = f"{PROFILE}{entry(ME, scopes=scopes)}"
        kubelet.lay(volume, {"policy.toml": policy.encode()}, 0o644, None)

    lay("road")
    host.start(HSMTOLL_HOST__POLICY=str(volume / "policy.toml"))
    assert (host.ask().status, host.ask(scope="air").status) == (200, 403)
    lay("air")
    host.reload()
    assert (host.ask().status, host.ask(scope="air").status) == (403, 200)
