"""Policy text to plain data, with the place of every value, and the mistakes that point there.

What two readers of YAML could take differently is a mistake: anchors, aliases, tags, merge keys, duplicate keys, keys
that are not text, directives, further documents, unusual line breaks. Hostile text is refused within bounded time and memory.
Source: YAML 1.1 as libyaml reads it, by its events, which still tell a written tag from an implied one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Any, NoReturn

import yaml

MAX_BYTES = 8 * 1024 * 1024
MAX_VALUES = 1_000_000  # mappings, lists, keys and scalars together
MAX_DEPTH = 16  # mappings and lists inside each other
MAX_MISTAKES = 100  # listed before the rest is left unread

Path = tuple[str | int, ...]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STR = "tag:yaml.org,2002:str"
# A lone carriage return, NEL, LS and PS break lines for YAML but not for editors: places would be off.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|\r(?!\n)")
_TAB_INDENT = re.compile("^ *\t", re.MULTILINE)

_NONE: Mapping[str | int, Place] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PolicyMistake:
    """One mistake in a policy file. Lines and columns count from 1, in characters; `path` is empty for the whole file."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}: "
        return f"{where}{self.path}: {self.message}" if self.path else where + self.message


class PolicyError(ValueError):
    """A policy file that cannot be used. Its text has one line per mistake, in the order of the file."""

    def __init__(self, errors: tuple[PolicyMistake, ...]) -> None:
        super().__init__("\n".join(map(str, errors)))
        self.errors = errors


@dataclass(slots=True)
class Place:
    """Where a value stands. `spelling` is the text of a scalar, None for a mapping or a list.

    `inner` are the places of a container's values, `keys` those of a mapping's keys. A `spoiled` value has a mistake
    of its own already: what else is said of it would be noise.
    """

    line: int
    column: int
    spelling: str | None = None
    spoiled: bool = False
    keys: Mapping[str | int, Place] = field(default_factory=lambda: _NONE)
    inner: Mapping[str | int, Place] = field(default_factory=lambda: _NONE)

    def find(self, path: Path) -> Place:
        """The place to blame for what is wrong at `path`: a scalar itself, else the key it hangs on.

        A part of the path that names nothing in the file is passed over.
        """
        place, key = self, self
        for part in path:
            if part in place.inner:
                key = place.keys.get(part, place.inner[part])
                place = place.inner[part]
        return place if place.spelling or place.spoiled else key

    def find_key(self, path: Path) -> Place:
        """The place of the key that `path` ends with; of its mapping, if there is no such key."""
        place = self
        for part in path[:-1]:
            place = place.inner.get(part, place)
        return place.keys.get(path[-1]) or self.find(path[:-1])


@dataclass(frozen=True, slots=True)
class Source:
    """A policy text that is one YAML mapping. `digest` names its exact bytes."""

    data: dict[str, Any]
    root: Place
    digest: str


class Mistakes:
    """Collects the mistakes of one file; raises PolicyError in `finish`, or at once when there are too many."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._found: list[PolicyMistake] = []

    def add(self, place: Place, path: Path, message: str) -> None:
        self._found.append(PolicyMistake(self._file, place.line, place.column, rendered(path), message))
        if len(self._found) > MAX_MISTAKES:
            del self._found[MAX_MISTAKES:]
            self._found.append(PolicyMistake(self._file, place.line, place.column, "", "too many mistakes to list"))
            self.finish()

    def fatal(self, line: int, column: int, message: str) -> NoReturn:
        """A mistake after which the text cannot be read any further."""
        self._found.append(PolicyMistake(self._file, line, column, "", message))
        self._raise()

    def finish(self) -> None:
        if self._found:
            self._raise()

    def _raise(self) -> NoReturn:
        raise PolicyError(tuple(sorted(self._found, key=lambda m: (m.line, m.column))))


def read(text: str | bytes, mistakes: Mistakes) -> Source:
    """The data of a policy text. What can be read past is left in `mistakes`; PolicyError for what cannot."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_BYTES:
        mistakes.fatal(1, 1, f"the file is over {MAX_BYTES} bytes long")
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as e:
        good = data[: e.start].decode("utf-8")
        mistakes.fatal(*_place_of(good, len(good)), f"byte 0x{data[e.start]:02x} is not UTF-8")
    if found := _FORBIDDEN.search(decoded):
        what = "a byte order mark" if found[0] == "\ufeff" else f"the character U+{ord(found[0]):04X}"
        mistakes.fatal(*_place_of(decoded, found.start()), f"{what} is not allowed")
    if found := _TAB_INDENT.search(decoded):
        mistakes.fatal(*_place_of(decoded, found.end() - 1), "a tab in the indentation; use spaces")
    return Source(*_Composer(decoded, mistakes).document(), sha256(data).hexdigest()[:12])


