"""Mutation fuzzing of every reader of bytes that others write, each in a process of its own.

Reports each unhandled exception, each answer that took over 50 ms of processor time, each wrong answer (an OK without a
target cluster among them), each crash and each hang: once by its place, with the smallest input that was found.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import mmap
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz_target import Target, WrongAnswerError
from benchmarks.fuzz_targets import TARGETS
from benchmarks.mutations import MAX_CASE
from benchmarks.parts import rss
from ext_authz.progress import Progress

SLOW = 0.05  # seconds of processor time
HANG = 20.0  # seconds without a sign of life
MAX_MEMORY = 4 * 2**30  # bytes of address space; what needs more fails with MemoryError
MAX_KEPT = 1024  # cases that are changed further, each with an outcome of its own
MAX_FOUND = 200  # findings of one target
SHRINK = 5.0  # seconds to make an input smaller
TOLD = 0.2  # seconds between signs of life
_SLOT = 2 * MAX_CASE  # bytes of the largest case that can be told of after a crash


@dataclass(slots=True)
class Finding:
    """One thing that must not happen. `key` says what and where, `detail` shows it, `case` makes it happen."""

    key: str
    detail: str
    case: bytes
    times: int = 1


# ---- in the process of a target ----


def work(name: str, seed: str, seconds: float, slot: str, told: Connection) -> None:
    """Try cases of a target for so many seconds. Tells of findings, and now and then how many cases there were."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Path(slot).open("r+b") as file, mmap.mmap(file.fileno(), _SLOT) as current:
        target = TARGETS[name]()
        gc.collect()
        gc.freeze()  # as the server does: a collection that traverses every module would seem a slow answer
        asyncio.run(_work(target, Random(seed), seconds, current, told))


async def _work(target: Target, random: Random, seconds: float, current: mmap.mmap, told: Connection) -> None:
    cases = list(target.seeds)
    outcomes: set[str] = set()
    found: dict[str, Finding] = {}
    todo = list(cases)
    ends, tells, n = time.monotonic() + seconds, 0.0, 0
    while (now := time.monotonic()) < ends:
        if now > tells:
            told.send((n, len(outcomes), rss(), [f.times for f in found.values()]))
            tells = now + TOLD
        case = todo.pop() if todo else target.mutate(random, random.choice(cases), random.choice(cases))
        n += 1
        slotted = (len(case).to_bytes(4, "big") + case)[:_SLOT]
        current[: len(slotted)] = slotted
        outcome, finding = await judged(target, case)
        if finding is None:
            if outcome not in outcomes and len(outcomes) < MAX_KEPT:
                outcomes.add(outcome)
                cases.append(case)
        elif finding.key in found:
            found[finding.key].times += 1
        elif len(found) < MAX_FOUND:
            found[finding.key] = finding
            told.send(finding)
            told.send(await _smaller(target, finding))
    told.send((n, len(outcomes), rss(), [f.times for f in found.values()]))


async def judged(target: Target, case: bytes) -> tuple[str, Finding | None]:
    """The outcome of a case, and what is wrong with it. An answer that seems slow is timed three times more."""
    outcome, finding = await _tried(target, case)
    if finding is None and target.spent > SLOW:
        took = []
        for _ in range(3):
            target.forget()
            await _tried(target, case)
            took.append(target.spent)
        if min(took) > SLOW:
            finding = Finding(f"slow: {outcome[:80]}", f"{min(took) * 1e3:.0f} ms: {outcome[:300]}", case)
    return outcome, finding


async def _tried(target: Target, case: bytes) -> tuple[str, Finding | None]:
    try:
        return await target.run(case), None
    except WrongAnswerError as e:
        return "", Finding(f"wrong answer: {re.sub('[0-9]+', '_', str(e))[:200]}", str(e), case)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # noqa: BLE001 - the panics of a library in Rust are no Exceptions
        return "", Finding(
            f"{type(e).__name__} at {_place(e)}", "".join(traceback.format_exception(e, limit=-12)), case
        )


