"""
The manifests of docker/kubernetes as values, and what the kubelet makes of them for a container:
its variables, and the files of its volumes.
"""

from __future__ import annotations

from typing import Any, Final

import yaml

from tests.kit.readers import TOP

FOLDER: Final = TOP / "docker" / "kubernetes"

#: A document of a manifest.
Document = dict[str, Any]


def documents(name: str) -> list[Document]:
    """What is in ``docker/kubernetes/NAME.yaml``, in its order."""
    return list(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text("utf-8")))


HOST: Final = documents("signing-host")
CLIENT: Final = documents("client")


def one(found: list[Document], kind: str) -> Document:
    """The only document of its kind."""
    (document,) = (each for each in found if each["kind"] == kind)
    return document


def pod(found: list[Document]) -> Document:
    """The specification of the pod that a StatefulSet or a Deployment makes."""
    (document,) = (each for each in found if each["kind"] in ("StatefulSet", "Deployment"))
    spec: Document = document["spec"]["template"]["spec"]
    return spec


def containers(spec: Document) -> list[Document]:
    """Of a pod: its sidecars, and then what they stand beside."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def container(spec: Document, name: str) -> Document:
    """The container of a pod that has that name."""
    (found,) = (each for each in containers(spec) if each["name"] == name)
    return found


def variables(of: Document) -> dict[str, str]:
    """The variables that a container's specification sets."""
    return {each["name"]: each["value"] for each in of.get("env", [])}


def service_variables(name: str, address: str, ports: list[Document]) -> dict[str, str]:
    """
    The variables that every container of the namespace gets for a Service, unless the pod has
    ``enableServiceLinks: false``.

    https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    prefix = name.upper().replace("-", "_")
    where = f"[{address}]" if ":" in address else address
    made = {f"{prefix}_SERVICE_HOST": address}
    for each in ports:
        number, protocol = str(each["port"]), each.get("protocol", "TCP")
        link, url = f"{prefix}_PORT_{number}_{protocol}", f"{protocol.lower()}://{where}:{number}"
        # The first one has these as well.
        made.setdefault(f"{prefix}_SERVICE_PORT", number)
        made.setdefault(f"{prefix}_PORT", url)
        made |= {
            link: url,
            f"{link}_PROTO": protocol.lower(),
            f"{link}_PORT": number,
            f"{link}_ADDR": address,
        }
        if "name" in each:
            made[f"{prefix}_SERVICE_PORT_{each['name'].upper().replace('-', '_')}"] = number
    return made
