"""The server: Check on bytes, a limited wait for fresh keys, and a real gRPC server on a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ext_authz.core.condition import compile_condition
from ext_authz.core.jwk import parse_jwks
from ext_authz.core.model import Decision, Reason, Request, Verdict
from ext_authz.core.policy import ClearanceRule, Expert, GateRule, Header, Issuer, Policy
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.metrics import Tally
from ext_authz.serve import authorization as authorization_module
from ext_authz.serve.authorization import SERVICE, Authorization
from ext_authz.serve.epoch import Epoch
from ext_authz.serve.server import MAX_MESSAGE, Server, unix_path
from tests.harness import checks, tokens
from tests.harness.checks import response_of
from tests.harness.tokens import AUDIENCE, ISSUER
from tests.harness.waiting import until

CHECK = f"/{SERVICE}/Check"
NOW = 1_800_000_000.0

POLICY = Policy(
    tiers=("low", "high"),
    experts={"A": Expert("A", 0, "expert-a"), "C": Expert("C", 1, "expert-c")},
    issuers={ISSUER: Issuer(ISSUER, frozenset({AUDIENCE}), frozenset({"ES256"}))},
    anonymous=0,
    clearance=(ClearanceRule(compile_condition('claims.plan == "premium"', "clearance[0].when", 1), 1),),
    gate=(GateRule("/", exact=False, source=Header("x-expert-names"), default=("A",)),),
    leeway=30,
    digest="d1",
)


def epoch(policy: Policy = POLICY, *names: str) -> Epoch:
    """An epoch of `policy` with the ES256 keys of `names`, or without any keys."""
    keys = tuple(key for name in names for key in parse_jwks(tokens.jwks("ES256", name=name)).keys)
    return Epoch.of(Snapshot(policy, {ISSUER: keys} if keys else {}))


def check_request(**headers: str) -> bytes:
    """A CheckRequest for /x, with a query; a header's name is written with underscores."""
    return checks.check_request(path="/x?q", method="GET", **headers)


def bearer(name: str = "", **over: Any) -> str:
    return "Bearer " + tokens.sign(tokens.claims(**{"iat": NOW, "exp": NOW + 300, **over}), name=name)


def answer(data: bytes) -> tuple[int, str]:
    """Status and reason of a CheckResponse; 200 for an OK."""
    response = response_of(data)
    ok, denied = response.ok_response, response.denied_response
    options = ok.response_headers_to_add if ok is not None else denied.headers if denied is not None else []
    headers = {o.header.key: o.header.value for o in options if o.header is not None}
    status = 200 if denied is None or denied.status is None else int(denied.status.code)
    return status, headers["x-srp-reason"]


class Keys:
    """A key store whose `refresh` is given by the test."""

    def __init__(self, refresh: Callable[[], Any] = lambda: None) -> None:
        self.asked: list[str] = []
        self.cancelled = False
        self._refresh = refresh

    async def refresh(self, issuer: str) -> bool:
        self.asked.append(issuer)
        try:
            outcome = self._refresh()
            if asyncio.iscoroutine(outcome):
                await outcome
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return True


class SlowKeys(Keys):
    """A refresh ends when `gate` is set; `waited_for` is set when a check waits for one."""

    def __init__(self) -> None:
        self.waited_for, self.gate = asyncio.Event(), asyncio.Event()
        super().__init__(self._wait)

    async def _wait(self) -> None:
        self.waited_for.set()
        await self.gate.wait()


def authorization(first: Epoch | None = None, keys: Keys | None = None) -> tuple[Authorization, Tally]:
    tally = Tally()
    return Authorization(first or epoch(), keys or Keys(), tally, clock=lambda: NOW), tally


# ---- one check -------------------------------------------------------------------------------------------------------

