"""What fuzzing changes: bytes, JSON and YAML, each with the oddities that its readers are known to stumble over.

Every function takes the random numbers that it uses, so that one seed gives one sequence of cases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

MAX_CASE = 48 * 1024  # bytes
MAX_DEPTH = 60  # of a tree that is changed; nothing deeper is walked
MAX_TREE = 12 * 1024  # bytes of a text that is parsed into a tree

_SPANS = (1, 1, 2, 3, 8, 40)
_BYTES = (
    b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b"\r", b"\r\n", b"\t", b" ", b'"', b"'", b"\\", b",", b";", b":", b".",
    b"/", b"%2f", b"=", b"-", b"_", b"{", b"}", b"[", b"]", b"&", b"*", b"<<", b"?", b"#", b"\xef\xbb\xbf", b"\xc2\x85",
    b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\xf0\x9f\x98\x80",
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a\0b", "\n", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ufeff", "\u202e", "\ud800", "\udfff\ud800", "ſ",
    "\u212a", "ß", "İ", "é", "e\u0301", "😀", "٣", "=", "<<", "~", "null", "none", "true", "no", "0", "-1", "1e400",
    "A,B", "A;w=1", "expert-c", "x" * 65, "x" * 1025, "%00", "${a}", "{{a}}", "'", '"', "\\", "\\u0041", "../../etc",
    "claims", "request", "deny", "__class__", "toString", "constructor",
)  # fmt: skip


class Raw(str):
    """Text that is written into JSON or YAML as it is."""

    __slots__ = ()


class Pairs(list[Any]):
    """The members of an object as `[name, value]`, in their order; a name may come twice."""

    __slots__ = ()


# ---- bytes ----


def damaged(random: Random, data: bytes, other: bytes) -> bytes:
    """`data` with one to six changes that know nothing of its form; `other` is a case to take pieces from."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        data = _damaged(random, data, other)
    return data[:MAX_CASE]


def _damaged(random: Random, data: bytes, other: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice(_SPANS))
    match random.randrange(8):
        case 0 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + random.choice(_BYTES) + data[end:]
        case 2:
            return data[:at] + data[end:]
        case 3:
            return data[:at] + data[at:end] * random.choice((2, 3, 50, 1000)) + data[end:]
        case 4:
            return data[:at]
        case 5 if other:
            start = random.randrange(len(other))
            return data[:at] + other[start : start + random.choice((4, 20, 200))] + data[end:]
        case 6:
            return data[:at] + random.randbytes(random.choice((1, 2, 4, 16))) + data[end:]
        case _:
            return data[:at] + random.choice(_BYTES) * random.choice((1, 2, 100, 3000)) + data[at:]


# ---- trees ----


def tree(value: Any) -> Any:
    """A parsed value with its objects as Pairs."""
    if isinstance(value, dict):
        return Pairs([str(k), tree(v)] for k, v in value.items())
    return [tree(v) for v in value] if isinstance(value, list) else value


def written(node: Any, space: str = "") -> str:
    """The JSON text of a tree, with `space` after each separator."""
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        members = (f"{_name(k)}:{space}{written(v, space)}" for k, v in node)
        return "{" + f",{space}".join(members) + "}"
    if isinstance(node, list):
        return "[" + f",{space}".join(written(v, space) for v in node) + "]"
    return json.dumps(node, ensure_ascii=space != "" or _lone(node), default=str)


def _name(name: Any) -> str:
    return str(name) if isinstance(name, Raw) else json.dumps(name, ensure_ascii=_lone(name))


def _lone(value: Any) -> bool:
    """Whether it holds half a surrogate pair, which no UTF-8 text can hold unescaped."""
    return isinstance(value, str) and re.search("[\ud800-\udfff]", value) is not None


