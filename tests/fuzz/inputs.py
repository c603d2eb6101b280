"""Strategies of bad bytes: good inputs with parts replaced, and bytes of no form."""

import gzip
import json
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Bytes = st.SearchStrategy[bytes]
Draw = Callable[[st.SearchStrategy], Any]


class Raw(str):
    """Text that stands in a JSON document as it is, valid or not."""


class Pairs(list):
    """An object as [key, value] pairs, which may repeat a key."""


# JSON values that readers tend to mistake, as text.
VALUES = (
    *("null", "true", "false", "0", "-0.0", "1", "-1", "2", "3.5", "1e308", "5e-324"),
    *("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e-400", "1.0", "01", "+1"),
    *("2147483647", "2147483648", "4294967296", "9223372036854775807", "1e30"),
    *("9223372036854775808", "-9223372036854775809", "1" + "0" * 307, "9" * 400),
    *("9" * 4000, "9" * 5000, "100000000", "1099511627776", "-5"),
    *('""', '"a"', '" "', '"0"', '"true"', '"\\u0000"', '"\\ud800"', '"\\udc00x"'),
    *('"é🙂"', '"\\n"', '"a/b"', '"../x"', '"/"', '"."', '"none"', '"stage:x"', '"{"'),
    *('"' + "x" * 300 + '"', '"' + "y " * 5000 + '"', '"gs://b/x"', '"hf:x"'),
    *("[]", "{}", "[[]]", "[{}]", "[null]", '{"": 0}', '{"a": 1}', "[1, 2]", "[true]"),
    *("[1, [2]]", '["a"]', '[["a", "b"]]', "[[1, 2], [3]]", '{"role": "user"}'),
    *("[" * 150 + "]" * 150, "[" * 990 + "]" * 990, "[" * 200_000, '{"a":' * 200_000),
    *("", ",", "'a'", "undefined", "// x", "[1,]", '{"a" 1}', '"a', "{", "]"),
)
NUMBERS = tuple(text for text in VALUES if text.lstrip("-")[:1].isdigit())
STRINGS = tuple(text for text in VALUES if text.startswith('"'))
KEYS = ("", "a", "x" * 300, "\0", "stage", "kind", "é", "__class__", "step", "a.b/c")
# Numbers that a length or a count in a binary format may be replaced by.
COUNTS = (0, 1, 2, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63)
GARBAGE = (
    *(b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x80"),
    *(b"\r", b"\r\n", b"\n", b"\n\n", b" ", b"\t", b",", b"}", b"]", b'"', b"{", b"["),
    *(b"\xe2\x80\xa8", b"\xc2\x85", b"\x0b", b"\x0c", b"\x1c", b"NaN", b"null\n"),
)
FORMS = (
    lambda text: text.decode("utf-8", "replace").encode("utf-16"),
    lambda text: text.decode("utf-8", "replace").encode("utf-32"),
    lambda text: b"\xef\xbb\xbf" + text,
    gzip.compress,
    lambda text: b"[" + text + b"]",
    lambda text: text + text,
    lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: b"\n\n" + text + b"\n\n",
    lambda text: text.replace(b"\n", b"\r"),
)


# ------------------------------------------------------------------ JSON


def json_bytes(seeds: Sequence[bytes]) -> Bytes:
    """Returns a strategy of JSON documents with some values replaced, and of damaged ones."""
    documents = [json.loads(seed, object_pairs_hook=_pairs) for seed in seeds]

    @st.composite
    def edited(draw: Draw) -> bytes:
        document = draw(st.sampled_from(documents))
        for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
            document = _edit(draw, document)
        return _text(document).encode("utf-8", "surrogatepass")

    return _mixed(edited(), seeds)


def lines_bytes(seeds: Sequence[bytes]) -> Bytes:
    """Returns a strategy of JSON lines: lines edited, repeated, removed and damaged."""
    kept = [line for seed in seeds for line in seed.splitlines() if line.strip()]
    line = weighted({json_bytes(kept): 1, st.sampled_from(kept): 1})
    join = st.sampled_from((*[b"\n"] * 9, b"\r\n", b"\n\n", b"\r", b"\x1c"))
    end = st.sampled_from((*[b"\n"] * 5, b"", b"\r\n", b" ", b"\0"))
    lines = st.builds(
        lambda lines, by, last: by.join(lines) + last,
        st.lists(line, min_size=1, max_size=5),
        join,
        end,
    )
    return weighted({lines: 9, _mixed(lines, seeds): 1})


def _pairs(pairs: list[tuple[str, Any]]) -> Pairs:
    return Pairs([list(pair) for pair in pairs])


def _edit(draw: Draw, node: Any) -> Any:
    """Returns a JSON value in which one part, at any depth, is another."""
    is_object = isinstance(node, Pairs)
    if isinstance(node, list) and node and draw(st.integers(0, 3)):
        i = draw(st.integers(0, len(node) - 1))
        changed = type(node)(node)
        if is_object:
            changed[i] = [node[i][0], _edit(draw, node[i][1])]
        else:
            changed[i] = _edit(draw, node[i])
        return changed
    if isinstance(node, list) and draw(st.booleans()):
        return _edit_members(draw, node)
    return Raw(draw(st.sampled_from(_likely(node) if draw(st.booleans()) else VALUES)))


def _likely(node: Any) -> Sequence[str]:
    """Returns values of the type of a JSON value, which pass the first checks."""
    if isinstance(node, str):
        return STRINGS
    if isinstance(node, int | float) and not isinstance(node, bool):
        return NUMBERS
    return VALUES


def _edit_members(draw: Draw, node: Any) -> Any:
    """Returns an object or array with a member removed, added, renamed or repeated."""
    changed = type(node)(node)
    if node:
        i = draw(st.integers(0, len(node) - 1))
        how = draw(st.sampled_from(("remove", "repeat", "often", "rename", "wrap")))
        if how == "remove":
            del changed[i]
        elif how == "repeat":
            changed.insert(i, node[i])
        elif how == "often":
            changed[i:i] = [node[i]] * 300
        elif how == "rename" and isinstance(node, Pairs):
            changed[i] = [draw(st.sampled_from(KEYS)), node[i][1]]
        else:
            return [node]
        return changed
    added = Raw(draw(st.sampled_from(VALUES)))
    is_object = isinstance(node, Pairs)
    changed.append([draw(st.sampled_from(KEYS)), added] if is_object else added)
    return changed


def _text(node: Any) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, Pairs):
        members = [f"{json.dumps(key)}: {_text(value)}" for key, value in node]
        return "{" + ", ".join(members) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_text, node)) + "]"
    return json.dumps(node)


