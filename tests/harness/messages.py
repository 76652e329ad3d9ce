"""A Hypothesis strategy: messages of envoy-data-plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, get_args, get_type_hints

from hypothesis import strategies as st

_texts = st.text(max_size=12)
_SCALARS: Mapping[str, st.SearchStrategy[Any]] = {
    "string": _texts,
    "bytes": st.binary(max_size=12),
    "bool": st.booleans(),
    "double": st.floats(allow_nan=False),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint32": st.integers(0, 2**32 - 1),
}
_times = st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))


def messages(cls: type, depth: int = 5) -> st.SearchStrategy[Any]:
    """Messages of `cls`, a dataclass of envoy-data-plane: any of its fields set, at most one of each oneof."""
    free: dict[str, st.SearchStrategy[Any]] = {}
    groups: dict[str, list[tuple[str, st.SearchStrategy[Any]]]] = {}
    hints = get_type_hints(cls)
    for field in fields(cls):
        meta = field.metadata["betterproto"]
        values = _field_values(meta, hints[field.name], depth)
        if values is None:
            continue
        if meta.group:
            groups.setdefault(meta.group, []).append((field.name, values))
        else:
            free[field.name] = values
    chosen = [
        st.one_of(st.just({}), *(values.map(lambda v, name=name: {name: v}) for name, values in members))
        for members in groups.values()
    ]
    return st.builds(
        lambda plain, *one: cls(**plain, **{k: v for d in one for k, v in d.items()}),
        st.fixed_dictionaries({}, optional=free),
        *chosen,
    )


def _field_values(meta: Any, hint: Any, depth: int) -> st.SearchStrategy[Any] | None:
    """Values of one field; None where messages would be nested too deep."""
    if meta.proto_type == "map":
        inner = _values(meta.map_meta[1], get_args(hint)[1], depth)
        return None if inner is None else st.dictionaries(_texts, inner, max_size=2)
    if meta.repeated:
        inner = _values(meta, get_args(hint)[0], depth)
        return None if inner is None else st.lists(inner, max_size=2)
    return _values(meta, hint, depth)


def _values(meta: Any, hint: Any, depth: int) -> st.SearchStrategy[Any] | None:
    plain = next((a for a in get_args(hint) if a is not type(None)), hint)
    if plain is datetime:
        return _times
    if meta.proto_type == "message" and meta.unwrap is None:
        return messages(plain, depth - 1) if depth else None
    if meta.proto_type == "enum":
        return st.sampled_from(list(plain))
    return _SCALARS["bool" if meta.unwrap else meta.proto_type]
