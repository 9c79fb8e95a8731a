"""What is known and by which id: the tables behind every lookup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evensong.mobile_runtime.errors import CompileError
from evensong.mobile_runtime.preprocessing.learned import Learned
from evensong.mobile_runtime.text import utf8
from evensong.mobile_runtime.twin_ops_input import token_hashes
from evensong.wire.program import Split

_MOST_WORDS = 1 << 17  # beyond, hardly any salt gives all words different hashes of 32 bits
_MOST_SALTS = 1000
_WORDS_AT_ONCE = 4096


class IdTable(Learned):
    """Keys of 32 bits and their ids, as LOOKUP takes them: ``table [K, 2]``, keys ascending."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0, 2, dtype=torch.int64), persistent=False)

    def _set_table(self, keys: npt.NDArray[np.int64], ids: Iterable[int]) -> None:
        rows = sorted(zip(keys.tolist(), ids, strict=True))
        self.table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)


class Integers(IdTable):
    """Integers that are known; the i-th has the id ``first + i``."""

    values: Tensor

    def __init__(self, values: Sequence[int], first: int) -> None:
        super().__init__()
        self.first = first
        self.register_buffer("values", torch.zeros(0, dtype=torch.int64))
        self.set(values)

    def set(self, values: Sequence[int]) -> None:
        if len(set(values)) != len(values) or not all(-(1 << 31) <= value < 1 << 31 for value in values):
            raise CompileError("this is no vocabulary", expected="different integers of 32 bits", got=list(values)[:10])
        self.values = torch.tensor(list(values), dtype=torch.int64)
        self._loaded()

    def _loaded(self) -> None:
        self._set_table(self.values.cpu().numpy(), range(self.first, self.first + len(self.values)))


class Words(IdTable):
    """Words that are known, kept as UTF-8 with a zero byte behind each; the i-th has the id ``first + i``.

    The keys are their hashes under ``salt``, the first that gives all words different ones. With ``padding``, 0 (no
    token) has the id 0.
    """

    encoded: Tensor

    def __init__(self, words: Sequence[str], first: int, *, padding: bool = False) -> None:
        super().__init__()
        self.first = first
        self.padding = padding
        self.salt = 0
        self.register_buffer("encoded", torch.zeros(0, dtype=torch.uint8))
        self.set(words)

    def __len__(self) -> int:
        return max(0, self.table.shape[0] - self.padding)

    def all(self) -> list[str]:
        """The words in the order of their ids."""
        return [word.decode() for word in self._bytes()]

    def set(self, words: Sequence[str]) -> None:
        distinct = len(set(words)) == len(words) <= _MOST_WORDS
        if not distinct or any("\0" in word for word in words) or (self.padding and "" in words):
            raise CompileError(
                "this is no vocabulary", expected=f"at most {_MOST_WORDS} different words", got=len(words)
            )
        data = b"".join(utf8(word) + b"\0" for word in words)
        self.encoded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        self._loaded()

    def _bytes(self) -> list[bytes]:
        return self.encoded.cpu().numpy().tobytes().split(b"\0")[:-1]

    def _loaded(self) -> None:
        words = self._bytes()
        self.salt, keys = _distinct_hashes(words)
        ids = [*range(self.first, self.first + len(words))]
        if self.padding and words:
            keys, ids = np.append(keys, 0), [*ids, 0]
        self._set_table(keys, ids)


def _distinct_hashes(words: list[bytes]) -> tuple[int, npt.NDArray[np.int64]]:
    """The first salt under which no two of ``words`` have the same hash, and those hashes."""
    for salt in range(_MOST_SALTS):
        hashes = _hashes(words, salt)
        if len(np.unique(hashes)) == len(words):
            return salt, hashes
    raise CompileError("no salt tells all words of the vocabulary apart", fix="Take fewer words.")


def _hashes(words: list[bytes], salt: int) -> npt.NDArray[np.int64]:
    hashes = np.zeros(len(words), np.int64)
    order = sorted(range(len(words)), key=lambda index: len(words[index]))  # words side by side are of one length
    for start in range(0, len(words), _WORDS_AT_ONCE):
        part = order[start : start + _WORDS_AT_ONCE]
        size = max(1, len(words[part[-1]]))
        rows = b"".join(words[index].ljust(size, b"\0") for index in part)
        texts = np.frombuffer(rows, np.uint8).reshape(len(part), size)
        hashes[part] = token_hashes(texts, 1, lower=0, strip=0, split=Split.NONE, ngrams=1, salt=salt)[:, 0]
    return hashes


def room(max_ids: int | None, reserved: int) -> int | None:
    """How many words may be known where ``max_ids`` ids may exist in all; None for any number."""
    if max_ids is not None and max_ids <= reserved:
        raise CompileError("max_ids leaves no room for a vocabulary", expected=f"more than {reserved}", got=max_ids)
    return None if max_ids is None else max_ids - reserved


def most_frequent(counts: Mapping[Any, int], most: int | None) -> list[Any]:
    """The keys of ``counts`` from the most frequent to the least, the smaller first among equals; at most ``most``."""
    if not counts:
        raise CompileError("there is nothing to learn from", expected="at least one value or word")
    return sorted(counts, key=lambda key: (-counts[key], key))[:most]
