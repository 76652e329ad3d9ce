"""From policy text to plain data, with the place of every value, and mistakes that point there.

Anything that two YAML parsers could read differently is a mistake: anchors, aliases, tags, merge keys, duplicate keys,
keys that are not text, directives, further documents, odd line breaks. Hostile text is refused in bounded time and
memory. Source: libyaml's events, which still distinguish explicit tags from implied ones; `scalars` for plain words.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ext_authz.policyfile.scalars import plain

MAX_BYTES = 8 * 1024 * 1024
MAX_VALUES = 500_000  # mappings, lists, keys and scalars together
MAX_DEPTH = 16  # mappings and lists inside each other
MAX_MISTAKES = 100  # listed; then reading stops

Place = tuple[str | int, ...]  # of a value in the file
Position = tuple[int, int]  # line and column, from 1

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A lone carriage return, NEL, LS and PS break lines for YAML but not for editors: places would be wrong.
_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|\r(?!\n)"
)
_TAB_INDENT = re.compile("^ *\t", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PolicyMistake:
    """One mistake. Lines and columns count from 1, in characters; `path` is empty for the file as a whole."""

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


class Places:
    """Where the values of a file are, by path. Flat dicts of tuples, which the garbage collector need not follow."""

    def __init__(self) -> None:
        self.at: dict[Place, Position] = {}  # a scalar's own place, otherwise its key's
        self.keys: dict[Place, Position] = {}
        self.spellings: dict[Place, str] = {}  # of the scalars that are not text
        self.spoiled: set[Place] = set()  # already has a mistake: another report would be noise

    def find(self, path: Place) -> Place:
        """The parts of `path` that the file has; other parts are skipped."""
        found: Place = ()
        for part in path:
            if (*found, part) in self.at:
                found = (*found, part)
        return found


@dataclass(frozen=True, slots=True)
class Source:
    """A policy text that is one YAML mapping. `digest` identifies its exact bytes."""

    data: dict[str, Any]
    places: Places
    digest: str

    def at(self, path: Place) -> Position:
        """The position to report for a mistake at `path`."""
        return self.places.at[self.places.find(path)]

    def found(self, path: Place, value: object) -> str:
        """What is at `path` in the file, for a message."""
        return found(value, self.places.spellings.get(self.places.find(path), ""))


class Mistakes:
    """Collects the mistakes of one file; raises PolicyError in `finish`, or at once when there are too many."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._found: list[PolicyMistake] = []
        self.end = (1, 1)  # the end of the text; libyaml may point past it

    def add(self, at: Position, path: Place, message: str) -> None:
        if len(self._found) == MAX_MISTAKES:
            self.fatal(at, "too many mistakes to list them all")
        self._add(at, rendered(path), message)

    def fatal(self, at: Position, message: str) -> NoReturn:
        """Add a mistake that ends the reading, and raise."""
        self._add(at, "", message)
        self._raise()

    def finish(self) -> None:
        if self._found:
            self._raise()

    def _add(self, at: Position, path: str, message: str) -> None:
        self._found.append(PolicyMistake(self._file, *min(at, self.end), path, message))

    def _raise(self) -> NoReturn:
        raise PolicyError(tuple(sorted(self._found, key=lambda m: (m.line, m.column))))


def file_bytes(path: Path) -> bytes:
    """The bytes of a file, at most one more than `read` accepts; PolicyError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as e:
        raise PolicyError((PolicyMistake(str(path), 1, 1, "", f"cannot be read: {e.strerror}"),)) from None


def read(text: str | bytes, mistakes: Mistakes) -> Source:
    """The data of a policy text. Mistakes go to `mistakes`; those that make reading on impossible raise PolicyError."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_BYTES:
        mistakes.fatal((1, 1), f"the file is over {MAX_BYTES} bytes long")
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as e:
        good = data[: e.start].decode("utf-8")
        mistakes.end = _position(good, len(good))
        mistakes.fatal(mistakes.end, f"byte 0x{data[e.start]:02x} is not UTF-8")
    mistakes.end = _position(decoded, len(decoded))
    if found := _FORBIDDEN.search(decoded):
        what = "a byte order mark" if found[0] == "\ufeff" else f"the character U+{ord(found[0]):04X}"
        mistakes.fatal(_position(decoded, found.start()), f"{what} is not allowed")
    if found := _TAB_INDENT.search(decoded):
        mistakes.fatal(_position(decoded, found.end() - 1), "a tab in the indentation; use spaces")
    composer = _Composer(decoded, mistakes)
    return Source(composer.document(), composer.places, sha256(data).hexdigest()[:12])


