"""The manifests of docker/kubernetes are what the API of Kubernetes takes, by its own schema."""

from __future__ import annotations

import copy
import importlib
from typing import Any, Final

import pytest

from tests.kit import vectors
from tests.kit.kubernetes import CLIENT, HOST, Document, container, pod

vectors.package("kubernetes_validate")
_judge: Any = importlib.import_module("kubernetes_validate")

#: The oldest one that has sidecars, and the newest one that the package knows.
VERSIONS: Final = ("1.29", str(_judge.latest_version()))


def judge(document: Document, version: str) -> None:
    _judge.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "document", [*HOST, *CLIENT], ids=lambda each: f"{each['kind']}-{each['metadata']['name']}"
)
def test_a_manifest_is_of_the_schema_of_the_api(document: Document, version: str) -> None:
    judge(document, version)


def misspelt(of: Document) -> None:
    of["securityContext"]["readOnlyRootFileSystem"] = True


def of_the_wrong_type(of: Document) -> None:
    of["livenessProbe"]["periodSeconds"] = "10"


def without_its_name(of: Document) -> None:
    del of["name"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("damage", [misspelt, of_the_wrong_type, without_its_name])
@pytest.mark.parametrize(("found", "name"), [(HOST, "signing-host"), (CLIENT, "proxy")])
def test_a_field_that_is_misspelt_wrong_or_missing_is_refused(
    found: list[Document], name: str, damage: Any, version: str
) -> None:
    changed = copy.deepcopy(found)
    damage(container(pod(changed), name))
    (document,) = (each for each in changed if each["kind"] in ("StatefulSet", "Deployment"))
    with pytest.raises(_judge.ValidationError):
        judge(document, version)
