"""Whatever changes, and however often: no request reaches a backend that no policy in force let its caller reach."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

import ext_authz.serve.control
from tests.harness import edits
from tests.harness.backends import HANGING
from tests.harness.edits import Edits, Question
from tests.harness.gateway import Gateway, gateway
from tests.harness.rules import Caller, Expert, Rules, callers

STEPS = int(os.environ.get("SRP_STEPS", "300"))
SEED = int(os.environ.get("SRP_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)

CALLERS = callers()
NOBODY = CALLERS["anonymous"]

# ---- the name of a cluster means something else in the next policy ----

LOW = Rules({"A": Expert("low", ("low",), "expert-a")})
HIGH = Rules({"A": Expert("high", ("high",), "expert-a")})
PLAIN = Rules({"A": Expert("low", ("low",), "expert-a"), "C": Expert("high", ("high",), "expert-c")})
SWAPPED = Rules({"A": Expert("low", ("low",), "expert-c"), "C": Expert("high", ("high",), "expert-a")})
BACKENDS = ("low", "high", HANGING)


def test_no_anonymous_request_follows_an_expert_that_moves_up() -> None:
    """A moves to a high tier and to other endpoints at once, and back, under load."""

    async def run() -> None:
        async with gateway(BACKENDS, LOW) as it:
            async with load(it):
                for rules in (HIGH, LOW) * 4:
                    assert await it.edit(rules)
                    await it.settled()
            assert it.counts["200"] > 50
            assert it.counts["403"] > 50
            assert arrivals(it, "high") == []

    asyncio.run(run())


def test_no_anonymous_request_follows_an_expert_that_moves_up_while_another_envoy_is_frozen() -> None:
    """The policy waits for the frozen Envoy's acknowledgement while the other one already has the new clusters."""

    async def run() -> None:
        async with gateway(BACKENDS, LOW, envoys=2) as it:
            async with load(it):
                it.envoys[1].pause()
                assert await it.edit(HIGH)
                it.envoys[1].resume()
                await it.settled()
            assert it.counts["200"] > 50
            assert it.counts["403"] > 0
            assert arrivals(it, "high") == []

    asyncio.run(run())


WAITING = {"in connect": (HANGING, "answer"), "for an answer": ("low", "hold, close")}


@pytest.mark.parametrize(("backend", "fate"), WAITING.values(), ids=WAITING)
def test_no_anonymous_request_is_retried_at_an_expert_that_has_moved_up(backend: str, fate: str) -> None:
    """The connect times out, or the connection breaks before there is an answer, once the edit is in force."""

    def rules(tier: str, endpoint: str) -> Rules:
        expert = Expert(tier, (endpoint,), "expert-a", retry_on="5xx", retries=1)
        return Rules({"A": expert})

    async def run() -> None:
        async with gateway(BACKENDS, rules("low", backend)) as it:
            asked = asyncio.create_task(it.ask(NOBODY, "A", fate=fate))
            await asyncio.sleep(0.1)
            assert await it.edit(rules("high", "high"))
            await it.settled()
            assert not asked.done()
            it.release()
            await asked
            assert arrivals(it, "high") == []

    asyncio.run(run())


def test_no_anonymous_request_follows_a_cluster_name_to_another_expert() -> None:
    """A and C swap the names of their clusters, and swap them back, under load."""

    async def run() -> None:
        async with gateway(BACKENDS, PLAIN) as it:
            async with load(it):
                for rules in (SWAPPED, PLAIN) * 4:
                    assert await it.edit(rules)
                    await it.settled()
            assert it.counts["200"] > 50
            assert arrivals(it, "high") == []

    asyncio.run(run())


@contextlib.asynccontextmanager
async def load(it: Gateway, clients: int = 8) -> AsyncIterator[None]:
    """Anonymous requests for A without pause, through the first Envoy."""
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            await it.ask(NOBODY, "A")

    running = [asyncio.create_task(client()) for _ in range(clients)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*running)


def arrivals(it: Gateway, backend: str) -> list[str]:
    """The requests that reached `backend`, and how long after the beginning of which change."""
    found = []
    for request in it.requests:
        for where, at in request.arrivals:
            if where == backend:
                number, begun = max((n, c.begun) for n, c in enumerate(it.policies.changes) if c.begun <= at)
                found.append(f"{request}, {(at - begun) * 1000:.0f} ms after change {number} began")
    return found


# ---- anything at all ----

MAX_OPEN = 60  # requests without an answer
MAX_HELD = 12  # requests that wait at a backend
MAX_REGULARS = 4


