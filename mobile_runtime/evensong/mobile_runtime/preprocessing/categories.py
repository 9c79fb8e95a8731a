"""Categories: integers and strings to ids, by a vocabulary or by a hash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from evensong.mobile_runtime.errors import CompileError
from evensong.mobile_runtime.preprocessing.calls import lookup, tokenize
from evensong.mobile_runtime.preprocessing.learned import fail_unlearned
from evensong.mobile_runtime.preprocessing.vocabulary import Integers, Words, most_frequent, room
from evensong.wire.program import Split


class Hashing(nn.Module):
    """Integers ``[...]`` or texts (uint8 ``[..., bytes]``, see :func:`encode_text`) to int64 ids 0 to ``bins - 1``.

    Nothing is learned and nothing stored; different values may share an id. ``salt`` makes another function of it.
    """

    def __init__(self, bins: int, *, salt: int = 0) -> None:
        super().__init__()
        if bins < 1:
            raise CompileError("Hashing needs at least one bin", got=bins)
        self.bins = bins
        self.salt = salt

    def forward(self, x: Tensor) -> Tensor:
        return lookup(_keys_of_texts(x, 0) if x.dtype == torch.uint8 else x, None, 0, self.bins, self.salt)


class IntegerLookup(nn.Module):
    """Integers ``[...]`` to int64 ids: the i-th of the vocabulary gets ``unknown + i``, any other value one of the ids
    0 to ``unknown - 1`` by its hash.

    The vocabulary is given, or learned by :meth:`adapt`: the most frequent values, the smaller first among equals, so
    that there are at most ``max_ids`` ids, those for what is unknown included.
    """

    def __init__(self, vocabulary: Sequence[int] = (), *, unknown: int = 1, max_ids: int | None = None) -> None:
        super().__init__()
        self.unknown = _at_least_one(unknown)
        self.most = room(max_ids, unknown)
        self.known = Integers(vocabulary, unknown)

    @property
    def vocabulary(self) -> list[int]:
        """The known values in the order of their ids."""
        return [int(value) for value in self.known.values]

    def adapt(self, data: npt.ArrayLike) -> None:
        values, counts = np.unique(np.asarray(data), return_counts=True)
        self.known.set(most_frequent(dict(zip(values.tolist(), counts.tolist(), strict=True)), self.most))

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.known.table):
            fail_unlearned(self, "vocabulary")
        return lookup(x, self.known.table, 0, self.unknown, 0)


class StringLookup(nn.Module):
    """Texts (uint8 ``[..., bytes]``, see :func:`encode_text`) to int64 ids ``[...]``, each text as a whole; the rest is
    as in :class:`IntegerLookup`.
    """

    def __init__(self, vocabulary: Sequence[str] = (), *, unknown: int = 1, max_ids: int | None = None) -> None:
        super().__init__()
        self.unknown = _at_least_one(unknown)
        self.most = room(max_ids, unknown)
        self.known = Words(vocabulary, unknown)

    @property
    def vocabulary(self) -> list[str]:
        """The known texts in the order of their ids."""
        return self.known.all()

    def adapt(self, data: Iterable[str]) -> None:
        self.known.set(most_frequent(Counter(text.partition("\0")[0] for text in data), self.most))

    def forward(self, x: Tensor) -> Tensor:
        if not len(self.known.table):
            fail_unlearned(self, "vocabulary")
        return lookup(_keys_of_texts(x, self.known.salt), self.known.table, 0, self.unknown, 0)


def _keys_of_texts(x: Tensor, salt: int) -> Tensor:
    return tokenize(x, 1, False, False, Split.NONE, 1, salt).squeeze(-1)


def _at_least_one(unknown: int) -> int:
    if unknown < 1:
        raise CompileError("what is unknown needs an id", expected="unknown >= 1", got=unknown)
    return unknown