CHECKS = [
    # name, CheckRequest, status, reason
    ("anonymous, default", check_request, 200, "permitted"),
    ("anonymous", lambda: check_request(x_expert_names="A"), 200, "permitted"),
    ("above the tier", lambda: check_request(x_expert_names="C"), 403, "tier_too_low"),
    ("premium", lambda: check_request(x_expert_names="C", authorization=bearer(plan="premium")), 200, "permitted"),
    ("downgrade", lambda: check_request(x_expert_names="A,C"), 200, "tier_too_low"),
    ("unknown", lambda: check_request(x_expert_names="Z"), 404, "unknown_expert"),
    ("bad gate", lambda: check_request(x_expert_names="A B"), 400, "bad_gate"),
    ("bad token", lambda: check_request(authorization="Bearer x"), 401, "invalid_token"),
    ("garbage", lambda: b"\xff\xff", 500, "internal_error"),
    ("empty", lambda: b"", 400, "no_experts_requested"),
]


@pytest.mark.parametrize(("data", "status", "reason"), [c[1:] for c in CHECKS], ids=[c[0] for c in CHECKS])
def test_check_answers_bytes_with_bytes(data: Callable[[], bytes], status: int, reason: str) -> None:
    """And each decision is counted once."""
    service, tally = authorization(epoch(POLICY, ""))
    assert answer(asyncio.run(service.check(data()))) == (status, reason)
    verdict = "deny" if status != 200 else "allow" if reason == "permitted" else "downgrade"
    assert dict(tally.decisions) == {(verdict, reason): 1}
    assert sum(tally.latency) == 1
    assert 0 < tally.latency_sum < 5
    assert tally.rpc_errors == (status == 500)


class Broken(dict[str, Any]):
    """A mapping that fails when it is read, with a secret in its message."""

    def get(self, key: str, default: Any = None) -> Any:
        raise RuntimeError(f"the token is {key} secret-of-the-request")


def test_an_unexpected_error_is_a_denial_that_leaks_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """The answer is 500, the error is counted, and the log has its place and type but not its text."""
    service, tally = authorization(epoch(replace(POLICY, issuers=Broken())))
    data = check_request(authorization=bearer())
    with caplog.at_level(logging.DEBUG):
        assert answer(asyncio.run(service.check(data))) == (500, "internal_error")
    assert tally.rpc_errors == 1
    assert dict(tally.decisions) == {(Verdict.DENY, Reason.INTERNAL): 1}
    (record,) = (r for r in caplog.records if r.name.startswith("srp"))
    assert record.levelname == "ERROR"
    assert "RuntimeError" in record.getMessage()
    assert "identity.py" in record.getMessage()
    assert "secret" not in caplog.text
    assert record.exc_info is None


