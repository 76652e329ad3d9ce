"""What `srp serve` needs to know, read once from flags and SRP_* variables; all mistakes are told at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ext_authz.core.check import CACHED_DECISIONS, CACHED_TOKENS

MAX_WORKERS = 64
MAX_PATH = 100  # bytes of a socket's path

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """The server's settings. `status` None: no HTTP listener. `drain` is in seconds, `decision_log_size` in bytes."""

    policy: Path
    listen: str = "unix:/run/srp/ext_authz.sock"
    status: tuple[str, int] | None = ("127.0.0.1", 9902)
    drain: float = 10.0
    max_concurrent: int = 1024
    log_level: str = "info"
    decision_log: Path | None = None
    decision_log_size: int = 64 * _MIB
    decision_log_keep: int = 4
    shadow_policy: Path | None = None
    lease_entries: int = 4096
    cached_tokens: int = CACHED_TOKENS
    cached_decisions: int = CACHED_DECISIONS
    workers: int = 1
    envoy_admin: tuple[str, int] | None = None


def add_arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """The flags of `srp serve`; each has a variable SRP_NAME that stands in for it."""

    def flag(name: str, default: str | None, text: str) -> None:
        variable = f"SRP_{name.upper().replace('-', '_')}"
        shown = f"default: {default}; " if default else ""
        value = environ.get(variable, default)
        parser.add_argument(f"--{name}", default=value, metavar=name.upper(), help=f"{text} ({shown}{variable})")

    flag("policy", None, "the policy file; its folder is watched")
    flag("listen", "unix:/run/srp/ext_authz.sock", "gRPC address: unix:PATH or HOST:PORT")
    flag("status", "127.0.0.1:9902", "HTTP address of /healthz, /metrics and /status, or `off`")
    flag("drain", "10", "seconds that running checks get to finish at SIGTERM")
    flag("max-concurrent", "1024", "checks in flight; more are refused and Envoy answers 503")
    flag("log-level", "info", "debug, info, warning or error")
    flag("decision-log", None, "file to append each decision to, for `srp diff`")
    flag("decision-log-size", "64", "MiB that it grows to before it becomes FILE.1, and that FILE.2")
    flag("decision-log-keep", "4", "such older files to keep")
    flag("lease-entries", "4096", "leases that each of Envoy's worker threads may hold, twice over; 0: no leases")
    flag("cached-tokens", str(CACHED_TOKENS), "verified tokens to remember, some 2 KiB each")
    flag("cached-decisions", str(CACHED_DECISIONS), "decisions to remember, by either of two keys, some 1 KiB each")
    flag("workers", "1", "processes that decide, each with one core at most; the others listen on PATH.1, PATH.2, ...")
    flag("envoy-admin", "off", "HTTP address of Envoy's admin interface, to tell of leases in the status, or `off`")
    flag("shadow-policy", None, "a second policy that judges each request as well and is only counted")


def read(args: argparse.Namespace) -> Settings:
    """Settings from parsed flags; ValueError with one line for each mistake."""
    mistakes: list[str] = []
    if not args.policy:
        mistakes.append("--policy is needed")
    status = None if args.status == "off" else _address(args.status, "--status", mistakes)
    if not args.listen.startswith("unix:"):
        _address(args.listen, "--listen", mistakes)
    drain = _number(args.drain, "--drain", 0, 3600, mistakes)
    concurrent = _number(args.max_concurrent, "--max-concurrent", 1, 100_000, mistakes)
    if args.log_level not in ("debug", "info", "warning", "error"):
        mistakes.append(f"--log-level: expected debug, info, warning or error, found `{args.log_level}`")
    size = _number(args.decision_log_size, "--decision-log-size", 1, 1024 * 1024, mistakes)
    keep = _number(args.decision_log_keep, "--decision-log-keep", 0, 1000, mistakes)
    entries = _number(args.lease_entries, "--lease-entries", 0, 1_000_000, mistakes)
    tokens = _number(args.cached_tokens, "--cached-tokens", 2, 10_000_000, mistakes)
    decisions = _number(args.cached_decisions, "--cached-decisions", 2, 10_000_000, mistakes)
    decision_log, shadow = (Path(f) if f else None for f in (args.decision_log, args.shadow_policy))
    workers = _number(args.workers, "--workers", 1, MAX_WORKERS, mistakes)
    if workers != int(workers):
        mistakes.append(f"--workers: expected a whole number, found `{args.workers}`")
    if workers > 1:
        mistakes += _for_one(args)
    admin = None if args.envoy_admin == "off" else _address(args.envoy_admin, "--envoy-admin", mistakes)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return Settings(
        Path(args.policy), args.listen, status, drain, int(concurrent), args.log_level,
        decision_log, int(size * _MIB), int(keep), shadow, int(entries),
        int(tokens), int(decisions), int(workers), admin,
    )  # fmt: skip


def _for_one(args: argparse.Namespace) -> Iterator[str]:
    """What cannot be had with several workers."""
    if args.decision_log:
        yield "--decision-log: needs --workers 1"
    if args.shadow_policy:
        yield "--shadow-policy: needs --workers 1"
    if not args.listen.startswith("unix:"):
        yield f"--listen: expected unix:PATH, as --workers is {args.workers}, found `{args.listen}`"
    elif len(os.fsencode(args.listen.removeprefix("unix:"))) > MAX_PATH - len(f".{MAX_WORKERS}"):
        yield f"--listen: with workers a socket's path is at most {MAX_PATH - len(f'.{MAX_WORKERS}')} bytes"


def _address(text: str, flag: str, mistakes: list[str]) -> tuple[str, int] | None:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        mistakes.append(f"{flag}: expected HOST:PORT, found `{text}`")
        return None
    return host.strip("[]"), int(port)


def _number(text: str, flag: str, low: float, high: float, mistakes: list[str]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        mistakes.append(f"{flag}: expected a number from {low} to {high}, found `{text}`")
        return low
    return value
