"""What a new policy grants and takes away, as far as the texts of both policies show. Pure.

A change is WIDER if it lets any caller reach an expert that the caller could not reach before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from enum import StrEnum
from math import inf
from typing import assert_never

from ext_authz.core.policy import Body, DefaultOnly, Expert, GateRule, Header, Issuer, Policy

Reach = frozenset[str]


class Effect(StrEnum):
    """The effect of a change on callers' rights. UNCLEAR: it depends on the callers."""

    WIDER = "wider"
    NARROWER = "narrower"
    NEUTRAL = "neutral"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True)
class Change:
    """One change. `path` is a path in the policy file, or a tier."""

    effect: Effect
    path: str
    text: str


def changes(old: Policy, new: Policy) -> tuple[Change, ...]:
    """All changes from `old` to `new`, changes of rights first."""
    return (
        *_tiers(old, new),
        *_anonymous(old, new),
        *_clearance(old, new),
        *(change for name in {**old.experts, **new.experts} for change in _expert(old, new, name)),
        *_issuers(old, new),
        *_revoked(old, new),
        *_gate(old, new),
        *_rest(old, new),
    )


def _reach(policy: Policy, tier: int | None) -> Reach:
    """The experts that a tier may reach, ignoring `allow` rules. For None, which stands for no callers: no experts."""
    return frozenset(e.name for e in policy.experts.values() if tier is not None and e.tier <= tier)


def _effect(before: Reach, after: Reach) -> Effect:
    if after - before:
        return Effect.WIDER
    return Effect.NARROWER if before - after else Effect.NEUTRAL


def _tiers(old: Policy, new: Policy) -> Iterator[Change]:
    if old.tiers != new.tiers:
        yield Change(Effect.NEUTRAL, "tiers", f"{_list(old.tiers)} → {_list(new.tiers)}")
    for level, name in enumerate(new.tiers):
        if name not in old.tiers:
            yield Change(Effect.NEUTRAL, f"tier {name}", f"is new and reaches {_names(_reach(new, level))}")
            continue
        before, after = _reach(old, old.tiers.index(name)), _reach(new, level)
        if after - before:
            yield Change(Effect.WIDER, f"tier {name}", f"gains {_names(after - before)}")
        if before - after:
            yield Change(Effect.NARROWER, f"tier {name}", f"loses {_names(before - after)}")


def _anonymous(old: Policy, new: Policy) -> Iterator[Change]:
    before, after = ("deny" if p.anonymous is None else p.tiers[p.anonymous] for p in (old, new))
    if before != after:
        effect = _effect(_reach(old, old.anonymous), _reach(new, new.anonymous))
        yield Change(effect, "anonymous", f"{before} → {after}")


def _clearance(old: Policy, new: Policy) -> Iterator[Change]:
    if old.tiers[0] != new.tiers[0] and (old.issuers or new.issuers):
        effect = _effect(_reach(old, 0), _reach(new, 0))
        yield Change(effect, "clearance", f"if no rule matches: {old.tiers[0]} → {new.tiers[0]}")
    if [r.when.source for r in old.clearance] == [r.when.source for r in new.clearance]:
        for index, (was, now) in enumerate(zip(old.clearance, new.clearance, strict=True)):
            if old.tiers[was.tier] != new.tiers[now.tier]:
                effect = _effect(_reach(old, was.tier), _reach(new, now.tier))
                yield Change(effect, f"clearance[{index}].tier", f"{old.tiers[was.tier]} → {new.tiers[now.tier]}")
        return
    before, after = ([f"`{r.when.source}` → {p.tiers[r.tier]}" for r in p.clearance] for p in (old, new))
    yield from _edited("clearance", before, after, Effect.UNCLEAR)


def _expert(old: Policy, new: Policy, name: str) -> Iterator[Change]:
    path, was, now = f"experts.{name}", old.experts.get(name), new.experts.get(name)
    if was is None or now is None:
        # Neutral here: the change of each tier's reach shows who gains or loses it.
        yield Change(Effect.NEUTRAL, path, "is new" if now else "is gone")
        return
    before, after = old.tiers[was.tier], new.tiers[now.tier]
    if before != after:
        yield Change(Effect.NEUTRAL, f"{path}.tier", f"{before} → {after}")
    yield from _allow(f"{path}.allow", was, now)
    if was.downgrade_to != now.downgrade_to:
        yield Change(Effect.NEUTRAL, f"{path}.downgrade_to", f"{_list(was.downgrade_to)} → {_list(now.downgrade_to)}")
    if was.cluster != now.cluster:
        yield Change(Effect.NEUTRAL, f"{path}.cluster", f"{was.cluster} → {now.cluster}")
    changed = [k for k in ("endpoints", "weight", "lease", "unavailable") if getattr(was, k) != getattr(now, k)]
    changed += [f.name for f in fields(was.traffic) if getattr(was.traffic, f.name) != getattr(now.traffic, f.name)]
    if changed:
        yield Change(Effect.NEUTRAL, path, f"changed {', '.join(changed)}")


