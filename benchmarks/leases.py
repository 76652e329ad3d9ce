"""The memory use of leases: distinct callers, each with its own token, through one Envoy with one worker thread.

Every caller is new, so every request is a miss and a store: the tables fill up, and then turn over for the rest of the
run. Prints Envoy's memory along the way and the memory per lease. Exits with 1 if Envoy has grown by more than a tenth
since its tables turned over twice. A million callers take about ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import callers, parts

CONNECTIONS = 32
BATCH = 50  # requests sent at once on a connection
SAMPLES = 20  # samples during the run, about
GROWTH = 1.1  # allowed growth of Envoy's memory after its tables are full, as a factor
_SECRET = b"a secret of the benchmark's, of 32 bytes or more"


@dataclass(frozen=True)
class Sample:
    """Sizes in bytes. `allocated` is as reported by Envoy's allocator, which does not include the script's tables."""

    callers: int
    allocated: int
    rss: int
    stores: int
    evictions: int
    server_rss: int


class Bench:
    """All running processes. They stop when `stack` closes."""

    def __init__(self, directory: Path, entries: int, stack: ExitStack) -> None:
        upstream, self.port, self.admin = parts.free_ports(3)
        (directory / "secret").write_bytes(_SECRET)
        (directory / "policy.yaml").write_text(policy(f"{parts.HOST}:{upstream}"))
        stack.callback(parts.upstream(directory, upstream).stop)
        self.server = parts.serve(directory, "srp", "--lease-entries", str(entries))
        stack.callback(self.server.stop)
        self.envoy = parts.envoy(directory, "leased", self.port, "srp", admin=self.admin)
        stack.callback(self.envoy.stop)

    def sample(self, callers_: int) -> Sample:
        with urllib.request.urlopen(f"http://{parts.HOST}:{self.admin}/memory", timeout=10) as page:
            allocated = int(json.load(page)["allocated"])
        counts = parts.lease_counts(self.admin)
        return Sample(
            callers_, allocated, self.envoy.rss(), counts.stores, counts.evictions, self.server.rss()
        )  # fmt: skip

    async def send(self, first: int, last: int) -> None:
        """Send one request from each caller from number `first` to before `last`, on CONNECTIONS connections."""
        batches = iter(range(first, last, BATCH))

        async def client() -> None:
            reader, writer = await asyncio.open_connection(parts.HOST, self.port)
            for start in batches:
                numbers = range(start, min(start + BATCH, last))
                writer.write(b"".join(map(request, numbers)))
                await answers(reader, len(numbers))
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(client() for _ in range(CONNECTIONS)))


async def answers(reader: asyncio.StreamReader, n: int) -> None:
    """Read `n` responses. RuntimeError if one is not a 200."""
    for _ in range(n):
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"expected 200, found {head[:200]!r}")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))


def request(number: int) -> bytes:
    return callers.request("A,B", token(number))


_HEADER = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=")
_EXPIRES = int(time.time()) + callers.LIFETIME


def token(number: int) -> str:
    """A caller's token, of a typical size and signed with HS256."""
    claims = {
        "iss": callers.ISSUER, "aud": callers.AUDIENCE, "sub": f"caller-{number:07}", "exp": _EXPIRES,
        "plan": "premium", "org": "acme", "scope": "experts.read experts.call", "jti": f"{number:032x}",
    }  # fmt: skip
    signed = _HEADER + b"." + base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=")
    signature = base64.urlsafe_b64encode(hmac.digest(_SECRET, signed, hashlib.sha256)).rstrip(b"=")
    return (signed + b"." + signature).decode()


def policy(endpoint: str) -> str:
    """The benchmarks' policy with leases, and with one issuer that uses a shared secret."""
    document = json.loads(callers.policy(endpoint, lease="10m"))
    document["issuers"] = [
        {"issuer": callers.ISSUER, "audiences": [callers.AUDIENCE], "algorithms": ["HS256"], "secret_file": "secret"}
    ]
    return json.dumps(document)


def run(bench: Bench, total: int, full: int) -> Iterator[Sample]:
    """A sample at the start, one when the tables have turned over twice, and then more at even intervals."""
    asyncio.run(bench.send(0, 1000))  # so that the first sample includes what Envoy allocates for any requests
    yield bench.sample(1000)
    at = sorted({full, *range(full, total, max(total // SAMPLES, 1)), total})
    began, sent = time.monotonic(), 1000
    for stop in at:
        asyncio.run(bench.send(sent, stop))
        sent = stop
        print(f"{sent:,} of {total:,} callers, {time.monotonic() - began:.0f} s", file=sys.stderr)
        yield bench.sample(sent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=1_000_000, help="default: 1000000")
    parser.add_argument("--entries", type=int, default=4096, help="value of --lease-entries (default: 4096)")
    args = parser.parse_args()
    full = 4 * args.entries
    if args.callers <= full:
        parser.error(f"--callers: expected more than {full}, four times the entries")
    with tempfile.TemporaryDirectory(prefix="srp-bench-") as directory, ExitStack() as stack:
        bench = Bench(Path(directory), args.entries, stack)
        samples = list(run(bench, args.callers, full))
    print(table(samples))
    start, warm, *later = samples
    print(
        f"\na lease takes {(warm.rss - start.rss) / (2 * args.entries) / 1024:.1f} KiB, including its share of garbage"
    )
    grown = max(s.rss for s in later) / warm.rss
    print(f"Envoy at its largest: {grown:.3f} times its size after its tables turned over twice")
    return int(grown > GROWTH)


def table(samples: list[Sample]) -> str:
    lines = [
        "| callers | Envoy RSS MiB | Envoy allocated MiB | stores | evictions | server RSS MiB |",
        "|---|---|---|---|---|---|",
    ]
    for s in samples:
        rss, allocated, server = (n / 2**20 for n in (s.rss, s.allocated, s.server_rss))
        lines.append(f"| {s.callers:,} | {rss:.1f} | {allocated:.1f} | {s.stores:,} | {s.evictions:,} | {server:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