def rendered(path: Path) -> str:
    """`experts.A.downgrade_to[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in path)
    return text.removeprefix(".")


def quoted(text: str) -> str:
    """User input for a message: in backticks, on one line, shortened."""
    return f"`{_printable(text)}`"


def found(value: object, place: Place) -> str:
    """What stands in the file, for a message."""
    spelling = quoted(place.spelling or "")
    match value:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case None | "":
            return "nothing"
        case bool():
            return f"the boolean {spelling}"
        case int() | float():
            return f"the number {spelling}"
        case _:
            return spelling


def suggestion(word: str, known: Collection[str]) -> str:
    """`; did you mean ...` if one of the `known` is near, else `; expected ...` if they are few."""
    near = difflib.get_close_matches(word, known, n=1) if len(known) <= 2000 and len(word) <= 64 else []
    if near:
        return f"; did you mean {quoted(near[0])}?"
    return f"; expected {listed(known)}" if 0 < len(known) <= 10 else ""


def listed(words: Collection[str]) -> str:
    """`a`, `b` or `c`."""
    *most, last = map(quoted, words)
    return f"{', '.join(most)} or {last}" if most else last


def _printable(text: str) -> str:
    cut = text if len(text) <= 64 else text[:64] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def _place_of(text: str, index: int) -> tuple[int, int]:
    return text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)


class _Composer:
    """Builds data and places from the events of one document. Its recursion is bounded by MAX_DEPTH."""

    def __init__(self, text: str, mistakes: Mistakes) -> None:
        self._text = text
        self._mistakes = mistakes
        self._loader = _Loader(text)
        self._left = MAX_VALUES

    def document(self) -> tuple[dict[str, Any], Place]:
        try:
            return self._document()
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            line, column = (mark.line, mark.column) if mark else (0, 0)
            if mark and self._text.startswith("\t", mark.index):
                self._mistakes.fatal(line + 1, column + 1, "a tab where YAML allows none; use spaces")
            context = f", {e.context}" if e.context else ""
            self._mistakes.fatal(line + 1, column + 1, f"not valid YAML: {e.problem}{context}")
        finally:
            self._loader.dispose()

    def _document(self) -> tuple[dict[str, Any], Place]:
        self._next()
        start = self._next()
        if isinstance(start, yaml.StreamEndEvent):
            self._mistakes.fatal(1, 1, "the file is empty, expected a mapping")
        if start.version or start.tags:
            self._stop(start, "a YAML directive is not supported")
        event = self._next()
        data, place = self._value(event, ())
        if not isinstance(data, dict):
            self._stop(event, f"found {found(data, place)}, expected a mapping")
        self._next()
        if not isinstance(further := self._next(), yaml.StreamEndEvent):
            self._stop(further, "a second document; a policy is one document")
        return data, place

    def _value(self, event: Any, path: Path) -> tuple[Any, Place]:
        place = Place(event.start_mark.line + 1, event.start_mark.column + 1)
        if isinstance(event, yaml.AliasEvent):
            self._spoil(place, path, f"alias {quoted('*' + event.anchor)} is not supported; write the value out")
            return None, place
        if event.anchor is not None:
            self._mistakes.add(place, path, f"anchor {quoted('&' + event.anchor)} is not supported; remove it")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._spoil(place, path, f"tag {quoted(tag)} is not supported; remove it")
        if isinstance(event, yaml.ScalarEvent):
            place.spelling = event.value
            return self._scalar(event), place
        if len(path) >= MAX_DEPTH:
            self._stop(event, f"nested over {MAX_DEPTH} deep")
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path, place), place
        return self._mapping(path, place), place

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        """A plain scalar as YAML 1.1 takes it, but a time stays text; anything quoted is text."""
        text = event.value
        if not event.implicit[0]:
            return text
        tag = self._loader.resolve(yaml.ScalarNode, text, (True, False))
        if tag == _STR:
            return text
        node = yaml.ScalarNode(tag, text)
        try:
            match tag.rpartition(":")[2]:
                case "null":
                    return None
                case "bool":
                    return self._loader.construct_yaml_bool(node)
                case "int":
                    return self._loader.construct_yaml_int(node)
                case "float":
                    return self._loader.construct_yaml_float(node)
        except ValueError:
            pass  # `0x_`, or more digits than Python converts: no number anybody means
        return text

    def _sequence(self, path: Path, place: Place) -> list[Any]:
        items: list[Any] = []
        places: dict[str | int, Place] = {}
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            index = len(items)
            item, places[index] = self._value(event, (*path, index))
            items.append(item)
        place.inner = places
        return items

    def _mapping(self, path: Path, place: Place) -> dict[str, Any]:
        items: dict[str, Any] = {}
        keys: dict[str | int, Place] = {}
        values: dict[str | int, Place] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key, at = self._key(event, path)
            inside = path if key is None else (*path, key)
            value, value_place = self._value(self._next(), inside)
            if key is None:
                continue
            if key in items:
                self._mistakes.add(at, inside, f"duplicate key; the first is in line {keys[key].line}")
                continue
            items[key], keys[key], values[key] = value, at, value_place
        place.keys, place.inner = keys, values
        return items

    def _key(self, event: Any, path: Path) -> tuple[str | None, Place]:
        """A key and its place; None for one that can stand for nothing."""
        key, at = self._value(event, (*path, "?"))
        if at.spelling is None:
            if not at.spoiled:
                self._spoil(at, path, f"found {found(key, at)} as a key, expected text")
            return None, at
        if at.spelling == "<<" and event.implicit[0]:
            self._spoil(at, path, "merge key `<<` is not supported; write the keys out")
            return None, at
        if not isinstance(key, str):
            advice = "; quote it" if at.spelling else ""
            self._spoil(at, path, f"found {found(key, at)} as a key, expected text{advice}")
        return at.spelling, at

    def _spoil(self, place: Place, path: Path, message: str) -> None:
        place.spoiled = True
        self._mistakes.add(place, path, message)

    def _next(self) -> Any:
        self._left -= 1
        event = self._loader.get_event()
        if self._left < 0:
            self._stop(event, f"over {MAX_VALUES} values in one file")
        return event

    def _stop(self, event: Any, message: str) -> NoReturn:
        self._mistakes.fatal(event.start_mark.line + 1, event.start_mark.column + 1, message)