def _place(error: BaseException) -> str:
    """The innermost line of ours, and the one in a library that it led to."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/ext_authz/" in f.filename] or frames
    places = [ours[-1]] if isinstance(error, RecursionError) else [ours[-1], frames[-1]]
    return " > ".join(dict.fromkeys(f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in places))


async def _smaller(target: Target, finding: Finding) -> Finding:
    """The same finding with a smaller case, as far as that can be found in SHRINK seconds."""
    ends, case, size = time.monotonic() + SHRINK, finding.case, max(1, len(finding.case) // 2)
    detail = finding.detail
    while size:
        at, shorter = 0, False
        while at < len(case) and time.monotonic() < ends:
            tried = case[:at] + case[at + size :]
            _, same = await judged(target, tried)
            if same is not None and same.key == finding.key:
                case, detail, shorter = tried, same.detail, True
            else:
                at += size
        size = size if shorter and size <= 4 and time.monotonic() < ends else size // 2
    return Finding(finding.key, detail, case)


# ---- in the process that was started ----


@dataclass(slots=True)
class Report:
    """What came of one target."""

    cases: int
    outcomes: int
    memory: int
    findings: dict[str, Finding]


def fuzz(name: str, seed: str, seconds: float, progress: Progress) -> Report:
    """Fuzz one target for so many seconds, in as many processes as it takes if some crash or hang."""
    report = Report(0, 0, 0, {})
    began, round_ = time.monotonic(), 0
    while (left := began + seconds - time.monotonic()) > 0 and len(report.findings) < MAX_FOUND:
        for finding in _run(
            name, f"{seed}/{name}/{round_}", left, report, lambda: progress(int(time.monotonic() - began), int(seconds))
        ):
            known = report.findings.get(finding.key)
            if known is None or len(finding.case) < len(known.case):
                finding.times = known.times if known else 1
                report.findings[finding.key] = finding
        round_ += 1
    return report


def _run(name: str, seed: str, seconds: float, report: Report, alive: Any) -> Iterator[Finding]:
    """One process; counts into `report`."""
    before, keys = report.cases, []
    ours, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="srp-fuzz-") as slot:
        slot.write(bytes(_SLOT))
        slot.flush()
        process = multiprocessing.get_context("spawn").Process(
            target=work, args=(name, seed, seconds, slot.name, theirs), daemon=True
        )
        process.start()
        theirs.close()
        heard = time.monotonic()
        try:
            while time.monotonic() - heard < HANG:
                alive()
                if not ours.poll(TOLD):
                    continue
                heard, message = time.monotonic(), ours.recv()
                if isinstance(message, Finding):
                    keys += [message.key] if message.key not in keys else []
                    yield message
                else:
                    n, outcomes, memory, times = message
                    report.cases, report.memory = before + n, max(report.memory, memory)
                    report.outcomes = max(report.outcomes, outcomes)
                    for key, count in zip(keys, times, strict=False):
                        report.findings[key].times = max(report.findings[key].times, count)
            ended = f"hang: no sign of life for {HANG:.0f} s"
        except EOFError:
            process.join()
            ended = f"crash: exit status {process.exitcode}" if process.exitcode else ""
        finally:
            process.kill()
            process.join()
            ours.close()
        if ended:
            data = Path(slot.name).read_bytes()
            yield Finding(ended, ended, data[4 : 4 + int.from_bytes(data[:4], "big")])


def save(findings: Path, name: str, number: int, finding: Finding) -> Path:
    """Write a finding into the folder; the last line is what `--replay` reads."""
    path = findings / f"{name}-{number}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [finding.key, f"{finding.times} times, {len(finding.case)} bytes", "", finding.detail.rstrip(), ""]
    path.write_text("\n".join([*lines, repr(finding.case), "", f"{name} {finding.case.hex()}", ""]), "utf-8", "replace")
    return path


def replay(path: Path) -> int:
    """Try a saved case again; exit status 1 if it still is a finding."""
    name, _, digits = path.read_text().splitlines()[-1].partition(" ")
    outcome, finding = asyncio.run(judged(TARGETS[name](), bytes.fromhex(digits)))
    print(finding.detail if finding else outcome)
    return 1 if finding else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default: all of them)")
    parser.add_argument("--minutes", type=float, default=2.0, help="for each target (default: 2)")
    parser.add_argument("--seed", default="1", help="of the random numbers (default: 1)")
    parser.add_argument(
        "--findings", type=Path, help="folder for what is found (default: a new one for temporary files)"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try the case of a finding again, and nothing else")
    args = parser.parse_args()
    if args.replay:
        return replay(args.replay)
    if unknown := sorted(set(args.targets) - set(TARGETS)):
        parser.error(f"no target `{unknown[0]}`; expected {', '.join(TARGETS)}")
    findings = args.findings or Path(tempfile.gettempdir()) / f"srp-fuzz-{args.seed}-{time.strftime('%H%M%S')}"
    found = 0
    for name in args.targets or TARGETS:
        with Progress(f"{name:9}", sys.stderr) as progress:
            report = fuzz(name, args.seed, args.minutes * 60, progress)
        print(
            f"{name:9} {report.cases:>11,} cases {report.outcomes:>6,} outcomes "
            f"{report.memory / 2**20:6.0f} MiB {len(report.findings):>4} findings",
            flush=True,
        )
        for number, finding in enumerate(report.findings.values(), 1):
            path = save(findings, name, number, finding)
            print(
                f"  {finding.key}\n    {finding.times} times, {len(finding.case)} bytes: {finding.case[:60]!r}\n    {path}"
            )
        found += len(report.findings)
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
