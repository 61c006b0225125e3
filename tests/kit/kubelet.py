"""
A stand-in for kubectl, and for the kubelet of one node, on a machine of `tests.kit.machine`.

    python kubelet.py VERB …      what kubectl is told: apply, create, cp, exec, wait or rollout

It knows what the manifests of docker/kubernetes have, and fails at anything else. A container has
namespaces for its processes and its mounts, its account without capabilities, and all but its
writable volumes is mounted read-only; the image is the machine itself. Volumes are laid as the
kubelet lays them: Secrets and ConfigMaps behind ``..data``, which is replaced by a rename, and
everything given to ``fsGroup``. Pods share the network of the machine.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

ROOT = Path("/run/kubelet")
#: What a test adds to the variables of the image.
IMAGE = ROOT / "image.json"
PATIENCE = 60.0


# ---------------------------------------------------------------------- objects


def path_of(kind: str, namespace: str, name: str) -> Path:
    return ROOT / "objects" / namespace / kind / f"{name}.json"


def put(document: dict[str, Any], namespace: str) -> None:
    named = document["metadata"]
    path = path_of(document["kind"], named.get("namespace", namespace), named["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def get(kind: str, namespace: str, name: str) -> dict[str, Any] | None:
    path = path_of(kind, namespace, name)
    return json.loads(path.read_text()) if path.exists() else None


def content(volume: dict[str, Any], namespace: str) -> tuple[dict[str, bytes], int] | None:
    """The files of a Secret's or a ConfigMap's volume, and their mode; None where it is missing."""
    if "secret" in volume:
        found = get("Secret", namespace, volume["secret"]["secretName"])
        mode = volume["secret"].get("defaultMode", 0o644)
    else:
        found = get("ConfigMap", namespace, volume["configMap"]["name"])
        mode = volume["configMap"].get("defaultMode", 0o644)
    if found is None:
        return None
    if found["kind"] == "Secret":
        return {name: base64.b64decode(each) for name, each in found["data"].items()}, mode
    return {name: each.encode() for name, each in found["data"].items()}, mode


# ---------------------------------------------------------------------- volumes


def give(place: Path, group: int, *, writable: bool) -> None:
    """SetVolumeOwnership of the kubelet: the group, and its permissions."""
    files, folders = (0o660, 0o2770) if writable else (0o440, 0o2550)
    for each in (place, *place.rglob("*")):
        os.chown(each, -1, group, follow_symlinks=False)
        if not each.is_symlink():
            each.chmod(each.stat().st_mode | (folders if each.is_dir() else files))


def lay(place: Path, files: dict[str, bytes], mode: int, group: int | None) -> None:
    """AtomicWriter of the kubelet: a new directory, and one rename that brings all of it."""
    version = place / f"..2026_12_01_10_00_00.{time.monotonic_ns()}"
    version.mkdir(mode=0o755)
    for name, data in files.items():
        (version / name).write_bytes(data)
        (version / name).chmod(mode)
        if not os.path.lexists(place / name):
            (place / name).symlink_to(f"..data/{name}")
    current = place / "..data"
    old = current.resolve() if current.exists() else None
    (place / "..data_tmp").symlink_to(version.name)
    (place / "..data_tmp").replace(current)
    if old is not None:
        shutil.rmtree(old)
    if group is not None:
        give(place, group, writable=False)


def make_volume(place: Path, volume: dict[str, Any], namespace: str, group: int | None) -> bool:
    """Whether the volume is there now."""
    if "emptyDir" in volume or "claim" in volume:
        if not place.exists():
            place.mkdir(parents=True)
            place.chmod(0o777 if "emptyDir" in volume else 0o755)
            if group is not None:
                give(place, group, writable=True)
        return True
    found = content(volume, namespace)
    if found is None:
        return False
    if not place.exists():
        place.mkdir(parents=True)
        place.chmod(0o777)
        if "secret" in volume:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    files, mode = found
    if any(
        not (place / name).exists() or (place / name).read_bytes() != data
        for name, data in files.items()
    ):
        lay(place, files, mode, group)
    return True


# ---------------------------------------------------------------------- pods

_CONTAINER = """
set -eu
mount --make-rprivate /
{binds}
cut -d' ' -f5 /proc/self/mountinfo | while read -r at; do
    case $at in
        /proc* | /sys* | /dev* | /home | {kept}) ;;
        *) mount -o remount,bind,ro "$at" 2> /dev/null || true ;;
    esac
