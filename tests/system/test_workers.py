"""Several processes that decide, through a real Envoy: they agree, they are replaced, and they end with their owner."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ext_authz.policyfile.parse import parse_policy
from tests.conftest import demo_policy
from tests.harness import tokens
from tests.harness.system import HOST, System, system
from tests.harness.waiting import wait_for

WORKERS = 3
SWAPS = 10
ENOUGH = 60  # requests, of which each of three workers gets some
FILES = {"jwks.json": tokens.jwks("ES256")}

Answers = list[tuple[int, str]]


@pytest.fixture(scope="module")
def team() -> Iterator[System]:
    """A system with three workers, all of them up."""
    flags = ("--workers", str(WORKERS), "--drain", "2")
    with system(demo_policy, {"A": 1, "B": 1, "C": 1, "D": 1}, FILES, serve_flags=flags) as it:
        complete(it)
        yield it


def workers(it: System) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = it.status()["workers"]
    return found


def complete(it: System, n: int = WORKERS) -> None:
    """Until all workers take checks."""
    wait_for(lambda: [w["serving"] for w in workers(it)] == [True] * n, "the workers", it)


def statuses(it: System, experts: str, token: str | None = None) -> Counter[int]:
    """The statuses of ENOUGH requests, several at a time."""

    async def run() -> Counter[int]:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        body = {"token_id": 1, "expert_names": [experts]}

        async def one(session: aiohttp.ClientSession) -> int:
            async with session.post(f"http://{HOST}:{it.port}/route", json=body, headers=headers) as response:
                await response.read()
                return response.status

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8)) as session:
            return Counter(await asyncio.gather(*(one(session) for _ in range(ENOUGH))))

    return asyncio.run(run())


def from_all(it: System, experts: str, token: str | None = None) -> set[int]:
    """The statuses of requests until every worker has decided some: one that was ejected is back within seconds."""
    before = {w["worker"]: w["checks"] for w in workers(it)}
    found: Counter[int] = Counter()
    deadline = time.monotonic() + 10
    while True:
        found += statuses(it, experts, token)
        after = {w["worker"]: w["checks"] for w in workers(it)}
        if all(after[n] > before[n] for n in after):
            return set(found)
        assert time.monotonic() < deadline, (before, after)


@contextlib.asynccontextmanager
async def load(it: System, expert: str, clients: int = 6) -> AsyncIterator[Answers]:
    """Requests without end, half of them such as may be leased: status and policy, in order of arrival."""
    answers: Answers = []
    stop = asyncio.Event()

    async def client(session: aiohttp.ClientSession, leased: bool) -> None:
        url = f"http://{HOST}:{it.port}/{'x' if leased else 'route'}"
        body = {"token_id": 1, "expert_names": [expert]}
        while not stop.is_set():
            async with session.post(url, json=body, headers={"x-expert-names": expert}) as response:
                await response.read()
                answers.append((response.status, response.headers.get("x-srp-policy", "")))

    async with aiohttp.ClientSession() as session:
        running = [asyncio.create_task(client(session, n % 2 == 0)) for n in range(clients)]
        try:
            yield answers
        finally:
            stop.set()
            await asyncio.gather(*running)


def restart(it: System, n: int) -> None:
    """Start ext_authz again, with another number of workers."""
    command = list(it.authz.command)
    command[command.index("--workers") + 1] = str(n)
    it.authz.command = command
    it.restart_authz()
    complete(it, n)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def logged(it: System) -> str:
    return it.authz.log.read_text()


def listening(it: System) -> set[str]:
    return {p.name for p in it.directory.iterdir() if p.is_socket()}


# ---- they agree ----


def test_all_of_them_decide_and_their_counts_add_up(team: System) -> None:
    assert from_all(team, "A") == {200}
    assert from_all(team, "C") == {403}
    status = team.status()
    assert sum(w["checks"] for w in status["workers"]) == sum(status["decisions"].values())
    assert {w["epoch"] for w in status["workers"]} == {status["workers"][0]["epoch"]}
    assert len({w["pid"] for w in status["workers"]}) == WORKERS
    with urllib.request.urlopen(f"http://{HOST}:{team.status_port}/metrics", timeout=5) as response:
        metrics = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[0] != "#")
    assert float(metrics["srp_check_seconds_count"]) == sum(status["decisions"].values())
    assert float(metrics["srp_workers"]) == WORKERS
    assert float(metrics['srp_decisions_total{reason="tier_too_low",verdict="deny"}']) >= ENOUGH
    lookups = sum(float(metrics[f'srp_cache_{use}_total{{cache="decisions"}}']) for use in ("hits", "misses"))
    assert lookups >= 2 * ENOUGH


def test_the_sockets_are_beside_the_owners_and_private(team: System) -> None:
    assert listening(team) == {"ext_authz.sock", "ext_authz.sock.1", "ext_authz.sock.2"}
    assert {(team.directory / name).stat().st_mode & 0o777 for name in listening(team)} == {0o660}


def test_no_thread_of_theirs_interrupts_another(team: System) -> None:
    """gRPC's threads, too: they would, at each of a check's events."""
    for pid in [w["pid"] for w in team.status()["workers"]]:
        threads = [int(p.name) for p in Path(f"/proc/{pid}/task").iterdir()]
        assert len(threads) > 2
        assert {os.sched_getscheduler(tid) for tid in threads} == {os.SCHED_BATCH}


def test_a_policy_in_force_is_every_workers(team: System) -> None:
    """Swaps under load: an answer agrees with the policy it carries, and none has the old one once the new counts."""
    original = demo_policy(team.ports)
    opened = original.replace("C: {tier: high", "C: {tier: low")
    expected = {team.swap(original): 403, team.swap(opened): 200}

    async def story() -> Answers:
        async with load(team, "C") as answers:
            for n in range(SWAPS):
                digest = await asyncio.to_thread(team.swap, original if n % 2 == 0 else opened)
                # A request from before the swap may be answered after it: six clients have one each.
                arrived = len(answers)
                for _ in range(3):
                    answer = await asyncio.to_thread(team.send, experts=["C"])
                    assert answer.headers["x-srp-policy"] == digest
                assert sum(policy != digest for _, policy in answers[arrived:]) <= 6
        return answers

    answers = asyncio.run(story())
    assert len(answers) > 10 * SWAPS
    assert [(status, policy) for status, policy in answers if expected.get(policy) != status] == []
    assert team.status()["leases"]["granted"] > 0
    team.swap(original)


def test_a_revocation_reaches_all(team: System) -> None:
    original = demo_policy(team.ports)
    token = tokens.sign(tokens.claims(sub="eve", plan="premium"))
    assert from_all(team, "C", token) == {200}
    team.swap(original + "revoked: {sub: [eve]}\n")
    assert from_all(team, "C", token) == {401}
    team.swap(original)


def test_a_rotation_of_keys_reaches_all(team: System) -> None:
    """A token of an unknown key has any worker ask the owner for new ones; they are everybody's with the answer."""
    old, new = (tokens.sign(tokens.claims(plan="premium"), name=name) for name in ("", "new"))
    (team.directory / "jwks.json").write_bytes(tokens.jwks("ES256", name="new"))
    before = workers(team)[0]["epoch"]
    wait_for(lambda: team.send(experts=["C"], token=new).status == 200, "the new key", team, seconds=12)
    assert {w["epoch"] for w in workers(team)} == {before + 1}
    assert from_all(team, "C", new) == {200}
    assert from_all(team, "C", old) == {401}


