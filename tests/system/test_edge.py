"""The edge of envoy/envoy.yaml, in a real Envoy, does what its comments say."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.envoy import ENVOY, configuration
from tests.harness.raw import exchange
from tests.harness.rig import Rig, rig


def test_envoy_accepts_it_without_a_warning(tmp_path: Path) -> None:
    config = tmp_path / "envoy.yaml"
    config.write_text(configuration(0, 1, "/tmp/srp.sock"))
    command = [ENVOY, "--mode", "validate", "--log-level", "warning", "-c", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


@pytest.fixture(scope="module")
def running() -> Iterator[Rig]:
    with rig({"A": 1, "B": 1}) as it:
        yield it


SPOOFS: list[list[tuple[str, str]]] = [
    [("x-target-cluster", "expert-b")],
    [("X-Target-Cluster", "expert-b")],
    [("x-target-cluster", "expert-b"), ("x-target-cluster", "expert-b")],
    [("X-TARGET-cluster", "expert-b"), ("x-target-cluster", "expert-b"), ("x-Target-Cluster", "")],
    [("x-target-cluster", "")],
    [("x-target-cluster", "expert-b;w=1000")],
]


@pytest.mark.parametrize("spoof", SPOOFS)
def test_a_target_set_by_the_client_is_never_used(running: Rig, spoof: list[tuple[str, str]]) -> None:
    async def play() -> None:
        b = running.experts["B"][0]
        b.seen.clear()
        assert (await running.send(headers=spoof)).code == "experts_unavailable"  # ext_authz sets no target
        assert (await running.send("expert-a", headers=spoof)).text == "A"
        assert not b.seen
        assert "x-target-cluster" not in {k for k, _ in running.authz.checks[-1]}

    running.run(play())


def test_a_target_set_by_the_client_is_passed_to_ext_authz_as_a_request(running: Rig) -> None:
    async def play() -> None:
        for headers, wish in (
            ([("x-target-cluster", "expert-b")], ["expert-b"]),
            ([("x-requested-cluster", "expert-b")], []),
            ([("x-target-cluster", "expert-a"), ("x-requested-cluster", "expert-b")], ["expert-a"]),
            ([("x-target-cluster", "expert-b")] * 2, ["expert-b", "repeated"]),
            ([("x-target-cluster", "expert-a"), ("x-target-cluster", "expert-b")], ["expert-a", "repeated"]),
            ([("x-target-cluster", "expert-a"), ("x-target-cluster", "")], ["expert-a", "repeated"]),
            ([("x-target-cluster", "")], [","]),
            ([("x-target-cluster", ""), ("x-target-cluster", "")], [","]),
            ([("x-target-cluster", "expert-b,expert-a")], ["expert-b,expert-a"]),
            ([("x-target-cluster", ""), ("x-requested-cluster", "expert-b")], [","]),
        ):
            await running.send("expert-a", headers=headers)
            assert [v for k, v in running.authz.checks[-1] if k == "x-requested-cluster"] == wish
            assert not {"x-requested-cluster", "x-target-cluster"} & set(running.experts["A"][0].seen[-1].headers)

    running.run(play())


def test_headers_that_only_srp_may_set_are_removed_before_anyone_reads_them(running: Rig) -> None:
    async def play() -> None:
        ours = [
            "subject", "issuer", "tier", "decision", "decision-id", "reason", "requested", "unknown", "policy",
            "expert", "attempts", "foo", "d", "downgrad", "downgraded", "downgrade-", "downgrade.x",
        ]  # fmt: skip
        spoofs = [(f"X-SRP-{name}", "root") for name in ours for _ in range(2)]
        spoofs += [("x-envoy-auth-partial-body", "true"), ("x-envoy-retry-on", "5xx"), ("x-envoy-made-up", "1")]
        await running.send("expert-a", headers=[*spoofs, ("x-srp-downgrade", "never"), ("x-own", "1")])
        checked = running.authz.checks[-1]
        assert {k for k, _ in checked if k.startswith("x-srp-")} == {"x-srp-downgrade"}
        assert ("x-envoy-auth-partial-body", "false") in checked  # Envoy's own
        assert not {"x-envoy-retry-on", "x-envoy-made-up"} & {k for k, _ in checked}
        assert ("x-own", "1") in checked
        (expert,) = running.experts["A"]
        assert not [name for name in expert.seen[-1].headers if name.lower() in {n.lower() for n, _ in spoofs[:-3]}]

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
    "x-target-cluster", "x-srp-subject", "x-srp-issuer", "x-srp-tier", "x-srp-decision-id",
    "x-envoy-upstream-rq-timeout-ms", "x-envoy-max-retries", "x-envoy-retry-on",
]  # fmt: skip
REMOVALS = ["authorization", "x-expert-access-token", "x-requested-cluster", "x-srp-downgrade"]


@pytest.mark.parametrize("header", CHANGES)
def test_ext_authz_may_set_these_headers(running: Rig, header: str) -> None:
    value = {"x-target-cluster": running.target("expert-a"), "x-envoy-retry-on": "5xx"}.get(header, "900")
    answer = running.run(running.send("expert-a", set={header: value}))
    assert answer.status == 200


@pytest.mark.parametrize("header", ["x-evil", "authorization-x", "host", ":path", "x-srp-downgrades", "x-envoy-other"])
def test_any_other_header_that_ext_authz_sets_is_an_error(running: Rig, header: str) -> None:
    answer = running.run(running.send("expert-a", set={header: "1"}))
    assert (answer.status, answer.code) == (503, "authz_unavailable")


def test_ext_authz_may_remove_these_headers_and_no_others(running: Rig) -> None:
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
def test_a_denial_of_ext_authz_passes_unchanged(running: Rig, status: int, headers: dict[str, str]) -> None:
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
def test_envoys_own_refusals_are_json_and_come_before_any_check(
    running: Rig, data: bytes, status: int, code: str
) -> None:
    asked = len(running.authz.checks)
    answer = exchange(running.port, data)
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    assert len(running.authz.checks) == asked


def test_a_slow_or_missing_ext_authz_lets_no_request_pass(running: Rig) -> None:
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


def test_the_access_log_says_what_happened_and_shows_no_secret() -> None:
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
