"""Changed files, as hypothesis draws them: of JSON's values and structure, and of bytes."""

import json
from typing import Any

from hypothesis import strategies as st

ODD = [
    *("null", "true", "false", "0", "-1", "1", "-0.0", "0.5", "1e400", "-1e400", "1e-320", "NaN"),
    *("Infinity", "-Infinity", "2147483647", "4294967296", "9223372036854775808", "1" + "0" * 40),
    *("1" + "0" * 400, "9" * 5000, '""', '"a"', '"1"', '"byte"', '"\\ud800"', '"\\u0000"', '"é"'),
    *('"../outside/secret"', '"../outside"', '".."', '"/etc/passwd"', '"~"', '"\\\\"', '"%s{0}"'),
    *("[]", "[[]]", "[1]", '["a"]', "[null]", "{}", '{"a": 1}', '{"content": 5}', "", "nul", "'a'"),
    *("[" * 500 + "]" * 500, "[" * 100_000, '{"a":' * 100_000, '"' + "a" * 100_000 + '"'),
]
"""Texts in the place of a JSON value; some are no JSON."""


class Object(list):
    """The members of a JSON object, each [key, value]; a key can repeat."""


class Raw(str):
    """A text in the place of a JSON value."""


def parse(text: str) -> Any:
    """JSON with objects as `Object`."""
    return json.loads(text, object_pairs_hook=lambda pairs: Object(map(list, pairs)))


def render(value: Any) -> str:
    """The inverse of `parse`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Object):
        return "{" + ", ".join(f"{render(key)}: {render(member)}" for key, member in value) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(render, value))}]"
    return json.dumps(value)


@st.composite
def odd_values(draw: st.DrawFn) -> Raw:
    if draw(st.booleans()):
        return Raw(draw(st.sampled_from(ODD)))
    values = st.integers() | st.floats() | st.text(max_size=8) | st.integers(0, 300)
    return Raw(json.dumps(draw(values | st.lists(values, max_size=3))))


@st.composite
def similar_values(draw: st.DrawFn, value: Any) -> Any:
    """A value of the same type, which a reader looks at more closely than at one of another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from([0, 1, value + 1, -value, 1000, 1 << 31]) | st.integers(0, 300))
    if isinstance(value, float):
        return draw(st.sampled_from([0.0, -value, 1e-30, 1e30]) | st.floats(0, 1))
    if isinstance(value, str):
        texts = [
            "",
            "a",
            value + " ",
            value * 2,
            value[:-1],
            value.upper(),
            "</s>",
            "<s>",
            "(a+a+)+b",
            "(?=)",
        ]
        return draw(st.sampled_from(texts) | st.text(max_size=3))
    if isinstance(value, list):
        kept = draw(st.integers(0, len(value)))
        return type(value)(value[:kept] + value[:1])
    return draw(odd_values())


@st.composite
def changed_json(draw: st.DrawFn, text: str) -> str:
    """JSON with one to three members replaced, removed, repeated, renamed, wrapped or exchanged."""
    root = [parse(text)]
    ways = [*["replace"] * 3, *["similar"] * 6, "remove", "repeat", "rename", "wrap", "copy"]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = []
        node = root
        while True:
            index = draw(st.integers(0, len(node) - 1))
            places.append((node, index))
            value = node[index][1] if isinstance(node, Object) else node[index]
            inner = isinstance(value, list) and value
            if not inner or draw(st.integers(0, 19 if node is root else 5)) == 3:
                break
            node = value
        node, index = places[-1]
        member = node[index]
        how = draw(st.sampled_from(ways))
        if how == "remove" and node is not root:
            del node[index]
            if not node:
                break
        elif how == "repeat" and node is not root:
            new = draw(odd_values())
            node.insert(index, [member[0], new] if isinstance(node, Object) else member)
        elif how == "rename" and isinstance(node, Object):
            node[index] = [draw(odd_values() | st.sampled_from(["", "model"])), member[1]]
        else:
            if how == "wrap":
                new = [value] if draw(st.booleans()) else Object([["a", value]])
            elif how == "similar":
                new = draw(similar_values(value))
            elif how == "copy":
                new = Raw(render(draw(st.sampled_from(places))[0][0]))
            else:
                new = draw(odd_values())
            node[index] = [member[0], new] if isinstance(node, Object) else new
        if isinstance(root[0], Raw) or not root[0]:
            break
    return render(root[0])


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes, last: int | None = None) -> bytes:
    """Bytes cut, flipped, zeroed, inserted, removed or appended, at most at the place `last`."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(data), last or len(data))))
        size = draw(st.integers(1, 16))
        how = draw(st.sampled_from(["cut", "flip", "zero", "insert", "remove", "append"]))
        if how == "cut":
            del data[at:]
        elif how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "zero":
            data[at : at + size] = bytes(size)
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif how == "remove":
            del data[at : at + size]
        elif how == "append":
            data += draw(st.binary(max_size=64))
    return bytes(data)


@st.composite
def changed_file(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """A file with one kind of change; of safetensors, the header and its length are changed."""
    structural = draw(st.integers(0, 3)) != 2
    if name.endswith(".safetensors"):
        length = int.from_bytes(content[:8], "little")
        if not structural:
            return draw(changed_bytes(content, 8 + length))
        header = draw(changed_json(content[8 : 8 + length].decode())).encode()
        sizes = st.sampled_from([0, 1, length, 1 << 26, (1 << 63) - 1, (1 << 64) - 1])
        size = draw(sizes) if draw(st.integers(0, 5)) == 0 else len(header)
        return size.to_bytes(8, "little") + header + content[8 + length :]
    if not structural:
        return draw(changed_bytes(content))
    if name.endswith(".jsonl"):
        lines = content.decode().splitlines()
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = draw(changed_json(lines[at]))
        return "\n".join(lines).encode()
    return draw(changed_json(content.decode())).encode()