# ---- they fail ----


def test_a_worker_that_is_killed_costs_no_request_and_is_replaced(team: System) -> None:
    victim = workers(team)[1]
    decided = sum(team.status()["decisions"].values())

    async def story() -> Answers:
        async with load(team, "A") as answers:
            await asyncio.sleep(0.2)
            os.kill(victim["pid"], signal.SIGKILL)
            await asyncio.sleep(0.2)
            await asyncio.to_thread(complete, team)
        return answers

    answers = asyncio.run(story())
    assert Counter(status for status, _ in answers).keys() == {200}
    successor = workers(team)[1]
    assert successor["pid"] != victim["pid"]
    assert successor["restarts"] == victim["restarts"] + 1
    assert successor["checks"] >= victim["checks"]
    assert sum(team.status()["decisions"].values()) > decided
    assert "worker 1 ended after" in logged(team)
    assert from_all(team, "A") == {200}


def test_a_worker_that_does_not_take_over_a_policy_is_killed_first(team: System) -> None:
    """Stopped, it might decide by the old policy when it goes on: it is gone when the new one counts."""
    original = demo_policy(team.ports)
    victim = workers(team)[2]
    os.kill(victim["pid"], signal.SIGSTOP)
    began = time.monotonic()
    team.write_policy(original.replace("C: {tier: high", "C: {tier: low"))
    old = parse_policy(original, "policy.yaml", team.directory).digest
    while team.status()["policy"]["digest"] == old:
        assert time.monotonic() - began < 10
    assert not alive(victim["pid"])
    assert "killed" in logged(team)
    complete(team)
    assert from_all(team, "C") == {200}
    team.swap(original)


def test_without_its_owner_nobody_decides(team: System) -> None:
    """kill -9 of the owner: the workers end, all is 503, no expert is reached; another number of them heals it."""
    pids = [w["pid"] for w in workers(team)]
    team.authz.kill()
    wait_for(lambda: not any(map(alive, pids)), "the workers to end", team, seconds=2)
    reached = team.served("A")
    assert statuses(team, "A") == {503: ENOUGH}
    assert team.served("A") == reached
    assert listening(team) == {"ext_authz.sock"}
    restart(team, 2)
    assert from_all(team, "A") == {200}


def test_sigterm_leaves_nothing_behind(team: System) -> None:
    """All end, the owner last, and one process alone takes over from where Envoy is."""
    pids = [w["pid"] for w in workers(team)]
    team.authz.stop()
    assert not any(map(alive, pids))
    assert listening(team) == set()
    assert "killed" not in logged(team).rpartition("draining")[2]
    restart(team, 1)
    assert statuses(team, "A") == {200: ENOUGH}
