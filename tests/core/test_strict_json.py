"""JSON that has only one meaning."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ext_authz.core.strict_json import loads

GOOD: list[tuple[str, bytes, Any]] = [
    ("object", b'{"a": [1, 2.5, "x", true, null]}', {"a": [1, 2.5, "x", True, None]}),
    ("scalar", b'"x"', "x"),
    ("white space around", b" \t\r\n1 \n", 1),
    ("UTF-8", '"é\U0001f600"'.encode(), "é\U0001f600"),
    ("escapes", rb'"\u00e9\ud83d\ude00\n"', "é\U0001f600\n"),
    ("the same name in two objects", b'[{"a": 1}, {"a": 2}, {"b": {"a": 3}}]', [{"a": 1}, {"a": 2}, {"b": {"a": 3}}]),
    ("brackets in strings are no nesting", b'"' + b"[" * 100 + b'"', "[" * 100),
    ("wide is not deep", b"[" + b"[],{}," * 50 + b"1]", [[], {}] * 50 + [1]),
    ("the largest float", b"1.7976931348623157e308", 1.7976931348623157e308),
    ("a float too small is zero", b"1e-999", 0.0),
    ("an integer of 400 digits", b"9" * 400, int("9" * 400)),
    ("a negative integer of 400 digits", b"-" + b"9" * 400, -int("9" * 400)),
]


@pytest.mark.parametrize(("data", "value"), [row[1:] for row in GOOD], ids=[row[0] for row in GOOD])
def test_strict_json_is_read_as_python_reads_it(data: bytes, value: Any) -> None:
    """JSON by RFC 8259 that has one meaning."""
    assert loads(data) == value


BAD = [
    # name, text, what the error says
    ("empty", b"", "is not JSON: Expecting value"),
    ("blank", b" ", "is not JSON: Expecting value"),
    ("cut short", b'{"a": ', "is not JSON: Expecting value"),
    ("two values", b"{} {}", "is not JSON: Extra data"),
    ("trailing comma", b"[1,]", "is not JSON"),
    ("comment", b"/**/1", "is not JSON"),
    ("single quotes", b"{'a': 1}", "is not JSON"),
    ("leading zero", b"01", "is not JSON"),
    ("no digits after the point", b"5.", "is not JSON"),
    ("plus sign", b"+1", "is not JSON"),
    ("full-width digit", "\uff11".encode(), "is not JSON"),
    ("no-break space", b"\xc2\xa01", "is not JSON"),
    ("control character in a string", b'"\x01"', "is not JSON: Invalid control character"),
    ("unknown escape", b'"\\x41"', "is not JSON"),
    ("NUL", b"\x00", "is not JSON"),
    ("NUL after the value", b"1\x00", "is not JSON: Extra data"),
    ("byte order mark", b"\xef\xbb\xbf{}", "starts with a byte order mark"),
    ("UTF-16", "{}".encode("utf-16"), "is not UTF-8"),
    ("latin-1", b'"\xe9"', "is not UTF-8"),
    ("overlong UTF-8", b'"\xc0\xaf"', "is not UTF-8"),
    ("surrogate in UTF-8", b'"\xed\xa0\x80"', "is not UTF-8"),
    ("NaN", b"NaN", "holds NaN"),
    ("Infinity", b"[Infinity]", "holds Infinity"),
    ("-Infinity", b'{"a": -Infinity}', "holds -Infinity"),
    ("a float too large", b"1e400", "holds a number that is too large"),
    ("a negative float too large", b"[-1e400]", "holds a number that is too large"),
    ("an integer of 401 digits", b"9" * 401, "holds a number of over 400 digits"),
    ("a negative integer of 401 digits", b"-" + b"9" * 401, "holds a number of over 400 digits"),
    ("an integer of 100,000 digits", b"9" * 100_000, "holds a number of over 400 digits"),
    ("duplicate name", b'{"a": 1, "a": 1}', "has a duplicate name"),
    ("duplicate name by an escape", b'{"a": 1, "\\u0061": 1}', "has a duplicate name"),
    ("duplicate name deep down", b'{"x": [{"y": {"a": 1, "b": 2, "a": 3}}]}', "has a duplicate name"),
    ("duplicate empty name", b'{"": 1, "": 2}', "has a duplicate name"),
    ("lists 17 deep", b"[" * 17 + b"]" * 17, "is nested more than 16 deep"),
    ("objects 17 deep", b'{"a":' * 17 + b"1" + b"}" * 17, "is nested more than 16 deep"),
    ("mixed 17 deep, after a wide start", b"[[],{}," + b'{"a":[' * 8 + b"]}" * 8 + b"]", "is nested more than 16 deep"),
    ("100,000 brackets, not closed", b"[" * 100_000, "is nested more than 16 deep"),
    ("100,000 brackets, closed", b"[" * 100_000 + b"]" * 100_000, "is nested more than 16 deep"),
    ("100,000 objects", b'{"a":' * 100_000, "is nested more than 16 deep"),
]


@pytest.mark.parametrize(("data", "error"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_anything_else_is_a_value_error(data: bytes, error: str) -> None:
    """In one short line that says what is wrong."""
    with pytest.raises(ValueError, match=error) as raised:
        loads(data)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 100


@pytest.mark.parametrize("depth", [1, 2, 16, 32])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")], ids=["lists", "objects"])
def test_the_depth_bound_is_exact(opening: bytes, closing: bytes, depth: int) -> None:
    """`max_depth` levels are read, and one more is refused."""

    def nested(levels: int) -> bytes:
        return opening * levels + b"1" + closing * levels

    loads(nested(depth), depth)
    with pytest.raises(ValueError, match=f"is nested more than {depth} deep"):
        loads(nested(depth + 1), depth)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)))
@example(b"\xef\xbb\xbf")
def test_any_bytes_give_a_value_or_a_value_error(data: bytes) -> None:
    """And what is accepted has the value that Python's json reads."""
    try:
        value = loads(data)
    except ValueError:
        return
    assert value == json.loads(data)


