"""Text on its way into a program: UTF-8 in rows of bytes, and what a token is (docs/artifact.md, "Tokens")."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.errors import ExampleError
from evensong.wire.program import Split

Bytes = npt.NDArray[np.uint8]

PUNCTUATION = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
SPACES = b"\t\n\v\f\r "


def is_text(array: npt.NDArray[Any]) -> TypeGuard[npt.NDArray[Any]]:
    """Whether ``array`` holds strings and nothing else."""
    return array.dtype.kind == "U" or (
        array.dtype.kind == "O" and array.size > 0 and all(isinstance(item, str) for item in array.flat)
    )


def encode_text(texts: npt.ArrayLike, max_bytes: int) -> Bytes:
    """Strings ``[...]`` as UTF-8 in uint8 ``[..., max_bytes]``, padded with zeros.

    A longer text loses its end, from the first code point that does not fit. A character U+0000 ends its text, since
    zero bytes are padding. Raises :class:`ExampleError` for what is not a string, or not Unicode (a lone surrogate).
    """
    array = np.asarray(texts)
    if not is_text(array):
        raise ExampleError("this is not text", expected="strings", got=array.dtype)
    rows = b"".join(_row(str(text), max_bytes) for text in array.flat)
    return np.frombuffer(rows, np.uint8).reshape(*array.shape, max_bytes).copy()


def utf8(text: str) -> bytes:
    """``text`` in UTF-8; a lone surrogate, which has no such form, raises :class:`ExampleError`."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ExampleError("a text is not Unicode", got=error) from None


def _row(text: str, size: int) -> bytes:
    data = utf8(text)
    end = min(len(data), size)
    while end < len(data) and end and data[end] & 0xC0 == 0x80:  # in the middle of a code point
        end -= 1
    return data[:end].ljust(size, b"\0")


def words(text: bytes, *, lower: bool, strip: bool, split: int, ngrams: int) -> Iterator[bytes]:
    """The tokens of ``text`` in the order of TOKENIZE: each, then it and the one before it joined by a space, ..."""
    text = text.partition(b"\0")[0]
    if lower:
        text = text.lower()  # of bytes: ASCII letters only
    if strip:
        text = text.translate(None, PUNCTUATION)
    if split == Split.WHITESPACE:
        tokens = text.split()
    elif split == Split.CHARACTERS:
        tokens = re.findall(rb"(?s).[\x80-\xbf]*", text)
    else:
        tokens = [text] if text else []
    for end in range(1, len(tokens) + 1):
        for count in range(1, min(ngrams, end) + 1):
            yield b" ".join(tokens[end - count : end])
