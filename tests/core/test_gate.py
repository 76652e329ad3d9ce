"""The gate: which experts a request names. What is malformed is refused; it never means the default."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_authz.core import gate
from ext_authz.core.gate import MAX_NAME_LENGTH, MAX_NAMES
from ext_authz.core.headers import REQUESTED_CLUSTER
from ext_authz.core.model import Reason, Refusal, Request
from ext_authz.core.policy import Body, DefaultOnly, Expert, GateRule, Header, Policy
from tests.harness.strategies import header_texts, json_values

EXPERTS = {n: Expert(n, 0, f"expert-{n.lower()}") for n in ("A", "B", "C")}
CLUSTERS = {e.cluster: e.name for e in EXPERTS.values()}
BAD, NONE = Reason.BAD_GATE, Reason.NO_EXPERTS_REQUESTED

Outcome = tuple[str, ...] | Reason


def policy(*rules: GateRule) -> Policy:
    return Policy(tiers=("low",), experts=EXPERTS, gate=rules, clusters=CLUSTERS)


def outcome(rules: Policy, request: Request) -> Outcome:
    found = gate.read(rules, request)
    return found.reason if isinstance(found, Refusal) else found


# ---- which rule ------------------------------------------------------------------------------------------------------

ROUTES = policy(
    GateRule("/route", exact=True, source=DefaultOnly(), default=("A",)),
    GateRule("/v1/", exact=False, source=DefaultOnly(), default=("B",)),
    GateRule("/v1/chat", exact=True, source=DefaultOnly(), default=("C",)),
)
PATHS: list[tuple[str, Outcome]] = [
    ("/route", ("A",)),
    ("/route/", NONE),
    ("/routes", NONE),
    ("/ROUTE", NONE),
    ("/v1/", ("B",)),
    ("/v1/chat", ("B",)),  # the first rule that matches, not the most specific
    ("/v1", NONE),
    ("/", NONE),
    ("", NONE),
    ("*", NONE),
]


@pytest.mark.parametrize(("path", "expected"), PATHS)
def test_the_first_rule_that_covers_the_path_counts(path: str, expected: Outcome) -> None:
    """`path` rules match the whole path, `prefix` rules its beginning; a path without a rule names no expert."""
    assert outcome(ROUTES, Request("GET", path, {})) == expected


def test_without_rules_a_request_names_no_expert() -> None:
    """It is a 400, whatever the request says."""
    request = Request("POST", "/", {"x-expert-names": "A"}, b'{"expert_names": ["A"]}')
    assert outcome(policy(), request) == NONE


# ---- a header --------------------------------------------------------------------------------------------------------

HEADER = policy(GateRule("/", exact=False, source=Header("x-expert-names"), default=("A", "B")))
HEADER_ONLY = policy(GateRule("/", exact=False, source=Header("x-expert-names")))

NAMES_64 = [f"e{i}" for i in range(MAX_NAMES)]
LONGEST = "x" * MAX_NAME_LENGTH

HEADERS: list[tuple[str, str | None, Outcome]] = [
    ("absent: the default", None, ("A", "B")),
    ("one", "C", ("C",)),
    ("two, in order", "C,A", ("C", "A")),
    ("white space around", " C ,\tA\t", ("C", "A")),
    ("empty items are dropped", ",C,,A,", ("C", "A")),
    ("twice is once", "A,C,A", ("A", "C")),
    ("unknown names are names", "Z,A", ("Z", "A")),
    ("visible ASCII", "gpt-4o:latest/v1.2_(x)~!", ("gpt-4o:latest/v1.2_(x)~!",)),
    ("empty", "", NONE),
    ("blank", " \t ", NONE),
    ("only commas", ",, ,", NONE),
    ("64 names", ",".join(NAMES_64), tuple(NAMES_64)),
    ("65 names", ",".join([*NAMES_64, "x"]), BAD),
    ("65 times the same name", ",".join(["A"] * 65), BAD),
    ("a name of 64 bytes", LONGEST, (LONGEST,)),
    ("a name of 65 bytes", LONGEST + "x", BAD),
    ("a long name behind a good one", f"A,{LONGEST}x", BAD),
    ("space inside", "A B", BAD),
    ("tab inside", "A\tB", BAD),
    ("semicolon", "A;w=2", BAD),
    ("NUL", "A\x00", BAD),
    ("newline", "A\nx-evil: 1", BAD),
    ("carriage return", "A\r", BAD),
    ("DEL", "A\x7f", BAD),
    ("latin-1", "caf\xe9", BAD),
    ("no-break space around", "\xa0A", BAD),
    ("JSON", '["A"]', ('["A"]',)),  # a name of visible ASCII, and unknown
    ("a cluster's name is not an expert's", "expert-a", ("expert-a",)),
]


@pytest.mark.parametrize(("value", "expected"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_a_header_names_experts_or_is_refused(value: str | None, expected: Outcome) -> None:
    """1 to 64 names of 1 to 64 visible ASCII characters; only an absent header means the default."""
    headers = {} if value is None else {"x-expert-names": value}
    assert outcome(HEADER, Request("GET", "/", headers)) == expected


@pytest.mark.parametrize("value", ["A", "", "Z"])
def test_a_repeated_header_is_refused(value: str) -> None:
    """Two readers may understand it differently: 400, even if the first value is good."""
    request = Request("GET", "/", {"x-expert-names": value}, repeated=frozenset({"x-expert-names"}))
    assert outcome(HEADER, request) is BAD


def test_a_repeated_header_that_is_not_read_does_no_harm() -> None:
    """Only the header that is read must not be repeated."""
    request = Request("GET", "/", {"x-expert-names": "A", "accept": "x"}, repeated=frozenset({"accept"}))
    assert outcome(HEADER, request) == ("A",)


def test_without_a_default_a_request_must_name_an_expert() -> None:
    """No header and no default: 400."""
    assert outcome(HEADER_ONLY, Request("GET", "/", {})) is NONE


def test_a_header_rule_does_not_read_the_body() -> None:
    """A path has one gate, in one place."""
    assert outcome(HEADER, Request("POST", "/", {}, b'{"expert_names": ["C"]}')) == ("A", "B")


# ---- the client's own x-target-cluster -------------------------------------------------------------------------------

TARGET = policy(GateRule("/", exact=False, source=Header(REQUESTED_CLUSTER), default=("A",)))
TARGETS: list[tuple[str | None, Outcome]] = [
    (None, ("A",)),
    ("expert-c", ("C",)),
    ("C", ("C",)),
    ("expert-c, B", ("C", "B")),
    ("expert-c,C", ("C",)),
    ("expert-z", ("expert-z",)),
    ("expert-c;w=9", BAD),
    ("", NONE),
]


@pytest.mark.parametrize(("value", "expected"), TARGETS)
def test_a_client_may_ask_by_cluster(value: str | None, expected: Outcome) -> None:
    """The rule on `x-target-cluster` accepts clusters and experts; the header arrives as `x-requested-cluster`."""
    headers = {} if value is None else {REQUESTED_CLUSTER: value}
    assert outcome(TARGET, Request("GET", "/", headers)) == expected


def test_errors_name_the_header_that_the_client_sent() -> None:
    """The client does not know `x-requested-cluster`."""
    found = gate.read(TARGET, Request("GET", "/", {REQUESTED_CLUSTER: "a b"}))
    assert isinstance(found, Refusal)
    assert "x-target-cluster" in found.detail
    assert REQUESTED_CLUSTER not in found.detail


def test_only_that_rule_accepts_clusters() -> None:
    """A name in another header is never taken for a cluster's."""
    assert outcome(HEADER, Request("GET", "/", {"x-expert-names": "expert-c"})) == ("expert-c",)


