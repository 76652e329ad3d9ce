"""The files that `srp demo` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ext_authz.cli.main import main
from ext_authz.demo.files import prepare


def test_the_cases_pass_and_cover_the_whole_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`srp test` on the folder of the demo."""
    prepare(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["test", str(tmp_path), "--coverage", "--fail-under", "100"])
    assert ended.value.code == 0
    assert "(100 %)" in capsys.readouterr().out


def test_edited_cases_are_left_alone(tmp_path: Path) -> None:
    """They belong to the user from then on."""
    prepare(tmp_path)
    (tmp_path / "policy_test.yaml").write_text("mine")
    prepare(tmp_path)
    assert (tmp_path / "policy_test.yaml").read_text() == "mine"
