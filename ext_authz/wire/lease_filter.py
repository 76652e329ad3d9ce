"""Leases: which decisions Envoy may repeat without asking again, for how long, and the filter that repeats them.

A lease rests on three things. The filter finds it by the exact text of all that its decision read (`READ`, the gate's
header and the path), so whatever a decision reads beyond that forbids one. The decision must hold until the lease
ends, so it ends with the caller's token. And whatever else a decision depends on, the policy and the keys, is the
epoch: the filter has its epoch in its source, takes only leases of that epoch, and is sent anew, empty, with the next.
"""

from __future__ import annotations

from typing import Any

from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.message_pool import default_message_pool

from ext_authz.core.check import DOWNGRADE
from ext_authz.core.gate import REQUESTED_CLUSTER, rule_for
from ext_authz.core.model import Decision, Outcome, Request
from ext_authz.core.policy import TOKEN_HEADERS, GateRule, Policy
from ext_authz.wire.twin import twins

FILTER = "srp.lease"  # the filter's name in envoy.yaml
SCRIPT = "lease.lua"
TYPE_EXTENSION = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
ENTRIES = 4096
READ = frozenset({*TOKEN_HEADERS, DOWNGRADE, REQUESTED_CLUSTER})  # by any decision; the script has the same list

_TWINS = twins(TypedExtensionConfig, Lua)


def grant(policy: Policy, outcome: Outcome, request: Request, now: float) -> float | None:
    """Until when, in seconds since the epoch, Envoy may repeat the `outcome` of `now`; None if it may not.

    The length of the key is the filter's to judge.
    """
    decision, caller, _ = outcome
    if not decision.serve or decision.standby:  # who answers may change what the client is told
        return None
    rule = rule_for(policy, request.path)
    if rule is None or rule.pointer is not None:
        return None
    if request.repeated and not request.repeated.isdisjoint(_read(rule)):
        return None
    seconds = _seconds(policy, decision)
    return min(caller.expires, now + seconds) if seconds else None


def filter_resource(script: str | None, policy: Policy, epoch: str, entries: int = ENTRIES) -> bytes:
    """The filter of one epoch as Envoy takes it from ADS: a serialised TypedExtensionConfig.

    `script` is the text of envoy/lease.lua; None, or a policy that grants nothing, gives a filter that does nothing.
    """
    source = "-- no leases\n" if script is None or not possible(policy) else _settings(policy, epoch, entries) + script
    lua = _TWINS[Lua](default_source_code={"inline_string": source}, stat_prefix="lease")
    config = {"type_url": default_message_pool.type_to_url[Lua], "value": lua.SerializeToString(deterministic=True)}
    made = _TWINS[TypedExtensionConfig](name=FILTER, typed_config=config)
    return bytes(made.SerializeToString(deterministic=True))


def possible(policy: Policy) -> bool:
    """Whether there is a request whose decision may be leased."""
    lasting = any(policy.lease if e.lease is None else e.lease for e in policy.experts.values())
    return lasting and any(rule.pointer is None for rule in policy.gate)


def _seconds(policy: Policy, decision: Decision) -> float:
    """The shortest lease of the experts that the decision is about; 0 if it may have read more than the key holds."""
    asked = [policy.experts[n] for n in decision.requested]
    judged = asked + [policy.experts[n] for e in asked for n in e.downgrade_to]
    if policy.reads_request and any(e.allow is not None and "request" in e.allow.reads for e in judged):
        return 0.0
    about = asked + [policy.experts[n] for n in decision.serve]
    return min(policy.lease if e.lease is None else e.lease for e in about)


def _read(rule: GateRule) -> frozenset[str]:
    return READ if rule.header is None else READ | {rule.header}


def _settings(policy: Policy, epoch: str, entries: int) -> str:
    """The line of Lua that goes before the script."""
    rules = [
        {
            "match": rule.match,
            "exact": rule.exact,
            "body": rule.pointer is not None,
            "header": rule.header if rule.header not in READ else None,
        }
        for rule in policy.gate
    ]
    removed = [REQUESTED_CLUSTER, DOWNGRADE, *(() if policy.forward_token else TOKEN_HEADERS)]
    return f"SRP = {_lua({'epoch': epoch, 'entries': entries, 'rules': rules, 'removed': removed})}\n"


def _lua(value: Any) -> str:
    """A Lua expression for plain data. Of a text, all but letters and digits is written as numbers."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case str():
            return '"' + "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\{b:03d}" for b in value.encode()) + '"'
        case list():
            return "{" + ", ".join(map(_lua, value)) + "}"
        case dict():
            return "{" + ", ".join(f"{k} = {_lua(v)}" for k, v in value.items() if v is not None) + "}"
        case _:
            raise TypeError(f"no Lua for {type(value).__name__}")