def test_allowed_and_denied_requests_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The audit trail is the access log."""
    service, _ = authorization(epoch(POLICY, ""))
    with caplog.at_level(logging.DEBUG, logger="srp"):
        for data in (check_request(), check_request(x_expert_names="C"), check_request(authorization="Bearer x")):
            asyncio.run(service.check(data))
    assert [r for r in caplog.records if r.name.startswith("srp")] == []


def test_condition_errors_are_counted_each_time_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    service, tally = authorization(epoch(POLICY, ""))
    data = check_request(authorization=bearer())  # without a plan: the clearance rule fails
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            asyncio.run(service.check(data))
    assert tally.condition_errors == {"clearance[0].when": 3}
    assert [r.getMessage() for r in caplog.records] == [
        "condition clearance[0].when could not be evaluated for a caller: counted as no match"
    ]


def test_a_witness_sees_each_decision_after_its_answer() -> None:
    """With the request, the decision and the id that the client got; if the witness fails, the answer stands."""
    seen: list[tuple[Request, Decision, str]] = []
    service, _ = authorization()

    def witness(snapshot: Snapshot, request: Request, decision: Decision, decision_id: str, now: float) -> None:
        seen.append((request, decision, decision_id))
        raise RuntimeError("the disk is full")

    async def run() -> list[bytes]:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        service.witness = witness
        answers = [await service.check(check_request(x_expert_names="A")), await service.check(b"\xff")]
        assert seen == []
        await asyncio.sleep(0)
        return answers

    answers = asyncio.run(run())
    assert [(request.path, decision.verdict) for request, decision, _ in seen] == [("/x", "allow"), ("", "deny")]
    assert all(decision_id.encode() in data for (_, _, decision_id), data in zip(seen, answers, strict=True))


# ---- fresh keys ------------------------------------------------------------------------------------------------------


def test_an_unknown_kid_asks_for_fresh_keys_once() -> None:
    """Fresh keys make a new epoch, which verifies the token."""
    keys = Keys(lambda: setattr(service, "epoch", epoch(replace(POLICY, digest="d2"), "", "new")))
    service, tally = authorization(epoch(POLICY, ""), keys)
    data = asyncio.run(service.check(check_request(authorization=bearer("new"))))
    assert answer(data) == (200, "permitted")
    assert keys.asked == [ISSUER]
    assert b"d2" in data  # the new epoch's writer
    assert dict(tally.decisions) == {(Verdict.ALLOW, Reason.PERMITTED): 1}


def test_a_policy_that_arrives_during_the_wait_decides() -> None:
    stricter = replace(POLICY, experts={"A": Expert("A", 1, "expert-a")})
    keys = Keys(lambda: setattr(service, "epoch", epoch(stricter, "new")))
    service, _ = authorization(epoch(POLICY, ""), keys)
    assert answer(asyncio.run(service.check(check_request(authorization=bearer("new"))))) == (403, "tier_too_low")


STALE = [
    # name, what the first epoch knows, the token, status, reason
    ("a kid that stays unknown", ("",), lambda: bearer("eve"), 401, "invalid_token"),
    ("keys that do not come", (), bearer, 503, "keys_unavailable"),
]


@pytest.mark.parametrize(("known", "token", "status", "reason"), [s[1:] for s in STALE], ids=[s[0] for s in STALE])
def test_without_fresh_keys_a_check_is_denied_after_one_attempt(
    known: tuple[str, ...], token: Callable[[], str], status: int, reason: str
) -> None:
    keys = Keys()
    service, _ = authorization(epoch(POLICY, *known), keys)
    assert answer(asyncio.run(service.check(check_request(authorization=token())))) == (status, reason)
    assert keys.asked == [ISSUER]


def test_tokens_that_no_key_could_verify_ask_for_none() -> None:
    """Malformed tokens, unknown issuers and bad signatures cost the issuer nothing."""
    keys = Keys()
    service, _ = authorization(epoch(POLICY, ""), keys)
    for token in ("Bearer x", bearer(iss="https://stranger.example.com/"), bearer()[:-8] + "AAAAAAAA", bearer(exp=1)):
        assert answer(asyncio.run(service.check(check_request(authorization=token)))) == (401, "invalid_token")
    asyncio.run(service.check(check_request()))
    assert keys.asked == []


def test_a_refresh_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check waits at most KEY_WAIT seconds, less than Envoy's timeout of 0.5 s."""
    assert authorization_module.KEY_WAIT < 0.5
    monkeypatch.setattr(authorization_module, "KEY_WAIT", 0.05)
    keys = Keys(lambda: asyncio.sleep(60))
    service, _ = authorization(epoch(POLICY, ""), keys)
    began = time.monotonic()
    assert answer(asyncio.run(service.check(check_request(authorization=bearer("new"))))) == (401, "invalid_token")
    assert time.monotonic() - began < 2
    assert keys.cancelled


def test_a_refresh_that_fails_is_a_denial() -> None:
    """An error of the key store is unexpected: 500."""

    def fail() -> None:
        raise OSError("connection to secret-host refused")

    service, tally = authorization(epoch(POLICY, ""), Keys(fail))
    assert answer(asyncio.run(service.check(check_request(authorization=bearer("new"))))) == (500, "internal_error")
    assert tally.rpc_errors == 1


def test_a_flood_of_unknown_key_ids_does_not_block_other_checks() -> None:
    """Above MAX_WAITING of them, no more wait for keys: the keys at hand decide."""

    async def run() -> None:
        gate = asyncio.Event()
        service, _ = authorization(epoch(POLICY, ""), Keys(gate.wait))
        unknown = check_request(authorization=bearer("new"))
        slow = [asyncio.create_task(service.check(unknown)) for _ in range(authorization_module.MAX_WAITING)]
        await asyncio.sleep(0)
        assert answer(await service.check(unknown)) == (401, "invalid_token")
        assert not any(s.done() for s in slow)
        gate.set()
        assert {answer(data) for data in await asyncio.gather(*slow)} == {(401, "invalid_token")}
        waits = asyncio.create_task(service.check(unknown))
        gate.clear()
        await asyncio.sleep(0)
        assert not waits.done()
        gate.set()
        await waits

    asyncio.run(run())