# ------------------------------------------------------------------ bytes


def binary_bytes(seeds: Sequence[bytes]) -> Bytes:
    """Returns a strategy of files of a binary format, damaged; their openings most of all."""
    return _damaged(st.sampled_from(seeds))


def _mixed(edited: Bytes, seeds: Sequence[bytes]) -> Bytes:
    """Returns a strategy of edited documents, most of them whole, and of damaged seeds."""
    form = st.sampled_from(FORMS)
    good = st.sampled_from(seeds)
    reformed = st.builds(lambda text, change: change(text), good, form)
    damaged = _damaged(edited | good)
    return weighted({edited: 14, damaged: 3, reformed: 2, st.binary(max_size=60): 1})


def weighted(strategies: dict[st.SearchStrategy, int]) -> st.SearchStrategy:
    """Returns one of several strategies, as often as their numbers say."""
    # `one_of` counts a strategy that is repeated once.
    choices = [one for one, weight in strategies.items() for _ in range(weight)]
    return st.integers(0, len(choices) - 1).flatmap(choices.__getitem__)


@st.composite
def _damaged(draw: Draw, contents: Bytes) -> bytes:
    content = draw(contents)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        content = _damage(draw, content)
    return content


def _damage(draw: Draw, content: bytes) -> bytes:
    """Returns bytes with one place cut, overwritten, repeated or filled."""
    last = max(0, len(content) - 1)
    ends = st.sampled_from((last, min(last, 40), min(last, 400)))
    at = draw(st.integers(0, draw(ends)))
    how = draw(st.sampled_from(("flip", "cut", "number", "number", "insert", "repeat")))
    if how == "flip":
        return (
            content[:at] + draw(st.binary(min_size=1, max_size=1)) + content[at + 1 :]
        )
    if how == "cut":
        return content[:at]
    if how == "number":
        width = draw(st.sampled_from((4, 8)))
        number = draw(st.sampled_from(COUNTS)) % 2 ** (8 * width)
        return content[:at] + number.to_bytes(width, "little") + content[at + width :]
    if how == "insert":
        return content[:at] + draw(st.sampled_from(GARBAGE)) + content[at:]
    end = at + draw(st.integers(1, 64))
    return content[:end] + content[at:end] * draw(st.sampled_from((1, 3, 50)))