NUMBERS = [
    "-0", "-0.0", "0.0", "1.0", "1e2", "1E400", "1e-400", "0.1", "1e22", "100000000000000000000.0", "5e-324",
    "9223372036854775807", "-9223372036854775808", "18446744073709551615", "18446744073709551616", "1" + "0" * 400,
    "123456789012345678901234567890", "0.30000000000000004", "2.2250738585072014e-308", "NaN", "Infinity", "01", "1.",
]  # fmt: skip
STRINGS = [
    r'"\u0061"',
    '"a"',
    r'"\/"',
    r'"\ud83d\ude00"',
    r'"\ud83d"',
    '"\u2028"',
    '"\x7f"',
    r'"\u0001"',
    r'"\b"',
    '""',
]
LEAVES = st.sampled_from(NUMBERS + STRINGS + ["true", "null"])
TEXTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda parts: f"[{','.join(parts)}]"),
        st.lists(st.tuples(st.sampled_from(STRINGS), inner), max_size=4).map(
            lambda members: "{" + ",".join(f"{name}:{value}" for name, value in members) + "}"
        ),
    ),
    max_leaves=8,
)


@given(TEXTS)
@example('{"a":1,"a":1}')
@example('{"a":{"a":1},"b":[{"a":1}]}')
def test_a_text_means_the_same_with_a_blank_before_it(text: str) -> None:
    """`loads` reads texts without white space in another way."""

    def outcome(data: bytes) -> str:
        try:
            return repr(loads(data))
        except ValueError as e:
            return str(e).partition(" at character ")[0]

    assert outcome(text.encode()) == outcome(b" " + text.encode())


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=12, max_size=40), st.integers(0, 6))
def test_errors_do_not_quote_the_text(secret: str, kind: int) -> None:
    """It may be the claims of a token."""
    quoted = json.dumps(secret)
    broken = [
        f"{{{quoted}: 1, {quoted}: 2}}", f"[{quoted}", f"{quoted} {quoted}", f"{{{quoted}}}",
        f"[{quoted}, NaN]", f"[1e999, {quoted}]", "[" * 17 + quoted + "]" * 17,
    ]  # fmt: skip
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is checked below
        loads(broken[kind].encode())
    assert secret not in str(raised.value)
