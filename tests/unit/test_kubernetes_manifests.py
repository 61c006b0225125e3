"""
What the manifests of docker/kubernetes say agrees with the settings, and within itself.

That the API takes them is judged in the room `vectors`; that a pod of them works, in `host`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import pytest
from pydantic import BaseModel

from hsmtoll.errors import ConfigurationError
from hsmtoll.host.emergency_stop import stop_file
from hsmtoll.host.peers import Peer
from hsmtoll.host.policy import Counts, GrantRequest, Policy, decide
from hsmtoll.settings import Settings, load
from tests.kit.kubernetes import (
    CLIENT,
    HOST,
    Document,
    container,
    containers,
    one,
    pod,
    service_variables,
    variables,
)
from tests.kit.readers import TOP

if TYPE_CHECKING:
    from collections.abc import Iterator

PODS: Final = {"signing-host": pod(HOST), "proxy": pod(CLIENT)}
#: What the image is started with, and where it lies.
DOCKERFILE: Final = (TOP / "docker" / "Dockerfile").read_text("utf-8")
#: In the image that a user makes of ours, with the module of the HSM's maker.
IN_THE_IMAGE: Final = {"/opt/hsm/libpkcs11.so"}


@pytest.fixture(params=PODS)
def name(request: pytest.FixtureRequest) -> str:
    """Of the container that runs hsmtoll."""
    return str(request.param)


@pytest.fixture
def settings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Those that the container has: an unknown or wrong one is an error of `load`."""
    for variable, value in variables(container(PODS[name], name)).items():
        monkeypatch.setenv(variable, value)
    file = tmp_path / "hsmtoll.toml"
    file.write_text(
        one(HOST, "ConfigMap")["data"]["hsmtoll.toml"] if name == "signing-host" else ""
    )
    return load(config=file)


def paths(group: BaseModel) -> Iterator[Path]:
    """Every path in the settings that were set."""
    for member in group.model_fields_set:
        value = getattr(group, member)
        if isinstance(value, BaseModel):
            yield from paths(value)
        elif isinstance(value, Path):
            yield value


def test_every_setting_of_a_manifest_exists(settings: Settings, name: str) -> None:
    assert [each for each in paths(settings) if not each.is_absolute()] == []
    if name == "signing-host":
        assert settings.host.metrics_public
    else:
        assert settings.signer.url


def test_a_setting_that_does_not_exist_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    for variable, value in variables(container(PODS["proxy"], "proxy")).items():
        monkeypatch.setenv(variable.replace("CLIENT_CERT", "CLIENT_CRT"), value)
    with pytest.raises(ConfigurationError, match="HSMTOLL_SIGNER__CLIENT_CRT"):
        load()


def mounts(name: str) -> dict[str, Document]:
    return {each["mountPath"]: each for each in container(PODS[name], name)["volumeMounts"]}


def volume(name: str, mount: Document) -> str:
    """The kind of volume that is mounted."""
    claimed = one(HOST, "StatefulSet")["spec"]["volumeClaimTemplates"]
    if name == "signing-host" and mount["name"] in {each["metadata"]["name"] for each in claimed}:
        return "persistent"
    (found,) = (each for each in PODS[name]["volumes"] if each["name"] == mount["name"])
    return str(next(kind for kind in found if kind != "name"))


def test_every_path_is_in_a_volume_and_every_volume_is_used(settings: Settings, name: str) -> None:
    # Python's temporary files, and those of the module.
    used = {path for path, each in mounts(name).items() if each["name"] == "tmp"}
    for path in paths(settings):
        if str(path) not in IN_THE_IMAGE:
            (mount,) = (each for each in mounts(name) if path.is_relative_to(each))
            used.add(mount)
    assert used == mounts(name).keys()


def test_what_is_written_lies_in_volumes_that_can_be(settings: Settings, name: str) -> None:
    writable = {
        path: volume(name, each) for path, each in mounts(name).items() if not each.get("readOnly")
    }
    assert settings.state is not None
    written, kind = [settings.state], "emptyDir"
    if name == "signing-host":
        assert settings.host.audit_dir is not None
        written += [settings.host.audit_dir, stop_file(settings)]
        kind = "persistent"
    # None is the root of a volume, which fsGroup opens to the group.
    assert {writable[str(path.parent)] for path in written} == {kind}


def test_secrets_come_from_secrets_and_the_files_in_them_are_for_their_group_alone(
    settings: Settings, name: str
) -> None:
    host, signer = settings.host, settings.signer
    secret = [settings.hsm.pin_file, host.audit_key, host.key, signer.client_key]
    for path in filter(None, secret):
        assert volume(name, mounts(name)[str(path.parent)]) == "secret", path
    for each in PODS[name]["volumes"]:
        if "secret" in each:
            # The kubelet makes 0440 of it, with the group of fsGroup.
            assert each["secret"]["defaultMode"] == 0o400
    assert PODS[name]["securityContext"]["fsGroup"] == 10001


