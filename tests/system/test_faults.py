"""Experts that die, hang, fail or are cut off under load: the experts themselves report who was called.

Half of the load also asks for C, which its callers are not permitted: C is idle while A and B are in trouble. A request
may fail only if it was with an expert when that expert went down.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from ext_authz.demo.ports import HOST, free_ports
from tests.harness import tokens
from tests.harness.loop import Loop
from tests.harness.policies import HEAD
from tests.harness.process import Process
from tests.harness.system import System, get_json, system
from tests.harness.upstream import close
from tests.harness.waiting import wait_for

INTERVAL = 1.0  # seconds between two health checks
GRACE = 0.1  # seconds until Envoy has noticed that a connection is closed
CLIENTS = 6
LATE = 2  # requests that ext_authz may answer too late on a busy machine

RULES = """\
experts:
  A: {{tier: low, endpoints: [{A}], health: {{interval: 1s}}}}
  B: {{tier: low, endpoints: [{B}], health: {{interval: 1s}}}}
  C: {{tier: high, endpoints: [{C}], health: {{interval: 1s}}}}
  Failing: {{tier: low, endpoints: [{Failing}], health: {{interval: 1s}}}}
  Again: {{tier: low, endpoints: [{Again}], health: {{interval: 1s}}, retry_on: 5xx}}
  Other: {{tier: low, endpoints: [{Other}], health: {{interval: 1s}}, retry_on: 5xx}}
  Only: {{tier: high, endpoints: [{Only}], health: {{interval: 1s}}, downgrade_to: [B, A], unavailable: downgrade}}
  Far: {{tier: low, endpoints: ["127.0.0.1:{relay}"], health: {{interval: 1s}}}}
gate:
  - {{path: /route, json: /expert_names}}
  - {{prefix: /, header: x-expert-names}}
"""

REPLICAS = {"A": 2, "B": 2, "C": 1, "Failing": 1, "Again": 1, "Other": 1, "Only": 1, "Far": 1}
FLAGS = {
    "A": ("--delay", "0.005:0.02"),
    "B": ("--delay", "0.005:0.02"),
    "Failing": ("--delay", "0", "--fail-rate", "1"),
    "Again": ("--delay", "0", "--fail-rate", "1"),
    "Far": ("--delay", "0.6"),
}


class Relay:
    """The network to one expert. It passes everything on until it is cut."""

    def __init__(self, port: int, to: int) -> None:
        self._port, self._to = port, to
        self._loop = Loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def start(self) -> None:
        async def start() -> None:
            self._server = await asyncio.start_server(self._serve, HOST, self._port)

        self._loop.run(start())

    def cut(self) -> None:
        """Abort every connection, and accept no more."""

        async def cut() -> None:
            assert self._server is not None
            await close(self._server)
            for writer in self._open:
                writer.transport.abort()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._loop.run(cut())

    def close(self) -> None:
        self.cut()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            far_reader, far_writer = await asyncio.open_connection(HOST, self._to)
            self._open.add(far_writer)
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        self._tasks.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass(frozen=True)
class Sent:
    """One request of the load. `status` 0: its answer was cut off. `code` is the error's code."""

    began: float
    ended: float
    status: int
    expert: str = ""
    code: str = ""


@dataclass
class Load:
    """Clients that send requests without end while the context is open."""

    it: System
    asked: Sequence[Sequence[str]]
    token: str | None = None
    sent: list[Sent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(CLIENTS)]

    def _client(self, n: int) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                answer = self.it.send(experts=self.asked[n % len(self.asked)], token=self.token, timeout=30)
                code = "" if answer.status == 200 else answer.code
                sent = Sent(began, time.monotonic(), answer.status, answer.headers.get("x-srp-expert", ""), code)
            except (OSError, http.client.HTTPException):
                sent = Sent(began, time.monotonic(), 0)
            self.sent.append(sent)
            time.sleep(0.005)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def failed(self) -> list[Sent]:
        """Requests that failed because of experts, rather than because ext_authz was late on a busy machine."""
        late = [s for s in self.sent if s.code == "authz_unavailable"]
        assert len(late) <= LATE
        return [s for s in self.sent if s.status != 200 and s not in late]

    def served_since(self, moment: float) -> set[str]:
        return {s.expert for s in self.sent if s.began > moment and s.status == 200}


