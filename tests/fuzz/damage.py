"""Bytes of a file as a bad disk, a broken transfer or a careless edit leaves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st


@st.composite
def damaged(draw: Callable[..., Any], content: bytes) -> bytes:
    """A file's bytes: cut, flipped, overwritten, removed from, or with some of them twice.

    Args:
        content: The file as it was.

    Returns:
        As it is now.
    """
    start = draw(st.integers(0, max(0, len(content) - 1)))
    end = min(len(content), start + draw(st.integers(1, 40)))
    kind = draw(st.sampled_from(["cut", "flip", "overwrite", "remove", "twice", "value"]))
    if kind == "cut":
        return content[:start]
    if kind == "flip":
        flipped = bytes([content[start] ^ 1 << draw(st.integers(0, 7))]) if content else b"\xff"
        return content[:start] + flipped + content[start + 1 :]
    if kind == "overwrite":
        return content[:start] + draw(st.binary(min_size=1, max_size=40)) + content[end:]
    if kind == "remove":
        return content[:start] + content[end:]
    if kind == "twice":
        return content[:end] + content[start:]
    # A number or a text of JSON or YAML gives way to another value.
    for word in (b": ", b":"):
        place = content.find(word, start)
        if place >= 0:
            stop = min(
                (i for i in (content.find(c, place) for c in (b",", b"\n", b"}")) if i > 0),
                default=len(content),
            )
            value = draw(st.sampled_from([b"null", b"0", b"-1", b"[]", b"{}", b'"x"', b"1e400"]))
            return content[:place] + word + value + content[stop:]
    return content[:start]
