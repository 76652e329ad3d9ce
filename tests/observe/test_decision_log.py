"""The decision log: what a record contains and what not, and a file that survives what happens to files."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ext_authz.core.difference import Difference
from ext_authz.core.model import Decision, Reason, Request, Verdict
from ext_authz.core.policy import Policy
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe import decision_log as module
from ext_authz.observe.decision_log import DecisionLog
from ext_authz.observe.decision_record import MAX_PATH, Record, RecordWriter
from ext_authz.serve.witness import Witness
from ext_authz.wire.check import INTERNAL
from tests.harness.authorization import authorization, load_policy, snapshot
from tests.harness.checks import check_request, client_headers, token
from tests.harness.waiting import wait_for

# ---- a record --------------------------------------------------------------------------------------------------------


def record(policy: Policy, *calls: bytes) -> list[dict[str, Any]]:
    """The log's records after these Check calls."""
    lines: list[bytes] = []
    it, writer = authorization(policy), RecordWriter()

    def witness(*seen: Any) -> None:
        lines.append(writer.line(*seen))

    async def make() -> None:
        it.witness = witness
        for call in calls:
            answer = client_headers(await it.check(call))
            await asyncio.sleep(0)
            assert json.loads(lines[-1])["decision_id"] == answer["x-srp-decision-id"]
            assert json.loads(lines[-1])["policy"] == answer["x-srp-policy"] == policy.digest

    asyncio.run(make())
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    return [json.loads(line) for line in lines]


PREMIUM = {"anonymous": False, "claims": {"plan": "premium"}, "absent": ["org"]}
NOBODY = {"anonymous": True, "claims": {}, "absent": []}

RECORDS = [
    # name, Check call, what the record must say
    ("allowed", check_request("A", "B"), {
        "verdict": "allow", "reason": "permitted", "requested": ["A", "B"], "serve": ["A", "B"], "tier": "low",
        "downgrade": True, "method": "POST", "path": "/x", **NOBODY,
    }),
    ("the claims of log_claims", check_request("C", caller=token(plan="premium", email="ada@example.com")), {
        "verdict": "allow", "serve": ["C"], "tier": "high", **PREMIUM,
    }),
    ("downgraded", check_request("A", "C"), {"verdict": "downgrade", "reason": "tier_too_low", "serve": ["A"]}),
    ("forbidden", check_request("A", "C", x_srp_downgrade="never"), {
        "reason": "downgrade_forbidden", "downgrade": False,
    }),
    ("unknown names are kept", check_request("X", "A"), {"verdict": "allow", "requested": ["A", "X"], "serve": ["A"]}),
    ("only unknown names", check_request("X"), {"verdict": "deny", "reason": "unknown_expert", "requested": ["X"]}),
    ("the default", check_request(path="/route"), {"requested": ["A", "B"], "path": "/route"}),
    ("no query", check_request("A", path="/x?access_token=secret"), {"path": "/x"}),
    ("bad gate", check_request(path="/route", body=b"{"), {
        "reason": "bad_gate", "requested": None, "serve": [], **NOBODY,
    }),
    ("bad token", check_request("A", caller="garbage"), {
        "verdict": "deny", "reason": "invalid_token", "requested": None, "tier": None, "anonymous": False,
        "claims": None,
    }),
    ("unreadable", b"\xff", {"reason": "internal_error", "requested": None, "method": "", "path": ""}),
    ("a path too long to keep", check_request("A", path="/" + "x" * MAX_PATH), {"path": None}),
    ("no second line", check_request("A", path="/a\nb", method="G\r\n"), {"path": "/a\nb", "method": "G\r\n"}),
    ("claims no condition can read", check_request("A", caller=token(plan="\ud800")), {
        "anonymous": False, "claims": None, "absent": [],
    }),
    ("such a claim that no condition reads", check_request("C", caller=token(plan="premium", other="\ud800")), {
        "verdict": "allow", "tier": "high", "anonymous": False, "claims": {"plan": "premium"}, "absent": ["org"],
    }),
]  # fmt: skip


@pytest.mark.parametrize(("call", "expected"), [r[1:] for r in RECORDS], ids=[r[0] for r in RECORDS])
def test_a_record_describes_the_decision(tmp_path: Path, call: bytes, expected: dict[str, Any]) -> None:
    """And has the id and the digest that the answer has."""
    (found,) = record(load_policy(tmp_path), call)
    assert found | expected == found
    assert time.time() - 60 < found["time"] < time.time() + 60


def test_a_decision_without_a_policy_is_logged_under_the_one_in_force(tmp_path: Path) -> None:
    """An internal error is one decision, whatever the policy."""
    policy, writer = load_policy(tmp_path), RecordWriter()
    for digest in ("one", "two"):
        snapshot = Snapshot(replace(policy, digest=digest))
        line = writer.line(snapshot, Request("", "", {}), INTERNAL, "0" * 16, 1.0)
        assert json.loads(line)["policy"] == digest