@dataclass
class World:
    """The system and the relay in front of expert Far."""

    it: System
    relay: Relay

    def experts(self, *names: str) -> list[Process]:
        return [p for name in names for p in self.it.experts[name]]

    def healthy(self, name: str, n: int, seconds: float = 10) -> None:
        """Until Envoy sees `n` healthy replicas of an expert."""
        wait_for(lambda: self._healthy(name) == n, f"{n} healthy replicas of {name}", self.it, seconds)

    def _healthy(self, name: str) -> int:
        stats = get_json(self.it.admin, f"/stats?format=json&filter=^cluster.{name.lower()}.membership_healthy$")
        return int(stats["stats"][0]["value"])

    def answers(self, port: int) -> bool:
        with contextlib.suppress(OSError):
            return bool(get_json(port, "/healthz")["status"] == "ok")
        return False

    def start(self, proc: Process) -> float:
        """Start an expert again. Returns the time of its first answer."""
        proc.start()
        port = int(proc.command[proc.command.index("--port") + 1])
        wait_for(lambda: self.answers(port), "an expert to be back", self.it)
        return time.monotonic()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    (relay_port,) = free_ports(1)

    def policy(ports: dict[str, list[int]]) -> str:
        listed = {n: ", ".join(f'"{HOST}:{p}"' for p in of) for n, of in ports.items()}
        return HEAD + RULES.format(relay=relay_port, **listed)

    with system(policy, REPLICAS, {"jwks.json": tokens.jwks("ES256")}, expert_flags=FLAGS) as it:
        relay = Relay(relay_port, it.ports["Far"][0])
        relay.start()
        made = World(it, relay)
        try:
            for name, n in REPLICAS.items():
                made.healthy(name, n)
            yield made
        finally:
            relay.close()


TEMPTED = (["A", "B"], ["A", "B", "C"])


def intruders(it: System) -> dict[str, int]:
    """Requests that reached C from callers who are not permitted it."""
    return {who: n for who, n in it.seen("C").items() if not who.startswith("high|")}


KILLS = [
    # name, the replicas that are killed
    ("one replica", [("A", 0)]),
    ("a whole expert", [("A", 0), ("A", 1)]),
    ("all but one replica", [("A", 0), ("A", 1), ("B", 0)]),
]


@pytest.mark.parametrize(("what", "killed"), KILLS, ids=[k[0] for k in KILLS])
def test_only_requests_at_the_killed_replicas_fail(world: World, what: str, killed: list[tuple[str, int]]) -> None:
    it = world.it
    procs = [it.experts[name][n] for name, n in killed]
    with Load(it, TEMPTED) as load:
        time.sleep(0.4)
        before = time.monotonic()
        for proc in procs:
            proc.kill()
        after = time.monotonic()
        time.sleep(0.8)
        back = max(map(world.start, procs))
        for name in sorted({name for name, _ in killed}):
            world.healthy(name, REPLICAS[name])
        recovered = time.monotonic() - back
        time.sleep(0.3)
    failed = load.failed()
    assert all(before <= s.ended and s.began <= after + GRACE for s in failed), f"{what}: {failed}"
    assert len(failed) <= CLIENTS * len(killed)  # each client has one request in flight
    assert "B" in load.served_since(after)
    assert recovered <= 2 * INTERVAL
    assert not intruders(it)


def test_a_hung_replica_keeps_its_requests_and_gets_no_more(world: World) -> None:
    it = world.it
    hung = it.experts["A"][0]
    with Load(it, TEMPTED) as load:
        time.sleep(0.3)
        hung.pause()
        stopped = time.monotonic()
        world.healthy("A", 1)
        noticed = time.monotonic()
        done = len(load.sent)
        time.sleep(0.5)
        during = len(load.sent) - done
        hung.resume()
        world.healthy("A", 2)
        recovered = time.monotonic() - noticed - 0.5
    assert not load.failed()
    assert during > 20
    held = [s for s in load.sent if s.began < noticed and s.ended > noticed + 0.4]
    assert len(held) < CLIENTS  # it looked busy, so the others got the rest
    assert noticed - stopped < 4 * INTERVAL
    assert recovered <= 2 * INTERVAL
    assert not intruders(it)


def test_an_answer_of_503_is_retried_at_another_expert_where_the_policy_permits_it(world: World) -> None:
    it = world.it
    with Load(it, [["Again", "Other"], ["Again", "Other", "C"]]) as load:
        time.sleep(1.0)
    assert not load.failed()
    assert load.served_since(0) == {"Other"}
    assert not intruders(it)


def test_an_expert_that_answers_503_is_soon_avoided_where_the_policy_permits_no_retry(world: World) -> None:
    it = world.it
    with Load(it, [["Failing", "A"], ["Failing", "A", "C"]]) as load:
        time.sleep(1.5)
    failed = load.failed()
    assert {s.status for s in failed} <= {503}
    # Five such answers in a row, and those in flight by then, eject it until it passes a health check.
    assert 1 <= len(failed) <= (5 + CLIENTS) * 3
    assert not intruders(it)