def test_checks_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authorization_module, "KEY_WAIT", 5)

    async def run() -> None:
        gate = asyncio.Event()
        service, _ = authorization(epoch(POLICY, ""), Keys(gate.wait))
        slow = asyncio.create_task(service.check(check_request(authorization=bearer("new"))))
        await asyncio.sleep(0)
        assert answer(await service.check(check_request())) == (200, "permitted")
        assert not slow.done()
        gate.set()
        assert answer(await slow) == (401, "invalid_token")

    asyncio.run(run())


# ---- the socket ------------------------------------------------------------------------------------------------------


@pytest.fixture
def path() -> Iterator[Path]:
    """A path for a socket, which must be short."""
    with tempfile.TemporaryDirectory(prefix="srp") as folder:
        yield Path(folder) / "s.sock"


@asynccontextmanager
async def serving(path: Path, keys: Keys | None = None, **options: Any) -> AsyncIterator[tuple[Server, Any]]:
    """A started server on `path` and a channel to it."""
    service, _ = authorization(epoch(POLICY, "") if keys else None, keys)
    server = Server(f"unix:{path}", service.handlers(), **options)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            yield server, channel
    finally:
        await server.stop(0)


async def slow_check(channel: Any, keys: SlowKeys) -> asyncio.Future[bytes]:
    """A Check under way, which waits for `keys`."""
    check = asyncio.ensure_future(channel.unary_unary(CHECK)(check_request(authorization=bearer("new"))))
    await keys.waited_for.wait()
    return check


async def start(listen: str) -> None:
    """A server is created in a running event loop."""
    await Server(listen).start()


async def health(channel: Any, service: str = "") -> str:
    stub = health_pb2_grpc.HealthStub(channel)
    status = (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def test_a_real_server_answers_on_its_socket(path: Path) -> None:
    """Check and health over gRPC; garbage gets an answer, too; only owner and group may use the socket."""

    async def run() -> None:
        async with serving(path) as (server, channel):
            assert server.address == f"unix:{path}"
            mode = path.stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) & ~0o660 == 0
            check = channel.unary_unary(CHECK)
            assert answer(await check(check_request(x_expert_names="A"))) == (200, "permitted")
            assert answer(await check(b"\xff" * 100)) == (500, "internal_error")
            assert await health(channel) == "SERVING"
            assert await health(channel, SERVICE) == "SERVING"
        assert not path.exists()

    asyncio.run(run())


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o117])
def test_the_sockets_mode_does_not_depend_on_the_umask(path: Path, mask: int) -> None:
    """It is at most 0660, and the umask is restored."""

    async def run() -> int:
        async with serving(path):
            return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(mask)
    try:
        assert asyncio.run(run()) & ~0o660 == 0
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


def test_a_message_that_is_too_large_is_refused(path: Path) -> None:
    """Above MAX_MESSAGE, gRPC answers RESOURCE_EXHAUSTED, which Envoy takes for an error: 503."""

    async def run() -> None:
        async with serving(path) as (_, channel):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(CHECK)(b"\x00" * (MAX_MESSAGE + 1))
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(run())


def test_a_method_other_than_check_and_health_is_unimplemented(path: Path) -> None:

    async def run() -> None:
        async with serving(path) as (_, channel):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(f"/{SERVICE}/Other")(b"")
            assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(run())