def changed(random: Random, node: Any, odd: Any) -> Any:
    """A tree with one to four changes to its values, names and shape; `odd(random)` makes a strange scalar."""
    holder = [node]
    for _ in range(random.choice((1, 1, 2, 4))):
        slots = list(_slots(holder, 0))
        holder_of, index = random.choice(slots)
        _change(random, holder_of, index, slots, odd)
    return holder[0]


def _slots(parent: list[Any], depth: int) -> Iterator[tuple[list[Any], int]]:
    """Every place of a value: a list and an index into it."""
    for index, child in enumerate(parent):
        yield (child, 1) if isinstance(parent, Pairs) else (parent, index)
        inner = child[1] if isinstance(parent, Pairs) else child
        if isinstance(inner, list) and depth < MAX_DEPTH:
            yield from _slots(inner, depth + 1)


def _change(random: Random, parent: list[Any], index: int, slots: Sequence[tuple[list[Any], int]], odd: Any) -> None:
    value = parent[index]
    from_list, at = random.choice(slots)
    match random.randrange(10):
        case 0 | 1 | 2:
            parent[index] = odd(random)
        case 3:
            parent[index] = Raw(written(from_list[at]))
        case 4:
            parent[index] = _wrapped(random, value)
        case 5 if isinstance(value, Pairs) and value:
            name, inner = random.choice(value)
            value.insert(random.randrange(len(value) + 1), [name, random.choice((inner, odd(random)))])
        case 6 if isinstance(value, Pairs) and value:
            pair = random.choice(value)
            pair[0] = _renamed(random, str(pair[0]))
        case 7 if isinstance(value, list) and value:
            value.pop(random.randrange(len(value)))
        case 8 if isinstance(value, list) and value and not isinstance(value, Pairs):
            value.extend([value[0]] * random.choice((1, 63, 64, 65, 300)))
        case _:
            parent[index] = odd_number(random) if isinstance(value, int | float) else random.choice(TEXTS)


def _wrapped(random: Random, value: Any) -> Any:
    depth = random.choice((1, 1, 2, 15, 16, 17, 31, 33, 1000, 5000))
    opened, closed = random.choice((("[", "]"), ('{"a":', "}"), ('{"a":[', "]}"), ("[0,", "]")))
    return Raw(opened * depth + written(value) + closed * depth)


def _renamed(random: Random, name: str) -> Any:
    new = random.choice(
        (name.swapcase(), name.title(), f"{name} ", f"{name}\0", name * 100, name.replace("k", "\u212a"))
    )
    escaped = Raw('"' + "".join(f"\\u{ord(c) & 0xFFFF:04x}" for c in name) + '"')
    return random.choice((new, escaped, random.choice(TEXTS)))


def odd_number(random: Random) -> Raw:
    """A number that some reader takes for another, cannot hold, or needs long to convert."""
    digits = random.choice("19") * random.choice((1, 16, 19, 20, 39, 309, 400, 401, 4300, 4301, 9000))
    return Raw(
        random.choice(
            (
                digits, f"-{digits}", f"{digits}.5", f"1e{digits[:6]}", f"1E-{digits[:6]}", "-0", "-0.0", "1e400", "-1e400",
                "1e-400", "9007199254740993", "9223372036854775808", "18446744073709551616", "1.0", "0.1e1", f"0.{digits}",
                "2147483648", "4294967296", "NaN", "Infinity", "-Infinity", "01", "+1", "1.", ".5", "0x10", "1_000",
            )
        )
    )  # fmt: skip


def odd_json(random: Random) -> Any:
    """A strange JSON value."""
    match random.randrange(6):
        case 0 | 1:
            return odd_number(random)
        case 2 | 3:
            return random.choice(TEXTS)
        case 4:
            return random.choice((None, True, False, [], Pairs(), [[]], [None], Raw(""), Raw("nul"), Raw("'a'")))
        case _:
            text = random.choice(("\\ud800", "\\udc00\\ud800", "\\u0000", "\\x", "\\", "\t", "\\ud83d\\ude00", "\\uD8"))
            return Raw(f'"{text * random.choice((1, 1, 300))}"')