def rendered(path: Place) -> str:
    """`experts.A.downgrade_to[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in path)
    return text.removeprefix(".")


def quoted(text: str) -> str:
    """User input for a message: in backticks, on one line, shortened."""
    return f"`{printable(text)}`"


def found(value: object, spelling: str) -> str:
    """What `value` is, for a message; `spelling` is how a boolean or a number is written in the file."""
    match value:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case None | "":
            return "nothing"
        case bool():
            return f"the boolean {quoted(spelling)}"
        case int() | float():
            return f"the number {quoted(spelling)}"
        case _:
            return quoted(str(value))


def suggestion(word: str, known: Collection[str]) -> str:
    """`; did you mean ...` if one of the `known` is close, otherwise `; expected ...` if they are few."""
    near = difflib.get_close_matches(word, known, n=1) if len(known) <= 500 and len(word) <= 64 else []
    if near:
        return f"; did you mean {quoted(near[0])}?"
    return f"; expected {listed(known)}" if 0 < len(known) <= 10 else ""


def listed(words: Collection[str], conjunction: str = "or") -> str:
    """`a`, `b` or `c`."""
    *most, last = map(quoted, words)
    return f"{', '.join(most)} {conjunction} {last}" if most else last


def printable(text: str, most: int = 64) -> str:
    """`text` on one line, cut after `most` characters."""
    if text.isprintable() and len(text) <= most:
        return text
    cut = text if len(text) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def _position(text: str, index: int) -> Position:
    return text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)


def _start(event: Any) -> Position:
    mark = event.start_mark
    return mark.line + 1, mark.column + 1


class _Composer:
    """Builds data and places from the events of one document. Its recursion is bounded by MAX_DEPTH."""

    def __init__(self, text: str, mistakes: Mistakes) -> None:
        self.places = Places()
        self._text = text
        self._mistakes = mistakes
        self._loader = _Loader(text)
        self._next = self._loader.get_event
        self._left = MAX_VALUES

    def document(self) -> dict[str, Any]:
        try:
            return self._document()
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            at = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            if mark and self._text.startswith("\t", mark.index):
                self._mistakes.fatal(at, "a tab where YAML allows none; use spaces")
            context = f", {e.context}" if e.context else ""
            self._mistakes.fatal(at, f"not valid YAML: {e.problem}{context}")
        finally:
            self._loader.dispose()

    def _document(self) -> dict[str, Any]:
        self._next()
        start = self._next()
        if isinstance(start, yaml.StreamEndEvent):
            self._mistakes.fatal((1, 1), "the file is empty, expected a mapping")
        if start.version or start.tags:
            self._mistakes.fatal(_start(start), "a YAML directive is not supported")
        event = self._next()
        data = self._value(event, (), _start(event))
        if not isinstance(data, dict):
            what = found(data, self.places.spellings.get((), ""))
            self._mistakes.fatal(_start(event), f"found {what}, expected a mapping")
        self._next()
        if not isinstance(further := self._next(), yaml.StreamEndEvent):
            self._mistakes.fatal(_start(further), "a second document; a policy is one document")
        return data

    def _value(self, event: Any, path: Place, key: Position | None = None) -> Any:
        at = _start(event)
        self._left -= 1
        if self._left < 0:
            self._mistakes.fatal(at, f"over {MAX_VALUES} values in one file")
        if isinstance(event, yaml.AliasEvent):
            self.places.at[path] = at
            self._spoil(at, path, f"alias {quoted(f'*{event.anchor}')} is not supported; write the value out")
            return None
        if event.anchor is not None:
            self._mistakes.add(at, path, f"anchor {quoted(f'&{event.anchor}')} is not supported; remove it")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._spoil(at, path, f"tag {quoted(tag)} is not supported; remove it")
        if isinstance(event, yaml.ScalarEvent):
            self.places.at[path] = at if event.value or key is None else key
            value = self._scalar(event, path)
            if not isinstance(value, str):
                self.places.spellings[path] = event.value
            return value
        if len(path) >= MAX_DEPTH:
            self._mistakes.fatal(at, f"nested more than {MAX_DEPTH} deep")
        self.places.at[path] = key or at
        return self._sequence(path) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(path)

    def _scalar(self, event: yaml.ScalarEvent, path: Place) -> Any:
        """The value of a scalar. Anything quoted is text."""
        if not event.implicit[0]:
            return event.value
        try:
            return plain(event.value)
        except ValueError as e:
            self._spoil(_start(event), path, f"{quoted(event.value)} {e}")
            return event.value

    def _sequence(self, path: Place) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: Place) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            at = _start(event)
            key = self._key(event, at, path)
            inside = (*path, "?" if key is None else key)
            if key is not None and key in items:
                first, _ = self.places.keys[inside]
                self._mistakes.add(at, inside, f"duplicate key; the first is in line {first}")
                key, inside = None, (*path, "?")
            value = self._value(self._next(), inside, at)
            if key is not None:
                items[key] = value
                self.places.keys[inside] = at
        return items

    def _key(self, event: Any, at: Position, path: Place) -> str | None:
        """The text of a key; None, and a mistake, if it is not plain text: its mapping is not what it seems."""
        if not isinstance(event, yaml.ScalarEvent) or event.anchor is not None or event.tag is not None:
            key = self._value(event, (*path, "?"))
            self.places.spoiled.add(path)
            if isinstance(key, list | dict):
                self._mistakes.add(at, path, f"found {found(key, '')} as a key, expected text")
            return None
        key = self._scalar(event, path)
        if not isinstance(key, str):
            advice = "; quote it" if event.value else ""
            self._spoil(at, path, f"found {found(key, event.value)} as a key, expected text{advice}")
            return None
        if key == "<<" and event.implicit[0]:
            self._spoil(at, path, "merge key `<<` is not supported; write the keys out")
            return None
        return key

    def _spoil(self, at: Position, path: Place, message: str) -> None:
        self.places.spoiled.add(path)
        self._mistakes.add(at, path, message)
