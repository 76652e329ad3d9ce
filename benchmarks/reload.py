"""How long it takes until a changed policy file is in force, and whether any request fails in the meantime.

    .venv/bin/python -m benchmarks.reload [--swaps 1000]

Starts the whole proxy on loopback and flips expert C between two tiers under load, the way a ConfigMap changes: a new
folder and one swapped symlink. Prints percentiles of the time from the swap to the first response with the new digest,
while clients send requests without a pause.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import time

import aiohttp

from ext_authz.policyfile.parse import parse_policy
from tests.conftest import demo_policy
from tests.harness import tokens
from tests.harness.system import System, rss, system


def mount(it: System, number: int, text: str) -> None:
    """Change the policy the way a kubelet updates a ConfigMap."""
    folder = it.directory
    version = folder / f"..version_{number}"
    version.mkdir()
    (version / "policy.yaml").write_text(text)
    old = (folder / "..data").resolve() if (folder / "..data").is_symlink() else None
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").rename(folder / "..data")
    if old is not None:
        shutil.rmtree(old)


async def measure(it: System, swaps: int) -> tuple[list[float], int, int]:
    """For each swap, the seconds until it was in force; the responses; those that disagreed with their digest."""
    texts = [demo_policy(it.ports), demo_policy(it.ports).replace("C: {tier: high", "C: {tier: low")]
    digests = [parse_policy(t, "policy.yaml", it.directory).digest for t in texts]
    expected = dict(zip(digests, (403, 200), strict=True))
    mount(it, 0, texts[0])
    it.policy.unlink()
    it.policy.symlink_to("..data/policy.yaml")
    url = f"http://127.0.0.1:{it.port}/route"
    latest, seen, wrong = "", 0, 0
    stop = asyncio.Event()
    changed = asyncio.Condition()

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal latest, seen, wrong
        while not stop.is_set():
            async with session.post(url, json={"token_id": 1, "expert_names": ["C"]}) as response:
                await response.read()
                digest = response.headers.get("x-srp-policy", "")
                seen, wrong = seen + 1, wrong + (expected.get(digest) != response.status)
                if digest != latest:
                    latest = digest
                    async with changed:
                        changed.notify_all()

    took = []
    async with aiohttp.ClientSession() as session:
        running = [asyncio.create_task(client(session)) for _ in range(4)]
        for number in range(1, swaps + 1):
            wanted = digests[number % 2]
            began = time.perf_counter()
            mount(it, number, texts[number % 2])
            async with changed:
                await asyncio.wait_for(changed.wait_for(lambda wanted=wanted: latest == wanted), 10)
            took.append(time.perf_counter() - began)
            if number % 100 == 0:
                print(f"  {number} of {swaps} swaps", file=sys.stderr)
        stop.set()
        await asyncio.gather(*running)
    return took, seen, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000, help="default: 1000")
    swaps = parser.parse_args().swaps
    files = {"jwks.json": tokens.jwks("RS256", "ES256", "EdDSA")}
    with system(demo_policy, {"A": 1, "B": 1, "C": 1, "D": 1}, files) as it:
        assert it.authz.process is not None
        before = rss(it.authz.process.pid)
        took, seen, wrong = asyncio.run(measure(it, swaps))
        after = rss(it.authz.process.pid)
    cuts = statistics.quantiles(took, n=100)
    print(f"swaps {swaps}, responses {seen}, responses that failed or disagree with their digest {wrong}")
    print(f"swap to in force: p50 {cuts[49] * 1e3:.0f} ms, p95 {cuts[94] * 1e3:.0f} ms, p99 {cuts[98] * 1e3:.0f} ms")
    print(f"memory of ext_authz: {before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")


if __name__ == "__main__":
    main()
