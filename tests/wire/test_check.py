"""Check on the wire: Envoy's bytes to a Request, a Decision to Envoy's bytes, and the twin that parses them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue, HeaderValueOption
from envoy_data_plane.envoy.config.core.v3 import HeaderValueOptionHeaderAppendAction as AppendAction
from envoy_data_plane.envoy.service.auth.v3 import (
    AttributeContext,
    AttributeContextHttpRequest,
    AttributeContextRequest,
    CheckRequest,
    CheckResponse,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ext_authz.core.decide import decide
from ext_authz.core.model import STATUS, Decision, Identity, Reason, Refusal, Request, Verdict, refuse
from ext_authz.core.policy import Expert, Policy, Traffic
from ext_authz.wire.check import INTERNAL, Writer, read
from ext_authz.wire.twin import twins
from tests.harness.authorization import load_policy
from tests.harness.checks import response_of
from tests.harness.messages import messages
from tests.harness.policies import with_stand_ins

TWINS = twins(CheckRequest, CheckResponse)

# ---- the twin --------------------------------------------------------------------------------------------------------


def same(theirs: Any, twin: Any) -> bool:
    """Whether a message of envoy-data-plane and its twin agree in every field."""
    for field in fields(theirs):
        meta, value = field.metadata["betterproto"], getattr(theirs, field.name)
        if value is None:
            if twin.HasField(field.name):
                return False
            continue
        other = getattr(twin, field.name)
        if meta.proto_type == "map":
            agree = value.keys() == other.keys() and all(alike(v, other[k]) for k, v in value.items())
        elif meta.repeated:
            agree = len(value) == len(other) and all(map(alike, value, other))
        else:
            agree = alike(value, other) and (not (meta.group or meta.unwrap) or twin.HasField(field.name))
        if not agree:
            return False
    return True


def alike(value: Any, other: Any) -> bool:
    if isinstance(value, datetime):
        return value.timestamp() == pytest.approx(other.seconds + other.nanos / 1e9, abs=1e-6)
    if hasattr(other, "DESCRIPTOR"):  # a message, or a wrapped value
        return bool(value == other.value if isinstance(value, bool) else same(value, other))
    return bool(value == other)


@pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")  # about fields that the schema still has
@pytest.mark.parametrize("cls", [CheckRequest, CheckResponse])
def test_the_twin_and_envoy_data_plane_read_what_the_other_writes(cls: type) -> None:
    """Any message, there and back unchanged; each field has the same name and value in both."""

    @given(messages(cls))
    @settings(max_examples=100)
    def check(theirs: Any) -> None:
        twin = TWINS[cls].FromString(bytes(theirs))
        assert same(theirs, twin)
        assert cls.parse(twin.SerializeToString()) == theirs  # type: ignore[attr-defined]
        back = cls.parse(twin.SerializeToString(deterministic=True))  # type: ignore[attr-defined]
        assert same(back, twin)
        assert TWINS[cls].FromString(bytes(back)) == twin

    check()


def test_the_twin_keeps_the_schema() -> None:
    """It has every message, field, number and oneof of envoy-data-plane."""
    assert len(TWINS) > 20
    for cls, twin in TWINS.items():
        numbers = {f.name: f.metadata["betterproto"].number for f in fields(cls)}
        assert numbers == {f.name: f.number for f in twin.DESCRIPTOR.fields}
        groups = {f.name: f.metadata["betterproto"].group for f in fields(cls)}
        assert groups == {f.name: f.containing_oneof and f.containing_oneof.name for f in twin.DESCRIPTOR.fields}


# ---- reading ---------------------------------------------------------------------------------------------------------


def check_request(*headers: tuple[str, bytes], **http: Any) -> bytes:
    header_map = HeaderMap(headers=[HeaderValue(key=k, raw_value=v) for k, v in headers])
    asked = AttributeContextHttpRequest(**{"method": "GET", "path": "/", "header_map": header_map, **http})
    return bytes(CheckRequest(attributes=AttributeContext(request=AttributeContextRequest(http=asked))))


READS = [
    # name, CheckRequest, Request
    ("method and path", check_request(method="POST", path="/route"), Request("POST", "/route", {})),
    ("the query is no part of the path", check_request(path="/a?b=/c?d"), Request("GET", "/a", {})),
    ("an empty query", check_request(path="/a?"), Request("GET", "/a", {})),
    ("only a query", check_request(path="?a"), Request("GET", "", {})),
    (
        "headers",
        check_request(("x-a", b"1"), (":path", b"/?q"), ("x-b", b"")),
        Request("GET", "/", {"x-a": "1", ":path": "/?q", "x-b": ""}, lines=3, size=31),
    ),
    (
        "bytes are latin-1",
        check_request(("x-a", b"caf\xc3\xa9 \xff")),
        Request("GET", "/", {"x-a": "cafÃ© ÿ"}, lines=1, size=16),
    ),
    (
        "a repeated header: the first, and named",
        check_request(("x-a", b"1"), ("x-b", b"2"), ("x-a", b"3"), ("x-a", b"1")),
        Request("GET", "/", {"x-a": "1", "x-b": "2"}, repeated=frozenset({"x-a"}), lines=4, size=40),
    ),
    (
        "the host, which Envoy sends beside the headers",
        check_request(("x-a", b"1"), host="Experts.Example.com:80"),
        Request("GET", "/", {"x-a": "1", "host": "experts.example.com:80"}, lines=1, size=10),
    ),
    (
        "two hosts",
        check_request(("host", b"a"), host="b"),
        Request("GET", "/", {"host": "b"}, repeated=frozenset({"host"}), lines=1, size=11),
    ),
    ("a raw body", check_request(raw_body=b"\xff\x00"), Request("GET", "/", {}, b"\xff\x00")),
    ("a text body", check_request(body="é"), Request("GET", "/", {}, "é".encode())),
    ("empty", b"", Request("", "", {})),
]


@pytest.mark.parametrize(("data", "request_"), [r[1:] for r in READS], ids=[r[0] for r in READS])
def test_a_request_is_what_envoy_saw(data: bytes, request_: Request) -> None:
    """The path without its query, every header, the body as bytes."""
    assert read(data) == request_


def nested(depth: int) -> bytes:
    """Metadata with lists inside lists."""
    request = TWINS[CheckRequest]()
    value = request.attributes.metadata_context.filter_metadata["x"].fields["y"]
    for _ in range(depth):
        value = value.list_value.values.add()
    return bytes(request.SerializeToString())


GARBAGE = [
    ("text", b"hello"),
    ("cut short", check_request(("x-a", b"1"))[:-1]),
    ("a field without its value", b"\x08"),
    ("a length beyond the end", b"\x0a\xff\xff\xff\xff\x0f"),
    ("a path that is not UTF-8", check_request(path="/ab").replace(b"/ab", b"/a\xff")),
    ("nested over 100 deep", nested(60)),
]


@pytest.mark.parametrize("data", [g[1] for g in GARBAGE], ids=[g[0] for g in GARBAGE])
def test_bytes_that_are_no_check_request_are_a_value_error(data: bytes) -> None:
    """Whose text repeats none of it."""
    with pytest.raises(ValueError, match=r"^not a CheckRequest$"):
        read(data)


@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """With nothing but ValueError."""
    try:
        read(data)
    except ValueError:
        return


def test_headers_must_come_raw() -> None:
    """The `headers` map joins repeated headers, so without `encode_raw_headers` nothing is decided."""
    with pytest.raises(ValueError, match="encode_raw_headers"):
        read(check_request(headers={"x-a": "1"}))


# ---- writing ---------------------------------------------------------------------------------------------------------

POLICY = Policy(
    tiers=("low", "high"),
    experts={
        "A": Expert("A", 0, "expert-a", weight=2),
        "B": Expert("B", 0, "expert-b"),
        "C": Expert("C", 1, "expert-c", downgrade_to=("A",)),
        "D": Expert("D", 1, "expert-d"),
    },
    digest="0123456789ab",
)
TO = POLICY.envoy_clusters
GET = Request("GET", "/", {})
CALLER = Identity(0, "ada", "https://idp.example.com/", {"org": "acme-claim"})
ID = re.compile(r"[0-9a-f]{16}")


def written(decision: Decision, policy: Policy = POLICY, subject: str = "ada", issuer: str = "idp") -> CheckResponse:
    return response_of(Writer(policy).write(decision, subject=subject, issuer=issuer))


def listed(options: list[HeaderValueOption]) -> dict[str, str]:
    """The headers by name. Each must occur once, in `value`, overwrite, and be legal in HTTP."""
    found: dict[str, str] = {}
    for option in options:
        assert option.header is not None
        assert option.header.key not in found
        assert option.header.raw_value == b""  # Envoy's ext_authz does not read it
        assert option.append is None
        assert option.append_action is AppendAction.OVERWRITE_IF_EXISTS_OR_ADD
        assert re.fullmatch("[ -~]+", option.header.value)
        found[option.header.key] = option.header.value
    return found


def for_expert(
    decision: Decision, policy: Policy = POLICY, subject: str = "ada", issuer: str = "idp"
) -> dict[str, str]:
    response = written(decision, policy, subject, issuer)
    assert response.ok_response is not None
    return listed(response.ok_response.headers)


def for_client(decision: Decision) -> dict[str, str]:
    """The headers for the client."""
    response = written(decision)
    if response.ok_response is not None:
        return listed(response.ok_response.response_headers_to_add)
    assert response.denied_response is not None
    return listed(response.denied_response.headers)


def metadata(decision: Decision) -> dict[str, str]:
    response = written(decision)
    assert response.dynamic_metadata is not None
    return {name: value.string_value or "" for name, value in response.dynamic_metadata.fields.items()}


def asked(*names: str, caller: Identity = CALLER, downgrade: bool = True) -> Decision:
    return decide(POLICY, caller, names, GET, downgrade)


def without_id(headers: Mapping[str, str]) -> dict[str, str]:
    assert ID.fullmatch(headers["x-srp-decision-id"])
    return {name: value for name, value in headers.items() if name != "x-srp-decision-id"}


DIGEST = {"x-srp-policy": POLICY.digest}
TRIES = str(Traffic().retries)
LADDER = str(Traffic().retries + 2 * 2)  # two candidates; each rung of the ladder may fail twice

OK = [
    # name, decision, headers for the expert, headers for the client
    (
        "allow", asked("B", "A"),
        {
            "x-target-cluster": f"{TO['B']};w=1;m=1024,{TO['A']};w=2;m=1024", "x-srp-subject": "ada",
            "x-srp-issuer": "idp", "x-srp-tier": "low",
        },
        {"x-srp-decision": "allow", "x-srp-reason": "permitted", "x-srp-requested": "B,A", **DIGEST},
    ),
    (
        "anonymous", asked("A", caller=Identity(0)),
        {"x-target-cluster": f"{TO['A']};w=2;m=1024", "x-srp-tier": "low"},
        {"x-srp-decision": "allow", "x-srp-reason": "permitted", "x-srp-requested": "A", **DIGEST},
    ),
    (
        "downgrade, with an unknown name", asked("C", "Z"),
        {
            "x-target-cluster": f"{TO['A']};w=2;m=1024", "x-srp-subject": "ada", "x-srp-issuer": "idp",
            "x-srp-tier": "low",
        },
        {
            "x-srp-decision": "downgrade", "x-srp-reason": "tier_too_low", "x-srp-requested": "C",
            "x-srp-unknown": "Z", **DIGEST,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("decision", "sent", "answered"), [o[1:] for o in OK], ids=[o[0] for o in OK])
def test_an_ok_sets_the_headers_for_expert_and_client(
    decision: Decision, sent: dict[str, str], answered: dict[str, str]
) -> None:
    """With the target, the verified caller and the traffic limits for the expert, and the verdict for the client."""
    response = written(decision)
    assert response.status is None or response.status.code == 0
    assert response.denied_response is None
    tries = LADDER if len(decision.serve) > 1 else TRIES
    limits = {"x-envoy-upstream-rq-timeout-ms": "60000", "x-envoy-max-retries": tries}
    caller = sent.get("x-srp-subject", ""), sent.get("x-srp-issuer", "")
    assert without_id(for_expert(decision, POLICY, *caller)) == {**sent, **limits}
    assert without_id(for_client(decision)) == answered
    assert response.ok_response is not None
    assert response.ok_response.dynamic_metadata is None  # deprecated, and would replace ours


@pytest.mark.parametrize("forward", [False, True])
def test_what_the_client_wished_for_does_not_reach_the_expert(forward: bool) -> None:
    """Nor its token, unless the policy forwards it."""
    response = written(asked("A"), replace(POLICY, forward_token=forward))
    assert response.ok_response is not None
    taken = {"x-requested-cluster", "x-srp-downgrade"} | (
        set() if forward else {"authorization", "x-expert-access-token"}
    )
    assert set(response.ok_response.headers_to_remove) == taken


TRAFFIC = [
    # name, traffic of A, traffic of B, timeout in ms, retries, retry-on
    ("alike", Traffic(), Traffic(), "60000", LADDER, None),
    ("the most patient", Traffic(timeout=0.25), Traffic(timeout=30.0), "30000", LADDER, None),
    ("none is the most patient", Traffic(timeout=0.0), Traffic(timeout=30.0), "0", LADDER, None),
    ("the most retries", Traffic(retries=0), Traffic(retries=7), "60000", "10", None),
    ("no retries", Traffic(retries=0), Traffic(retries=0), "60000", "0", None),
    ("one may not be asked twice after an answer", Traffic(retry_on="5xx"), Traffic(), "60000", LADDER, None),
    (
        "all may", Traffic(retry_on="5xx"), Traffic(retry_on="5xx"), "60000", TRIES,
        "connect-failure,refused-stream,reset-before-request,5xx",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "timeout", "retries", "retry_on"), [t[1:] for t in TRAFFIC], ids=[t[0] for t in TRAFFIC]
)
def test_the_longest_timeout_and_the_most_retries_of_the_candidates_count(
    a: Traffic, b: Traffic, timeout: str, retries: str, retry_on: str | None
) -> None:
    """5xx are retried only if all candidates permit it."""
    experts = {**POLICY.experts, "A": Expert("A", 0, "a", traffic=a), "B": Expert("B", 0, "b", traffic=b)}
    headers = for_expert(asked("A", "B"), replace(POLICY, experts=experts))
    assert headers["x-envoy-upstream-rq-timeout-ms"] == timeout
    assert headers["x-envoy-max-retries"] == retries
    assert headers.get("x-envoy-retry-on") == retry_on


SUBJECTS = [
    ("ada", "ada"),
    ("user:1@example.com/a+b?c=d&e", "user:1@example.com/a+b?c=d&e"),
    ("Zoë", "Zo%C3%AB"),
    ("a b", "a%20b"),
    (" ", "%20"),
    ("100%", "100%25"),
    ("%0d%0a", "%250d%250a"),
    ("a\r\nx-srp-tier: high", "a%0D%0Ax-srp-tier:%20high"),
    ("\x00\x7f\u2028", "%00%7F%E2%80%A8"),
    ('"quoted"', '"quoted"'),
]


@pytest.mark.parametrize(("subject", "header"), SUBJECTS)
def test_all_but_visible_ascii_in_a_subject_is_percent_encoded(subject: str, header: str) -> None:
    """So is the percent sign: no two subjects are encoded alike."""
    assert for_expert(asked("A"), subject=subject)["x-srp-subject"] == header
    assert for_expert(asked("A"), issuer=subject)["x-srp-issuer"] == header


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50))
def test_no_subject_can_inject_a_header(subject: str) -> None:
    """Nor any issuer. The header is visible ASCII, and decodes to the text."""
    sent = for_expert(asked("A"), subject=subject, issuer=subject)
    for header in (sent["x-srp-subject"], sent["x-srp-issuer"]):
        assert re.fullmatch("[!-~]+", header)
        assert unquote(header) == subject


DENIALS: list[tuple[str, Decision, int, dict[str, Any], dict[str, str]]] = [
    # name, decision, status, error members, headers beyond those of every denial
    (
        "tier too low", asked("D", "Z"), 403,
        {
            "code": "tier_too_low", "message": "expert D needs tier high, the caller has low",
            "requested": ["D", "Z"], "required_tier": "high", "caller_tier": "low",
        },
        {"x-srp-requested": "D", "x-srp-unknown": "Z"},
    ),
    (
        "downgrade forbidden", asked("C", downgrade=False), 403,
        {
            "code": "downgrade_forbidden",
            "message": "only A may serve this caller, and the request forbids a downgrade",
            "requested": ["C"], "required_tier": "high", "caller_tier": "low",
        },
        {"x-srp-requested": "C"},
    ),
    (
        "unknown expert", asked("Z"), 404,
        {
            "code": "unknown_expert", "message": "no such expert: Z", "requested": ["Z"],
            "required_tier": None, "caller_tier": "low",
        },
        {"x-srp-unknown": "Z"},
    ),
    (
        "bad gate", refuse(Refusal(Reason.BAD_GATE, "the body is compressed"), "low"), 400,
        {
            "code": "bad_gate", "message": "the body is compressed", "requested": [],
            "required_tier": None, "caller_tier": "low",
        },
        {},
    ),
    (
        "no token", refuse(Refusal(Reason.TOKEN_REQUIRED, "a token is required")), 401,
        {
            "code": "token_required", "message": "a token is required", "requested": [],
            "required_tier": None, "caller_tier": None,
        },
        {"www-authenticate": "Bearer"},
    ),
    (
        "bad token", refuse(Refusal(Reason.INVALID_TOKEN, "the token has expired")), 401,
        {
            "code": "invalid_token", "message": "the token has expired", "requested": [],
            "required_tier": None, "caller_tier": None,
        },
        {"www-authenticate": 'Bearer error="invalid_token", error_description="the token has expired"'},
    ),
    (
        "bad token, with quotes in the detail", refuse(Refusal(Reason.INVALID_TOKEN, 'an "odd" \\ detail')), 401,
        {
            "code": "invalid_token", "message": 'an "odd" \\ detail', "requested": [],
            "required_tier": None, "caller_tier": None,
        },
        {"www-authenticate": "Bearer error=\"invalid_token\", error_description=\"an 'odd' / detail\""},
    ),
    (
        "keys unavailable", refuse(Refusal(Reason.KEYS_UNAVAILABLE, "no keys", "https://idp.example.com/")), 503,
        {
            "code": "keys_unavailable", "message": "no keys", "requested": [],
            "required_tier": None, "caller_tier": None,
        },
        {"retry-after": "1"},
    ),
    (
        "internal", INTERNAL, 500,
        {
            "code": "internal_error", "message": "the request could not be decided", "requested": [],
            "required_tier": None, "caller_tier": None,
        },
        {},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("decision", "status", "error", "headers"), [d[1:] for d in DENIALS], ids=[d[0] for d in DENIALS]
)
def test_a_denial_has_its_status_body_and_headers(
    decision: Decision, status: int, error: dict[str, Any], headers: dict[str, str]
) -> None:
    """The JSON body has one schema."""
    response = written(decision)
    assert response.ok_response is None
    assert response.status is not None
    assert response.status.code != 0
    denied = response.denied_response
    assert denied is not None
    assert denied.status is not None
    assert denied.status.code == status
    assert denied.body.endswith("\n")
    body = json.loads(denied.body)
    sent = listed(denied.headers)
    assert body.keys() == {"error"}
    assert body["error"].pop("decision_id") == sent["x-srp-decision-id"]
    assert body["error"] == error
    assert without_id(sent) == {
        "content-type": "application/json",
        "cache-control": "no-store",
        "x-srp-decision": "deny",
        "x-srp-reason": error["code"],
        **DIGEST,
        **headers,
    }


@pytest.mark.parametrize("reason", list(STATUS))
def test_every_reason_can_be_written(reason: Reason) -> None:
    """With the status of the reason, and a gRPC status that Envoy takes for a denial."""
    response = written(Decision(Verdict.DENY, reason, detail="why"))
    assert response.denied_response is not None
    assert response.denied_response.status is not None
    assert response.denied_response.status.code == STATUS[reason]
    assert response.status is not None
    assert response.status.code == {401: 16, 503: 14}.get(STATUS[reason], 7)
    challenged = "www-authenticate" in listed(response.denied_response.headers)
    assert challenged == (STATUS[reason] == 401)


METADATA = [
    (
        asked("C", "Z"),
        {
            "decision": "downgrade", "reason": "tier_too_low", "requested": "C", "unknown": "Z", "candidates": "A",
            "caller_tier": "low", "policy": POLICY.digest,
        },
    ),
    (
        refuse(Refusal(Reason.INVALID_TOKEN, "the token has expired")),
        {
            "decision": "deny", "reason": "invalid_token", "requested": "", "unknown": "", "candidates": "",
            "caller_tier": "", "policy": POLICY.digest,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("decision", "expected"), METADATA, ids=["served", "denied"])
def test_the_access_log_gets_the_decision_without_the_subject(decision: Decision, expected: dict[str, str]) -> None:
    """As dynamic metadata."""
    found = metadata(decision)
    assert ID.fullmatch(found.pop("decision_id"))
    assert found.items() >= expected.items()
    assert "ada" not in found.values()


def test_only_the_expert_gets_the_subject_and_nobody_the_claims() -> None:
    """A client does not learn how it was identified, least of all from a denial."""
    caller = replace(CALLER, subject="subject-of-the-token")
    for names in (["A"], ["C"], ["Z"]):
        data = Writer(POLICY).write(decide(POLICY, caller, names, GET, downgrade=False), subject=caller.subject)
        response = response_of(data)
        if response.ok_response is not None:
            response.ok_response.headers = []
        assert b"subject-of-the-token" not in bytes(response)
        assert b"acme-claim" not in data


def test_ids_are_unique() -> None:
    """In 10,000 answers by two writers."""
    ids = []
    for writer in (Writer(POLICY), Writer(POLICY)):
        for decision in (asked("A"), asked("Z")):
            ids += [metadata_id(writer.write(decision)) for _ in range(2500)]
    assert len(set(ids)) == 10_000


@pytest.mark.parametrize("decision", [asked("A", "Z"), asked("C", downgrade=False), INTERNAL], ids=["ok", "no", "oops"])
def test_two_answers_to_one_decision_differ_only_in_the_id(decision: Decision) -> None:
    """The id is the only part of a cached answer that belongs to one request; all its occurrences are the same."""
    writer = Writer(POLICY)
    first, second = writer.write(decision), writer.write(decision)
    one, other = headers_id(first), headers_id(second)
    assert one != other
    assert first.replace(one, other) == second
    assert first.count(one) == 3  # headers for the client, metadata, and headers for the expert or the body
    assert metadata_id(first) == one


def headers_id(data: bytes) -> bytes:
    response = response_of(data)
    ok, denied = response.ok_response, response.denied_response
    options = ok.response_headers_to_add if ok is not None else denied.headers if denied is not None else []
    return listed(options)["x-srp-decision-id"].encode()


def metadata_id(data: bytes) -> bytes:
    response = response_of(data)
    assert response.dynamic_metadata is not None
    return (response.dynamic_metadata.fields["decision_id"].string_value or "").encode()


HEX = st.text("0123456789abcdef", min_size=16, max_size=16)


@given(st.lists(HEX, min_size=1, max_size=4), HEX)
def test_names_that_look_like_ids_are_written_as_they_are(names: list[str], subject: str) -> None:
    """They are not taken for the id."""
    policy = replace(POLICY, experts={**POLICY.experts, names[0]: Expert(names[0], 0, names[0])}, digest=names[-1])
    decision = decide(policy, CALLER, names, GET)
    writer = Writer(policy)
    for data in (writer.write(decision, subject=subject), writer.write(decision, subject=subject)):
        response = response_of(data)
        assert response.ok_response is not None
        sent, answered = listed(response.ok_response.headers), listed(response.ok_response.response_headers_to_add)
        assert sent["x-target-cluster"] == f"{policy.envoy_clusters[names[0]]};w=1;m=1024"
        assert sent["x-srp-subject"] == subject
        assert answered["x-srp-policy"] == names[-1]
        assert answered["x-srp-requested"] == names[0]
        assert answered.get("x-srp-unknown", "") == ",".join(dict.fromkeys(n for n in names if n != names[0]))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([("A",), ("A", "B"), ("B", "A"), ("C",), ("C", "A"), ("A", "Z"), ("D",), ("E",)]),
            st.sampled_from(
                [
                    Identity(0),
                    Identity(1),
                    CALLER,
                    Identity(1, "bob"),
                    Identity(0, "x\u00e9 %"),
                    Identity(1, "bob", "https://idp.example.com/"),
                    Identity(0, "", "https://idp.example.com/"),
                    Identity(1, "https://idp.example.com/", "bob"),
                ]
            ),
            st.booleans(),
        ),
        max_size=20,
    )
)
def test_what_is_shared_between_callers_leaks_nothing(asked: list[tuple[Any, Identity, bool]]) -> None:
    """A writer that has answered others answers like a new one, with and without a lease."""
    experts = {**POLICY.experts, "E": Expert("E", 1, "e", downgrade_to=("A", "B"), unavailable="downgrade")}
    policy = replace(POLICY, experts=experts)
    used = Writer(policy, "epoch")
    for names, caller, downgrade in asked:
        decision = decide(policy, caller, names, GET, downgrade)
        both = used, Writer(policy, "epoch")
        who = caller.subject, caller.issuer or ""
        found, expected = (response_of(w.write(decision, "0" * 16, *who)) for w in both)
        assert found == expected
        if decision.serve:
            granted, fresh = (response_of(w.grant(decision, "0" * 16, 1e9, *who)) for w in both)
            assert granted == fresh
            assert found.ok_response is not None
            sent = {o.header.key: o.header.value for o in found.ok_response.headers if o.header}
            for name, text in zip(("x-srp-subject", "x-srp-issuer"), who, strict=True):
                assert unquote(sent.get(name, "")) == text
                assert (name in found.ok_response.headers_to_remove) is (text == "")


def test_the_cache_of_prepared_answers_is_bounded() -> None:
    """To the latest 1,024 decisions, at most."""
    writer = Writer(POLICY)
    for _ in range(1500):
        writer.write(asked("A"))
    assert 1 <= len(writer._prepared) <= 1024


NAMES = st.lists(st.from_regex(r"[!-+\--:<-~]{1,64}", fullmatch=True), min_size=1, max_size=64)


@given(NAMES, st.booleans(), st.text(max_size=30))
@settings(max_examples=50)
def test_any_names_and_details_give_a_well_formed_answer(names: list[str], forbid: bool, detail: str) -> None:
    """Names that the gate accepts, and any detail, give legal headers and a body that is JSON."""
    for decision in (
        asked(*names, downgrade=not forbid),
        asked("A", *names),
        Decision(Verdict.DENY, Reason.INVALID_TOKEN, detail=detail),
    ):
        for_client(decision)
        response = written(decision)
        if response.denied_response is not None:
            json.loads(response.denied_response.body)


def test_a_lease_changes_nothing_of_an_answer_but_its_metadata(tmp_path: Path) -> None:
    """The lease there contains exactly the headers that the answer sets for the expert."""
    policy = load_policy(tmp_path)
    decision = decide(policy, Identity(0), ["D"], GET)
    writer = Writer(policy, "the epoch")
    plain = response_of(writer.write(decision, "0123456789abcdef"))
    with_grant = response_of(writer.grant(decision, "0123456789abcdef", 1e9 + 1.5))
    assert plain.dynamic_metadata is not None
    assert with_grant.dynamic_metadata is not None
    lease = with_grant.dynamic_metadata.fields.pop("lease").struct_value
    assert with_grant == plain
    assert lease is not None
    assert lease.fields["epoch"].string_value == "the epoch"
    assert lease.fields["expires"].string_value == "1000000001500"
    held = lease.fields["headers"].struct_value
    assert held is not None
    assert plain.ok_response is not None
    expected = {o.header.key: o.header.value for o in plain.ok_response.headers if o.header}
    assert {name: value.string_value for name, value in held.fields.items()} == expected
    assert expected["x-srp-decision-id"] == "0123456789abcdef"


def test_envoy_gets_the_stand_ins_and_may_change_the_verdict() -> None:
    """Verdict and reason are set only where Envoy has not set them: it does when a stand-in answers."""
    policy = with_stand_ins()
    decision = decide(policy, Identity(1, claims={"org": "acme"}), ["C"], Request("POST", "/", {}))
    response = written(decision, policy).ok_response
    assert response is not None
    headers = {o.header.key: o.header.value for o in response.headers if o.header}
    c, b, d, a = (policy.envoy_clusters[name] for name in "CBDA")
    assert headers["x-target-cluster"] == f"{c};w=1;m=1024,{b};w=3;m=1024;s,{d};w=1;m=1024;s,{a};w=1;m=1024;s"
    actions = {o.header.key: o.append_action for o in response.response_headers_to_add if o.header}
    only_if_absent = {name for name, action in actions.items() if action is AppendAction.ADD_IF_ABSENT}
    assert only_if_absent == {"x-srp-decision", "x-srp-reason"}
