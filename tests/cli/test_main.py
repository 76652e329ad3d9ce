"""The command line: what it prints, its exit status, and that a mistake is reported in one clear line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jwt
import pytest

from ext_authz.cli.main import main
from ext_authz.demo.files import policy_text
from ext_authz.demo.keys import ISSUER, DemoKeys
from ext_authz.policyfile.parse import load_policy
from tests.harness.authorization import write_policy


@pytest.fixture
def demo_dir(tmp_path: Path) -> Path:
    """A folder as `srp demo` leaves it."""
    DemoKeys.create(tmp_path)
    ports = {"a1": 1, "a2": 2, "b1": 3, "b2": 4, "c1": 5}
    (tmp_path / "policy.yaml").write_text(policy_text(ports))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("command", ["serve", "check", "explain", "token", "schema", "demo"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """With exit status 0 and a usage that names the command."""
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"usage: srp {command}" in out


def test_check_accepts_a_good_policy(capsys: pytest.CaptureFixture[str], demo_dir: Path) -> None:
    """With exit status 0 and the policy's digest."""
    path = demo_dir / "policy.yaml"
    code, out, err = run(capsys, "check", str(path))
    assert (code, err) == (0, "")
    assert load_policy(path).digest in out


def test_check_prints_every_error_on_its_line(capsys: pytest.CaptureFixture[str], demo_dir: Path) -> None:
    """All at once, each with file, line and column."""
    path = demo_dir / "policy.yaml"
    path.write_text(path.read_text().replace("tier: high", "tier: hihg"))
    code, out, err = run(capsys, "check", str(path))
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{path}:") for line in lines)
    assert all("`hihg`" in line and "high" in line for line in lines)


def test_explain_names_the_rule_for_each_expert(capsys: pytest.CaptureFixture[str], demo_dir: Path) -> None:
    """Kept or struck, and by which line of the policy."""
    path = str(demo_dir / "policy.yaml")
    code, out, _ = run(capsys, "explain", "--policy", path, "--claims", '{"plan": "free"}', "--experts", "A,C,X")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("caller    tier low (no clearance rule matched")
    assert lines[1].startswith("kept      A  permitted (line ")
    assert lines[2].startswith("struck    C  tier_too_low (line ")
    assert lines[3].startswith("struck    X  unknown_expert")
    assert lines[-1] == "verdict   downgrade (tier_too_low): A"


def test_explain_reads_a_token(capsys: pytest.CaptureFixture[str], demo_dir: Path, tmp_path: Path) -> None:
    """Which the policy's keys verify; and prints JSON."""
    token = tmp_path / "t.jwt"
    token.write_text(DemoKeys.load(demo_dir).mint({"plan": "premium"}, 60))
    path = str(demo_dir / "policy.yaml")
    code, out, _ = run(capsys, "explain", "--policy", path, "--token", str(token), "--experts", "C", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["verdict"], found["serve"], found["tier"]) == ("allow", ["C"], "high")


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"iss": "https://stranger.example.com/"}, "the token's issuer is not trusted"),
        ({"sub": "mallory"}, "the token is revoked"),
        ({"jti": "stolen", "iss": ISSUER}, "the token is revoked"),
        ({"iat": 1}, "the token is revoked"),
    ],
    ids=["foreign", "subject", "id", "old"],
)
def test_explain_refuses_claims_that_no_valid_token_has(
    capsys: pytest.CaptureFixture[str], demo_dir: Path, claims: dict[str, object], why: str
) -> None:
    """As the server would: such a caller reaches nobody, not even what anonymous callers reach."""
    path = demo_dir / "policy.yaml"
    path.write_text(
        path.read_text() + "\nrevoked: {sub: [mallory], jti: [stolen], issued_before: 2026-01-01T00:00:00Z}\n"
    )
    command = ["explain", "--policy", str(path), "--experts", "A", "--claims"]
    code, out, err = run(capsys, *command, json.dumps(claims))
    assert (code, out, err) == (1, "", f"srp explain: 401 invalid_token: {why}\n")
    code, out, _ = run(capsys, *command, json.dumps({"iss": ISSUER, "sub": "ada", "jti": "fine"}))
    assert (code, out.splitlines()[-1]) == (0, "verdict   allow (permitted): A")


def test_explain_names_an_error_of_a_condition_once(capsys: pytest.CaptureFixture[str], demo_dir: Path) -> None:
    path = demo_dir / "policy.yaml"
    path.write_text(path.read_text().replace("claims.plan ==", "claims.n + 1 > 0 && claims.plan =="))
    command = ["explain", "--policy", str(path), "--experts", "A", "--claims", '{"n": "text"}', "--json"]
    code, out, _ = run(capsys, *command)
    assert (code, json.loads(out)["condition_errors"]) == (0, ["clearance[0].when"])