# ---- the body --------------------------------------------------------------------------------------------------------

BODY = policy(GateRule("/", exact=False, source=Body(("expert_names",)), default=("A", "B")))
DEFAULT = ("A", "B")


def names(value: Any) -> bytes:
    return json.dumps({"expert_names": value}).encode()


BODIES: list[tuple[str, bytes, Outcome]] = [
    ("a list", names(["C", "A"]), ("C", "A")),
    ("a string", names("C"), ("C",)),
    ("twice is once", names(["A", "C", "A"]), ("A", "C")),
    ("a string is one name, not a list", names("A,C"), BAD),
    ("no body: the default", b"", DEFAULT),
    ("no such member: the default", b"{}", DEFAULT),
    ("other members: the default", b'{"token_id": 1}', DEFAULT),
    ("a member in another case, which some experts would read", b'{"Expert_Names": ["C"]}', BAD),
    ("a name with a NUL, which a reader in C cuts there", b'{"expert_names\\u0000x": ["C"]}', BAD),
    ("a control character in any name beside it", b'{"expert_names": ["A"], "a\\u0085": 1}', BAD),
    ("an escaped member name is the member", b'{"expert\\u005fnames": ["C"]}', ("C",)),
    ("an empty list is not the default", names([]), NONE),
    ("null", names(None), BAD),
    ("number", names(3), BAD),
    ("true", names(True), BAD),
    ("object", names({"A": 1}), BAD),
    ("empty string", names(""), BAD),
    ("list with an empty string", names(["A", ""]), BAD),
    ("list with a number", names(["A", 1]), BAD),
    ("list with null", names(["A", None]), BAD),
    ("nested list", names([["A"]]), BAD),
    ("list behind a list", names(["A", ["B"]]), BAD),
    ("the whole body is a list", b'["A"]', BAD),
    ("the whole body is a string", b'"A"', BAD),
    ("the whole body is null", b"null", BAD),
    ("not JSON", b"expert_names=A", BAD),
    ("blank", b"  ", BAD),
    ("cut short", b'{"expert_names": ["A"', BAD),
    ("two values", names(["A"]) + names(["C"]), BAD),
    ("NaN elsewhere", b'{"expert_names": ["A"], "x": NaN}', BAD),
    ("Infinity elsewhere", b'{"expert_names": ["A"], "x": 1e999}', BAD),
    ("duplicate member", b'{"expert_names": ["A"], "expert_names": ["C"]}', BAD),
    ("duplicate member by an escape", b'{"expert_names": ["A"], "expert_name\\u0073": ["C"]}', BAD),
    ("duplicate member anywhere", b'{"expert_names": ["A"], "x": [{"y": 1, "y": 2}]}', BAD),
    ("32 deep", b'{"expert_names": ["A"], "x": ' + b"[" * 31 + b"]" * 31 + b"}", ("A",)),
    ("33 deep", b'{"expert_names": ["A"], "x": ' + b"[" * 32 + b"]" * 32 + b"}", BAD),
    ("100,000 brackets", b"[" * 100_000, BAD),
    ("100,000 brackets, closed", b"[" * 100_000 + b"]" * 100_000, BAD),
    ("not UTF-8", b'{"expert_names": ["\xff"]}', BAD),
    ("UTF-16", '{"expert_names": ["A"]}'.encode("utf-16-le"), BAD),
    ("byte order mark", b"\xef\xbb\xbf" + names(["A"]), BAD),
    ("64 names", names(NAMES_64), tuple(NAMES_64)),
    ("65 names", names([*NAMES_64, "x"]), BAD),
    ("a name of 64 bytes", names(LONGEST), (LONGEST,)),
    ("a name of 65 bytes", names(LONGEST + "x"), BAD),
    ("comma", names(["A,C"]), BAD),
    ("semicolon", names(["A;w=9"]), BAD),
    ("space", names([" A"]), BAD),
    ("newline", names(["A\n"]), BAD),
    ("NUL", names(["A\x00"]), BAD),
    ("not ASCII", names(["é"]), BAD),
    ("full-width A", names(["\uff21"]), BAD),
    ("zero-width space", names(["A\u200b"]), BAD),
    ("half a surrogate pair", names(["\ud800"]), BAD),
]