done
cd /
if touch /etc/probe 2> /dev/null; then echo 'the root file system can be written' >&2; exit 125; fi
exec {command}
"""


class Pod:
    """Of one namespace: its containers are started once all volumes are there."""

    def __init__(self, namespace: str, name: str, document: dict[str, Any]) -> None:
        self.namespace, self.name = namespace, name
        self.spec = document["spec"]["template"]["spec"]
        claims = document["spec"].get("volumeClaimTemplates", [])
        self.volumes = [
            *self.spec.get("volumes", []),
            *({"name": each["metadata"]["name"], "claim": {}} for each in claims),
        ]
        self.folder = ROOT / "pods" / namespace / name

    def containers(self) -> dict[str, dict[str, Any]]:
        """Those that run hsmtoll: nobody knows the image of another one here."""
        every = [*self.spec.get("initContainers", []), *self.spec["containers"]]
        return {each["name"]: each for each in every if "/hsmtoll:" in each["image"]}

    def place(self, volume: dict[str, Any]) -> Path:
        # What is claimed outlives the pod.
        kept = ROOT / "claims" if "claim" in volume else self.folder / "volumes"
        return kept / str(volume["name"])

    def sync(self) -> None:
        """As the kubelet now and then: volumes are brought up to date, containers started."""
        group = self.spec.get("securityContext", {}).get("fsGroup")
        there = [
            make_volume(self.place(each), each, self.namespace, group) for each in self.volumes
        ]
        if all(there):
            for name in self.containers():
                if self.process(name) is None:
                    self._start(name)

    def _start(self, name: str) -> None:
        container = self.containers()[name]
        binds, kept = [], []
        for each in container["volumeMounts"]:
            (volume,) = (one for one in self.volumes if one["name"] == each["name"])
            at = shlex.quote(each["mountPath"])
            binds.append(f"mkdir -p {at} && mount --bind {self.place(volume)} {at}")
            if not each.get("readOnly"):
                kept.append(at)
        script = _CONTAINER.format(
            binds="\n".join(binds), kept=" | ".join(kept),
            command=shlex.join([*self._become(name), "hsmtoll", *container["args"]]),
        )  # fmt: skip
        with (self.folder / f"{name}.log").open("ab") as log:
            started = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "sh", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        (self.folder / f"{name}.pid").write_text(str(started.pid))

    def _become(self, name: str) -> list[str]:
        """The account and the variables of a container."""
        container = self.containers()[name]
        context = {**self.spec.get("securityContext", {}), **container["securityContext"]}
        group = context.get("fsGroup")
        own = {each["name"]: each["value"] for each in container.get("env", [])}
        variables = json.loads(IMAGE.read_text()) | own
        return [
            "setpriv", f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}",
            *([f"--groups={group}"] if group is not None else ["--clear-groups"]),
            "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all",
            "env", "-i", *(f"{each}={value}" for each, value in variables.items()),
        ]  # fmt: skip

    def process(self, name: str) -> int | None:
        """The first process of a container, as the machine counts it; None if it does not run."""
        path = self.folder / f"{name}.pid"
        outer = path.read_text() if path.exists() else "none"
        until = time.monotonic() + PATIENCE
        while status(outer).get("State", "Z")[0] != "Z" and time.monotonic() < until:
            for each in Path("/proc").glob("[0-9]*"):
                inner = status(each.name)
                # Until it is of its account, its mounts are still being made.
                if inner.get("PPid") == outer and inner["Uid"].split()[0] != "0":
                    return int(each.name)
            time.sleep(0.05)
        return None

    def exec(self, name: str, argv: list[str], stdin: bytes = b"") -> int:
        process = self.process(name)
        if process is None:
            sys.exit(f"container {name} of {self.name} does not run")
        enter = ["nsenter", f"--target={process}", "--mount", "--pid", "--wd=/"]
        done = subprocess.run([*enter, *self._become(name), *argv], check=False, input=stdin)
        return done.returncode

    def end(self) -> None:
        """SIGTERM, SIGKILL after the time of the specification; and what is not kept is gone."""
        for name in self.containers():
            process = self.process(name)
            if process is not None:
                os.kill(process, signal.SIGTERM)
                until = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
                while Path(f"/proc/{process}").exists():
                    if time.monotonic() > until:
                        os.kill(process, signal.SIGKILL)
                    time.sleep(0.05)
            (self.folder / f"{name}.pid").unlink(missing_ok=True)
        for each in self.volumes:
            place = self.place(each)
            if "claim" not in each and place.exists():
                subprocess.run(["umount", "-q", place], check=False)
                shutil.rmtree(place)

    def is_ready(self) -> bool:
        """Whether every readiness probe succeeds; those of a container without one do."""
        for name, each in self.containers().items():
            if self.process(name) is None:
                return False
            get = each.get("readinessProbe", {}).get("httpGet")
            if get is not None:
                (port,) = (
                    one["containerPort"] for one in each["ports"] if one["name"] == get["port"]
                )
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{get['path']}", timeout=5)
                except (OSError, urllib.error.URLError):
                    return False
        return True


def status(process: str) -> dict[str, str]:
    """What the kernel says of a process; nothing of one that is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (each.partition(":") for each in lines)}
    return {}


