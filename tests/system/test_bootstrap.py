"""envoy/envoy.yaml: that it moves to another place unchanged, and that its edge does what its comments say."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ext_authz.core.headers import NOT_SENT
from ext_authz.wire.bootstrap import bootstrap, envoy_file
from tests.harness.rig import ENVOY, HOST, Answer, Rig, rig

TEMPLATE = envoy_file("envoy.yaml").read_text()
PLACE: dict[str, Any] = {
    "listen": (HOST, 0), "admin": (HOST, 1), "socket": "/tmp/srp.sock", "lua": str(envoy_file("least_request.lua"))
}  # fmt: skip


def moved(**changes: Any) -> Any:
    return yaml.safe_load(bootstrap(TEMPLATE, **PLACE | changes))


def authz_address(config: Any) -> Any:
    """Where Envoy finds ext_authz, for checks and for its configuration."""
    decides, configures = (
        next(c for c in config["static_resources"]["clusters"] if c["name"] == name)["load_assignment"]["endpoints"]
        for name in ("ext_authz", "ext_authz_ads")
    )
    assert decides == configures
    return decides[0]["lb_endpoints"][0]["endpoint"]["address"]


# ---- another place ----


def test_the_file_itself_is_for_a_pod() -> None:
    config = yaml.safe_load(TEMPLATE)
    (listener,) = config["static_resources"]["listeners"]
    assert listener["address"]["socket_address"] == {"address": "0.0.0.0", "port_value": 9000}
    assert config["admin"]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9901}
    assert authz_address(config) == {"pipe": {"path": "/run/srp/ext_authz.sock"}}
    assert TEMPLATE.count("/etc/envoy/least_request.lua") == 2


def test_nothing_but_the_places_changes() -> None:
    back = moved(
        listen=("0.0.0.0", 9000), admin=("127.0.0.1", 9901), socket="/run/srp/ext_authz.sock",
        lua="/etc/envoy/least_request.lua",
    )  # fmt: skip
    assert back == yaml.safe_load(TEMPLATE)


def test_the_admin_listener_can_be_left_out() -> None:
    assert "admin" not in moved(admin=None)


@pytest.mark.parametrize(
    ("socket", "address"),
    [
        ("/run/x.sock", {"pipe": {"path": "/run/x.sock"}}),
        ("./x.sock", {"pipe": {"path": "./x.sock"}}),
        ("127.0.0.1:9191", {"socket_address": {"address": "127.0.0.1", "port_value": 9191}}),
        ("[::1]:9191", {"socket_address": {"address": "::1", "port_value": 9191}}),
    ],
)
def test_ext_authz_may_be_a_path_or_an_address(socket: str, address: dict[str, Any]) -> None:
    assert authz_address(moved(socket=socket)) == address


BROKEN = [
    ("name: http\n", "name: web\n", "has no static_resources.listeners.http.address"),
    ("admin:\n", "nimda:\n", "has no admin.address"),
    ("- name: ext_authz #", "- name: other #", "has no static_resources.clusters.ext_authz.load_assignment"),
    ("lb_endpoints:", "endpoints:", "has no static_resources.clusters.ext_authz.load_assignment.endpoints.0.lb"),
    ("least_request.lua", "most_request.lua", "loads no least_request.lua"),
]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN)
def test_a_template_without_a_place_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(TEMPLATE.replace(old, new), **PLACE)


def test_a_socket_that_is_neither_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a path or HOST:PORT, found `nonsense`"):
        moved(socket="nonsense")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"envoy/no\.such is not installed"):
        envoy_file("no.such")


def test_envoy_finds_nothing_to_say_about_it(tmp_path: Path) -> None:
    config = tmp_path / "envoy.yaml"
    config.write_text(bootstrap(TEMPLATE, **PLACE))
    command = [ENVOY, "--mode", "validate", "--log-level", "warning", "-c", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


# ---- the edge ----


@pytest.fixture(scope="module")
def running() -> Iterator[Rig]:
    with rig({"A": 1, "B": 1}) as it:
        yield it


async def raw(it: Rig, data: bytes) -> Answer:
    """What comes back for exactly these bytes."""
    reader, writer = await asyncio.open_connection(HOST, it.port)
    writer.write(data)
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().splitlines()
    headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    writer.close()
    return Answer(int(head[0].split()[1]), headers, body, 0.0)


SPOOFS: list[list[tuple[str, str]]] = [
    [("x-target-cluster", "expert-b")],
    [("X-Target-Cluster", "expert-b")],
    [("x-target-cluster", "expert-b"), ("x-target-cluster", "expert-b")],
    [("X-TARGET-cluster", "expert-b"), ("x-target-cluster", "expert-b"), ("x-Target-Cluster", "")],
    [("x-target-cluster", "")],
    [("x-target-cluster", "expert-b;w=1000")],
]


@pytest.mark.parametrize("spoof", SPOOFS)
def test_a_target_that_the_client_names_is_never_one(running: Rig, spoof: list[tuple[str, str]]) -> None:
    async def play() -> None:
        b = running.experts["B"][0]
        b.seen.clear()
        assert (await running.send(headers=spoof)).code == "experts_unavailable"  # ext_authz sets none
        assert (await running.send("expert-a", headers=spoof)).text == "A"
        assert not b.seen
        assert "x-target-cluster" not in {k for k, _ in running.authz.checks[-1]}

    running.run(play())


def test_a_target_that_the_client_names_is_kept_as_a_wish(running: Rig) -> None:
    async def play() -> None:
        for headers, wish in (
            ([("x-target-cluster", "expert-b")], ["expert-b"]),
            ([("x-requested-cluster", "expert-b")], []),
            ([("x-target-cluster", "expert-a"), ("x-requested-cluster", "expert-b")], ["expert-a"]),
        ):
            await running.send("expert-a", headers=headers)
            assert [v for k, v in running.authz.checks[-1] if k == "x-requested-cluster"] == wish
            assert not {"x-requested-cluster", "x-target-cluster"} & set(running.experts["A"][0].seen[-1].headers)

    running.run(play())


def test_what_only_we_may_say_is_taken_from_the_client_before_anyone_reads_it(running: Rig) -> None:
    async def play() -> None:
        ours = [
            "subject",
            "tier",
            "decision",
            "decision-id",
            "reason",
            "requested",
            "unknown",
            "policy",
            "expert",
            "attempts",
        ]
        spoofs = [(f"X-SRP-{name}", "root") for name in ours for _ in range(2)]
        spoofs += [("x-envoy-auth-partial-body", "true"), ("x-envoy-retry-on", "5xx"), ("x-envoy-made-up", "1")]
        await running.send("expert-a", headers=[*spoofs, ("x-srp-downgrade", "never"), ("x-own", "1")])
        checked = running.authz.checks[-1]
        assert {k for k, _ in checked if k.startswith("x-srp-")} == {"x-srp-downgrade"}
        assert ("x-envoy-auth-partial-body", "false") in checked  # Envoy's own
        assert not {"x-envoy-retry-on", "x-envoy-made-up"} & {k for k, _ in checked}
        assert ("x-own", "1") in checked

    running.run(play())


def test_repeated_headers_reach_ext_authz_one_by_one(running: Rig) -> None:
    async def play() -> None:
        await running.send("expert-a", headers=[("x-expert-names", "A"), ("x-expert-names", "C")])
        assert [v for k, v in running.authz.checks[-1] if k == "x-expert-names"] == ["A", "C"]

    running.run(play())


def test_ext_authz_sees_the_bytes_that_the_expert_sees(running: Rig) -> None:
    async def play() -> None:
        body = bytes(range(256)) * 200
        assert (await running.send("expert-a", body=body)).status == 200
        assert running.authz.bodies[-1] == running.experts["A"][0].bodies[-1] == body

    running.run(play())


CHANGES = [
    "x-target-cluster", "x-srp-subject", "x-srp-tier", "x-srp-decision-id",
    "x-envoy-upstream-rq-timeout-ms", "x-envoy-max-retries", "x-envoy-retry-on",
]  # fmt: skip
REMOVALS = ["authorization", "x-expert-access-token", "x-requested-cluster", "x-srp-downgrade"]


@pytest.mark.parametrize("header", CHANGES)
def test_ext_authz_may_set(running: Rig, header: str) -> None:
    value = {"x-target-cluster": "expert-a", "x-envoy-retry-on": "5xx"}.get(header, "900")
    answer = running.run(running.send(set={"x-target-cluster": "expert-a", header: value}))
    assert answer.status == 200


@pytest.mark.parametrize("header", ["x-evil", "authorization-x", "host", ":path", "x-srp-downgrades", "x-envoy-other"])
def test_anything_else_that_it_sets_is_an_error_and_not_dropped(running: Rig, header: str) -> None:
    answer = running.run(running.send("expert-a", set={header: "1"}))
    assert (answer.status, answer.code) == (503, "authz_unavailable")


def test_ext_authz_may_remove(running: Rig) -> None:
    async def play() -> None:
        answer = await running.send("expert-a", headers=[(h, "never") for h in REMOVALS], remove=REMOVALS)
        assert answer.status == 200
        assert not set(REMOVALS) & {k.lower() for k in running.experts["A"][0].seen[-1].headers}
        assert (await running.send("expert-a", remove=["x-own"])).code == "authz_unavailable"

    running.run(play())


DENIALS = [
    (400, {"x-srp-reason": "bad_gate"}),
    (401, {"www-authenticate": 'Bearer error="invalid_token"'}),
    (403, {}),
    (404, {}),
    (503, {"retry-after": "7"}),
    (200, {"x-srp-decision": "allow"}),
]


@pytest.mark.parametrize(("status", "headers"), DENIALS)
def test_what_ext_authz_answers_passes_unchanged(running: Rig, status: int, headers: dict[str, str]) -> None:
    headers = headers | {"content-type": "application/json", "cache-control": "no-store"}
    body = '{"error": {"code": "its_own"}}\n'
    answer = running.run(running.send(deny={"status": status, "body": body, "headers": headers}))
    assert (answer.status, answer.text) == (status, body)
    assert headers.items() <= answer.headers.items()
    assert "retry-after" in headers or "retry-after" not in answer.headers


REFUSED = [
    (b"POST /a%2Fb HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n", 400, "bad_request"),
    (b"POST / HTTP/1.1\r\nhost: x\r\nx_target_cluster: a\r\ncontent-length: 0\r\n\r\n", 400, "bad_request"),
    (b"GET / HTTP/1.1\r\nhost: x\r\nx y: 1\r\n\r\n", 400, "bad_request"),
    (b"GET / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\nabc", 400, "bad_request"),
    (b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 403, "bad_request"),
    (b"GET / HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * 62_000 + b"\r\n\r\n", 431, "bad_request"),
    (b"CONNECT x:1 HTTP/1.1\r\nhost: x:1\r\n\r\n", 404, "not_found"),
    (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 65537\r\n\r\n" + b"x" * 65_537, 413, "payload_too_large"),
]


@pytest.mark.parametrize(("data", "status", "code"), REFUSED)
def test_what_envoy_refuses_is_told_in_json_before_anyone_is_asked(
    running: Rig, data: bytes, status: int, code: str
) -> None:
    asked = len(running.authz.checks)
    answer = running.run(raw(running, data))
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    assert len(running.authz.checks) == asked


def test_an_ext_authz_that_is_slow_or_gone_lets_nobody_pass(running: Rig) -> None:
    async def play() -> None:
        running.authz.delay = 2.0
        slow = await running.send("expert-a")
        running.authz.delay = 0.0
        await running.stop_authz()
        gone = await running.send("expert-a")
        await running.start_authz()
        for answer in (slow, gone):
            assert (answer.status, answer.code) == (503, "authz_unavailable")
            assert answer.headers["retry-after"] == "1"
        assert 0.4 < slow.seconds < 1.5

    running.run(play())


def test_the_access_log_tells_what_happened_and_no_secret() -> None:
    with rig({"A": 1, "B": 1}) as it:

        async def play() -> list[dict[str, Any]]:
            secret = [("authorization", "Bearer s3cr3t"), ("x-expert-access-token", "s3cr3t")]
            await it.experts["A"][0].stop()
            await it.healthy(expert_a=0)
            await it.send("expert-a,expert-b", path="/route?token=s3cr3t", headers=secret)
            await it.stop_envoy()  # flushes the log
            text = it.log.read_text()
            assert "s3cr3t" not in text
            return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

        (entry,) = it.run(play())
        expected = {
            "method": "POST", "path": "/route", "status": 200, "flags": "-", "details": "via_upstream", "expert": "B",
            "attempts": 1,
        }  # fmt: skip
        assert {key: entry[key] for key in expected} == expected
        assert entry["srp"]["decision"] == "allow"
        assert entry["cluster"] in {"expert-a~expert-b", "expert-b~expert-a"}
        assert {"time", "duration_ms", "upstream", "client", "request_id"} <= set(entry)


def test_no_route_passes_without_ext_authz() -> None:
    config = yaml.safe_load(TEMPLATE)
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    names = [f["name"] for f in manager["http_filters"]]
    assert names == ["srp.lease", *(f"envoy.filters.http.{name}" for name in ("ext_authz", "lua", "router"))]
    assert "typed_per_filter_config" not in TEMPLATE
    assert "filter_enabled:" not in TEMPLATE
    switch = manager["http_filters"][1]["typed_config"]["filter_enabled_metadata"]
    assert switch == {"filter": "srp.lease", "path": [{"key": "hit"}], "value": {"bool_match": True}, "invert": True}
    assert TEMPLATE.count("srp.lease") == 2  # nothing else names it, so nothing else writes there
    (host,) = manager["route_config"]["virtual_hosts"]
    assert host["domains"] == ["*"]
    for route in host["routes"]:
        assert set(route) == {"match", "route"}
        assert "inline_cluster_specifier_plugin" in route["route"]
        assert "cluster" not in route["route"]
    names = ["ext_authz", "ext_authz_ads", "ext_authz_workers", "ext_authz_any"]
    assert [c["name"] for c in config["static_resources"]["clusters"]] == names
    assert "clearRouteCache" not in envoy_file("least_request.lua").read_text()


def test_no_crowd_of_checks_holds_up_the_configuration() -> None:
    """A circuit breaker is a cluster's: the stream of configuration has a cluster that no check uses."""
    config = yaml.safe_load(TEMPLATE)
    clusters = {c["name"]: c for c in config["static_resources"]["clusters"]}
    (service,) = config["dynamic_resources"]["ads_config"]["grpc_services"]
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    asked = manager["http_filters"][1]["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"]
    any_of = clusters[asked]["cluster_type"]["typed_config"]["clusters"]
    assert service["envoy_grpc"]["cluster_name"] not in (asked, *any_of)
    assert "circuit_breakers" not in clusters[service["envoy_grpc"]["cluster_name"]]


def test_what_envoy_does_not_send_names_no_experts() -> None:
    """A gate that read it would find nothing, and take the default list."""
    manager = yaml.safe_load(TEMPLATE)["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]
    authz = manager["typed_config"]["http_filters"][1]["typed_config"]
    unsent = [*({"exact": name} for name in NOT_SENT), {"prefix": ":"}, {"prefix": "x-b3-"}]
    assert sorted(map(str, authz["disallowed_headers"]["patterns"])) == sorted(map(str, unsent))