@pytest.mark.parametrize(("body", "expected"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_a_body_names_experts_or_is_refused(body: bytes, expected: Outcome) -> None:
    """A string or a list of strings at the pointer; only an absent body or member means the default."""
    assert outcome(BODY, Request("POST", "/", {"content-type": "application/json"}, body)) == expected


UNREADABLE = [
    # name, headers, repeated
    ("gzip", {"content-encoding": "gzip"}, ()),
    ("GZIP", {"content-encoding": "GZIP"}, ()),
    ("gzip behind identity", {"content-encoding": "identity, gzip"}, ()),
    ("unknown coding", {"content-encoding": "x"}, ()),
    ("empty coding", {"content-encoding": ""}, ()),
    ("coding named twice", {"content-encoding": "identity"}, ("content-encoding",)),
    ("partial", {"x-envoy-auth-partial-body": "true"}, ()),
    ("partial said twice", {"x-envoy-auth-partial-body": "false"}, ("x-envoy-auth-partial-body",)),
]


@pytest.mark.parametrize("body", [names(["A"]), b""], ids=["a body", "no body"])
@pytest.mark.parametrize(("headers", "repeated"), [u[1:] for u in UNREADABLE], ids=[u[0] for u in UNREADABLE])
def test_a_compressed_or_incomplete_body_is_refused(
    headers: dict[str, str], repeated: tuple[str, ...], body: bytes
) -> None:
    """A compressed or incomplete body is a 400, even if none of it arrived: never the default."""
    assert outcome(BODY, Request("POST", "/", headers, body, frozenset(repeated))) is BAD


@pytest.mark.parametrize("headers", [{"content-encoding": " Identity "}, {"x-envoy-auth-partial-body": "false"}])
def test_a_plain_and_complete_body_is_read(headers: dict[str, str]) -> None:
    """Encoding `identity`, and Envoy's header that says that the body is complete."""
    assert outcome(BODY, Request("POST", "/", headers, names(["C"]))) == ("C",)


POINTERS: list[tuple[str, tuple[str, ...], bytes, Outcome]] = [
    ("deep", ("a", "b"), b'{"a": {"b": "C"}}', ("C",)),
    ("whole document", (), b'["C", "A"]', ("C", "A")),
    ("whole document, a string", (), b'"C"', ("C",)),
    ("whole document, an object", (), b'{"a": "C"}', BAD),
    ("empty member name", ("",), b'{"": "C"}', ("C",)),
    ("slash in the name", ("a/b",), b'{"a/b": "C", "a": {"b": "A"}}', ("C",)),
    ("tilde in the name", ("m~n",), b'{"m~n": "C"}', ("C",)),
    ("list index", ("m", "1"), b'{"m": ["A", "C"]}', ("C",)),
    ("list index, then a member", ("m", "0", "n"), b'{"m": [{"n": "C"}]}', ("C",)),
    ("a number as a member name", ("m", "1"), b'{"m": {"1": "C"}}', ("C",)),
    ("index beyond the list", ("m", "2"), b'{"m": ["A", "C"]}', DEFAULT),
    ("huge index", ("m", "9" * 30), b'{"m": ["A"]}', BAD),
    ("leading zero is no index", ("m", "01"), b'{"m": ["A", "C"]}', BAD),
    ("minus is no index", ("m", "-1"), b'{"m": ["A", "C"]}', BAD),
    ("the element behind the last is no name", ("m", "-"), b'{"m": ["A"]}', BAD),
    ("full-width digit is no index", ("m", "\uff11"), b'{"m": ["A", "C"]}', BAD),
    ("a member of a list", ("m", "n"), b'{"m": ["A"]}', BAD),
    ("a member of a string", ("m", "n"), b'{"m": "A"}', BAD),
    ("a member of null", ("m", "n"), b'{"m": null}', BAD),
    ("an index into a string", ("m", "0"), b'{"m": "A"}', BAD),
    ("an object lacks the member", ("m", "n"), b'{"m": {}}', DEFAULT),
    ("an object lacks the first member", ("m", "n"), b'{"k": 1}', DEFAULT),
]


@pytest.mark.parametrize(("pointer", "body", "expected"), [p[1:] for p in POINTERS], ids=[p[0] for p in POINTERS])
def test_a_pointer_leads_to_its_member_or_is_refused(pointer: tuple[str, ...], body: bytes, expected: Outcome) -> None:
    """RFC 6901 on decoded tokens. A path through a value of the wrong type is a 400, an absent member the default."""
    rules = policy(GateRule("/", exact=False, source=Body(pointer), default=DEFAULT))
    assert outcome(rules, Request("POST", "/", {}, body)) == expected


# ---- neither ---------------------------------------------------------------------------------------------------------


def test_a_rule_may_have_a_default_only() -> None:
    """It reads nothing from the request."""
    rules = policy(GateRule("/", exact=False, source=DefaultOnly(), default=("B",)))
    assert outcome(rules, Request("POST", "/", {"x-expert-names": "C"}, b"\xff")) == ("B",)


DETAILS = [
    (BODY, Request("POST", "/", {}, b'{"expert_names": 7}'), "body member /expert_names is not a string or a list"),
    (BODY, Request("POST", "/", {}, b"{"), "the body is not JSON"),
    (BODY, Request("POST", "/", {}, names([])), "body member /expert_names names no expert"),
    (BODY, Request("POST", "/", {"content-encoding": "br"}, b"x"), "the body is compressed"),
    (HEADER, Request("GET", "/", {"x-expert-names": "a b"}), "header x-expert-names holds a name that is not"),
    (HEADER, Request("GET", "/", {"x-expert-names": ","}), "header x-expert-names names no expert"),
    (HEADER_ONLY, Request("GET", "/", {}), "the request names no expert and the gate has no default"),
    (policy(), Request("GET", "/", {}), "no gate rule covers this path"),
]


@pytest.mark.parametrize(("rules", "request_", "detail"), DETAILS, ids=[d for _, _, d in DETAILS])
def test_a_refusal_says_where_the_gate_looked(rules: Policy, request_: Request, detail: str) -> None:
    """And what was wrong there, in the policy's words."""
    found = gate.read(rules, request_)
    assert isinstance(found, Refusal)
    assert found.detail.startswith(detail)


# ---- what could be read in two ways ----------------------------------------------------------------------------------

READS_DEBUG = replace(HEADER, reads_request=True, headers_read=frozenset({"x-debug"}))
READS_ANY = replace(HEADER, reads_request=True, headers_read=None)


@pytest.mark.parametrize(
    ("rules", "repeated", "expected"),
    [
        (HEADER, "x-debug", ("A", "B")),
        (READS_DEBUG, "x-debug", BAD),
        (READS_DEBUG, "x-other", ("A", "B")),
        (READS_ANY, "x-other", BAD),
        (READS_ANY, "cookie", BAD),
    ],
)
def test_a_repeated_header_that_a_condition_may_read_is_refused(
    rules: Policy, repeated: str, expected: Outcome
) -> None:
    """To the condition it would be absent, and a rule that forbids the header would let the request pass."""
    request = Request("GET", "/", {repeated: "1"}, repeated=frozenset({repeated}))
    assert outcome(rules, request) == expected


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json; charset=utf-8", ("A",)),
        ('application/json;charset="UTF-8" ; v=1', ("A",)),
        ("text/plain; charset=us-ascii", ("A",)),
        ('a/b; charset="utf-8 "', BAD),
        ("a/b; charset=utf-8 x", BAD),
        ('a/b; charset="utf-8', BAD),
        ('a/b; charset="utf-8;latin1"', BAD),
        ("a/b; charset=utf-8; charset=latin1", BAD),
        ("a/b; charset=", BAD),
    ],
)
def test_a_charset_is_utf_8_as_a_whole_or_refused(content_type: str, expected: Outcome) -> None:
    request = Request("POST", "/", {"content-type": content_type}, b'{"expert_names": ["A"]}')
    assert outcome(BODY, request) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/open/%2e%2e;/admin", BAD),
        ("/open/.%2E;a=b/admin", BAD),
        ("/open/%2e;/x", BAD),
        ("/open/..%3B/admin", BAD),
        ("/open\\..;\\admin", BAD),
        ("/open%5cadmin", BAD),
        ("/a/..;", BAD),
        ("/a/.hidden", ("A", "B")),
        ("/a/..b;c", ("A", "B")),
        ("/v1/a.b;x=1", ("A", "B")),
        ("/...", ("A", "B")),
    ],
)
def test_a_path_that_experts_could_resolve_differently_is_refused(path: str, expected: Outcome) -> None:
    """An expert that drops `;x` and then resolves `..` serves another path than the one that was decided about."""
    assert outcome(HEADER, Request("GET", path, {})) == expected