def pods() -> list[Pod]:
    found = []
    for path in sorted((ROOT / "objects").glob("*/*/*.json")):
        namespace, kind = path.parts[-3:-1]
        if kind in ("StatefulSet", "Deployment"):
            name = f"{path.stem}-0" if kind == "StatefulSet" else f"deploy/{path.stem}"
            made = Pod(namespace, name, json.loads(path.read_text()))
            made.folder.mkdir(parents=True, exist_ok=True)
            found.append(made)
    return found


def pod(namespace: str, name: str) -> Pod:
    (found,) = (each for each in pods() if (each.namespace, each.name) == (namespace, name))
    return found


def sync() -> None:
    for each in pods():
        each.sync()


# ---------------------------------------------------------------------- commands


def main(argv: list[str]) -> int:
    os.umask(0o022)
    command = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(prog="kubectl")
    parser.add_argument("-n", default="default", dest="namespace")
    parser.add_argument("-f", dest="file", type=Path)
    parser.add_argument("-c", dest="container")
    parser.add_argument("--for", dest="condition")
    parser.add_argument("--timeout")
    parser.add_argument("--from-file", action="append", default=[], dest="files")
    parser.add_argument("words", nargs="+")
    asked = parser.parse_intermixed_args(argv[: len(argv) - len(command)])
    return VERBS[asked.words[0]](asked, command)


def in_namespace(document: dict[str, Any], namespace: str) -> None:
    namespace = document["metadata"].get("namespace", namespace)
    if document["kind"] == "Namespace":
        namespace = document["metadata"]["name"]
    elif not (ROOT / "objects" / namespace).is_dir():
        sys.exit(f"namespaces {namespace} not found")
    if document["kind"] in ("StatefulSet", "Deployment"):
        known = get(document["kind"], namespace, document["metadata"]["name"])
        if known is not None and known != document:
            pod(namespace, f"{document['metadata']['name']}-0").end()
    put(document, namespace)


def apply(asked: argparse.Namespace, command: list[str]) -> int:
    assert not command
    for document in yaml.safe_load_all(asked.file.read_text()):
        in_namespace(document, asked.namespace)
    sync()
    return 0


def create(asked: argparse.Namespace, command: list[str]) -> int:
    assert not command
    if asked.words[1] == "namespace":
        named = {"name": asked.words[2]}
        in_namespace({"kind": "Namespace", "metadata": named}, asked.namespace)
        return 0
    assert asked.words[1:3] == ["secret", "generic"]
    data = {}
    for each in asked.files:
        name, equals, file = each.rpartition("=")
        raw = Path(file).read_bytes()
        data[name if equals else Path(file).name] = base64.b64encode(raw).decode()
    named = {"name": asked.words[3]}
    in_namespace({"kind": "Secret", "metadata": named, "data": data}, asked.namespace)
    sync()
    return 0


def execute(asked: argparse.Namespace, command: list[str]) -> int:
    found = pod(asked.namespace, asked.words[1])
    return found.exec(asked.container or next(iter(found.containers())), command)


def copy(asked: argparse.Namespace, command: list[str]) -> int:
    assert not command
    name, _, target = asked.words[2].partition(":")
    found = pod(asked.namespace, name)
    write = ["sh", "-c", 'cat > "$0"', target]
    return found.exec(next(iter(found.containers())), write, Path(asked.words[1]).read_bytes())


def wait(asked: argparse.Namespace, command: list[str]) -> int:
    assert not command
    found = pod(asked.namespace, asked.words[1].removeprefix("pod/"))
    until = time.monotonic() + float((asked.timeout or "30s").removesuffix("s"))
    while time.monotonic() < until:
        if asked.condition == "condition=Ready":
            if found.is_ready():
                return 0
        elif all(found.process(each) for each in found.containers()):
            return 0
        time.sleep(0.2)
    sys.exit(f"timed out waiting for the condition on {found.name}")


def rollout(asked: argparse.Namespace, command: list[str]) -> int:
    assert not command
    kind, _, name = asked.words[2].partition("/")
    assert kind == "statefulset"
    found = pod(asked.namespace, f"{name}-0")
    if asked.words[1] == "restart":
        found.end()
        found.sync()
        return 0
    asked.condition, asked.words = "condition=Ready", ["wait", found.name]
    return wait(asked, command)


VERBS = {
    "apply": apply, "create": create, "cp": copy, "exec": execute, "wait": wait,
    "rollout": rollout,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
