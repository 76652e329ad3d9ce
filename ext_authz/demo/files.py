"""The files in the demo's folder: keys, tokens, a policy and its test cases. Existing files stay, except tokens."""

from __future__ import annotations

from pathlib import Path
from string import Template

from ext_authz.core.policy import Policy
from ext_authz.demo.keys import AUDIENCE, ISSUER, DemoKeys
from ext_authz.demo.ports import HOST, free_ports
from ext_authz.policyfile.parse import load_policy

TOKEN_TTL = 24 * 3600  # seconds

_PORTS = ("a1", "a2", "b1", "b2", "c1")


def policy_text(ports: dict[str, int]) -> str:
    """The demo's policy with these ports for the experts' replicas."""
    return _rendered("policy.yaml", issuer=ISSUER, audience=AUDIENCE, host=HOST, **ports)


def _rendered(name: str, **values: object) -> str:
    return Template(Path(__file__).with_name(name).read_text()).substitute(values)


def prepare(directory: Path) -> tuple[Policy, DemoKeys]:
    """Create what the folder lacks. PolicyError if the policy in it is invalid."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("logs", "tokens"):
        (directory / name).mkdir(mode=0o700, exist_ok=True)
    keys = DemoKeys.load(directory) if (directory / "jwks.json").exists() else DemoKeys.create(directory)
    path = directory / "policy.yaml"
    if not path.exists():
        path.write_text(policy_text(dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))))
    cases = directory / "policy_test.yaml"
    if not cases.exists():
        cases.write_text(_rendered("policy_test.yaml", directory=directory))
    return load_policy(path), keys


def write_tokens(directory: Path, keys: DemoKeys) -> None:
    """Write new tokens for a low and a premium caller."""
    for name, claims in (("low", {"sub": "ada", "plan": "free"}), ("premium", {"sub": "grace", "plan": "premium"})):
        path = directory / "tokens" / f"{name}.jwt"
        path.touch(mode=0o600)
        path.write_text(keys.mint(claims, TOKEN_TTL) + "\n")