def changed_json(random: Random, data: bytes, other: bytes, odd: Any = odd_json) -> bytes:
    """A JSON text with changes to its values, names and shape; bytes are damaged where it is no JSON."""
    try:
        value = json.loads(data) if len(data) <= MAX_TREE else None
    except (ValueError, RecursionError):
        value = None
    if value is None or random.random() < 0.15:
        return damaged(random, data, other)
    text = written(changed(random, tree(value), odd), random.choice(("", " ")))
    return text.encode("utf-8", "surrogatepass")[:MAX_CASE]


# ---- YAML ----

_SCALAR = re.compile(rb"(?<=[:\[,{ -] )[^\s,\]}{\[#][^,\]}\n#]*|(?<=[\[{,])[^\s,\]}{\[:]+")
_YAML_TEXTS = (
    b"~", b"null", b"=", b"<<", b"yes", b"off", b"'no'", b"!!str a", b"!!binary aGk=", b"!!python/name:os.system",
    b"&a b", b"*a", b"[]", b"{}", b"[[]]", b"{a: }", b"? a", b"- a", b"|\n a", b">-\n a", b"'", b'"', b'"\\x00"', b'"\\ud800"',
    b'"\\uDFFF"', b'"\\U0010FFFF"', b'"\\U00110000"', b'"\\N\\_\\L\\P"', b"%YAML 1.1", b"---", b"...", b"@a", b"`a`", b"a: b",
    b"2001-01-01", b"2001-13-45", b"2001-01-01T00:00:00Z", b"9999-12-31T23:59:59-23:59", b"0001-01-01T00:00:00+23:59",
    b"'2001-02-30T00:00:00Z'", b"'0001-01-01T00:00:00+23:59'", b"'9999-12-31T23:59:60Z'", b"'2001-01-01T24:00:00Z'",
    b"1s", b"1h", b"999999999h", b"0ms", b"0.5s", b"\xd9\xa31s", b"'[::]:1'", b"'[::ffff:1.2.3.4]:80'", b"'1.2.3.4.5:80'",
    b"127.0.0.1:1", b"127.1:1", b"0x7f.1:1", b"a:65536", b"a:00080", b"'[fe80::1%25lo]:1'", b"https://a", b"https://[::1",
    b"https://a:99999/", b"https://a\\b/", b"https://\xe2\x84\xaa/", b"http://127.0.0.1:0/", b"https://a:b@c/", b"//a",
)  # fmt: skip
_CEL = (
    "claims", "request", "claims.a", "request.headers['x']", "claims['a'].b.c", "true", "null", "1", "1u", "1.5", "-1",
    "9223372036854775807", "9223372036854775808", "1e999", "0xffffffffffffffffff", "'a'", '"\\x00"', "b'\\xff'", "r'\\'",
    "'\\ud800'", "'''a'''", "[1,2]", "{'a': 1}", "has(claims.a)", "size(claims)", "claims.a in ['b']", "a.b(c)", "!true",
    "claims.a.matches('(a+)+$')", "claims.a.matches('[')", "'x' in request.headers", "claims.all(x, x)", "int('x')",
    "[1].map(x, x)", "[[1]].map(x, x.map(y, y))", "claims.a.exists(claims, true)", "duration('1s')", "timestamp('x')",
    "string(1)", "bytes('a')", "type(1)", "1 / 0", "1 % 0", "request.path", "dyn(1)", "// c", "@in", "`a`", "a ? b : c",
)  # fmt: skip