def test_a_request_whose_answer_was_cut_off_is_not_repeated(world: World) -> None:
    it = world.it
    before = it.served("Far"), it.served("B")
    outcomes: list[str] = []

    def stream() -> None:
        names = [("x-expert-names", "Far")]
        try:
            answer = it.send("/v1/chat/completions", headers=names, body={"stream": True}, timeout=10)
            outcomes.append(str(answer.status))
        except (OSError, http.client.HTTPException):
            outcomes.append("cut")

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: it.served("Far") == before[0] + 4, "four answers to be under way", it)
    time.sleep(0.25)
    world.relay.cut()
    began = time.monotonic()
    for thread in threads:
        thread.join()
    with Load(it, [["Far", "B"], ["Far", "B", "C"]]) as load:
        time.sleep(0.8)
    world.relay.start()
    back = time.monotonic()
    wait_for(lambda: it.send(experts=["Far"]).status == 200, "Far to be back", it)
    recovered = time.monotonic() - back
    assert outcomes == ["cut"] * 4
    assert it.served("Far") >= before[0] + 5
    assert not load.failed()
    assert load.served_since(began) == {"B"}
    assert it.served("B") == before[1] + len(load.sent)  # none of them twice
    assert recovered <= 2 * INTERVAL + 1  # the answer itself takes 0.6 s
    assert not intruders(it)


def test_where_the_policy_says_so_others_stand_in_for_an_expert_that_is_down_and_the_caller_sees_it(
    world: World,
) -> None:
    it = world.it
    premium = tokens.sign(tokens.claims(plan="premium"))
    (only,) = world.experts("Only")

    def outcome(**more: Any) -> tuple[int, str, str, str]:
        answer = it.send(token=premium, **more)
        decision, reason, expert = (answer.headers.get(f"x-srp-{h}", "") for h in ("decision", "reason", "expert"))
        return answer.status, decision, reason, expert

    itself = (200, "allow", "permitted", "Only")
    assert {outcome(experts=["Only"]) for _ in range(10)} == {itself}
    only.kill()
    stand_ins = {(200, "downgrade", "unavailable", name) for name in "AB"}
    assert {outcome(experts=["Only"]) for _ in range(5)} <= stand_ins  # Envoy finds the connection refused
    world.healthy("Only", 0)
    assert {outcome(experts=["Only"]) for _ in range(20)} == stand_ins
    assert outcome(experts=["Only"], headers=[("x-srp-downgrade", "never")])[0] == 503
    assert outcome(experts=["Only", "C"]) == (200, "allow", "permitted", "C")
    world.start(only)
    world.healthy("Only", 1)
    assert {outcome(experts=["Only"]) for _ in range(10)} == {itself}
    assert not intruders(it)


ASKS = (["A"], ["A", "B"], ["A", "B", "C"], ["C"], ["C", "B"])


def test_whatever_is_killed_no_caller_gets_an_expert_that_is_not_permitted(world: World) -> None:
    """Whole experts are killed at random. For a caller without C, with A and B dead, it is 503, never C."""
    it = world.it
    premium = tokens.sign(tokens.claims(plan="premium"))
    chosen = random.Random(4)
    patterns = [frozenset("AB"), *(frozenset(n for n in "ABC" if chosen.random() < 0.5) for _ in range(2)), frozenset()]
    dead: frozenset[str] = frozenset()
    for pattern in patterns:
        assert "C" in dead or not intruders(it)
        for proc in world.experts(*sorted(pattern - dead)):
            proc.kill()
        for asked, permitted, _, expert in _ask(it, premium):  # Envoy has not noticed yet
            assert expert in {*permitted, ""}, (pattern, asked)
        for proc in world.experts(*sorted(dead - pattern)):
            world.start(proc)
        for name in "ABC":
            world.healthy(name, 0 if name in pattern else REPLICAS[name])
        dead = pattern
        if dead == frozenset("AB"):
            _all_down_is_answered_at_once(it)
        for asked, permitted, status, expert in _ask(it, premium):
            living = permitted - dead
            if not permitted:
                assert (status, expert) == (403, ""), (dead, asked)
            elif not living:
                assert (status, expert) == (503, ""), (dead, asked)
            else:
                assert status == 200, (dead, asked)
                assert expert in living, (dead, asked)
    assert not intruders(it)


def _ask(it: System, premium: str) -> list[tuple[Sequence[str], frozenset[str], int, str]]:
    """For callers of both tiers and all of `ASKS`: asked, permitted, status, the expert that answered."""
    found = []
    for token, rights in ((None, "AB"), (premium, "ABC")):
        for asked in ASKS:
            answer = it.send(experts=asked, token=token)
            permitted = frozenset(asked) & frozenset(rights)
            found.append((asked, permitted, answer.status, answer.headers.get("x-srp-expert", "")))
    return found


def _all_down_is_answered_at_once(it: System) -> None:
    took = []
    for _ in range(20):
        began = time.monotonic()
        answer = it.send(experts=["A", "B"])
        took.append(time.monotonic() - began)
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "experts_unavailable", "1")
    assert statistics.median(took) < 0.05  # seconds