def fields_bytes(
    seeds: Sequence[bytes], fields: Callable[[bytes], list[tuple[int, int]]]
) -> Bytes:
    """Returns a strategy of binary files in which numbers are others, and of damaged files.

    Args:
      fields: returns the (offset, width) of the numbers in a good file.
    """
    places = [(seed, place) for seed in seeds for place in fields(seed)]

    @st.composite
    def edited(draw: Draw) -> bytes:
        content, (at, width) = draw(st.sampled_from(places))
        number = draw(st.sampled_from(COUNTS) | st.integers(0, 20))
        number %= 2 ** (8 * width)
        return content[:at] + number.to_bytes(width, "little") + content[at + width :]

    return weighted({edited(): 4, binary_bytes(seeds): 1})


def sized_json_bytes(seeds: Sequence[bytes]) -> Bytes:
    """Returns a strategy of safetensors files: 8 bytes of length, JSON, then tensors."""
    headers, bodies = [], []
    for seed in seeds:
        end = 8 + int.from_bytes(seed[:8], "little")
        headers.append(seed[8:end])
        bodies.append(seed[end:])
    whole = st.builds(
        lambda header, body: len(header).to_bytes(8, "little") + header + body,
        json_bytes(headers),
        st.sampled_from(bodies),
    )
    return weighted({whole: 2, binary_bytes(seeds): 1})


# ------------------------------------------------------------------ texts

ODD_TEXT = (
    *("\0", "\n", "\r", "\t", " ", "\x1b[31m", "é", "🙂", "\ufeff", "\u2028", "$x^2$"),
    *("'", '"', "\\", "/", "//", "..", ".", "-", "--", "=", "==", ":", "::", ",", "%"),
    *("[", "]", "{", "}", "(", ")", "*", "**", "?", "&", "#", "~", "~nobody", "|", "@"),
    *("0", "-1", "1e9", "1e400", "nan", "inf", "9" * 30, "9" * 5000, "x" * 300),
    *("None", "True", "[" * 300, "{split}", "{0}", "%s", "gs://", "s3://b", "file:///"),
)


def text_bytes(
    seeds: Sequence[str], parts: Sequence[str] = (), ends: str = ""
) -> Bytes:
    """Returns a strategy of texts in which parts are put, removed, doubled and exchanged.

    Args:
      parts: pieces of the language that the texts are in.
      ends: a pattern of where such a piece ends; most are then put between two others.
    """
    pieces = (*parts, *parts, *parts, *ODD_TEXT) if parts else ODD_TEXT
    start = weighted({st.sampled_from(seeds): 4, st.sampled_from(pieces): 1})

    @st.composite
    def edited(draw: Draw) -> bytes:
        text = draw(start)
        for _ in range(draw(st.sampled_from((1, 1, 2, 3, 4)))):
            at = draw(st.integers(0, len(text)))
            end = at + draw(st.sampled_from((0, 0, 1, 3, 10)))
            if ends and draw(st.integers(0, 4)):
                between = [match.end() for match in re.finditer(ends, text)]
                at = end = draw(st.sampled_from([0, *between]))
            text = text[:at] + draw(st.sampled_from(pieces)) + text[end:]
        return text.encode("utf-8", "surrogatepass")

    free = st.text(string.printable, max_size=40).map(str.encode)
    encoded = [seed.encode() for seed in seeds]
    return weighted({edited(): 8, free: 1, _damaged(st.sampled_from(encoded)): 1})


def words_bytes(seeds: Sequence[Sequence[str]], words: Sequence[str]) -> Bytes:
    """Returns a strategy of command lines, one word per line."""
    odd = text_bytes(words).map(lambda content: content.decode("utf-8", "replace"))
    one = weighted({st.sampled_from(words): 4, st.sampled_from(ODD_TEXT): 1, odd: 1})
    more = st.lists(one, max_size=4)
    lines = st.builds(lambda seed, rest: [*seed, *rest], st.sampled_from(seeds), more)
    return lines.map(lambda words: SEPARATOR.join(words).encode("utf-8", "replace"))


SEPARATOR = "\x1e"