def _allow(path: str, was: Expert, now: Expert) -> Iterator[Change]:
    before, after = (e.allow.source if e.allow else None for e in (was, now))
    if before != after:
        effect = Effect.WIDER if after is None else Effect.NARROWER if before is None else Effect.UNCLEAR
        yield Change(effect, path, " → ".join("none" if text is None else f"`{text}`" for text in (before, after)))


def _issuers(old: Policy, new: Policy) -> Iterator[Change]:
    for name in {**old.issuers, **new.issuers}:
        path, was, now = f"issuers {name}", old.issuers.get(name), new.issuers.get(name)
        if was is None:
            yield Change(Effect.WIDER, path, "is now trusted")
        elif now is None:
            yield Change(Effect.NARROWER, path, "is no longer trusted")
        elif was != now:
            yield from _issuer(path, was, now)


def _issuer(path: str, was: Issuer, now: Issuer) -> Iterator[Change]:
    for what, before, after in (
        ("audiences", was.audiences, now.audiences),
        ("algorithms", was.algorithms, now.algorithms),
    ):
        if before != after:
            text = f"{_list(sorted(before))} → {_list(sorted(after))}"
            yield Change(_effect(before, after), f"{path} {what}", text)
    if (was.jwks, was.secret_file) != (now.jwks, now.secret_file):
        yield Change(Effect.UNCLEAR, path, "the source of its keys changed")


def _revoked(old: Policy, new: Policy) -> Iterator[Change]:
    was, now = old.revoked, new.revoked
    for what, before, after in (("jti", was.jti, now.jti), ("sub", was.sub, now.sub)):
        if before != after:
            text = f"{len(after - before)} added, {len(before - after)} removed"
            yield Change(_effect(after, before), f"revoked.{what}", text)
    if was.issued_before != now.issued_before:
        later = (now.issued_before or -inf) > (was.issued_before or -inf)
        text = f"{was.issued_before or 'none'} → {now.issued_before or 'none'}"
        yield Change(Effect.NARROWER if later else Effect.WIDER, "revoked.issued_before", text)


def _gate(old: Policy, new: Policy) -> Iterator[Change]:
    """What can be asked for at all, as experts that no gate rule lets a request name are out of everybody's reach."""
    before, after = _askable(old), _askable(new)
    gained, lost = ((after - before) & old.experts.keys(), (before - after) & new.experts.keys())
    if gained:
        yield Change(Effect.WIDER, "gate", f"requests can now ask for {_names(gained)}")
    if lost:
        yield Change(Effect.NARROWER, "gate", f"requests can no longer ask for {_names(lost)}")
    # Where a request is sent matters to conditions that read it.
    by_request = old.reads_request or new.reads_request
    yield from _edited("gate", _gate_texts(old), _gate_texts(new), Effect.UNCLEAR if by_request else Effect.NEUTRAL)


def _askable(policy: Policy) -> Reach:
    """The experts that some request can ask for, or be downgraded to."""
    asked: set[str] = set()
    for rule in policy.gate:
        match rule.source:
            case Body() | Header():
                return frozenset(policy.experts)
            case DefaultOnly():
                asked.update(rule.default or ())
            case unknown:
                assert_never(unknown)
    return frozenset(asked.union(*(policy.experts[name].downgrade_to for name in asked)))


def _gate_texts(policy: Policy) -> list[str]:
    return [_gate_text(rule) for rule in policy.gate]


def _gate_text(rule: GateRule) -> str:
    match rule.source:
        case Body(pointer):
            source = f"json /{'/'.join(pointer)}"
        case Header(name):
            source = f"header {name}"
        case DefaultOnly():
            source = "the default only"
        case unknown:
            assert_never(unknown)
    default = f", default {_list(rule.default)}" if rule.default else ""
    return f"{'path' if rule.exact else 'prefix'} {rule.match}: {source}{default}"


def _rest(old: Policy, new: Policy) -> Iterator[Change]:
    if old.leeway != new.leeway:
        effect = Effect.WIDER if new.leeway > old.leeway else Effect.NARROWER
        yield Change(effect, "leeway", f"{old.leeway:g}s → {new.leeway:g}s")
    if old.forward_token != new.forward_token:
        yield Change(Effect.NEUTRAL, "forward_token", f"{old.forward_token} → {new.forward_token}".lower())
    if old.log_claims != new.log_claims:
        yield Change(Effect.NEUTRAL, "log_claims", f"{_list(old.log_claims)} → {_list(new.log_claims)}")
    if old.lease != new.lease:
        yield Change(Effect.NEUTRAL, "lease", f"{old.lease:g}s → {new.lease:g}s")


def _edited(path: str, old: Sequence[str], new: Sequence[str], effect: Effect) -> Iterator[Change]:
    """The rules removed and added, with their indexes."""
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            yield from (Change(effect, f"{path}[{i}]", f"removed: {old[i]}") for i in range(a, b))
            yield from (Change(effect, f"{path}[{i}]", f"added: {new[i]}") for i in range(c, d))


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _list(names: Iterable[str]) -> str:
    return f"[{', '.join(names)}]"