def test_a_record_can_be_read_back(tmp_path: Path) -> None:
    """Whatever the decision was."""
    for written in record(load_policy(tmp_path), *(call for _, call, _ in RECORDS)):
        read = Record.read(json.dumps(written).encode())
        assert read.verdict == written["verdict"]
        assert read.requested == (None if written["requested"] is None else tuple(written["requested"]))


def test_a_record_has_nothing_of_token_headers_body_or_other_claims(tmp_path: Path) -> None:
    """Only the claims that the policy lists."""
    caller = token(plan="premium", email="ada@example.com", sub="secret-subject")
    call = check_request("C", caller=caller, path="/x?q=secret-query", body=b"secret-body", x_secret="secret-header")
    text = json.dumps(record(load_policy(tmp_path), call, check_request("C", caller=caller + "x")))
    assert not [part for part in ("secret", "example", *caller.split(".")) if part in text]


def test_records_of_the_same_decision_have_their_own_ids_and_claims(tmp_path: Path) -> None:
    """What is cached of a record excludes its id, its time and its caller's claims."""
    calls = [
        check_request("A", caller=token(plan="free")),
        check_request("A", caller=token(plan="premium")),
        check_request("A", caller=token(plan="free")),
    ]
    found = record(load_policy(tmp_path), *calls, *calls)
    assert [r["claims"]["plan"] for r in found] == ["free", "premium", "free"] * 2
    assert len({r["decision_id"] for r in found}) == 6


def test_a_record_has_the_shadow_policys_difference(tmp_path: Path) -> None:
    """`shadow` names the difference, and is absent without a shadow policy."""
    epoch = snapshot(load_policy(tmp_path))
    made = Decision(Verdict.DENY, Reason.BAD_GATE)
    line = RecordWriter().line(epoch, Request("GET", "/", {}), made, "id", 1.0, Difference.DENY_TO_ALLOW)
    assert json.loads(line)["shadow"] == "deny_to_allow"
    assert b"shadow" not in RecordWriter().line(epoch, Request("GET", "/", {}), made, "id", 1.0)


