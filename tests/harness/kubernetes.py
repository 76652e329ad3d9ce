"""The manifests as a cluster would get them: rendered by kubectl, and read from the point of view of the pods."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.harness import ROOT

BESIDE = Path(sys.executable).parent
Manifest = dict[str, Any]

# What is rendered: each overlay, and the base with each component that no overlay uses.
OVERLAYS = ("kind", "minikube", "dev", "production")
COMPONENTS = ("cluster-tokens", "monitoring")


def tool(name: str) -> str:
    """The path of a program of the extra `dev`."""
    found = shutil.which(name, path=str(BESIDE)) or shutil.which(name)
    assert found, f"`{name}` is not installed: scripts/setup"
    return found


@functools.cache
def rendered(name: str) -> tuple[Manifest, ...]:
    """Every object of an overlay, or of the base with a component."""
    if name in OVERLAYS:
        return _kustomize(ROOT / "k8s/overlays" / name)
    with tempfile.TemporaryDirectory(prefix="srp-") as folder:

        def relative(*parts: str) -> str:
            return os.path.relpath(ROOT.joinpath("k8s", *parts), Path(folder).resolve())

        kustomization = {"resources": [relative("base")], "components": [relative("components", name)]}
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return _kustomize(Path(folder))


def _kustomize(folder: Path) -> tuple[Manifest, ...]:
    command = [tool("kubectl"), "kustomize", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # deprecation warnings
    return tuple(yaml.safe_load_all(result.stdout))


def smoke_job() -> Manifest:
    job: Manifest = yaml.safe_load((ROOT / "k8s/smoke-job.yaml").read_text())
    return job


def title(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(manifests: tuple[Manifest, ...], *kinds: str) -> list[Manifest]:
    return [m for m in manifests if m["kind"] in kinds]


def named(manifests: tuple[Manifest, ...], kind: str, name: str) -> Manifest:
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


@dataclass(frozen=True)
class Pods:
    """The pods of one Deployment or Job."""

    owner: str
    labels: dict[str, str]
    spec: Manifest

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {p["name"]: p["containerPort"] for c in self.containers for p in c.get("ports", [])}

    def container(self, name: str) -> Manifest:
        (found,) = (c for c in self.containers if c["name"] == name)
        return found

    def volume(self, name: str) -> Manifest:
        (found,) = (v for v in self.spec["volumes"] if v["name"] == name)
        return found


def pods(manifests: tuple[Manifest, ...]) -> list[Pods]:
    templates = ((title(m), m["spec"]["template"]) for m in of_kind(manifests, "Deployment", "Job"))
    return [Pods(owner, t["metadata"]["labels"], t["spec"]) for owner, t in templates]


def gateway(manifests: tuple[Manifest, ...]) -> Pods:
    (found,) = (p for p in pods(manifests) if p.owner == "Deployment/gateway")
    return found


def selected(manifests: tuple[Manifest, ...], selector: Manifest) -> list[Pods]:
    """The pods that a label selector, or a Service's plain labels, select."""
    wanted = selector.get("matchLabels", {}) if "matchLabels" in selector or not selector else selector
    assert "matchExpressions" not in selector
    return [p for p in pods(manifests) if wanted.items() <= p.labels.items()]


def flag(arguments: list[str], name: str) -> str:
    """The value of `--name=VALUE` or `--name VALUE`."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
        if argument == name:
            return arguments[i + 1]
    raise AssertionError(f"no {name} in {arguments}")


def mounted(pod: Pods, container: Manifest, path: str, manifests: tuple[Manifest, ...]) -> str:
    """What a container reads at `path`, which must be a key of a mounted ConfigMap."""
    folder, _, key = path.rpartition("/")
    (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == folder)
    content: str = named(manifests, "ConfigMap", pod.volume(mount["name"])["configMap"]["name"])["data"][key]
    return content


def values(node: Any, key: str) -> Iterator[Any]:
    """Every value under `key`, however deep."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from values(child, key)
