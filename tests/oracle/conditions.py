"""Random conditions, in the part of CEL that `cel_subset` reads."""

from __future__ import annotations

import random

_CLAIMS = (
    'claims.plan == "premium"', 'claims["plan"] != "free"', "has(claims.plan)", '"plan" in claims',
    "claims.plan == null", 'has(claims.plan) && claims.plan == "premium"', "claims.level >= 3",
    "claims.level < claims.limit", "claims.level == 2", "claims.level == 2.5", '"g1" in claims.groups',
    'claims.groups.exists(g, g == "g1")', 'claims.groups.all(g, g != "g2")', "size(claims.groups) > 1",
    "size(claims) < 9", 'claims.org in ["acme", "umbrella", 7]', 'claims.org.startsWith("ac")',
    'claims.org.endsWith("me")', 'claims.org.contains("ç")', "size(claims.org) <= 4", "claims.blocked",
    "!claims.blocked", "!has(claims.blocked)", "claims.blocked == false", "has(claims.address.country)",
    'claims.address.country == "de"', 'claims.sub == "ada"', 'claims.exists(k, k == "org")',
    "claims.org == claims.plan", 'claims.groups == ["g1", "g2"]', 'claims["address"]["country"] > "a"',
    'claims.org >= "b"', "claims.groups[0] == claims.plan",
)  # fmt: skip
_REQUEST = (
    'request.method == "POST"', 'request.path.startsWith("/v1")', 'request.path == "/route"',
    'request.headers["x-team"] == "red"', '"x-team" in request.headers', '!("x-team" in request.headers)',
    'request.headers.exists(h, h == "accept")', "size(request.headers) < 4", 'request.headers["cookie"] == "a"',
    'request.headers["x-srp-downgrade"] != "never"', 'request.headers["x-team"] == claims.org',
    '"content-type" in request.headers && request.headers["content-type"].startsWith("application/")',
)  # fmt: skip


def condition(rng: random.Random, *, request: bool = False) -> str:
    """A condition that reads claims, or with `request` mostly the request."""
    if rng.random() < 0.6:
        return rng.choice(_REQUEST if request else _CLAIMS)
    parts = [rng.choice(_REQUEST if request and rng.random() < 0.6 else _CLAIMS) for _ in range(rng.randint(1, 3))]
    joined = rng.choice((" && ", " || ")).join(f"({part})" for part in parts)
    return f"!({joined})" if rng.random() < 0.25 else joined
