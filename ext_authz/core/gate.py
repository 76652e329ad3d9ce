"""The gate: which experts does a request name? Pure. Malformed input is refused; it never means the default list."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, assert_never

from ext_authz.core import strict_json
from ext_authz.core.headers import (
    CONTENT_ENCODING,
    CONTENT_TYPE,
    PARTIAL_BODY,
    REQUESTED_CLUSTER,
    TARGET_CLUSTER,
)
from ext_authz.core.model import Reason, Refusal, Request
from ext_authz.core.policy import Body, DefaultOnly, GateRule, Header, Policy

MAX_NAMES = 64
MAX_NAME_LENGTH = 64  # bytes, and characters: a name is visible ASCII
MAX_DEPTH = 32  # nesting of a JSON body
_CACHED_LISTS = 1024  # header values that list names
_SHORT = 256  # characters; longer header values are not cached

_NAME = re.compile(rf"[!-+\--:<-~]{{1,{MAX_NAME_LENGTH}}}", re.ASCII)  # visible ASCII without comma and semicolon
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
_CHARSET = re.compile(r";\s*charset([^=;]*)=([^;]*)", re.IGNORECASE)
# What Envoy has not resolved or rejected: a dot segment with a parameter, escaped or behind a backslash. An expert that
# drops `;x` and then resolves `..` serves another path than the one that was decided about.
_DOT_SEGMENT = re.compile(r"(?:^|[/\\])(?:\.|%2e){1,2}(?:(?:;|%3b)[^/\\]*)?(?:[/\\]|$)|\\|%5c", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_UTF8 = frozenset({("", "utf-8"), ("", "utf8"), ("", "us-ascii")})
_ABSENT, _AMBIGUOUS = object(), object()

Names = tuple[str, ...]


def read(policy: Policy, request: Request) -> Names | Refusal:
    """The names that the request asks for, deduplicated and in order, or why they cannot be read."""
    if _DOT_SEGMENT.search(request.path):
        return _bad("the path has a segment that experts could resolve differently")
    if request.repeated and (repeated := _repeated_for_conditions(policy, request)):
        return _bad(f"header {repeated} appears more than once, and a condition may read it")
    rule = rule_for(policy, request.path)
    if rule is None:
        return Refusal(Reason.NO_EXPERTS_REQUESTED, "no gate rule covers this path")
    match rule.source:
        case Header() as source:
            return _in_header(policy, source, rule.default, request)
        case Body() as source:
            return _unreadable(request) or in_body(source, rule.default, request.body)
        case DefaultOnly():
            return _default(rule.default)
        case unknown:
            assert_never(unknown)


def _repeated_for_conditions(policy: Policy, request: Request) -> str | None:
    """A header that came more than once and that a condition may read, which has no one value for it.

    Without the header a condition that forbids it would hold, and so would one that compares it, with all its values.
    """
    if not policy.reads_request:
        return None
    read = request.repeated if policy.headers_read is None else request.repeated & policy.headers_read
    return min(read, default=None)


def rule_for(policy: Policy, path: str) -> GateRule | None:
    """The rule that says where requests to `path` name their experts."""
    for rule in policy.gate:
        if rule.covers(path):
            return rule
    return None


def headers(policy: Policy) -> frozenset[str]:
    """The headers that `read` may look at, and REQUESTED_CLUSTER, which every lease depends on."""
    own = (rule.source.name for rule in policy.gate if isinstance(rule.source, Header))
    return frozenset({CONTENT_ENCODING, CONTENT_TYPE, PARTIAL_BODY, REQUESTED_CLUSTER, *own})


def _in_header(policy: Policy, source: Header, default: Names | None, request: Request) -> Names | Refusal:
    header = source.name
    if header in request.repeated:
        return _bad(f"header {_shown(header)} appears more than once")
    value = request.headers.get(header)
    if value is None:
        return _default(default)
    if header == REQUESTED_CLUSTER:
        names = [policy.clusters.get(n, n) for n in _listed(value)]
        return _checked(names) or _unusable(names, f"header {_shown(header)}")
    listed = _named if len(value) <= _SHORT else _named.__wrapped__
    return listed(value) or _unusable(_listed(value), f"header {header}")


@lru_cache(_CACHED_LISTS)
def _named(value: str) -> Names:
    """The names that a header lists; empty if they are not usable."""
    return _checked(_listed(value))


def _listed(value: str) -> list[str]:
    return [name for part in value.split(",") if (name := part.strip(" \t"))]


def _unreadable(request: Request) -> Refusal | None:
    """Why the body cannot be read, according to the headers; None if it can."""
    encoding = request.headers.get(CONTENT_ENCODING, "identity")
    if CONTENT_ENCODING in request.repeated or encoding.strip().lower() != "identity":
        return _bad("the body is compressed")
    if request.headers.get(PARTIAL_BODY) == "true" or PARTIAL_BODY in request.repeated:
        return _bad("the body is incomplete")
    if CONTENT_TYPE in request.repeated or not _utf8(request.headers.get(CONTENT_TYPE, "")):
        return _bad("the body is declared to be in a charset other than UTF-8")
    return None


def in_body(source: Body, default: Names | None, body: bytes) -> Names | Refusal:
    """The names in `body`, whose headers have already been checked."""
    pointer = source.pointer
    if not body:
        return _default(default)
    try:
        value = strict_json.loads(body, MAX_DEPTH)
    except ValueError as e:
        return _bad(f"the body {e}")
    found = _resolve(value, pointer)
    if found is _ABSENT:
        return _default(default)
    if found is _AMBIGUOUS:
        return _bad(f"{_member(pointer)} appears in another spelling")
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not set(map(type, found)) <= {str}:
        return _bad(f"{_member(pointer)} is not a string or a list of strings")
    return _checked(found) or _unusable(found, _member(pointer))


def _resolve(value: Any, pointer: tuple[str, ...]) -> Any:
    """RFC 6901 evaluation: _ABSENT if the member or element is absent, None (a wrong type) if it cannot exist.

    _AMBIGUOUS if a member's name differs only in case, as some parsers, such as Go's encoding/json, treat the two as
    the same; or if one holds a control character, as a parser in C reads a name up to its NUL.
    """
    for token in pointer:
        if isinstance(value, dict):
            for name in value:
                if len(name) == len(token) and name != token and _same_letters(name, token):
                    return _AMBIGUOUS
                if not name.isprintable() and _CONTROL.search(name):
                    return _AMBIGUOUS
            value = value.get(token, _ABSENT)
        elif isinstance(value, list) and _INDEX.fullmatch(token):
            value = value[int(token)] if int(token) < len(value) else _ABSENT
        else:
            return None
        if value is _ABSENT:
            return _ABSENT
    return value


def _same_letters(a: str, b: str) -> bool:
    return a.casefold() == b.casefold()


def _utf8(content_type: str) -> bool:
    """Whether the content type names no charset but UTF-8: with another, a reader would see different text."""
    return all((rest.strip(), _unquoted(name).lower()) in _UTF8 for rest, name in _CHARSET.findall(content_type))


def _unquoted(value: str) -> str:
    """A parameter's value, as a token or a quoted string (RFC 9110 §5.6.6), without white space around it."""
    text = value.strip(" \t")
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _checked(names: list[str]) -> Names:
    """The names, deduplicated; empty if there are none, too many, or malformed ones."""
    if len(names) > MAX_NAMES or not all(map(_NAME.fullmatch, names)):
        return ()
    return tuple(dict.fromkeys(names))


def _unusable(names: list[str], where: str) -> Refusal:
    """Why `_checked` returns no names."""
    if not names:
        return Refusal(Reason.NO_EXPERTS_REQUESTED, f"{where} names no expert")
    if len(names) > MAX_NAMES:
        return _bad(f"{where} names {len(names)} experts, at most {MAX_NAMES} are allowed")
    return _bad(f"{where} holds a name that is not 1 to {MAX_NAME_LENGTH} visible ASCII characters")


def _default(default: Names | None) -> Names | Refusal:
    if default:
        return default
    return Refusal(Reason.NO_EXPERTS_REQUESTED, "the request names no expert and the gate has no default")


def _bad(detail: str) -> Refusal:
    return Refusal(Reason.BAD_GATE, detail)


def _member(pointer: tuple[str, ...]) -> str:
    return "body member /" + "/".join(pointer)


def _shown(header: str) -> str:
    return TARGET_CLUSTER if header == REQUESTED_CLUSTER else header
