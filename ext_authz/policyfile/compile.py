"""The compiler: from a file of valid form to a Policy.

It resolves references, compiles the conditions, and reports what refers to nothing or contradicts the rest of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ext_authz.core import jwk
from ext_authz.core.condition import VARIABLES, Condition, compile_condition
from ext_authz.core.condition_reads import Members, headers, headers_named, members
from ext_authz.core.headers import REQUESTED_CLUSTER, TARGET_CLUSTER, never_there
from ext_authz.core.policy import (
    Body,
    ClearanceRule,
    DefaultOnly,
    Expert,
    GateRule,
    Header,
    Health,
    Issuer,
    JwksSource,
    Outlier,
    Policy,
    Revoked,
    Traffic,
)
from ext_authz.policyfile import schema, values
from ext_authz.policyfile.source import Mistakes, Place, Source, listed, printable, quoted, rendered, suggestion

DEFAULT_GATE = (GateRule("/", exact=False, source=Header("x-expert-names")),)
MAX_SECRET = 4096  # bytes
MAX_MACRO_RULES = 16  # clearance rules

_TRAFFIC_KEYS = frozenset(f.name for f in fields(Traffic))
_DEFAULT_TRAFFIC = Traffic()

# Placeholders for mappings with mistakes, so that the rest of the file can be checked. Their own validators must accept
# them.
HOLES: dict[str, Any] = {
    "issuers": schema.Issuer.model_construct({"jwks"}, algorithms=[]),
    "clearance": schema.ClearanceRule.model_construct(),
    "experts": schema.Expert.model_construct(),
    "gate": schema.GateRule.model_construct({"path"}, default=["A"]),
}


class Compiler:
    """Compiles the parts of a file that are well formed, and adds mistakes of meaning to `mistakes`."""

    def __init__(
        self, file: schema.File, broken: frozenset[str], source: Source, mistakes: Mistakes, base: Path, key_files: bool
    ) -> None:
        self._file = file
        self._broken = broken
        self._source = source
        self._mistakes = mistakes
        self._base = base.absolute()
        self._key_files = key_files
        self._tiers = {name: level for level, name in reversed(list(enumerate(file.tiers)))}

    def policy(self) -> Policy:
        file = self._file
        self._once(("tiers",), file.tiers)
        self._once(("log_claims",), file.log_claims)
        experts = {e.name: e for e in self._experts()}
        clearance = tuple(self._clearance())
        whens = [rule.when for rule in clearance]
        allow = [e.allow for e in experts.values() if e.allow is not None]
        self._few_macros(whens)
        return Policy(
            tiers=tuple(file.tiers),
            experts=MappingProxyType(experts),
            issuers=MappingProxyType({i.issuer: i for i in self._issuers()}),
            anonymous=None if file.anonymous == "deny" else self._tier(file.anonymous, ("anonymous",)),
            clearance=clearance,
            gate=tuple(self._gate()) or DEFAULT_GATE,
            revoked=Revoked(frozenset(file.revoked.jti), frozenset(file.revoked.sub), file.revoked.issued_before),
            leeway=file.leeway,
            forward_token=file.forward_token,
            log_claims=tuple(file.log_claims),
            digest=self._source.digest,
            clusters=MappingProxyType({e.cluster: e.name for e in experts.values()}),
            claims_read=_read(partial(members, variable="claims"), [*whens, *allow]),
            headers_read=_read(headers, allow),
            max_entries=min((c.max_entries for c in (*whens, *allow) if c.max_entries is not None), default=None),
            reads_request=any("request" in condition.reads for condition in allow),
            lease=file.lease,
        )

    def _experts(self) -> Iterator[Expert]:
        owners: dict[str, str] = {}
        for name, entry in self._well_formed("experts"):
            path = ("experts", name)
            tier = self._tier(entry.tier, (*path, "tier"))
            self._once((*path, "endpoints"), map(values.address, entry.endpoints))
            self._downgrades((*path, "downgrade_to"), name, entry)
            yield Expert(
                name=name,
                tier=tier,
                cluster=self._cluster((*path, "cluster"), name, entry, owners),
                endpoints=tuple(entry.endpoints),
                weight=entry.weight,
                downgrade_to=tuple(entry.downgrade_to),
                allow=self._condition(entry.allow, (*path, "allow"), VARIABLES) if entry.allow else None,
                traffic=_traffic(entry),
                line=self._line(path),
                lease=entry.lease,
                unavailable=entry.unavailable,
            )

    def _cluster(self, path: Place, name: str, entry: schema.Expert, owners: dict[str, str]) -> str:
        cluster = entry.cluster or name.lower().replace("_", "-")
        if not entry.cluster and not values.is_cluster(cluster):
            self._add(path, f"required key is missing: the name {quoted(name)} cannot become a cluster name")
        elif cluster in owners:
            self._add(path, f"cluster {quoted(cluster)} already belongs to expert {quoted(owners[cluster])}")
        elif cluster != name and cluster in self._file.experts:
            self._add(path, f"cluster {quoted(cluster)} is the name of another expert")
        owners.setdefault(cluster, name)
        return cluster

    def _downgrades(self, path: Place, name: str, entry: schema.Expert) -> None:
        self._known(path, entry.downgrade_to)
        hole = HOLES["experts"]
        own = self._tiers.get(entry.tier)
        for index, other in enumerate(entry.downgrade_to):
            target = self._file.experts.get(other, hole)
            if other == name:
                self._add((*path, index), f"expert {quoted(other)} cannot stand in for itself")
            elif target is not hole and own is not None and self._tiers.get(target.tier, own) > own:
                needs = f"needs tier {quoted(target.tier)}, above {quoted(entry.tier)}"
                self._add((*path, index), f"expert {quoted(other)} {needs}")

    def _clearance(self) -> Iterator[ClearanceRule]:
        for index, rule in self._well_formed("clearance"):
            path = ("clearance", index)
            tier = self._tier(rule.tier, (*path, "tier"))
            if when := self._condition(rule.when, (*path, "when"), frozenset({"claims"})):
                yield ClearanceRule(when, tier)

    def _few_macros(self, conditions: Sequence[Condition]) -> None:
        """All of them may be evaluated for one token."""
        with_macros = [c for c in conditions if c.max_entries is not None]
        if len(with_macros) > MAX_MACRO_RULES:
            last = with_macros[MAX_MACRO_RULES]
            message = f"over {MAX_MACRO_RULES} rules whose condition has a macro (`exists`, `filter`, ...)"
            self._mistakes.add((last.line, 1), ("clearance",), message)

    def _gate(self) -> Iterator[GateRule]:
        earlier: list[tuple[int, GateRule]] = []
        for index, entry in self._well_formed("gate"):
            path = ("gate", index)
            self._known((*path, "default"), entry.default)
            rule = GateRule(
                match=entry.path or entry.prefix,
                exact=bool(entry.path),
                source=_source(entry),
                default=tuple(entry.default) or None,
                line=self._line(path),
            )
            for place, other in earlier:
                if other.covers(rule.match) and (rule.exact or not other.exact):
                    self._add(path, f"never reached: gate[{place}] covers {quoted(rule.match)} before it")
                    break
            earlier.append((index, rule))
            yield rule

    def _issuers(self) -> Iterator[Issuer]:
        seen: set[str] = set()
        for index, entry in self._well_formed("issuers"):
            path = ("issuers", index)
            if entry.issuer in seen:
                self._add((*path, "issuer"), f"issuer {quoted(entry.issuer)} is defined twice")
            seen.add(entry.issuer)
            self._once((*path, "audiences"), entry.audiences)
            self._once((*path, "algorithms"), entry.algorithms)
            algorithms = frozenset(entry.algorithms)
            if entry.secret_file:
                self._keys((*path, "secret_file"), entry.secret_file, algorithms)
            elif entry.jwks.file:
                self._keys((*path, "jwks", "file"), entry.jwks.file, algorithms)
            yield Issuer(
                issuer=entry.issuer,
                audiences=frozenset(entry.audiences),
                algorithms=algorithms,
                jwks=self._jwks(entry.jwks) if entry.jwks else None,
                secret_file=self._absolute(entry.secret_file),
            )

    def _jwks(self, entry: schema.Jwks) -> JwksSource:
        return JwksSource(
            file=self._absolute(entry.file),
            url=entry.url or None,
            refresh=entry.refresh,
            ca_file=self._absolute(entry.ca_file),
            bearer_token_file=self._absolute(entry.bearer_token_file),
        )

    def _keys(self, path: Place, name: str, algorithms: frozenset[str]) -> None:
        """Check that a secret fits every algorithm, or that a JWKS has a key for at least one."""
        if not self._key_files:
            return
        file = self._base / name
        try:
            if not file.is_file():
                raise ValueError("is not a file" if file.exists() else "no such file")
            with file.open("rb") as stream:
                data = stream.read(max(MAX_SECRET, jwk.MAX_BYTES) + 1)
            if path[-1] == "secret_file":
                if len(data) > MAX_SECRET:
                    raise ValueError(f"holds over {MAX_SECRET} bytes")
                if short := sorted(algorithms - jwk.secret_key(data).algorithms):
                    raise ValueError(f"the secret is too short for {quoted(short[0])}")
            elif (found := jwk.parse_jwks(data).keys) and not any(key.algorithms & algorithms for key in found):
                raise ValueError(f"holds no key for {listed(sorted(algorithms))}")
        except OSError as e:
            self._add(path, f"{quoted(name)}: cannot be read: {e.strerror}")
        except ValueError as e:
            self._add(path, f"{quoted(name)}: {e}")

    def _condition(self, text: str, path: Place, allowed: frozenset[str]) -> Condition | None:
        where = rendered(path)
        try:
            condition = compile_condition(text, where, self._line(path), allowed)
        except ValueError as e:
            reason = printable(str(e), 300)
            self._add(path, f"not a condition: {reason[:1].lower()}{reason[1:]}")
            return None
        for name in sorted(headers_named(condition)):
            if why := never_there(name):
                self._add(path, f"reads header {quoted(name)}, {why}")
        return condition

    def _tier(self, name: str, path: Place) -> int:
        if name not in self._tiers and "tiers" not in self._broken:
            self._add(path, f"unknown tier {quoted(name)}{suggestion(name, self._file.tiers)}")
        return self._tiers.get(name, 0)

    def _known(self, path: Place, names: Sequence[str]) -> None:
        self._once(path, names)
        for index, name in enumerate(names):
            if name not in self._file.experts and "experts" not in self._broken:
                hint = suggestion(name, self._file.experts)
                self._add((*path, index), f"unknown expert {quoted(name)}{hint}")

    def _once(self, path: Place, items: Iterable[str]) -> None:
        seen: set[str] = set()
        for index, item in enumerate(items):
            if item in seen:
                self._add((*path, index), f"{quoted(item)} is listed twice")
            seen.add(item)

    def _well_formed(self, section: str) -> Iterator[tuple[Any, Any]]:
        """The entries of a section that are well formed, each with its key or index."""
        items = getattr(self._file, section)
        entries = items.items() if isinstance(items, dict) else enumerate(items)
        return ((key, entry) for key, entry in entries if entry is not HOLES[section])

    def _absolute(self, name: str) -> str | None:
        return str(self._base / name) if name else None

    def _add(self, path: Place, message: str) -> None:
        self._mistakes.add(self._source.at(path), path, message)

    def _line(self, path: Place) -> int:
        return self._source.at(path)[0]


def _read(of: Callable[[Condition], Members], conditions: Iterable[Condition]) -> Members:
    """What any of the conditions reads; None if it may be anything."""
    found: set[str] = set()
    for condition in conditions:
        read = of(condition)
        if read is None:
            return None
        found |= read
    return frozenset(found)


def _traffic(entry: schema.Expert) -> Traffic:
    given = {key: getattr(entry, key) for key in entry.model_fields_set & _TRAFFIC_KEYS}
    if not given:
        return _DEFAULT_TRAFFIC
    if entry.health and "health" in given:
        given["health"] = Health(entry.health.path, entry.health.interval)
    if entry.outlier and "outlier" in given:
        given["outlier"] = Outlier(entry.outlier.consecutive_5xx, entry.outlier.base_ejection)
    return Traffic(**given)


def _source(entry: schema.GateRule) -> Body | Header | DefaultOnly:
    if entry.pointer:
        return Body(_tokens(entry.pointer))
    if entry.header:
        return Header(REQUESTED_CLUSTER if entry.header == TARGET_CLUSTER else entry.header)
    return DefaultOnly()


def _tokens(pointer: str) -> tuple[str, ...]:
    """The reference tokens of a JSON pointer (RFC 6901 §4)."""
    return tuple(t.replace("~1", "/").replace("~0", "~") for t in pointer[1:].split("/"))
