"""Whether memory stays flat: millions of checks in this process, each with a new token.

The tokens are HS256, which is cheap to sign, so that most of the time goes into the checks. One in ten has a bad
signature, one in ten names an unknown expert, and one in ten has a body. One in six comes a second time and is then
cached by its headers. A new epoch starts every million tokens, as after a change of keys. Prints the resident memory
once the caches are full, in the middle and at the end.
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
from pathlib import Path
from types import MappingProxyType

from benchmarks.callers import check_request
from benchmarks.parts import rss
from ext_authz.core.jwk import secret_key
from ext_authz.core.policy import Policy
from ext_authz.core.snapshot import CacheSizes
from ext_authz.observe.metrics import Tally
from ext_authz.policyfile.parse import parse_policy
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.epoch import Epoch
from ext_authz.sources.keys import KeyStore

SECRET = b"a secret of thirty-two bytes or more"
ISSUER = "https://idp.example.com/"
POLICY = f"""\
version: 1
tiers: [low, high]
issuers:
  - {{issuer: {ISSUER}, audiences: [soak], algorithms: [HS256], secret_file: secret}}
anonymous: low
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
experts:
  A: {{tier: low, cluster: expert-a, endpoints: ["127.0.0.1:9"]}}
  C: {{tier: high, cluster: expert-c, endpoints: ["127.0.0.1:9"]}}
gate:
  - {{path: /route, json: /expert_names}}
  - {{prefix: /, header: x-expert-names}}
"""


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


HEADER = _b64(b'{"alg":"HS256"}')


def asks(n: int, now: int) -> bytes:
    """The n-th CheckRequest."""
    claims = {
        "iss": ISSUER,
        "aud": "soak",
        "sub": f"caller-{n}",
        "exp": now + 3600,
        "plan": "premium",
        "n": "x" * (n % 50),
    }
    signed = f"{HEADER}.{_b64(json.dumps(claims).encode())}"
    signature = hmac.digest(SECRET if n % 10 else b"another", signed.encode(), hashlib.sha256)
    body = b'{"expert_names": ["A", "C"]}' if n % 10 == 1 else b""
    headers = {"authorization": f"Bearer {signed}.{_b64(signature)}", "x-request-id": str(n)}
    if not body:
        headers["x-expert-names"] = f"X{n},A" if n % 10 == 2 else "A,C"
    return check_request(headers, "POST", "/route" if body else "/", body)


async def soak(checks: int, policy: Policy) -> list[int]:
    """Resident memory in bytes: with full caches, in the middle, and at the end."""
    sizes, keys = CacheSizes(), MappingProxyType({ISSUER: (secret_key(SECRET),)})
    tally = Tally()
    authorization = Authorization(Epoch.of(sizes.snapshot(policy, keys, 0)), KeyStore(), tally)
    began, now = time.monotonic(), int(time.time())
    stages = {min(checks // 8, 500_000): "caches full", checks // 2: "middle", checks: "end"}
    found = []
    for n in range(1, checks + 1):
        request = asks(n, now)
        for _ in range(1 if n % 6 else 2):
            await authorization.check(request)
        if n % 1_000_000 == 0:
            now = int(time.time())
            authorization.epoch = Epoch.of(sizes.snapshot(policy, keys, n))
        if n in stages:
            found.append(rss())
            print(
                f"{stages[n]:12} {n:>9,} tokens {found[-1] / 2**20:8.1f} MiB {time.monotonic() - began:7.0f} s",
                flush=True,
            )
    print({f"{v.value}/{r.value}": n for (v, r), n in sorted(tally.decisions.items())}, sizes.counts)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", type=int, default=5_000_000, help="new tokens (default: 5000000)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="srp-soak-") as made:
        (Path(made) / "secret").write_bytes(SECRET)
        policy = parse_policy(POLICY.encode(), base=Path(made))
    start, *rest = asyncio.run(soak(args.checks, policy))
    grown = max(rest) / start - 1
    print(f"largest growth after the caches were full: {grown:+.1%}")
    return 0 if grown <= 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