# ---- anything --------------------------------------------------------------------------------------------------------

bodies = st.one_of(
    st.binary(max_size=100),
    json_values.map(lambda value: json.dumps({"expert_names": value}).encode()),
    st.lists(st.sampled_from([b"[", b"]", b"{", b"}", b'"A"', b'"expert_names":', b",", b"\xff"])).map(b"".join),
)


@given(bodies, header_texts, header_texts)
def test_any_bytes_give_clean_names_or_a_refusal(body: bytes, header: str, encoding: str) -> None:
    """The gate never raises; the names it returns are few, short, unique and visible ASCII."""
    requests = (
        (HEADER, Request("GET", "/", {"x-expert-names": header})),
        (TARGET, Request("GET", "/", {REQUESTED_CLUSTER: header})),
        (BODY, Request("POST", "/", {}, body)),
        (BODY, Request("POST", "/", {"content-encoding": encoding}, body)),
    )
    for rules, request in requests:
        found = gate.read(rules, request)
        if isinstance(found, Refusal):
            assert found.reason in (BAD, NONE)
            continue
        assert 0 < len(found) == len(set(found)) <= MAX_NAMES
        assert all(n.isascii() and n.isprintable() and 0 < len(n) <= MAX_NAME_LENGTH for n in found)
        assert not any(char in n for n in found for char in ",; ")


@given(st.lists(st.from_regex(r"[!-+\--:<-~]{1,64}", fullmatch=True), min_size=1, max_size=MAX_NAMES))
def test_every_way_to_name_experts_agrees(asked: list[str]) -> None:
    """The same names in a header and in a body."""
    by_header = gate.read(HEADER, Request("GET", "/", {"x-expert-names": ",".join(asked)}))
    by_body = gate.read(BODY, Request("POST", "/", {}, names(asked)))
    assert by_header == by_body == tuple(dict.fromkeys(asked))
