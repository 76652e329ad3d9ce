"""The policy file is edited under load, in front of a real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from ext_authz.policyfile.parse import parse_policy
from tests.conftest import demo_policy
from tests.harness import tokens
from tests.harness.policies import BROKEN, BROKEN_KEYS
from tests.harness.system import System, get_json, rss, system
from tests.harness.waiting import wait_for

SWAPS = int(os.environ.get("SRP_SWAPS", "100"))  # 1,000 for the figure in the README
REFUSED = [path for path in BROKEN if path.stem not in BROKEN_KEYS]
FILES = {"jwks.json": tokens.jwks("RS256", "ES256", "EdDSA")}

Answers = list[tuple[int, str, str]]


@pytest.fixture(scope="module")
def live() -> Iterator[System]:
    """A system for this file alone, because its policy keeps changing."""
    with system(demo_policy, {"A": 1, "B": 1, "C": 1, "D": 1}, FILES) as it:
        yield it


@pytest.fixture
def original(live: System) -> Iterator[str]:
    """The first policy. It is in force before and after the test."""
    text = demo_policy(live.ports)
    yield text
    live.swap(text)


@contextlib.asynccontextmanager
async def load(it: System, experts: list[str], clients: int = 8) -> AsyncIterator[Answers]:
    """Requests for `experts` without end. The answers are (status, policy digest, expert), in order of arrival."""
    answers: Answers = []
    url = f"http://127.0.0.1:{it.port}/route"
    stop = asyncio.Event()

    async def client(session: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            async with session.post(url, json={"token_id": 1, "expert_names": experts}) as response:
                await response.read()
                headers = response.headers
                answers.append((response.status, headers.get("x-srp-policy", ""), headers.get("x-srp-expert", "")))

    async with aiohttp.ClientSession() as session:
        running = [asyncio.create_task(client(session)) for _ in range(clients)]
        try:
            yield answers
        finally:
            stop.set()
            await asyncio.gather(*running)


def under_load(it: System, experts: list[str], act: Callable[[Answers], Awaitable[None]]) -> Answers:
    async def run() -> Answers:
        async with load(it, experts) as answers:
            await act(answers)
        return answers

    return asyncio.run(run())


def test_every_answer_agrees_with_the_digest_it_carries(live: System, original: str) -> None:
    """Policies that move C between tiers are swapped as fast as they come into force; nothing fails or leaks."""
    opened = original.replace("C: {tier: high", "C: {tier: low")
    digests = {live.swap(original): 403, live.swap(opened): 200}
    assert live.authz.process is not None
    pid = live.authz.process.pid
    before = (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(live.directory)))
    memory: list[int] = []

    async def flip(_: Answers) -> None:
        for n in range(SWAPS):
            await asyncio.to_thread(live.swap, original if n % 2 == 0 else opened)
            if n == SWAPS // 4:
                memory.append(rss(pid))
        memory.append(rss(pid))

    answers = under_load(live, ["C"], flip)
    assert {policy for _, policy, _ in answers} == set(digests)
    wrong = [(status, policy) for status, policy, _ in answers if digests[policy] != status]
    assert wrong == []
    assert live.status()["policy"]["failures"] == 0
    after = (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(live.directory)))
    assert after[0] <= before[0] + 4  # connections of the status listener come and go
    assert after[1] == before[1]
    assert memory[1] < memory[0] * 1.1


def test_the_swap_of_a_configmap_is_noticed(live: System, original: str) -> None:
    """As the kubelet does it: a new ..data folder, one symlink swapped, the old folder removed."""
    folder = live.directory
    target = original + "# mounted\n"
    version = folder / "..2026_1"
    version.mkdir()
    (version / "policy.yaml").write_text(target)
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").rename(folder / "..data")
    (folder / "link").symlink_to("..data/policy.yaml")
    (folder / "link").rename(folder / "policy.yaml")
    wanted = parse_policy(target, "policy.yaml", folder).digest
    wait_for(lambda: live.digest == wanted, "the mounted policy", live)
    again = folder / "..2026_2"
    again.mkdir()
    (again / "policy.yaml").write_text(original + "# mounted again\n")
    (folder / "..data_tmp").symlink_to(again.name)
    (folder / "..data_tmp").rename(folder / "..data")
    shutil.rmtree(version)
    wanted = parse_policy(original + "# mounted again\n", "policy.yaml", folder).digest
    wait_for(lambda: live.digest == wanted, "the second mounted policy", live)
    (folder / "policy.yaml").unlink()
    (folder / "policy.yaml").write_text(original)
    shutil.rmtree(again)
    (folder / "..data").unlink()


def test_touching_the_file_reloads_nothing(live: System, original: str) -> None:
    before = live.status()["policy"]["reloads"]
    live.policy.touch()
    live.write_policy(original)
    time.sleep(0.3)
    assert live.status()["policy"]["reloads"] == before


def test_a_new_expert_serves_from_the_first_decision_of_its_policy_on(live: System, original: str) -> None:
    """404 until the new policy is in force, then 200, 404 after its removal, and no failure in between."""
    without = "".join(line for line in original.splitlines(keepends=True) if not line.startswith("  D:"))
    live.swap(without)

    async def add_and_remove(answers: Answers) -> None:
        opened = original.replace("D: {tier: high", "D: {tier: low")
        for _ in range(3):
            await asyncio.to_thread(live.swap, opened)
            await asyncio.sleep(0.2)
            await asyncio.to_thread(live.swap, without)
            await asyncio.sleep(0.2)

    answers = under_load(live, ["D"], add_and_remove)
    gone = parse_policy(without, "policy.yaml", live.directory).digest
    for status, policy, expert in answers:
        assert (status, expert) == ((404, "") if policy == gone else (200, "D"))
    assert {status for status, _, _ in answers} == {200, 404}


def test_a_removed_expert_is_named_in_log_and_status(live: System, original: str) -> None:
    """In the log and in the status."""
    without = "".join(line for line in original.splitlines(keepends=True) if not line.startswith("  D:"))
    live.swap(without)
    assert any("D" in warning for warning in live.status()["policy"]["warnings"])
    assert "`D`" in live.authz.log.read_text()


def test_a_token_revoked_by_jti_is_refused_from_the_reload_on(live: System, original: str) -> None:
    """Although it was verified and cached; another token of the same caller still works."""
    revoked = tokens.sign(tokens.claims(plan="premium", jti="stolen"))
    other = tokens.sign(tokens.claims(plan="premium", jti="fine"))
    for token in (revoked, other, revoked):
        assert live.send(experts=["C"], token=token).status == 200
    live.swap(original + "revoked: {jti: [stolen]}\n")
    answer = live.send(experts=["C"], token=revoked)
    assert (answer.status, answer.code) == (401, "invalid_token")
    assert live.send(experts=["C"], token=other).status == 200


@pytest.mark.parametrize("path", REFUSED, ids=lambda p: p.stem)
def test_a_broken_policy_keeps_the_old_one(live: System, original: str, path: Path) -> None:
    """The status has the error, and the old policy still decides."""
    before = live.status()["policy"]
    live.policy.with_name(".policy.new").write_bytes(path.read_bytes())
    live.policy.with_name(".policy.new").rename(live.policy)
    wait_for(lambda: live.status()["policy"]["failures"] > before["failures"], "the refusal", live)
    after = live.status()["policy"]
    assert after["digest"] == before["digest"]
    assert f"{live.policy}:" in after["error"]
    assert live.send(experts=["A"]).status == 200


def test_ext_authz_and_envoy_each_recover_from_a_restart(live: System, original: str) -> None:
    """ext_authz restarts behind a running Envoy, and Envoy in front of a running ext_authz."""
    live.authz.kill()
    assert live.send(experts=["A"]).status == 503
    live.authz.start()
    wait_for(lambda: live.send(experts=["A"]).status == 200, "ext_authz", live)
    wait_for(lambda: get_json(live.status_port, "/status")["envoy"]["connected"] == 1, "the stream", live)
    live.envoy.kill()
    live.envoy.start()
    wait_for(lambda: live.send(experts=["A"]).status == 200, "envoy", live)
    wait_for(lambda: live.status()["envoy"]["connected"] == 1, "the dead stream to go", live, seconds=5)
    live.swap(original + "# after both\n")
    status: Any = live.status()
    assert live.send(experts=["A"]).headers["x-srp-policy"] == status["policy"]["digest"]