def stale_socket(path: Path) -> None:
    """The socket that a killed server leaves behind."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


def test_a_stale_socket_is_replaced(path: Path) -> None:
    stale_socket(path)

    async def run() -> None:
        async with serving(path) as (_, channel):
            assert answer(await channel.unary_unary(CHECK)(check_request())) == (200, "permitted")

    asyncio.run(run())


def test_a_socket_in_use_is_left_alone(path: Path) -> None:
    """The second server says why it cannot start."""

    async def run() -> None:
        async with serving(path) as (_, channel):
            with pytest.raises(OSError, match=f"cannot listen on {path}: another server is using it"):
                await Server(f"unix:{path}").start()
            assert answer(await channel.unary_unary(CHECK)(check_request())) == (200, "permitted")

    asyncio.run(run())


def a_file(path: Path) -> None:
    path.write_text("precious")


IN_THE_WAY: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a file", a_file, "exists and is not a socket"),
    ("a folder", Path.mkdir, "exists and is not a socket"),
    ("a link to a file", lambda path: (a_file(path.with_suffix(".txt")), path.symlink_to(path.with_suffix(".txt"))),
     "exists and is not a socket"),
    ("a link to nothing", lambda path: path.symlink_to("/nonexistent/x"), "cannot listen on"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error"), [i[1:] for i in IN_THE_WAY], ids=[i[0] for i in IN_THE_WAY])
def test_anything_but_a_socket_is_left_alone(path: Path, make: Callable[[Path], Any], error: str) -> None:
    """With OSError."""
    make(path)
    with pytest.raises(OSError, match=error):
        asyncio.run(start(f"unix:{path}"))
    assert os.path.lexists(path)


ADDRESSES = [
    ("no folder", "unix:/nonexistent/s.sock", "its folder does not exist"),
    ("a long path", f"unix:/tmp/{'x' * 101}", "at most 100 bytes"),
    ("no host", "srp.invalid:0", "cannot listen on"),
]


@pytest.mark.parametrize(("listen", "error"), [a[1:] for a in ADDRESSES], ids=[a[0] for a in ADDRESSES])
def test_an_address_that_cannot_be_used_is_named(listen: str, error: str) -> None:
    with pytest.raises(OSError, match=error):
        asyncio.run(start(listen))


def test_port_0_takes_a_free_port() -> None:
    """Two servers cannot share a port."""

    async def run() -> None:
        server = Server("127.0.0.1:0", authorization()[0].handlers())
        await server.start()
        try:
            assert not server.address.endswith(":0")
            async with grpc.aio.insecure_channel(server.address) as channel:
                assert await health(channel) == "SERVING"
            with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1"):
                await Server(server.address).start()
        finally:
            await server.stop(0)

    asyncio.run(run())


def test_stop_lets_running_checks_finish(path: Path) -> None:
    """New checks are not accepted, and the socket is removed at the start of the drain."""

    async def run() -> None:
        keys = SlowKeys()
        async with serving(path, keys) as (server, channel):
            running = await slow_check(channel, keys)
            stopping = asyncio.create_task(server.stop(5))
            await until(lambda: not path.exists(), "the socket to go", seconds=5)
            stale_socket(path)  # of the next server; stopping must not touch it
            assert not stopping.done()
            keys.gate.set()
            assert answer(await running) == (401, "invalid_token")
            await asyncio.wait_for(stopping, 5)
            assert path.exists()
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(CHECK)(check_request())

    asyncio.run(run())


def test_more_checks_than_allowed_are_refused_at_once(path: Path) -> None:
    """Above `max_concurrent`, gRPC answers RESOURCE_EXHAUSTED, which Envoy takes for an error: 503."""

    async def run() -> None:
        keys = SlowKeys()
        async with serving(path, keys, max_concurrent=1) as (_, channel):
            running = await slow_check(channel, keys)
            check = channel.unary_unary(CHECK)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await check(check_request())
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            keys.gate.set()
            assert answer(await running) == (401, "invalid_token")
            assert answer(await check(check_request())) == (200, "permitted")

    asyncio.run(run())


def test_stop_does_not_wait_beyond_its_grace(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that does not end in time is cut off."""
    monkeypatch.setattr(authorization_module, "KEY_WAIT", 60)

    async def run() -> None:
        keys = SlowKeys()
        async with serving(path, keys) as (server, channel):
            running = await slow_check(channel, keys)
            await asyncio.wait_for(server.stop(0.05), 5)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await running

    asyncio.run(run())


@pytest.mark.parametrize(
    ("listen", "path"),
    [("unix:/run/a.sock", "/run/a.sock"), ("unix:///run/a.sock", "/run/a.sock"), ("127.0.0.1:0", None)],
)
def test_both_forms_of_a_unix_address_have_a_path(listen: str, path: str | None) -> None:
    assert unix_path(listen) == (None if path is None else Path(path))
