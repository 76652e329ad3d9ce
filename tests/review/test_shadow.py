"""The shadow policy: it sees every request, its differences are counted, and it can do nothing else."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from ext_authz.core.difference import Difference
from ext_authz.core.jwk import parse_jwks
from ext_authz.core.model import Request
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.decision_log import DecisionLog
from ext_authz.observe.metrics import registry
from ext_authz.review.shadow import NotCompared, Shadow
from ext_authz.serve.authorization import SERVICE, Authorization
from ext_authz.serve.epoch import Epoch
from ext_authz.serve.server import Server
from ext_authz.serve.witness import Witness
from tests.harness import tokens
from tests.harness.authorization import POLICY, authorization, load_policy, snapshot, write_policy
from tests.harness.checks import check_request, client_headers, token
from tests.harness.waiting import until

Edit = tuple[str, str]

C_IS_LOW: Edit = ("C: {tier: high", "C: {tier: low")
A_IS_HIGH: Edit = ("A: {tier: low", "A: {tier: high")
NO_STAND_IN: Edit = (", downgrade_to: [B, A]", "")
ONLY_B: Edit = ("downgrade_to: [B, A]", "downgrade_to: [B]")
TURNED: Edit = ("downgrade_to: [B, A]", "downgrade_to: [A, B]")
NOBODY_ANONYMOUS: Edit = ("anonymous: low", "anonymous: deny")
OTHER_CLAIM: Edit = ('claims.plan == "premium"', 'claims.org == "acme"')
NO_ISSUER: Edit = (POLICY[POLICY.index("issuers:") : POLICY.index("anonymous:")], "")


def shadow_of(directory: Path, *edits: Edit) -> Path:
    text = POLICY
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return write_policy(directory, text, "shadow.yaml")


async def compared(directory: Path, calls: list[bytes], *edits: Edit, check: Any = None) -> tuple[Shadow, list[bytes]]:
    """The shadow policy, the policy with `edits`, after these Check calls; and their answers."""
    it = check or authorization(load_policy(directory))
    shadow = Shadow(shadow_of(directory, *edits))
    try:
        assert await shadow.reload()
        shadow.set_active(it.epoch.snapshot)
        it.witness = Witness(shadow, None)
        answers = [await it.check(call) for call in calls]
        await asyncio.sleep(0)
        return shadow, answers
    finally:
        await shadow.close()


COMPARED: list[tuple[str, Callable[[], bytes], list[Edit], str]] = [
    ("the same policy", lambda: check_request("A", "C"), [], "unchanged"),
    ("C for all", lambda: check_request("C"), [C_IS_LOW], "deny_to_allow"),
    ("C for all, beside A", lambda: check_request("A", "C"), [C_IS_LOW], "downgrade_to_allow"),
    ("A for few", lambda: check_request("A"), [A_IS_HIGH], "allow_to_deny"),
    ("A for few, beside B", lambda: check_request("A", "B"), [A_IS_HIGH], "allow_to_downgrade"),
    ("no stand-in", lambda: check_request("D"), [NO_STAND_IN], "downgrade_to_deny"),
    ("fewer stand-ins", lambda: check_request("D"), [ONLY_B], "experts_changed"),
    ("stand-ins in another order", lambda: check_request("D"), [TURNED], "unchanged"),
    ("no anonymous callers", lambda: check_request("A"), [NOBODY_ANONYMOUS], "allow_to_deny"),
    (
        "another clearance rule",
        lambda: check_request("C", caller=token(plan="premium")),
        [OTHER_CLAIM],
        "allow_to_deny",
    ),
    ("and whom it lets in", lambda: check_request("C", caller=token(org="acme")), [OTHER_CLAIM], "deny_to_allow"),
    ("an issuer that it does not trust", lambda: check_request("A", caller=token()), [NO_ISSUER], "allow_to_deny"),
    ("a bad token", lambda: check_request("A", caller="x"), [C_IS_LOW], "unchanged"),
    ("a bad gate", lambda: check_request(path="/route", body=b"{"), [C_IS_LOW], "unchanged"),
    ("a request that could not be read", lambda: b"\xff", [C_IS_LOW], NotCompared.ACTIVE),
]


@pytest.mark.parametrize(("call", "edits", "expected"), [j[1:] for j in COMPARED], ids=[j[0] for j in COMPARED])
def test_each_difference_is_counted(
    tmp_path: Path, call: Callable[[], bytes], edits: list[Edit], expected: str
) -> None:
    """By kind."""
    shadow, _ = asyncio.run(compared(tmp_path, [call()] * 3, *edits))
    assert shadow.differences == {expected: 3}
    assert shadow.status.differences == {expected: 3}


def test_an_answer_is_the_same_bytes_with_and_without_a_shadow(tmp_path: Path) -> None:
    """Except for the decision's id."""
    calls = [
        check_request("A", "C"),
        check_request("C"),
        check_request("D"),
        check_request("A", caller=token(plan="premium")),
        check_request("A", caller="x"),
        b"\xff",
    ]
    policy = load_policy(tmp_path)

    async def plain() -> list[bytes]:
        it = authorization(policy)
        return [await it.check(call) for call in calls]

    _, answers = asyncio.run(compared(tmp_path, calls, C_IS_LOW, check=authorization(policy)))
    for answer, other in zip(answers, asyncio.run(plain()), strict=True):
        one, two = (client_headers(a)["x-srp-decision-id"].encode() for a in (answer, other))
        assert answer.replace(one, b"") == other.replace(two, b"")


