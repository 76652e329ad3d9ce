"""Every header that SRP reads or writes, and who may set it. Code, Lua and tests take the names from here.

`wire.lease_filter` passes the names on to the lease filter. envoy.yaml and least_request.lua are written by hand; tests
check them against this file. The docs and README explain the headers to people.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ext_authz.core.model import Decision

# Set by the client.
AUTHORIZATION = "authorization"
ACCESS_TOKEN = "x-expert-access-token"
DOWNGRADE = "x-srp-downgrade"
TOKEN_HEADERS = (AUTHORIZATION, ACCESS_TOKEN)

HOST = "host"  # to conditions, the request's `:authority`

# Set by Envoy, for ext_authz.
REQUESTED_CLUSTER = "x-requested-cluster"  # the client's `x-target-cluster`, moved here before any filter runs
PARTIAL_BODY = "x-envoy-auth-partial-body"
CONTENT_ENCODING = "content-encoding"
CONTENT_TYPE = "content-type"

# Set by ext_authz, for Envoy's router and for the expert.
TARGET_CLUSTER = "x-target-cluster"
SUBJECT = "x-srp-subject"
ISSUER = "x-srp-issuer"  # a subject is unique only within its issuer
TIER = "x-srp-tier"
DECISION_ID = "x-srp-decision-id"
TIMEOUT = "x-envoy-upstream-rq-timeout-ms"
MAX_RETRIES = "x-envoy-max-retries"
RETRY_ON = "x-envoy-retry-on"
TO_EXPERT = (TARGET_CLUSTER, SUBJECT, ISSUER, TIER, DECISION_ID, TIMEOUT, MAX_RETRIES, RETRY_ON)

# Set by Envoy, for the client: the expert that actually answered, and the number of attempts.
EXPERT = "x-srp-expert"
ATTEMPTS = "x-srp-attempts"

# A request may have so many headers, so that those of a decision still fit under Envoy's own limits (envoy.yaml).
MAX_LINES = 80
MAX_SIZE = 48 * 1024  # bytes

# What every decision may read besides the path and the gate's own header. A lease's key contains all of them.
READ_BY_EVERY_DECISION = (*TOKEN_HEADERS, REQUESTED_CLUSTER, DOWNGRADE)

# Envoy does not send these or `x-b3-*` to ext_authz: they differ between requests and do not affect decisions.
NOT_SENT = (
    "content-length", "x-request-id", "traceparent", "tracestate", "baggage", "b3", "x-amzn-trace-id",
    "x-cloud-trace-context",
)  # fmt: skip


class Answer(NamedTuple):
    """One decision, as it is reported. `policy` is the digest of the policy that made it."""

    decision: Decision
    decision_id: str
    policy: str


class Field(NamedTuple):
    """One fact that SRP reports about each decision: to the access log as dynamic metadata `name`, and to the client as
    `header` (None: not sent). Empty texts are left out of the headers."""

    name: str
    header: str | None
    text: Callable[[Answer], str]


FIELDS = (
    Field("decision", "x-srp-decision", lambda a: a.decision.verdict.value),
    Field("reason", "x-srp-reason", lambda a: a.decision.reason.value),
    Field("requested", "x-srp-requested", lambda a: ",".join(a.decision.requested)),
    Field("unknown", "x-srp-unknown", lambda a: ",".join(a.decision.unknown)),
    Field("decision_id", DECISION_ID, lambda a: a.decision_id),
    Field("policy", "x-srp-policy", lambda a: a.policy),
    Field("candidates", None, lambda a: ",".join(a.decision.serve)),
    Field("caller_tier", None, lambda a: a.decision.caller_tier or ""),
)

# What changes if an expert on standby answers. Only Envoy knows whether one did.
DEPENDS_ON_WHO_ANSWERS = frozenset({"x-srp-decision", "x-srp-reason"})


def never_there(name: str) -> str | None:
    """Why conditions never see a header of this name, in words; None if they may."""
    if name == TARGET_CLUSTER:
        return f"which conditions never see: the client's own is in `{REQUESTED_CLUSTER}`"
    if name in TOKEN_HEADERS:
        return "which conditions never see: it holds a token"
    if name in NOT_SENT or name.startswith("x-b3-"):
        return "which conditions never see: Envoy does not send it to ext_authz"
    if name.startswith("x-envoy-") or (name.startswith("x-srp-") and name != DOWNGRADE):
        return "which conditions never see: Envoy removes the client's own"
    if name.startswith(":"):
        return "which conditions never see: read `request.method`, `request.path` or the header `host`"
    if name != name.lower() or "_" in name:
        return "which no request has: names are in lower case, without `_`"
    return None


def removed(forward_token: bool) -> tuple[str, ...]:
    """The client's headers that are not forwarded to experts."""
    return (REQUESTED_CLUSTER, DOWNGRADE, *(() if forward_token else TOKEN_HEADERS))


def client_headers(answer: Answer) -> dict[str, str]:
    """The headers that report a decision to the client."""
    texts = ((field.header, field.text(answer)) for field in FIELDS)
    return {header: text for header, text in texts if header is not None and text}


def metadata(answer: Answer) -> dict[str, str]:
    """The dynamic metadata of a decision: no subject, no claim, no token."""
    return {field.name: field.text(answer) for field in FIELDS}
