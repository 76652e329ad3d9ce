"""The lease filter: the Lua filter that repeats decisions in Envoy, as a resource for ADS. The rules: `core.leases`.

The source contains the epoch, so each epoch's filter is a new text, and a new text starts with empty tables.
"""

from __future__ import annotations

from typing import Any

from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.message_pool import default_message_pool

from ext_authz.core.headers import FIELDS, MAX_LINES, MAX_SIZE, READ_BY_EVERY_DECISION, TO_EXPERT, removed
from ext_authz.core.leases import ENTRIES, leasable, possible
from ext_authz.core.policy import Header, Policy
from ext_authz.wire.twin import twins

FILTER = "srp.lease"  # the filter's name in envoy.yaml
SCRIPT = "lease.lua"
TYPE_EXTENSION = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"

_TWINS = twins(TypedExtensionConfig, Lua)


def filter_resource(script: str | None, policy: Policy, lease_epoch: str, entries: int = ENTRIES) -> bytes:
    """The filter of one epoch as Envoy gets it over ADS: a serialised TypedExtensionConfig.

    `script` is the text of envoy/lease.lua; None, or a policy that grants no leases, gives a filter that does nothing.
    """
    leases = script is not None and possible(policy)
    source = f"{settings(policy, lease_epoch, entries)}{script}" if leases else "-- no leases\n"
    lua = _TWINS[Lua](default_source_code={"inline_string": source}, stat_prefix="lease")
    config = {"type_url": default_message_pool.type_to_url[Lua], "value": lua.SerializeToString(deterministic=True)}
    extension = _TWINS[TypedExtensionConfig](name=FILTER, typed_config=config)
    return bytes(extension.SerializeToString(deterministic=True))


def settings(policy: Policy, lease_epoch: str, entries: int = ENTRIES) -> str:
    """The line of Lua before the script: everything that the script needs to know about the policy and headers."""
    values = {
        "epoch": lease_epoch,
        "entries": entries,
        "rules": [
            {
                "match": rule.match,
                "exact": rule.exact,
                "leasable": leasable(rule),
                "header": rule.source.name
                if isinstance(rule.source, Header) and rule.source.name not in READ_BY_EVERY_DECISION
                else None,
            }
            for rule in policy.gate
        ],
        "read": READ_BY_EVERY_DECISION,
        "to_expert": TO_EXPERT,
        "to_client": [{"name": field.name, "header": field.header} for field in FIELDS if field.header],
        "logged": [field.name for field in FIELDS],
        "removed": removed(policy.forward_token),
        "max_lines": MAX_LINES,
        "max_size": MAX_SIZE,
    }
    return f"SRP = {_lua(values)}\n"


def _lua(value: Any) -> str:
    """A Lua expression for plain data. In strings, everything but ASCII letters and digits is escaped."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case str():
            return '"' + "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\{b:03d}" for b in value.encode()) + '"'
        case list() | tuple():
            return "{" + ", ".join(map(_lua, value)) + "}"
        case dict():
            return "{" + ", ".join(f"{k} = {_lua(v)}" for k, v in value.items() if v is not None) + "}"
        case _:
            raise TypeError(f"no Lua for {type(value).__name__}")