def test_a_shadow_that_breaks_is_only_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in it affects no answer; it is logged once, without its text."""

    async def break_it() -> tuple[Shadow, list[bytes]]:
        it = authorization(load_policy(tmp_path))
        shadow = Shadow(shadow_of(tmp_path))
        await shadow.reload()
        # Not a snapshot: any access fails.
        shadow._snapshot = object()  # type: ignore[assignment]
        it.witness = Witness(shadow, None)
        answers = [await it.check(check_request("A")) for _ in range(3)]
        await asyncio.sleep(0)
        await shadow.close()
        return shadow, answers

    shadow, answers = asyncio.run(break_it())
    assert [client_headers(a)["x-srp-decision"] for a in answers] == ["allow"] * 3
    assert shadow.differences == {NotCompared.ERROR: 3}
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        "the shadow policy could not judge a request: AttributeError"
    ]


def test_keys_that_the_shadow_lacks_are_no_difference(tmp_path: Path) -> None:
    """A token that the shadow cannot verify yet is counted separately, not as a denial."""

    async def judge() -> Shadow:
        policy = load_policy(tmp_path)
        shadow = Shadow(shadow_of(tmp_path, ("file: jwks.json", 'url: "http://127.0.0.1:1/jwks.json"')))
        await shadow.reload()
        it = authorization(policy)
        shadow.set_active(it.epoch.snapshot)
        it.witness = Witness(shadow, None)
        await it.check(check_request("A", caller=token()))
        await asyncio.sleep(0)
        await shadow.close()
        return shadow

    assert asyncio.run(judge()).differences == {NotCompared.KEYS: 1}


def test_a_shadow_has_the_keys_of_the_policy_in_force_at_once(tmp_path: Path) -> None:
    """New keys of an issuer that both policies read from the same source do not wait for the shadow's own fetch."""

    async def judge() -> Shadow:
        policy = load_policy(tmp_path)
        shadow = Shadow(shadow_of(tmp_path))
        await shadow.reload()
        it = authorization(policy)
        newer = Snapshot(policy, {tokens.ISSUER: parse_jwks(tokens.jwks("ES256", name="next")).keys})
        it.epoch = Epoch.of(newer)
        shadow.set_active(newer)
        it.witness = Witness(shadow, None)
        await it.check(check_request("A", caller=tokens.sign(tokens.claims(), name="next")))
        await asyncio.sleep(0)
        await shadow.close()
        return shadow

    assert asyncio.run(judge()).differences == {Difference.UNCHANGED: 1}


def test_a_shadow_is_reloaded_and_a_bad_file_keeps_the_last_good_one(tmp_path: Path) -> None:
    """`/status` counts from when the shadow policy was loaded, metrics from when the server started."""
    path = shadow_of(tmp_path, C_IS_LOW)

    async def live() -> None:
        it = authorization(load_policy(tmp_path))
        shadow = Shadow(path)
        it.witness = witness = Witness(shadow, None)
        witness.start()
        witness.set_active(it.epoch.snapshot)

        async def ask() -> None:
            await it.check(check_request("C"))
            await asyncio.sleep(0)

        try:
            await until(lambda: shadow.status.digest is not None, "the first load")
            first = shadow.status.digest
            await ask()
            assert shadow.status.differences == {"deny_to_allow": 1}
            path.write_text("tiers: [")
            await until(lambda: shadow.status.error is not None, "the error")
            assert f"{path}:1:" in str(shadow.status.error)
            assert shadow.status.digest == first
            await ask()
            assert shadow.status.differences == {"deny_to_allow": 2}
            path.write_text(POLICY)
            await until(lambda: shadow.status.digest != first, "the mended file")
            assert shadow.status.error is None
            assert shadow.status.differences == {}
            await ask()
            assert shadow.status.differences == {"unchanged": 1}
            assert shadow.differences == {"deny_to_allow": 2, "unchanged": 1}
            path.unlink()
            await until(lambda: shadow.status.error is not None, "the error")
            path.write_text(POLICY)
            await until(lambda: shadow.status.error is None, "the file to be back")
        finally:
            await witness.close()

    asyncio.run(live())


