"""Experts that die, hang, fail or are cut off under load: who is called then is read at the experts themselves.

Half of the load asks for C as well, which its callers may not have: an idle C, while A and B are in trouble, is the
temptation. A request may fail only if it was with the expert when that was struck down.
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

from tests.harness import tokens
from tests.harness.loop import Loop
from tests.harness.policies import HEAD
from tests.harness.process import Process
from tests.harness.system import HOST, System, free_ports, get_json, system
from tests.harness.upstream import close
from tests.harness.waiting import wait_for

INTERVAL = 1.0  # seconds between two health checks
GRACE = 0.1  # seconds until Envoy has read of a connection that it is closed
CLIENTS = 6
LATE = 2  # requests that ext_authz may be too late for, on a machine that does much else

RULES = """\
experts:
  A: {{tier: low, endpoints: [{A}], health: {{interval: 1s}}}}
  B: {{tier: low, endpoints: [{B}], health: {{interval: 1s}}}}
  C: {{tier: high, endpoints: [{C}], health: {{interval: 1s}}}}
  Failing: {{tier: low, endpoints: [{Failing}], health: {{interval: 1s}}}}
  Again: {{tier: low, endpoints: [{Again}], health: {{interval: 1s}}, retry_on: 5xx}}
  Else: {{tier: low, endpoints: [{Else}], health: {{interval: 1s}}, retry_on: 5xx}}
  Only: {{tier: high, endpoints: [{Only}], health: {{interval: 1s}}, downgrade_to: [B, A], unavailable: downgrade}}
  Far: {{tier: low, endpoints: ["127.0.0.1:{relay}"], health: {{interval: 1s}}}}
gate:
  - {{path: /route, json: /expert_names}}
  - {{prefix: /, header: x-expert-names}}
"""

REPLICAS = {"A": 2, "B": 2, "C": 1, "Failing": 1, "Again": 1, "Else": 1, "Only": 1, "Far": 1}
FLAGS = {
    "A": ("--delay", "0.005:0.02"),
    "B": ("--delay", "0.005:0.02"),
    "Failing": ("--delay", "0", "--fail-rate", "1"),
    "Again": ("--delay", "0", "--fail-rate", "1"),
    "Far": ("--delay", "0.6"),
}


class Relay:
    """The network to one expert: passes everything on, until it is cut."""

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
        """Close every connection as it is, and take no other."""

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
    """One request of the load. `status` 0: cut in the middle of the answer. `code` is the error's."""

    began: float
    ended: float
    status: int
    expert: str = ""
    code: str = ""


@dataclass
class Load:
    """Clients that ask without a pause, from `start` to `stop`."""

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
        """What the experts' troubles cost. That ext_authz is late now and then, on a busy machine, is none of them."""
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
        """Until Envoy sees so many living replicas of an expert."""
        wait_for(lambda: self._healthy(name) == n, f"{n} healthy replicas of {name}", self.it, seconds)

    def _healthy(self, name: str) -> int:
        stats = get_json(self.it.admin, f"/stats?format=json&filter=^cluster.{name.lower()}.membership_healthy$")
        return int(stats["stats"][0]["value"])

    def answers(self, port: int) -> bool:
        with contextlib.suppress(OSError):
            return bool(get_json(port, "/healthz")["status"] == "ok")
        return False

    def start(self, proc: Process) -> float:
        """Start an expert again. When it first answered."""
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


def strangers(it: System) -> dict[str, int]:
    """Requests at C of callers who may not have it."""
    return {who: n for who, n in it.seen("C").items() if not who.startswith("high|")}


KILLS = [
    # what is killed: a name is all replicas of the expert, a number one of them
    ("one replica", [("A", 0)]),
    ("a whole expert", [("A", 0), ("A", 1)]),
    ("all but one replica", [("A", 0), ("A", 1), ("B", 0)]),
]


@pytest.mark.parametrize(("what", "killed"), KILLS, ids=[k[0] for k in KILLS])
def test_only_what_was_with_the_killed_fails(world: World, what: str, killed: list[tuple[str, int]]) -> None:
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
    assert not strangers(it)


