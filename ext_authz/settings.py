"""The settings of `srp serve`, read once from flags and SRP_* variables. All errors are reported at once.

`Settings` has all defaults, and `_FLAGS` has the syntax of each setting. Neither is repeated anywhere.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ext_authz.core.leases import ENTRIES
from ext_authz.core.snapshot import CACHED_DECISIONS, CACHED_TOKENS

DRAIN = 10.0  # seconds
MAX_CONCURRENT = 1024  # checks in flight; more are rejected at once, and Envoy answers 503
MAX_WORKERS = 64
MAX_PATH = 100  # bytes of a socket's path

_MIB = 1024 * 1024
_LOG_LEVELS = ("debug", "info", "warning", "error")

Address = tuple[str, int]  # host and port


@dataclass(frozen=True, slots=True)
class Settings:
    """The server's settings. `drain` is in seconds, `decision_log_size` in bytes. `status` None: no HTTP listener."""

    policy: Path
    listen: str = "unix:/run/srp/ext_authz.sock"
    status: Address | None = ("127.0.0.1", 9902)
    drain: float = DRAIN
    max_concurrent: int = MAX_CONCURRENT
    log_level: str = "info"
    decision_log: Path | None = None
    decision_log_size: int = 64 * _MIB
    decision_log_keep: int = 4
    shadow_policy: Path | None = None
    lease_entries: int = ENTRIES
    cached_tokens: int = CACHED_TOKENS
    cached_decisions: int = CACHED_DECISIONS
    workers: int = 1
    envoy_admin: Address | None = None


class _Syntax(NamedTuple):
    """The syntax of a kind of setting. `parse` raises ValueError; `show` is its inverse."""

    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str


class _Flag(NamedTuple):
    """The flag for the setting of the same name."""

    name: str
    syntax: _Syntax
    text: str

    @property
    def setting(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"SRP_{self.setting.upper()}"


def _number(low: float, high: float, unit: int = 1, *, whole: bool = True) -> _Syntax:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"expected a number from {low} to {high}, found `{text}`")
        if whole and value != int(value):
            raise ValueError(f"expected a whole number, found `{text}`")
        return int(value) * unit if whole else value

    return _Syntax(parse, lambda value: f"{value / unit:g}")


def _address(text: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ValueError(f"expected HOST:PORT, found `{text}`")
    return host.strip("[]"), int(port)


def _listen(text: str) -> str:
    if not text.startswith("unix:"):
        _address(text)
    return text


def _log_level(text: str) -> str:
    if text not in _LOG_LEVELS:
        raise ValueError(f"expected debug, info, warning or error, found `{text}`")
    return text


_ADDRESS = _Syntax(
    lambda text: None if text == "off" else _address(text), lambda at: "off" if at is None else f"{at[0]}:{at[1]}"
)
_FILE = _Syntax(lambda text: Path(text) if text else None)

_FLAGS = (
    _Flag("policy", _FILE, "the policy file; its folder is watched"),
    _Flag("listen", _Syntax(_listen), "gRPC address: unix:PATH or HOST:PORT"),
    _Flag("status", _ADDRESS, "HTTP address of /healthz, /metrics and /status, or `off`"),
    _Flag("drain", _number(0, 3600, whole=False), "seconds that running checks have to finish after SIGTERM"),
    _Flag("max-concurrent", _number(1, 100_000), "checks in flight; more are rejected, and Envoy answers 503"),
    _Flag("log-level", _Syntax(_log_level), "debug, info, warning or error"),
    _Flag("decision-log", _FILE, "append each decision to this file, for `srp diff`"),
    _Flag(
        "decision-log-size", _number(1, 1024 * 1024, _MIB),
        "maximum size of the decision log in MiB; a full FILE is renamed to FILE.1, FILE.1 to FILE.2, ...",
    ),
    _Flag("decision-log-keep", _number(0, 1000), "renamed decision logs to keep"),
    _Flag(
        "lease-entries", _number(0, 1_000_000),
        "leases in each of the two generations of every Envoy worker thread's table; 0 turns leases off",
    ),
    _Flag("cached-tokens", _number(2, 10_000_000), "verified tokens to cache, about 2 KiB each"),
    _Flag("cached-decisions", _number(2, 10_000_000), "entries in each of the two decision caches, about 1 KiB each"),
    _Flag(
        "workers", _number(1, MAX_WORKERS),
        "processes that decide, each on at most one CPU core; the second listens on PATH.1, and so on",
    ),
    _Flag("envoy-admin", _ADDRESS, "HTTP address of Envoy's admin interface, for lease counts in the status, or `off`"),
    _Flag("shadow-policy", _FILE, "a second policy whose decisions are only compared and counted"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """Add the flags of `srp serve`. Each defaults to its variable SRP_NAME in `environ`, if that is set."""
    defaults = {field.name: field.default for field in fields(Settings)}
    for flag in _FLAGS:
        has_default = flag.syntax is not _FILE
        default = flag.syntax.show(defaults[flag.setting]) if has_default else None
        shown = f"default: {default}; " if has_default else ""
        parser.add_argument(
            f"--{flag.name}", default=environ.get(flag.variable, default), metavar=flag.setting.upper(),
            help=f"{flag.text} ({shown}{flag.variable})",
        )  # fmt: skip


def read(args: argparse.Namespace) -> Settings:
    """The settings from parsed flags. ValueError with one line for each error."""
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    if not args.policy:
        mistakes.append("--policy is required")
    for flag in _FLAGS:
        try:
            values[flag.setting] = flag.syntax.parse(getattr(args, flag.setting) or "")
        except ValueError as e:
            mistakes.append(f"--{flag.name}: {e}")
    if values.get("workers", 1) > 1:
        mistakes += _worker_mistakes(args)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return Settings(**values)


def _worker_mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Errors in settings that cannot be combined with several workers."""
    if args.decision_log:
        yield "--decision-log: needs --workers 1"
    if args.shadow_policy:
        yield "--shadow-policy: needs --workers 1"
    if not args.listen.startswith("unix:"):
        yield f"--listen: expected unix:PATH, as --workers is {args.workers}, found `{args.listen}`"
    elif len(os.fsencode(args.listen.removeprefix("unix:"))) > MAX_PATH - len(f".{MAX_WORKERS}"):
        yield f"--listen: with workers a socket's path is at most {MAX_PATH - len(f'.{MAX_WORKERS}')} bytes"
