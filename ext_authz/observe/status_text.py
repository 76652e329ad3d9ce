"""`srp status`: the report of a running server, as text for people."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

TIMEOUT = 5.0  # seconds


def fetch(address: str) -> dict[str, Any]:
    """The report at `http://address/status`. A one-line OSError if it cannot be read."""
    url = f"http://{address}/status"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            report = json.load(response)
    except urllib.error.URLError as e:
        raise OSError(f"cannot read {url}: {e.reason}") from None
    except ValueError:
        raise OSError(f"cannot read {url}: not a report") from None
    if not isinstance(report, dict) or "policy" not in report:
        raise OSError(f"cannot read {url}: not a report")
    return report


def text(report: dict[str, Any]) -> str:
    """The report in a few lines. Lines about problems start with `!`."""
    policy, envoy = report["policy"], report["envoy"]
    rows = [
        f"srp {report['version']}, up {_age(report['uptime_seconds'])}",
        f"policy    {policy['digest']}, in force for {_age(policy['age_seconds'])}, "
        f"{policy['reloads']} reloads, {policy['failures']} rejected",
        f"envoy     {envoy['connected']} connected, clusters {envoy['acknowledged'] or 'not acknowledged yet'}",
    ]
    if not envoy["connected"]:
        rows.append("! no envoy is connected")
    if envoy["last_error"]:
        rows.append(f"! envoy rejected: {envoy['last_error']}")
    if policy["error"]:
        rows += [f"! {line}" for line in policy["error"].splitlines()]
    rows += [f"! {warning}" for warning in policy["warnings"]]
    lease = report["leases"]
    rows.append(f"leases    {'on' if lease['on'] else 'off'}, {lease['granted']} granted{_counted(lease['envoy'])}")
    if lease["error"]:
        rows.append(f"! {lease['error']}")
    for key in report["keys"]:
        age = "never loaded" if key["age"] is None else f"read {_age(key['age'])} ago"
        rows.append(
            f"keys      {key['issuer']}: {key['keys']}, {age}, {key['failures']} of {key['fetches']} reads failed"
        )
        if key["last_error"]:
            rows.append(f"! {key['issuer']}: {key['last_error']}")
        if key["age"] is not None and not key["keys"]:
            rows.append(f"! {key['issuer']}: there is no usable key, so its tokens are refused")
        rows += [f"! {key['issuer']}: skipped {line}" for line in key["skipped"]]
    if len(report["workers"]) > 1:
        rows += map(_worker, report["workers"])
    rows += [f"decided   {n:>9}  {name}" for name, n in report["decisions"].items()]
    rows += [f"{name:<9} {json.dumps(report[name])}" for name in ("shadow", "decision_log") if name in report]
    return "\n".join(rows)


def _worker(worker: dict[str, Any]) -> str:
    if not worker["serving"]:
        return f"! worker {worker['worker']} accepts no checks, replaced {worker['restarts']} times"
    process = f"pid {worker['pid']}, up {_age(worker['age_seconds'])}, epoch {worker['epoch']}"
    return f"worker    {worker['worker']}: {process}, {worker['checks']} checks, replaced {worker['restarts']} times"


def _counted(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "; hits unknown"
    epoch = ", ".join(f"{counts[name]} {name}" for name in ("hits", "misses", "stores", "evictions"))
    return f"; since the epoch began {epoch}; {counts['repeated']} hits in all"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