def test_the_pods_are_of_the_restricted_profile_of_pod_security() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    for spec in PODS.values():
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        of_the_pod = spec["securityContext"]
        assert of_the_pod["runAsNonRoot"] is True
        assert of_the_pod["seccompProfile"] == {"type": "RuntimeDefault"}
        kinds = {kind for each in spec["volumes"] for kind in each if kind != "name"}
        assert kinds <= {"configMap", "secret", "emptyDir"}
        for each in containers(spec):
            context = each["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            assert "privileged" not in context
    labels = one(HOST, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_account_is_that_of_the_image(name: str) -> None:
    of_the_pod, own = PODS[name]["securityContext"], container(PODS[name], name)["securityContext"]
    account = {**of_the_pod, **own}
    assert (account["runAsUser"], account["runAsGroup"]) == (10001, 10001)
    assert "USER 10001:10001" in DOCKERFILE


def port(of: Document, wanted: str | int) -> int:
    """The number of a container's port, by its name or number."""
    (number,) = (
        each["containerPort"]
        for each in of["ports"]
        if wanted in (each["name"], each["containerPort"])
    )
    return int(number)


@pytest.mark.parametrize("name", ["signing-host"], indirect=True)
def test_probes_service_and_network_policy_speak_of_the_ports_that_are_listened_on(
    settings: Settings,
) -> None:
    host = container(PODS["signing-host"], "signing-host")
    tls, metrics = (
        int(str(where).rpartition(":")[2])
        for where in (settings.host.listen, settings.host.metrics)
    )
    for kind, page in (("startup", "/live"), ("liveness", "/live"), ("readiness", "/ready")):
        get = host[f"{kind}Probe"]["httpGet"]
        assert (get["path"], port(host, get["port"])) == (page, metrics)
    service, rules = one(HOST, "Service"), one(HOST, "NetworkPolicy")["spec"]
    (served,) = service["spec"]["ports"]
    assert port(host, served["targetPort"]) == tls
    assert [port(host, rule["ports"][0]["port"]) for rule in rules["ingress"]] == [tls, metrics]
    template = one(HOST, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert template.items() >= service["spec"]["selector"].items()
    assert template.items() >= rules["podSelector"]["matchLabels"].items()


@pytest.mark.parametrize("name", ["proxy"], indirect=True)
def test_the_client_finds_the_host_and_is_let_in(settings: Settings) -> None:
    (url,) = map(urlsplit, settings.signer.url)
    service = one(HOST, "Service")
    named = service["metadata"]
    assert url.hostname == f"{named['name']}.{named['namespace']}.svc"
    (served,) = service["spec"]["ports"]
    assert url.port == served["port"]
    # The host's rule is for its label, and the client's own for the host's.
    labels = one(CLIENT, "Deployment")["spec"]["template"]["metadata"]["labels"]
    allowed = one(HOST, "NetworkPolicy")["spec"]["ingress"][0]["from"][0]["podSelector"]
    assert labels.items() >= allowed["matchLabels"].items()
    (to,) = one(CLIENT, "NetworkPolicy")["spec"]["egress"][0]["to"]
    assert to["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": named["namespace"]
    }
    assert to["podSelector"]["matchLabels"] == service["spec"]["selector"]
    # The program calls where the proxy listens, and has none of its files.
    app = container(PODS["proxy"], "app")
    assert variables(app) == {"CUSTOMS_URL": f"http://{settings.local_proxy.listen}"}
    assert "volumeMounts" not in app


@pytest.mark.parametrize("name", ["proxy"], indirect=True)
def test_the_policy_allows_the_client_and_nobody_else(settings: Settings) -> None:
    policy = Policy.parse(one(HOST, "ConfigMap")["data"]["policy.toml"].encode())
    assert settings.signer.profile is not None
    ask = GrantRequest(settings.signer.profile, "road")

    def may(*names: str) -> bool:
        peer = Peer(frozenset(names), "ab" * 32)
        return decide(policy, peer, ask, settings.signer.mode, Counts()).allowed

    # Whose certificate the page has made.
    assert may("san:dns:app.acme.example")
    assert not may("san:dns:other.acme.example")
    assert policy.profiles["acme"]["environment"] == settings.environment
    assert policy.profiles["acme"]["identity"] == settings.identity


def test_every_object_is_in_the_namespace_of_the_host() -> None:
    for each in HOST:
        assert each["metadata"].get("namespace", each["metadata"]["name"]) == "signing"


# ------------------------------------------------------------------ variables of Services


@pytest.mark.parametrize("called", ["hsmtoll", "hsmtoll-host", "hsmtoll-signer", "hsmtoll-prod-2"])
@pytest.mark.parametrize("address", ["10.96.7.1", "fd00::7"])
def test_a_service_called_hsmtoll_changes_nothing_for_its_neighbours(
    called: str, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ports: list[dict[str, Any]] = [
        *one(HOST, "Service")["spec"]["ports"],
        {"port": 53, "protocol": "UDP"},
    ]
    made = service_variables(called, address, ports)
    assert len(made) == 12
    for variable, value in made.items():
        monkeypatch.setenv(variable, value)
    caplog.set_level(logging.WARNING)
    assert load() == Settings()
    (output,) = caplog.records
    assert "enableServiceLinks: false" in output.getMessage()
    # The control: the same variable with a value that the kubelet does not set is no setting.
    monkeypatch.setenv(f"{called.upper().replace('-', '_')}_SERVICE_HOST", "signer.example")
    with pytest.raises(ConfigurationError, match="there is no such setting"):
        load()


def test_the_services_of_the_manifests_do_not_even_begin_like_settings() -> None:
    service = one(HOST, "Service")
    made = service_variables(service["metadata"]["name"], "10.96.7.1", service["spec"]["ports"])
    assert len(made) == 8
    assert [each for each in made if each.startswith("HSMTOLL_")] == []
