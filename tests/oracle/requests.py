"""Random requests, as Envoy passes them on: what a client sends, well or badly."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from tests.oracle import tokens
from tests.oracle.answers import Request
from tests.oracle.policies import PATHS, Case

_NAMES = (
    "Z", "a", "no such", "", "x;w=9", "né", "e" * 64, "e" * 65, "expert-0", "expert-1", "expert-0.0123abcd", "\x7f",
    "~",
)  # fmt: skip
_SCHEMES = (
    b"bearer   ", b"BEARER ", b"Basic ", b"", b"Bearer", b" Bearer ", b"Bearer\t", b"Bearer" + b" " * 16384,
)  # fmt: skip
_ENDS = (
    "/..;x", "/%2e%2E;/a", "/.;", "/..", "/...", "/..x", "/a;..", "/;", "\\..\\", "/%5Ca", "/%252e%252e", "/.%2e/x",
    ";/..",
)  # fmt: skip
_TYPES = (
    "application/json", "application/json; charset=utf-8", 'application/json;charset="UTF-8"',
    "text/plain; charset=latin1", "application/json; charset=us-ascii", "application/json; charset=utf-16",
    "a/b; charset*=utf-8''x", "a/b; charset = utf8", "a/b; x=1; charset=utf-8; charset=latin1", "",
    "a/b; charsets=latin1", "a/b; charset", "a/b; charset=", "A/B;CHARSET=LATIN1", 'a/b; charset="utf-8 "',
    "a/b; charset=utf-8 x", "charset=latin1",
)  # fmt: skip
_OTHERS = (
    ("x-srp-downgrade", ("never", "never", "allow", "Never", "ALLOW", "", " allow", "allow,allow", "maybe")),
    ("x-team", ("red", "blue", "", "acme", "r\xe9d")),
    ("content-encoding", ("identity", "gzip", "", "Identity ", "identity, identity")),
    ("x-envoy-auth-partial-body", ("true", "false", "True")),
    ("x-requested-cluster", ("expert-0", "expert-1,expert-2", "A", "expert-0.0123abcd", "expert-0;w=1", "")),
    ("x-expert-names", ("A", "A,B", "Z")),
    ("accept", ("*/*", "a/b")),
    ("cookie", ("a", "b")),
)
_NEARLY = (
    "", "{}", "null", "[]", "5", '"A"', "{", "[1,", '{"model":"A"', '{"model":"A",}', "{'model':'A'}",
    '{"model":"A"} x', '{"model":"A","model":"B"}', '{"model":"A","mod\\u0065l":"B"}',
    '{"model":"A","x":{"y":1,"y":2}}', '{"Model":"A"}', '{"model":"A","MODEL":"B"}', '{"model":NaN}',
    '{"model":"A","t":Infinity}', '\ufeff{"model":"A"}', '{"model":"A","t":1e999}', '{"mode\u013f":"A"}',
    '{"Key":"A"}', '{"\u212aey":"A"}', '{"key":"A"}', '{"model":"\\ud800"}', '{"model":"A\n"}', ' {"model":"A"} ',
    '{"model":"A","t":1' + "0" * 400 + "}", '{"model":"A","x":' + "[" * 31 + "]" * 31 + "}",
    '{"model":"A","x":' + "[" * 32 + "]" * 32 + "}", '{"model":"A","t":-0,"u":1E+2,"v":1.50}', '{"model":"A","t":+1}',
    '{"expert_names":["A","B"],"Expert_names":1}', '{"route":{"Experts":["A"]}}', '{"route":["A"]}', '{"route":"A"}',
    "true", '{"ROUTE":{"experts":["A"]}}', '{"experts":[]}', '{"experts":{"0":"A"}}', '{"experts":["A",5]}',
    '{"a/b":{"~":"A"}}', '{"model":"A","a\\u0000":1}', '{"model\\u0000":"A"}', '{"model":"A","x\\u0085":{}}',
    '{"model":"A","x":{"\\u0000":1}}',
)  # fmt: skip


def request(rng: random.Random, case: Case, now: float, known: dict[str, float]) -> Request:
    """A request. `known` are the tokens that were used before, each with its `exp`; new ones are added."""
    headers: list[tuple[str, bytes]] = []
    if rng.random() < (0.75 if case.signers else 0.2):
        headers += _token_headers(rng, case, now, known)
    for name, values in _OTHERS:
        for _ in range(rng.choice((1, 1, 2)) if rng.random() < (0.25 if name == "x-srp-downgrade" else 0.05) else 0):
            headers.append((name, rng.choice(values).encode("latin-1")))
    if rng.random() < 0.15:
        headers.append(("content-type", rng.choice(_TYPES).encode()))
    rule = _rule(rng, case)
    path = rule.get("path", rule.get("prefix")) + (rng.choice(("", "", "x", "chat")) if "prefix" in rule else "")
    if rng.random() < 0.2:
        path = rng.choice((*PATHS, "/v1/x", path.upper(), path + rng.choice(_ENDS)))
    if "header" in rule and rng.random() < 0.9:
        moved = {"x-target-cluster": "x-requested-cluster"}.get(rule["header"], rule["header"])
        headers.append((moved, _listed(rng, _names(rng, case))))
    if rng.random() < 0.04 and headers:
        headers.append(rng.choice(headers))
    if rng.random() < 0.01:
        headers += [("x-more", b"1")] * (rng.randint(79, 82) - len(headers))
    rng.shuffle(headers)
    body = _body(rng, case, rule) if "json" in rule or rng.random() < 0.1 else b""
    return Request(rng.choice(("POST", "GET")), path + rng.choice(("", "", "?", "?a=/v1?b")), tuple(headers), body)


def varied(rng: random.Random, case: Case, request: Request) -> Request:
    """The same caller again, with the same headers and perhaps another body, method or query."""
    body = _body(rng, case, _rule(rng, case)) if request.body else b""
    path = request.path.partition("?")[0] + rng.choice(("", "?b"))
    changes: Any = rng.choice(({}, {"body": body}, {"path": path}, {"method": "PUT"}))
    return replace(request, **changes)


def _rule(rng: random.Random, case: Case) -> dict[str, Any]:
    rules: list[dict[str, Any]] = case.policy.get("gate") or [{"prefix": "/", "header": "x-expert-names"}]
    return rng.choice(rules)


def _token_headers(rng: random.Random, case: Case, now: float, known: dict[str, float]) -> list[tuple[str, bytes]]:
    if not known or rng.random() < 0.4:
        known.update([tokens.token(rng, case, now)])
    text = rng.choice(list(known)[-8:]).encode("latin-1")
    scheme = rng.choice(_SCHEMES) if rng.random() < 0.06 else b"Bearer "
    if rng.random() < 0.75:
        end = rng.choice((b"",) * 120 + (b" ", b" x", b"\t", b', realm="x"', b"," + text))
        headers = [("authorization", scheme + text + end)]
    else:
        headers = [("x-expert-access-token", rng.choice((text,) * 60 + (b"Bearer " + text, b" " + text, b"")))]
    if rng.random() < 0.03:
        headers.append(rng.choice((("authorization", b"Bearer " + text), ("x-expert-access-token", text))))
    return headers


def _names(rng: random.Random, case: Case) -> list[str]:
    """Mostly experts, few at a time."""
    experts = list(case.policy["experts"])
    names = rng.choices(experts, k=rng.choice((1, 1, 1, 2, 2, 3)))
    if rng.random() < 0.03:
        names = rng.choices(_NAMES, k=1)
    elif rng.random() < 0.15:
        names.insert(rng.randint(0, len(names)), rng.choice(_NAMES))
    if rng.random() < 0.04:
        names = [rng.choice(experts) for _ in range(rng.randint(60, 68))]
    elif len(experts) > 20 and rng.random() < 0.3:
        names = rng.sample(experts, min(len(experts), rng.randint(60, 66)))
    return names if rng.random() < 0.97 else []


def _listed(rng: random.Random, names: list[str]) -> bytes:
    comma = rng.choice((",", ",", ",", ", ", "\t,", ",,", ";"))
    return (rng.choice(("", "", "", ",", " ")) + comma.join(names)).encode("latin-1", "replace")


def _body(rng: random.Random, case: Case, rule: dict[str, Any]) -> bytes:
    """Names where the rule reads them, or nearly so."""
    if rng.random() < 0.2:
        return rng.choice(_NEARLY).encode()
    names: Any = _names(rng, case)
    names = rng.choice((names, names, names[0] if names else "", rng.choice((None, 5, {}, [names], [None], True, ""))))
    parts = [p.replace("~1", "/").replace("~0", "~") for p in rule.get("json", "/model")[1:].split("/")]
    for part in reversed(parts):
        if rng.random() < 0.04:
            part = rng.choice((part.swapcase(), part + "s", "1"))
        names = [names] if part == "0" else {part: names} | ({"other": 1} if rng.random() < 0.3 else {})
    separators = rng.choice(((",", ":"), (", ", ": ")))
    text = json.dumps(names, separators=separators, ensure_ascii=rng.random() < 0.5)
    return text.encode() if rng.random() < 0.98 else text.encode()[:-1] + b"\xff}"
