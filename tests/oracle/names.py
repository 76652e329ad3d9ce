"""Which experts a request names: docs/policy.md, "Gate"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.oracle import json_text
from tests.oracle.caller import Headers, RefusedError
from tests.oracle.cel_subset import headers_read

MAX_NAMES = 64
MAX_DEPTH = 32
DEFAULT_GATE = [{"prefix": "/", "header": "x-expert-names"}]
_NAME = re.compile(r"[!-+\--:<-~]{1,64}")  # visible ASCII, neither comma nor semicolon


def names(
    policy: Mapping[str, Any], clusters: Mapping[str, str], path: str, headers: Headers, body: bytes
) -> list[str]:
    """The names in a request, each once and in order, or RefusedError. `clusters`: the expert of each cluster."""
    if _resolvable(path) or _repeated(policy, headers):
        raise RefusedError("bad_gate")
    for rule in policy.get("gate") or DEFAULT_GATE:
        if path == rule["path"] if "path" in rule else path.startswith(rule["prefix"]):
            break
    else:
        raise RefusedError("no_experts_requested")
    if "json" in rule:
        found = _in_body(rule["json"], headers, body)
    elif "header" in rule:
        found = _in_header(rule["header"], clusters, headers)
    else:
        found = None
    if found is None:
        found = rule.get("default", [])
    if not found:
        raise RefusedError("no_experts_requested")
    if len(found) > MAX_NAMES or not all(_NAME.fullmatch(name) for name in found):
        raise RefusedError("bad_gate")
    return list(dict.fromkeys(found))


def _resolvable(path: str) -> bool:
    """Whether an expert could resolve a dot segment that Envoy has left in a path, or takes `\\` for `/`."""
    plain = re.sub("%2e", ".", path, flags=re.IGNORECASE)
    segments = [segment.partition(";")[0] for segment in plain.split("/")]
    return "\\" in path or "%5c" in path.lower() or "." in segments or ".." in segments


def _repeated(policy: Mapping[str, Any], headers: Headers) -> bool:
    """Whether a header is there twice that a condition may read."""
    allow = [expert["allow"] for expert in policy["experts"].values() if "allow" in expert]
    read = [headers_read(condition) for condition in allow if "request" in condition]
    sent = [name for name, _ in headers]
    twice = {name for name in sent if sent.count(name) > 1}
    return any(twice if names is None else twice & names for names in read)


def _in_header(name: str, clusters: Mapping[str, str], headers: Headers) -> list[str] | None:
    """The names in a header; None if it is absent. Only the client's `x-target-cluster`, which Envoy moves, may name
    clusters."""
    moved = name == "x-target-cluster"
    values = _values("x-requested-cluster" if moved else name, headers)
    if len(values) > 1:
        raise RefusedError("bad_gate")
    if not values:
        return None
    listed = [part.strip(" \t") for part in values[0].split(",") if part.strip(" \t")]
    return [clusters.get(name, name) for name in listed] if moved else listed


def _in_body(pointer: str, headers: Headers, body: bytes) -> list[str] | None:
    """The names in a body; None if it names none."""
    if not _readable(headers):
        raise RefusedError("bad_gate")
    if not body:
        return None
    try:
        value = json_text.read(body, MAX_DEPTH)
        for part in pointer[1:].split("/"):
            value = _step(value, part.replace("~1", "/").replace("~0", "~"))
    except KeyError:
        return None
    except ValueError:
        raise RefusedError("bad_gate") from None
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise RefusedError("bad_gate")
    return found


def _step(value: Any, part: str) -> Any:
    """One step of a pointer; KeyError if it leads to nothing, ValueError if it cannot be taken."""
    if isinstance(value, dict):
        if any(name != part and _same_but_for_case(name, part) for name in value):
            raise ValueError("another spelling")
        if any(re.search(r"[\x00-\x1f\x7f-\x9f]", name) for name in value):
            raise ValueError("a control character")
        return value[part]
    if isinstance(value, list) and re.fullmatch("0|[1-9][0-9]*", part, re.ASCII):
        if int(part) >= len(value):
            raise KeyError(part)
        return value[int(part)]
    raise ValueError("nothing to step into")


def _same_but_for_case(a: str, b: str) -> bool:
    return len(a) == len(b) and a.casefold() == b.casefold()


def _readable(headers: Headers) -> bool:
    """Whether every expert reads the body as it is: whole, uncompressed, in UTF-8."""
    encodings, partial, types = (
        _values(name, headers) for name in ("content-encoding", "x-envoy-auth-partial-body", "content-type")
    )
    if max(len(encodings), len(partial), len(types)) > 1:
        return False
    if encodings and encodings[0].strip().lower() != "identity":
        return False
    return partial != ["true"] and all(map(_utf8, types))


def _utf8(content_type: str) -> bool:
    """Whether every `charset` parameter of a content type is UTF-8, or ASCII, which is the same text."""
    for parameter in content_type.split(";")[1:]:
        name, named, value = parameter.lower().partition("=")
        if named and name.strip().startswith("charset"):
            value = value.strip()
            plain = value[1:-1] if value[:1] == value[-1:] == '"' else value
            if name.strip() != "charset" or plain not in ("utf-8", "utf8", "us-ascii"):
                return False
    return True


def _values(name: str, headers: Headers) -> Sequence[str]:
    return [value.decode("latin-1") for key, value in headers if key == name]
