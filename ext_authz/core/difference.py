"""How two decisions on one request differ. Pure; shared by log replay and the shadow policy."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from ext_authz.core.model import Decision, Verdict


class Difference(StrEnum):
    """The change from one policy's verdict to another's. EXPERTS_CHANGED: the same verdict, different candidates.

    Two denials are UNCHANGED whatever their reasons: the caller gets nothing either way.
    """

    UNCHANGED = "unchanged"
    DENY_TO_ALLOW = "deny_to_allow"
    DENY_TO_DOWNGRADE = "deny_to_downgrade"
    DOWNGRADE_TO_ALLOW = "downgrade_to_allow"
    DOWNGRADE_TO_DENY = "downgrade_to_deny"
    ALLOW_TO_DOWNGRADE = "allow_to_downgrade"
    ALLOW_TO_DENY = "allow_to_deny"
    EXPERTS_CHANGED = "experts_changed"

    def __str__(self) -> str:
        """For display: `deny → allow`."""
        return self.value.replace("_to_", " → ").replace("_", " ")


_CHANGES: Mapping[tuple[Verdict, Verdict], Difference] = {
    (Verdict.DENY, Verdict.ALLOW): Difference.DENY_TO_ALLOW,
    (Verdict.DENY, Verdict.DOWNGRADE): Difference.DENY_TO_DOWNGRADE,
    (Verdict.DOWNGRADE, Verdict.ALLOW): Difference.DOWNGRADE_TO_ALLOW,
    (Verdict.DOWNGRADE, Verdict.DENY): Difference.DOWNGRADE_TO_DENY,
    (Verdict.ALLOW, Verdict.DOWNGRADE): Difference.ALLOW_TO_DOWNGRADE,
    (Verdict.ALLOW, Verdict.DENY): Difference.ALLOW_TO_DENY,
}


def difference(old: Decision, new: Decision) -> Difference:
    """What changes for the caller when `new` replaces `old`."""
    if old.verdict is not new.verdict:
        return _CHANGES[old.verdict, new.verdict]
    # The order of the candidates does not matter: the idlest one answers.
    same = old.serve == new.serve or set(old.serve) == set(new.serve)
    return Difference.UNCHANGED if same else Difference.EXPERTS_CHANGED