NO_RECORDS = [
    b"", b"\n", b"{}", b"[]", b"null", b"7", b"{", b"\xff\n", b"[" * 100_000,
    b'{"time":1}',
    json.dumps({**json.loads(b"{}"), "verdict": "maybe"}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("line", NO_RECORDS)
def test_anything_but_a_record_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a decision record"):
        Record.read(line)


WRONG = [
    ("time", "now"), ("time", True), ("time", 1e300), ("time", float("nan")), ("verdict", "maybe"), ("reason", 7),
    ("requested", [7]), ("requested", 7), ("requested", "AB"), ("serve", [None]), ("decision_id", 7), ("policy", None),
    ("downgrade", 1), ("anonymous", None), ("claims", []), ("claims", {"iss": []}),
    ("absent", [1]), ("path", 7), ("method", None), ("tier", 7),
]  # fmt: skip


@pytest.mark.parametrize(("member", "value"), WRONG)
def test_a_member_of_the_wrong_type_is_a_value_error(tmp_path: Path, member: str, value: Any) -> None:
    """A log may have been edited."""
    (good,) = record(load_policy(tmp_path), check_request("A"))
    with pytest.raises(ValueError, match="not a decision record"):
        Record.read(json.dumps(good | {member: value}).encode())


# ---- the file --------------------------------------------------------------------------------------------------------


@contextmanager
def started(path: Path, max_bytes: int = 1 << 20, keep: int = 2) -> Iterator[DecisionLog]:
    log = DecisionLog(path, max_bytes, keep)
    log.start()
    try:
        yield log
    finally:
        log.close()


def line(number: int) -> bytes:
    return b'{"n":%6d}\n' % number


def numbers(path: Path) -> list[int]:
    return [json.loads(text)["n"] for text in path.read_text().splitlines()]


def test_lines_are_in_order_and_closing_writes_the_rest(tmp_path: Path) -> None:
    """Nothing is lost."""
    path = tmp_path / "decisions.jsonl"
    with started(path) as log:
        for n in range(1000):
            log.add(line(n))
    assert numbers(path) == list(range(1000))
    assert log.counts == {"written": 1000, "dropped": 0, "failed": 0}


def test_lines_are_written_while_the_log_is_open(tmp_path: Path) -> None:
    """Within a moment; only the owner can read the file."""
    path = tmp_path / "decisions.jsonl"
    with started(path) as log:
        log.add(line(1))
        wait_for(lambda: log.written == 1, "the line", seconds=2)
        assert numbers(path) == [1]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_existing_file_is_continued_and_made_private(tmp_path: Path) -> None:
    """An incomplete last line is ended, so that the next one is complete."""
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(line(1) + b'{"n":00')
    path.chmod(0o644)
    with started(path) as log:
        log.add(line(2))
    assert path.read_bytes() == line(1) + b'{"n":00\n' + line(2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_log_rotates_by_size_and_keeps_the_newest_files(tmp_path: Path) -> None:
    """No file exceeds the size; FILE is the newest, FILE.1 the one before; older ones are deleted."""
    path = tmp_path / "decisions.jsonl"
    size = 10 * len(line(0))
    with started(path, max_bytes=size, keep=2) as log:
        for n in range(95):
            log.add(line(n))
    assert numbers(path) == list(range(90, 95))
    assert numbers(tmp_path / "decisions.jsonl.1") == list(range(80, 90))
    assert numbers(tmp_path / "decisions.jsonl.2") == list(range(70, 80))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"decisions.jsonl{n}" for n in ("", ".1", ".2")]
    assert log.written == 95


def test_without_older_files_a_log_starts_over(tmp_path: Path) -> None:
    """`keep` 0: there is only FILE."""
    path = tmp_path / "decisions.jsonl"
    with started(path, max_bytes=len(line(0)), keep=0) as log:
        for n in range(5):
            log.add(line(n))
    assert numbers(path) == [4]
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_longer_than_a_file_is_still_written(tmp_path: Path) -> None:
    """In its own file."""
    path = tmp_path / "decisions.jsonl"
    with started(path, max_bytes=20) as log:
        for text in (line(1), b"x" * 50 + b"\n", line(2)):
            log.add(text)
    assert path.read_bytes() == line(2)
    assert (tmp_path / "decisions.jsonl.1").read_bytes() == b"x" * 50 + b"\n"


def test_a_file_that_is_moved_away_is_created_again(tmp_path: Path) -> None:
    """Another program may rotate it, too."""
    path = tmp_path / "decisions.jsonl"
    with started(path) as log:
        log.add(line(1))
        wait_for(lambda: log.written == 1, "the first line")
        path.rename(tmp_path / "away")
        log.add(line(2))
    assert (numbers(tmp_path / "away"), numbers(path)) == ([1], [2])


def test_lines_that_come_too_fast_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the disk is bounded, and add() returns at once."""
    monkeypatch.setattr(module, "MAX_PENDING", 100 * len(line(0)))
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path, 1 << 20, 1)
    for n in range(150):  # not written yet
        log.add(line(n))
    log.start()
    log.close()
    assert numbers(path) == list(range(100))
    assert log.counts == {"written": 100, "dropped": 50, "failed": 0}


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can exceed `size` bytes: write() fails halfway, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_records_and_leaves_no_incomplete_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are counted and logged once; it is over when there is room again."""
    caplog.set_level(logging.WARNING)
    path = tmp_path / "decisions.jsonl"
    with started(path) as log:
        log.add(line(0))
        wait_for(lambda: log.written == 1, "the first line")
        with full_disk(len(line(0)) + 5):
            for n in (1, 2):
                log.add(line(n))
                wait_for(lambda n=n: log.failed == n, "the failure")  # type: ignore[misc]
        log.add(line(3))
    assert numbers(path) == [0, 3]
    assert log.counts == {"written": 2, "dropped": 0, "failed": 2}
    first, second = caplog.messages
    assert "File too large; decisions continue, their records are lost" in first
    assert "writing works again; 2 records were lost" in second


def test_a_folder_that_is_created_again_is_written_to(tmp_path: Path) -> None:
    """Opening is tried again with the next lines."""
    folder = tmp_path / "logs"
    folder.mkdir()
    with started(folder / "decisions.jsonl") as log:
        log.add(line(0))
        wait_for(lambda: log.written == 1, "the first line")
        folder.rename(tmp_path / "away")
        log.add(line(1))
        wait_for(lambda: log.failed == 1, "the failure")
        folder.mkdir()
        log.add(line(2))
    assert numbers(folder / "decisions.jsonl") == [2]


@pytest.mark.parametrize("what", ["folder", "fifo", "no folder"])
def test_a_path_that_cannot_be_a_log_is_refused_at_the_start(tmp_path: Path, what: str) -> None:
    path = tmp_path / "it"
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path = tmp_path / "absent" / "it"
    with pytest.raises(OSError, match=r"it"):
        DecisionLog(path, 1000, 1).start()


def test_every_check_is_written(tmp_path: Path) -> None:
    policy, path = load_policy(tmp_path), tmp_path / "decisions.jsonl"

    async def make() -> None:
        it = authorization(policy)
        with started(path) as log:
            it.witness = Witness(None, log)
            for _ in range(20):
                await it.check(check_request("A"))
            await asyncio.sleep(0)

    asyncio.run(make())
    assert [json.loads(text)["serve"] for text in path.read_text().splitlines()] == [["A"]] * 20