class Walk:
    """Random steps: each does something to the gateway, and most do not wait until it is done."""

    def __init__(self, it: Gateway, seed: int) -> None:
        self.it = it
        self.random = random.Random(seed)
        self.step = 0
        self.log: deque[str] = deque(maxlen=40)
        self.doing: dict[str, asyncio.Task[Any]] = {}  # what takes a while, one of each kind
        self.asking: set[asyncio.Task[None]] = set()
        self.frozen = False
        self.regulars: deque[Question] = deque(maxlen=MAX_REGULARS)
        self.edits = Edits(self.random, self.regulars)
        self.steps = {
            self.burst: 100, self.edit: 10, self.rotate: 4, self.release: 5, self.freeze: 1, self.wake: 4,
            self.restart_envoy: 0.4, self.restart_authz: 0.3,
        }  # fmt: skip

    async def walk(self, steps: int) -> None:
        """Take so many steps, or as many as it takes to a breach; then let everything come to an end."""
        for self.step in range(steps):
            (act,) = self.random.choices([*self.steps], [*self.steps.values()])
            await act()
            for name in [n for n, task in self.doing.items() if task.done()]:
                self.doing.pop(name).result()
            if self.it.breaches:
                break
        if self.frozen:
            await self.wake()
        await asyncio.gather(*self.doing.values())
        async with asyncio.timeout(30):
            while self.asking:
                self.it.release()
                await asyncio.wait(self.asking, timeout=0.1)

    # ---- requests ----

    async def burst(self) -> None:
        """A few requests at once. Most are like earlier ones, which may have a lease."""
        sent = []
        for _ in range(self.random.randint(1, 6)):
            if len(self.regulars) < MAX_REGULARS or self.random.random() < 0.05:
                self.regulars.append(self.question())
            regular = self.random.random() < 0.6
            sent.append(self.send(*self.random.choice(self.regulars) if regular else self.question()))
        await asyncio.wait(sent, timeout=0.01)
        while self.it.open > MAX_OPEN:
            self.it.release()
            await asyncio.wait(self.asking, timeout=0.01)
            await self.wake()

    def question(self) -> Question:
        often = ["anonymous"] * 4 + ["free"] * 3 + ["premium"] * 3 + ["acme"]
        caller = CALLERS[self.random.choice([*often, *CALLERS])]
        names = tuple(self.random.sample(edits.NAMES, self.random.choice((1, 1, 1, 2, 2, 3))))
        if self.random.random() < 0.5:
            names = (self.edits.focus, *(n for n in names[1:] if n != self.edits.focus))
        return caller, names, self.random.choice(("header", "header", "body"))

    def send(self, caller: Caller, names: tuple[str, ...], gate: str) -> asyncio.Task[None]:
        fates = ["answer"] * 24 + ["close", "fail", "hold", "hold, close", "hold, fail"]
        fate = self.random.choice(fates if self.it.held < MAX_HELD else fates[:-3])
        envoy = int(self.random.random() < (0.1 if self.frozen else 0.4))
        task = asyncio.create_task(self.it.ask(caller, *names, envoy=envoy, gate=gate, fate=fate))
        self.asking.add(task)
        task.add_done_callback(self.asking.discard)
        return task

    async def release(self) -> None:
        self.it.release()

    # ---- changes ----

    async def edit(self) -> None:
        """A new policy; sometimes a second one right behind it."""
        if "edit" in self.doing:
            if self.random.random() < 0.8:
                await self.burst()
                return
            await self.doing.pop("edit")
        what = self.edits.edit()
        self.start("edit", what, self.it.edit(self.edits.rules))
        if self.random.random() < 0.1:
            await asyncio.sleep(0)
            what = f"at once {self.edits.edit()}"
            self.start("edit", what, both(self.doing["edit"], self.it.edit(self.edits.rules)))

    async def rotate(self) -> None:
        """Other keys; now and then none, which changes nothing until they are back."""
        if "rotate" in self.doing:
            return
        names = self.random.choice([("",), ("",), ("", "new"), ("new",), ()])
        self.start("rotate", f"keys {names}", self.it.rotate(*names))

    async def freeze(self) -> None:
        """The second Envoy stops where it is."""
        if not self.frozen and "envoy" not in self.doing:
            self.note("freeze")
            self.it.envoys[1].pause()
            self.frozen = True

    async def wake(self) -> None:
        if self.frozen:
            self.note("wake")
            self.it.envoys[1].resume()
            self.frozen = False

    async def restart_envoy(self) -> None:
        if not self.frozen and "envoy" not in self.doing:
            n = self.random.randrange(2)
            self.start("envoy", f"restart envoy {n}", self.it.restart_envoy(n))

    async def restart_authz(self) -> None:
        """It stops, requests come, and it starts with another policy and the first key."""
        await asyncio.gather(*(self.doing.pop(name) for name in [*self.doing]))
        await self.wake()
        self.note("stop ext_authz")
        await self.it.stop_authz()
        await self.burst()
        self.note(f"start ext_authz: {self.edits.edit()}")
        await self.it.start_authz(self.edits.rules)
        connected = asyncio.create_task(self.it.connected())
        while not connected.done():
            await self.burst()

    def start(self, name: str, what: str, work: Coroutine[Any, Any, Any]) -> None:
        self.note(what)
        self.doing[name] = asyncio.create_task(work)

    def note(self, what: str) -> None:
        number = len(self.it.policies.changes)
        self.log.append(f"{self.it.now:8.3f} step {self.step}, {number} policies so far: {what}")


async def both(*work: Any) -> None:
    await asyncio.gather(*work)


def test_no_request_reaches_what_no_policy_in_force_permits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies, keys, revocations, frozen and restarted processes, in any order and at once."""
    monkeypatch.setattr(ext_authz.serve.control, "ACK_TIMEOUT", 0.25)  # what a frozen Envoy costs each edit
    print(f"SRP_SEED={SEED} SRP_STEPS={STEPS}")

    async def run() -> Gateway:
        async with gateway(edits.BACKENDS, edits.START, envoys=2, settle=0.05) as it:
            walk = Walk(it, SEED)
            try:
                await walk.walk(STEPS)
            finally:
                print(*walk.log, f"{walk.step + 1} steps, {len(it.policies.changes)} policies: {it.counts}", sep="\n")
            assert all(process.process and process.process.poll() is None for process in it.envoys)
            return it

    it = asyncio.run(run())
    breaches = "\n".join(it.breaches[:3])
    assert not breaches, f"SRP_SEED={SEED}, {len(it.breaches)} breaches, the last steps are above; {breaches}"
    for what in ("200", "401", "leased", "retried", "under one policy"):
        assert it.counts[what], f"it proves nothing without {what}"
