"""`srp diff`: what a new policy would change, judged by its text and by logged decisions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ext_authz.core.difference import Difference
from ext_authz.core.model import Decision
from ext_authz.core.policy import Policy
from ext_authz.observe.decision_record import Record
from ext_authz.policyfile.parse import load_policy, parse_policy
from ext_authz.policyfile.source import MAX_BYTES, printable
from ext_authz.review.changes import Change, Effect, changes
from ext_authz.review.reads import Cause, NotReplayable
from ext_authz.review.replay import Replay, Replayed

MAX_LINE = 1024 * 1024  # bytes of a record
EXAMPLES = 3  # records shown for each kind of difference
STEP = 1000  # records between calls of `progress`

Progress = Callable[[int, int], None]  # bytes read, bytes in total


@dataclass(slots=True)
class Totals:
    """The results of replaying a log. `corrupt` lines are not records; `corrupt_at` has the first, as `FILE:LINE`."""

    records: int = 0
    seconds: float = 0.0
    differences: Counter[Difference] = field(default_factory=Counter)
    widening: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)
    not_replayable: Counter[tuple[Cause, str]] = field(default_factory=Counter)
    corrupt: int = 0
    corrupt_at: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every record of a decision after the gate was replayed."""
        return not self.corrupt and all(cause is Cause.EARLY for cause, _ in self.not_replayable)


@dataclass(frozen=True, slots=True)
class PolicyDiff:
    """The changes from the policy `old` to `new` (digests), and how they would have changed logged decisions."""

    old: str
    new: str
    changes: tuple[Change, ...]
    replayed: Totals | None = None

    def widens(self) -> list[str]:
        """The reasons why this counts as widening, one line each; empty if it does not.

        An unclear change counts as well, unless a log settles it: every record of a decision after the gate replayed.
        """
        settled = self.replayed is not None and self.replayed.complete and bool(self.replayed.differences)
        reasons = [
            f"{c.path}: {c.text}"
            for c in self.changes
            if c.effect is Effect.WIDER or (c.effect is Effect.UNCLEAR and not settled)
        ]
        if self.replayed is not None and self.replayed.widening:
            reasons.append(f"{self.replayed.widening:,} logged decisions widen")
        return reasons

    def text(self) -> str:
        """The result as text for people."""
        rows = [f"policy {self.old} → {self.new}"]
        rows += [
            f"  {c.effect.value:<9} {c.path}: {printable(c.text, 400)}" for c in sorted(self.changes, key=_by_effect)
        ]
        if not self.changes:
            rows.append("  only comments or formatting" if self.old != self.new else "  the files are identical")
        return "\n".join([*rows, *(_totals(self.replayed) if self.replayed else ())])

    def as_json(self) -> dict[str, Any]:
        """The result for programs."""
        replayed = self.replayed
        result: dict[str, Any] = {"old": self.old, "new": self.new, "changes": [asdict(c) for c in self.changes]}
        if replayed is not None:
            result["decisions"] = {
                "records": replayed.records,
                "seconds": round(replayed.seconds, 3),
                "differences": {d.value: replayed.differences[d] for d in Difference},
                "widening": replayed.widening,
                "examples": replayed.examples,
                "not_replayable": [
                    {"cause": cause.value, "detail": detail, "records": n}
                    for (cause, detail), n in replayed.not_replayable.most_common()
                ],
                "corrupt": {"lines": replayed.corrupt, "first": replayed.corrupt_at},
            }
        result["widens"] = self.widens()
        return result


def _by_effect(change: Change) -> int:
    return [Effect.WIDER, Effect.UNCLEAR, Effect.NARROWER, Effect.NEUTRAL].index(change.effect)


def load(old: Path, new: Path) -> tuple[Policy, Policy]:
    """Both policies, as two versions of one file: relative paths in both start in the folder of `new`.

    PolicyError if either is invalid, OSError if `old` cannot be read.
    """
    with old.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    return parse_policy(text, str(old), new.parent), load_policy(new)


def compare(
    old: Policy, new: Policy, logs: Sequence[Path] = (), progress: Progress = lambda done, of: None
) -> PolicyDiff:
    """The changes from `old` to `new`. OSError if a log cannot be read, ValueError if one is not a decision log."""
    replayed = _replay(Replay(old, new), logs, progress) if logs else None
    return PolicyDiff(old.digest, new.digest, changes(old, new), replayed)


def _replay(replay: Replay, logs: Sequence[Path], progress: Progress) -> Totals:
    found = Totals()
    began = time.perf_counter()
    done, total = 0, sum(log.stat().st_size for log in logs)
    for log in logs:
        before = found.records - found.corrupt
        number = 0
        for number, line in _lines(log):
            done += len(line)
            found.records += 1
            if found.records % STEP == 0:
                progress(done, total)
            try:
                record = Record.read(line)
            except ValueError:
                found.corrupt += 1
                if len(found.corrupt_at) < EXAMPLES:
                    found.corrupt_at.append(f"{log}:{number}")
                continue
            _count(found, record, replay(record))
        if number and found.records - found.corrupt == before:
            raise ValueError(f"{log} is not a decision log: none of its lines is a record")
    progress(total, total)
    found.seconds = time.perf_counter() - began
    return found


def _lines(log: Path) -> Iterator[tuple[int, bytes]]:
    """The line numbers and lines. A line that is too long is truncated, so it is not a record."""
    with log.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            yield number, line
            while len(line) == MAX_LINE and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE)


def _count(found: Totals, record: Record, outcome: Replayed | NotReplayable) -> None:
    if isinstance(outcome, NotReplayable):
        found.not_replayable[outcome.cause, outcome.detail] += 1
        return
    found.differences[outcome.difference] += 1
    found.widening += outcome.widening
    if outcome.difference is not Difference.UNCHANGED:
        examples = found.examples.setdefault(outcome.difference.value, [])
        if len(examples) < EXAMPLES:
            examples.append(_example(record, outcome))


def _example(record: Record, outcome: Replayed) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.time))
    asked = "no expert" if record.requested is None else printable(", ".join(record.requested), 80)
    wider = " (widening)" if outcome.widening else ""
    return f"{when} {printable(record.decision_id)} asks {asked}: {_shown(outcome.old)} → {_shown(outcome.new)}{wider}"


def _shown(decision: Decision) -> str:
    tier = f"{decision.caller_tier}: " if decision.caller_tier else ""
    return tier + (", ".join(decision.serve) if decision.serve else f"{decision.status} {decision.reason.value}")


def _totals(replayed: Totals) -> Iterator[str]:
    yield f"decisions {replayed.records:,} read in {replayed.seconds:.1f} s"
    for kind in Difference:
        if n := replayed.differences[kind]:
            yield f"  {n:>9,} {kind}"
            yield from (f"            {example}" for example in replayed.examples.get(kind.value, ()))
    yield f"  {replayed.widening:>9,} of them widening"
    not_replayed = sum(replayed.not_replayable.values())
    if not_replayed:
        yield f"not replayed {not_replayed:,}"
        for (cause, detail), n in replayed.not_replayable.most_common():
            yield f"  {n:>9,} {cause.value}{f': {printable(detail, 200)}' if detail else ''}"
    if replayed.corrupt:
        yield f"corrupt {replayed.corrupt:,} lines, the first at {', '.join(replayed.corrupt_at)}"
