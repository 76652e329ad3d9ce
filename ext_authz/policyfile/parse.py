"""From policy text to Policy: read, validate, compile. Reports all mistakes at once; a file with one gives no policy.

Source of the format: docs/policy.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ext_authz.core.policy import Policy
from ext_authz.policyfile import schema, source
from ext_authz.policyfile.compile import HOLES, Compiler
from ext_authz.policyfile.source import Mistakes, PolicyError, PolicyMistake, Source

_STAND_INS = {"version": 1, "tiers": ["low"], "experts": {"A": HOLES["experts"]}}


def load_policy(path: Path) -> Policy:
    """The policy in the file at `path`; PolicyError if it cannot be read or has a mistake."""
    return parse_policy(source.file_bytes(path), str(path), path.parent)


def parse_policy(
    text: str | bytes, name: str = "policy.yaml", base: Path = Path(), *, key_files: bool = True
) -> Policy:
    """The policy that `text` defines; PolicyError, with every mistake that can be found, if there are any.

    `name` is the file's name in messages. Paths in the policy are relative to `base`. With `key_files` False, key files
    are not read.
    """
    try:
        return _parse(text, name, base, key_files)
    except PolicyError:
        raise
    except Exception as e:
        message = f"cannot be read: {type(e).__name__}, please report the file"
        raise PolicyError((PolicyMistake(name, 1, 1, "", message),)) from e


def _parse(text: str | bytes, name: str, base: Path, key_files: bool) -> Policy:
    mistakes = Mistakes(name)
    read = source.read(text, mistakes)
    file, broken = _validated(read, mistakes)
    policy = Compiler(file, broken, read, mistakes, base, key_files).policy()
    mistakes.finish()
    return policy


def _validated(read: Source, mistakes: Mistakes) -> tuple[schema.File, frozenset[str]]:
    """The validated file, with placeholders for mistakes, and the top-level keys that had to be left out."""
    try:
        return schema.File.model_validate(read.data), frozenset()
    except ValidationError as e:
        errors = e.errors(include_url=False)
    for error in errors:
        path = error["loc"]
        at = read.at(path)
        if path[-1] == "[key]" or error["type"] == "extra_forbidden":
            path = read.places.find(path)
            at = read.places.keys[path]
        about = path[:-1] if error["type"] == "missing" else path
        if about not in read.places.spoiled:
            mistakes.add(at, path, schema.explain(error, read.found(path, error["input"])))
    data, broken = _patched(read.data, errors)
    try:
        return schema.File.model_validate(data), broken
    except ValidationError:
        mistakes.finish()
        raise


def _patched(whole: dict[str, Any], errors: Sequence[ErrorDetails]) -> tuple[dict[str, Any], frozenset[str]]:
    data: dict[str, Any] = {k: v.copy() if isinstance(v, dict | list) else v for k, v in whole.items()}
    broken = set()
    for error in errors:
        section, *inner = map(str, error["loc"])
        items = data.get(section)
        if section not in HOLES or not inner:
            data.pop(section, None)
            broken.add(section)
        elif isinstance(items, list):
            items[int(inner[0])] = HOLES[section]
        elif isinstance(items, dict):
            if inner[-1] == "[key]":
                items.pop(inner[0], None)
            elif inner[0] in items:
                items[inner[0]] = HOLES[section]
    if not data.get("experts"):
        data.pop("experts", None)
        broken.add("experts")
    return _STAND_INS | data, frozenset(broken)