def test_check_warns_of_a_key_set_without_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It may be meant, so the policy is good."""
    path = write_policy(tmp_path)
    (tmp_path / "jwks.json").write_text('{"keys": []}')
    code, out, err = run(capsys, "check", str(path))
    assert (code, "ok" in out) == (0, True)
    assert err == f"{path}: warning: issuer `https://idp.example.com/`: {NO_KEY}\n"


def test_explain_rejects_a_bad_token(capsys: pytest.CaptureFixture[str], demo_dir: Path, tmp_path: Path) -> None:
    """In one line that does not repeat it."""
    token = tmp_path / "t.jwt"
    token.write_text(DemoKeys.load(demo_dir).mint({"exp": int(time.time()) - 3600}, 60))
    path = str(demo_dir / "policy.yaml")
    code, out, err = run(capsys, "explain", "--policy", path, "--token", str(token), "--experts", "C")
    assert (code, out) == (1, "")
    assert err == "srp explain: 401 invalid_token: the token has expired\n"


def test_explain_rejects_a_token_file_that_is_not_text_or_never_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, and no more is read than a token may have."""
    policy = write_policy(tmp_path)
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    for token in (str(tmp_path / "token"), "/dev/zero"):
        with pytest.raises(SystemExit) as ended:
            main(["explain", "--policy", str(policy), "--token", token, "--experts", "A"])
        assert ended.value.code == 1
        assert "401 invalid_token" in capsys.readouterr().err


def test_token_mints_the_claims_on_the_command_line(capsys: pytest.CaptureFixture[str], demo_dir: Path) -> None:
    """Values that are JSON become JSON."""
    code, out, _ = run(capsys, "token", "--dir", str(demo_dir), "--claim", "plan=premium", "--claim", "n=[1]")
    claims = jwt.decode(out.strip(), options={"verify_signature": False})
    assert code == 0
    assert (claims["plan"], claims["n"], claims["iss"]) == ("premium", [1], ISSUER)


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schema")
    assert code == 0
    assert json.loads(out)["type"] == "object"


NO_KEY = "the file holds no usable key, so its tokens are refused"

MISTAKES = [
    (["check", "nowhere.yaml"], 1, "nowhere.yaml"),
    (["token", "--dir", "nowhere"], 1, "no demo key in nowhere"),
    (["token", "--ttl", "soon"], 2, "--ttl: expected a time such as 30s"),
    (["token", "--claim", "x"], 2, "--claim: expected NAME=VALUE, found `x`"),
    (["serve"], 2, "--policy is required"),
    (["serve", "--policy", "p", "--status", "x"], 2, "--status: expected HOST:PORT, found `x`"),
    (["serve", "--policy", "p", "--drain", "x", "--log-level", "loud"], 2, "--log-level: expected"),
    (["serve", "--policy", "p", "--decision-log-size", "0"], 2, "--decision-log-size: expected a number from 1"),
    (["serve", "--policy", "p", "--decision-log-keep", "x"], 2, "--decision-log-keep: expected a number from 0"),
    (["serve", "--policy", "p", "--decision-log", "nowhere/log"], 1, "No such file or directory: nowhere/log"),
    (["serve", "--policy", "nowhere/policy.yaml"], 1, "nowhere/policy.yaml"),
    (["serve", "--policy", "p", "--workers", "65"], 2, "--workers: expected a number from 1 to 64, found `65`"),
    (["serve", "--policy", "p", "--workers", "1.5"], 2, "--workers: expected a whole number, found `1.5`"),
    (["serve", "--policy", "p", "--workers", "2", "--listen", "127.0.0.1:1"], 2, "--listen: expected unix:PATH"),
    (["serve", "--policy", "p", "--workers", "2", "--listen", "unix:/" + "s" * 97], 2, "path is at most 97 bytes"),
    (["serve", "--policy", "p", "--workers", "2", "--decision-log", "l"], 2, "--decision-log: needs --workers 1"),
    (["serve", "--policy", "p", "--workers", "2", "--shadow-policy", "q"], 2, "--shadow-policy: needs --workers 1"),
]


@pytest.mark.parametrize(("argv", "code", "text"), MISTAKES)
def test_a_mistake_is_reported_in_one_clear_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    code: int,
    text: str,
) -> None:
    """Without a traceback, and with the right exit status."""
    monkeypatch.chdir(tmp_path)
    if argv[:2] == ["token", "--ttl"] or argv[:2] == ["token", "--claim"]:
        DemoKeys.create(tmp_path / ".demo")
    found, out, err = run(capsys, *argv)
    assert (found, out) == (code, "")
    assert text in err
    assert "Traceback" not in err