def test_a_replica_that_hangs_holds_what_it_has_and_gets_no_more(world: World) -> None:
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
    assert len(held) < CLIENTS  # it looked busy, so that the others got the rest
    assert noticed - stopped < 4 * INTERVAL
    assert recovered <= 2 * INTERVAL
    assert not strangers(it)


def test_an_expert_that_answers_503_is_passed_over_where_the_policy_lets_us_ask_again(world: World) -> None:
    it = world.it
    with Load(it, [["Again", "Else"], ["Again", "Else", "C"]]) as load:
        time.sleep(1.0)
    assert not load.failed()
    assert load.served_since(0) == {"Else"}
    assert not strangers(it)


def test_an_expert_that_answers_503_is_soon_left_alone_where_we_may_not_ask_again(world: World) -> None:
    it = world.it
    with Load(it, [["Failing", "A"], ["Failing", "A", "C"]]) as load:
        time.sleep(1.5)
    failed = load.failed()
    assert {s.status for s in failed} <= {503}
    # Five answers in a row take it out, with what is in flight on top, until it passes a health check.
    assert 1 <= len(failed) <= (5 + CLIENTS) * 3
    assert not strangers(it)


def test_answers_that_are_cut_in_the_middle_are_not_asked_for_twice(world: World) -> None:
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
    wait_for(lambda: it.served("Far") == before[0] + 4, "four answers on their way", it)
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
    assert not strangers(it)


def test_an_expert_that_is_down_is_stood_in_for_where_the_policy_says_so_and_the_caller_is_told(world: World) -> None:
    it = world.it
    premium = tokens.sign(tokens.claims(plan="premium"))
    (only,) = world.experts("Only")

    def told(**more: Any) -> tuple[int, str, str, str]:
        answer = it.send(token=premium, **more)
        decision, reason, expert = (answer.headers.get(f"x-srp-{h}", "") for h in ("decision", "reason", "expert"))
        return answer.status, decision, reason, expert

    itself = (200, "allow", "permitted", "Only")
    assert {told(experts=["Only"]) for _ in range(10)} == {itself}
    only.kill()
    stand_ins = {(200, "downgrade", "unavailable", name) for name in "AB"}
    assert {told(experts=["Only"]) for _ in range(5)} <= stand_ins  # Envoy finds the connection refused
    world.healthy("Only", 0)
    assert {told(experts=["Only"]) for _ in range(20)} == stand_ins
    assert told(experts=["Only"], headers=[("x-srp-downgrade", "never")])[0] == 503
    assert told(experts=["Only", "C"]) == (200, "allow", "permitted", "C")
    world.start(only)
    world.healthy("Only", 1)
    assert {told(experts=["Only"]) for _ in range(10)} == {itself}
    assert not strangers(it)


ASKS = (["A"], ["A", "B"], ["A", "B", "C"], ["C"], ["C", "B"])


def test_whatever_is_killed_nobody_gets_an_expert_that_is_not_permitted(world: World) -> None:
    """Random kills of whole experts. Without rights to C and with A and B dead the answer is 503, never C."""
    it = world.it
    premium = tokens.sign(tokens.claims(plan="premium"))
    chosen = random.Random(4)
    patterns = [frozenset("AB"), *(frozenset(n for n in "ABC" if chosen.random() < 0.5) for _ in range(2)), frozenset()]
    dead: frozenset[str] = frozenset()
    for pattern in patterns:
        assert "C" in dead or not strangers(it)
        for proc in world.experts(*sorted(pattern - dead)):
            proc.kill()
        for asked, permitted, _, expert in _ask(it, premium):  # Envoy does not know yet
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
    assert not strangers(it)


def _ask(it: System, premium: str) -> list[tuple[Sequence[str], frozenset[str], int, str]]:
    """For callers of either tier and all of `ASKS`: asked, permitted, status, who answered."""
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