def test_without_a_good_file_nothing_is_compared(tmp_path: Path) -> None:
    """And the server still serves."""

    async def judge() -> Shadow:
        shadow = Shadow(tmp_path / "absent.yaml")
        assert not await shadow.reload()
        shadow.set_active(snapshot(load_policy(tmp_path)))
        request = Request("GET", "/", {})
        it = authorization(load_policy(tmp_path))
        it.witness = Witness(shadow, None)
        await it.check(check_request("A"))
        await asyncio.sleep(0)
        await shadow.close()
        assert shadow.judge(request, None, 0) is None  # type: ignore[arg-type]
        return shadow

    shadow = asyncio.run(judge())
    assert shadow.differences == {}
    assert "No such file" in str(shadow.status.error)


@asynccontextmanager
async def served(it: Authorization) -> Any:
    """A gRPC server on a free port, and its Check method."""
    server = Server("127.0.0.1:0", it.handlers())
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield channel.unary_unary(f"/{SERVICE}/Check")
    finally:
        await server.stop(1)


def test_metrics_status_and_log_show_the_same_differences(tmp_path: Path) -> None:
    """With a shadow policy and a decision log, over gRPC."""
    path = tmp_path / "decisions.jsonl"

    async def run() -> tuple[Witness, list[str]]:
        it = authorization(load_policy(tmp_path))
        shadow, log = Shadow(shadow_of(tmp_path, C_IS_LOW)), DecisionLog(path, 1 << 20, 1)
        await shadow.reload()
        it.witness = witness = Witness(shadow, log)
        witness.start()
        witness.set_active(it.epoch.snapshot)
        ids = []
        async with served(it) as check:
            for call in (
                check_request("C"),
                check_request("A"),
                check_request("C", caller=token(plan="premium")),
                check_request("A", "C"),
            ):
                ids.append(client_headers(await check(call))["x-srp-decision-id"])
        await witness.close()
        return witness, ids

    witness, ids = asyncio.run(run())
    kinds = ["deny_to_allow", "unchanged", "unchanged", "downgrade_to_allow"]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["decision_id"], r["shadow"]) for r in records] == list(zip(ids, kinds, strict=True))
    report = witness.report()
    assert report["shadow"]["differences"] == {"deny_to_allow": 1, "downgrade_to_allow": 1, "unchanged": 2}
    assert report["decision_log"] == {"written": 4, "dropped": 0, "failed": 0}
    text = generate_latest(registry(witness.families)).decode()
    assert 'srp_shadow_decisions_total{difference="deny_to_allow"} 1.0' in text
    assert "srp_shadow_policy_error 0.0" in text
    assert 'srp_decision_log_records_total{outcome="written"} 4.0' in text
    assert json.dumps(report)


def test_srp_serve_takes_a_decision_log_and_a_shadow_policy(tmp_path: Path) -> None:
    """What was decided before SIGTERM is in the log after it."""
    log, sock = tmp_path / "decisions.jsonl", tmp_path / "s"
    policy, shadow = write_policy(tmp_path), shadow_of(tmp_path, C_IS_LOW)
    command = [
        sys.executable, "-m", "ext_authz", "serve", "--policy", policy, "--listen", f"unix:{sock}",
        "--status", "127.0.0.1:0", "--decision-log", log, "--decision-log-size", "1", "--shadow-policy", shadow,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    started: list[str] = []
    try:
        while not any("listens on" in line for line in started) or not any("shadow policy" in line for line in started):
            started.append(process.stderr.readline())
            assert started[-1], started
        with grpc.insecure_channel(f"unix:{sock}") as channel:
            check = channel.unary_unary(f"/{SERVICE}/Check")
            ids = [client_headers(check(check_request("C"), timeout=5))["x-srp-decision-id"] for _ in range(50)]
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=15)
        assert process.returncode == 0, rest
    finally:
        process.kill()
        process.wait()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(r["decision_id"], r["shadow"]) for r in records] == [(i, "deny_to_allow") for i in ids]
    assert token()[:20] not in log.read_text()
