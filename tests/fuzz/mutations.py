"""Ways in which a file comes to be something else than what its reader expects."""

from __future__ import annotations

import copy
import json
import zlib
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    0.5,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 1000,
    "1",
    "../../etc/passwd",
    "\udc80",
    "\0",
    [],
    {},
    [[]],
    [0, 0],
    {"a": 1},
]


class Content(bytes):
    """The content of a file, whose repr is short."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes, {self[:20]!s}…, CRC {zlib.crc32(self):08x}>"


DEEP = [
    Content(content)
    for content in (b"[" * 20_000, b"{" * 20_000, b'{"a":' * 20_000, b'{"a":' * 5_000 + b"1" + b"}" * 5_000)
]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the bytes with one to four mutations: flipped bits, cuts, splices, runs of one byte."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        length = draw(st.sampled_from([1, 2, 4, 8, 64]))
        match draw(st.sampled_from(["flip", "cut", "remove", "repeat", "run", "insert", "number"])):
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "remove":
                del data[at : at + length]
            case "repeat":
                source = draw(st.integers(0, len(data) - 1))
                data[at:at] = data[source : source + length]
            case "run":
                data[at : at + length] = bytes([draw(st.sampled_from([0, 0x20, 0x7F, 0xFF]))]) * length
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "number":
                digits = [place for place, byte in enumerate(data) if chr(byte).isdecimal()]
                if digits:
                    place = draw(st.sampled_from(digits))
                    data[place : place + 1] = draw(st.sampled_from([b"-1", b"999999999", b"1e400", b"0.5", b"9" * 400]))
    return Content(data)


@st.composite
def altered(draw: st.DrawFn, values: Any) -> Any:
    """Return plain data with one or two of its parts replaced by something odd, left out or doubled."""
    whole = {"": copy.deepcopy(values)}
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(whole))
        container, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["odd", "odd", "odd", "without", "doubled", "swapped"])):
            case "odd":
                container[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
            case "without" if container is not whole:
                del container[key]
            case "doubled" if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            case "swapped":
                other, place = draw(st.sampled_from(places))
                container[key] = copy.deepcopy(other[place])
    return whole[""]


def altered_json(text: str) -> st.SearchStrategy[bytes]:
    """Return a JSON text that is altered, damaged, or nested deeply."""
    values = json.loads(text)
    as_json = altered(values).map(lambda value: Content(json.dumps(value).encode()))
    return st.one_of(as_json, as_json, damaged(text.encode()), st.sampled_from(DEEP))


def _places(container: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) for all that is in it."""
    keys = list(container) if isinstance(container, dict) else range(len(container))
    found = [(container, key) for key in keys]
    for key in keys:
        if isinstance(container[key], (dict, list)):
            found += _places(container[key])
    return found