def odd_yaml(random: Random) -> Any:
    """A strange YAML scalar, on one line."""
    size = random.choice((1, 2, 16, 60, 173, 174, 175, 176, 700, 1200))
    match random.randrange(12):
        case 0:
            return Raw(":".join(["1"] * size) + random.choice(("", ".5", ".", ":59", ":60", "e5")))
        case 1:
            return Raw(random.choice(("0x", "-0x", "0b", "0", "0o", "+")) + random.choice("1f7_") * size * 6)
        case 2:
            return Raw(
                random.choice((".inf", "-.inf", "+.INF", ".nan", ".NaN", "1e999", "-1e999", "1.e+999", "._", "1_."))
            )
        case 3:
            return odd_number(random)
        case 4:
            return Raw("'" + random.choice(TEXTS).replace("'", "''") + "'")
        case 5:
            return odd_json(random)
        case 6 | 7:
            return Raw(json.dumps(odd_cel(random)))
        case 8:
            opened, closed = random.choice((("[", "]"), ("{a: ", "}"), ("[{a: ", "}]"), ("[? ", "]"), ("{", "}")))
            return Raw(opened * size + closed * random.choice((size, size - 1, 0)))
        case 9:
            return Raw(
                random.choice(("x", "é", "😀", "a ", "0", "''", "\\")) * random.choice((63, 64, 65, 1023, 1025, 5000))
            )
        case _:
            return Raw(random.choice(_YAML_TEXTS).decode())


def odd_cel(random: Random) -> str:
    """A condition made of fragments that may or may not fit together."""
    text = random.choice(_CEL)
    for _ in range(random.choice((0, 1, 2, 5))):
        sign = random.choice((" && ", " || ", " == ", " in ", " + ", " / ", ".", ", ", " ? ", " : ", "\n", "\0", "["))
        text += sign + random.choice(_CEL)
    opened, closed = random.choice(
        (("(", ")"), ("[", "]"), ("!", ""), ("-", ""), ("{1: ", "}"), ("size(", ")"), ("(", ""))
    )
    depth = random.choice((0, 0, 0, 1, 31, 32, 33, 500, 2000))
    return opened * depth + text + closed * depth


def changed_yaml(random: Random, data: bytes, other: bytes) -> bytes:
    """A YAML text with other scalars, keys, lines or indentation."""
    if random.random() < 0.2:
        return damaged(random, data, other)
    for _ in range(random.choice((1, 1, 2, 3))):
        data = _changed_lines(random, data, other) if random.random() < 0.3 else _changed_scalar(random, data)
    return data[:MAX_CASE]


def _changed_scalar(random: Random, data: bytes) -> bytes:
    found = list(_SCALAR.finditer(data))
    if not found:
        return data + b" "
    at = random.choice(found)
    odd = odd_yaml(random)
    text = (str(odd) if isinstance(odd, Raw) else written(odd)).encode("utf-8", "surrogatepass")
    return data[: at.start()] + text + data[at.end() :]


def _changed_lines(random: Random, data: bytes, other: bytes) -> bytes:
    lines, more = data.split(b"\n"), other.split(b"\n")
    at = random.randrange(len(lines))
    match random.randrange(8):
        case 0:
            lines.insert(at, lines[at])
        case 1:
            lines[at] = b" " * random.choice((1, 2, 4)) + lines[at]
        case 2:
            del lines[at]
        case 3:
            lines.insert(at, random.choice(more))
        case 4:
            lines[at] = lines[at].replace(b":", random.choice((b"", b" :", b":\t", b"::", b": :", b": &a", b": !t")), 1)
        case 5:
            lines.insert(at, b" " * random.randrange(6) + random.choice(_YAML_TEXTS))
        case 6:
            key = random.choice(
                (b"k" * 1030, b"? k", b"''", b"~", b"1", b"<<", b"[a]", b"{a: b}", b"\xf0\x9f\x98\x80", b"*k")
            )
            lines.insert(at, b" " * random.randrange(6) + key + random.choice((b": 1", b":", b"")))
        case _:
            lines[at] = lines[at].replace(b"  ", b"\t", 1) + random.choice((b"\r", b"\xc2\x85", b" #", b"\0", b""))
    return b"\n".join(lines)
