"""Text: to ids of words, or to a bag of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evensong.mobile_runtime.errors import CompileError
from evensong.mobile_runtime.preprocessing.calls import lookup, one_hot, tokenize
from evensong.mobile_runtime.preprocessing.learned import Learned, fail_unlearned
from evensong.mobile_runtime.preprocessing.vocabulary import Words, most_frequent, room
from evensong.mobile_runtime.text import utf8, words
from evensong.wire.program import MOST_NGRAMS, Split

Standardize = Literal["lower_and_strip_punctuation", "lower", "strip_punctuation"]
Mode = Literal["int", "multi_hot", "count", "tf_idf"]

_STANDARDIZE = {
    "lower_and_strip_punctuation": (True, True),
    "lower": (True, False),
    "strip_punctuation": (False, True),
    None: (False, False),
}
_SPLIT = {"whitespace": Split.WHITESPACE, "character": Split.CHARACTERS, None: Split.NONE}


class TextVectorization(Learned):
    """Texts (uint8 ``[..., bytes]``, see :func:`encode_text`) to ids of their tokens, or to one row of numbers a text.

    A text is standardised (lower case and without punctuation, in ASCII), cut into tokens (at ASCII white space), and
    each token is looked up, or hashed with ``hash_bins``. What exactly is done with which byte stands in
    docs/artifact.md, "Tokens".

    Args:
        max_ids: the most ids there may be, those for padding and for unknown tokens included.
        standardize, split: what to do before; None does nothing of it.
        ngrams: up to so many tokens in a row are a token as well, joined by a space (at most 4).
        mode: ``"int"``: int64 ids ``[..., length]``: 0 where there is no token, then ``unknown`` ids for tokens that
            are not in the vocabulary, then the vocabulary. ``"multi_hot"``, ``"count"`` and ``"tf_idf"``: float32
            ``[..., ids]``, a column for each id but 0: whether it is there, how often, or how often times its weight
            ``log(1 + n / (1 + texts with it))`` (the mean of all weights for what is unknown).
        length: the most tokens of a text, n-grams included; others are dropped. None: as many as its bytes may hold.
        vocabulary: the known tokens; else :meth:`adapt` learns the most frequent ones.
        unknown: ids for what is not in the vocabulary; a hash picks one.
        hash_bins: no vocabulary, but a hash of each token: ids 1 to ``hash_bins``.
    """

    idf: Tensor
    padding: Tensor

    def __init__(
        self,
        max_ids: int | None = None,
        *,
        standardize: Standardize | None = "lower_and_strip_punctuation",
        split: Literal["whitespace", "character"] | None = "whitespace",
        ngrams: int = 1,
        mode: Mode = "int",
        length: int | None = None,
        vocabulary: Sequence[str] = (),
        unknown: int = 1,
        hash_bins: int | None = None,
    ) -> None:
        super().__init__()
        _check(standardize in _STANDARDIZE, "standardize", standardize)
        _check(split in _SPLIT, "split", split)
        _check(1 <= ngrams <= MOST_NGRAMS, "ngrams", ngrams)
        _check(mode in ("int", "multi_hot", "count", "tf_idf"), "mode", mode)
        _check(length is None or length >= 1, "length", length)
        _check(unknown >= 1, "unknown", unknown)
        _check(hash_bins is None or (hash_bins >= 1 and not vocabulary and mode != "tf_idf"), "hash_bins", hash_bins)
        _check(not (vocabulary and mode == "tf_idf"), "vocabulary", "given, with tf_idf, which learns its weights")
        self.lower, self.strip = _STANDARDIZE[standardize]
        self.split = _SPLIT[split]
        self.ngrams = ngrams
        self.mode = mode
        self.length = length
        self.unknown = unknown
        self.hash_bins = hash_bins
        self.most = room(max_ids, unknown + 1)
        self.known = Words(vocabulary, unknown + 1, padding=True)
        self.register_buffer("padding", torch.zeros(1, 2, dtype=torch.int64), persistent=False)
        if mode == "tf_idf":
            self.register_buffer("idf", torch.zeros(0))

    @property
    def vocabulary(self) -> list[str]:
        """The known tokens in the order of their ids."""
        return self.known.all()

    @property
    def ids(self) -> int:
        """How many ids there are, that of padding included: the rows of an embedding."""
        return 1 + (self.hash_bins or self.unknown + len(self.known))

    def adapt(self, texts: Iterable[str]) -> None:
        """Learns the vocabulary (and the weights of ``"tf_idf"``) from ``texts``."""
        if self.hash_bins is not None:
            raise CompileError("a hash learns nothing", fix="Leave out adapt(), or hash_bins.")
        counts: Counter[bytes] = Counter()
        holders: Counter[bytes] = Counter()
        number = 0
        for text in texts:
            number += 1
            found = [*words(utf8(text), lower=self.lower, strip=self.strip, split=self.split, ngrams=self.ngrams)]
            counts.update(found)
            holders.update(set(found))
        kept = most_frequent(counts, self.most)
        self.known.set([word.decode() for word in kept])
        if self.mode == "tf_idf":
            weights = np.log(1 + number / (1 + np.array([holders[word] for word in kept])))
            row = np.concatenate([np.full(self.unknown, weights.mean()), weights])
            self.idf = torch.from_numpy(row.astype(np.float32))

    def forward(self, texts: Tensor) -> Tensor:
        if self.hash_bins is None and not len(self.known.table):
            fail_unlearned(self, "vocabulary")
        width = self.length or self._most_tokens(texts.shape[-1])
        hashes = tokenize(texts, width, self.lower, self.strip, self.split, self.ngrams, self.known.salt)
        if self.hash_bins is None:
            ids = lookup(hashes, self.known.table, 1, self.unknown, 0)
        else:
            ids = lookup(hashes, self.padding, 1, self.hash_bins, 0)
        if self.mode == "int":
            return ids
        bag = one_hot(ids, self.ids - 1, 1, self.mode != "multi_hot")
        return bag * self.idf if self.mode == "tf_idf" else bag

    def _most_tokens(self, size: int) -> int:
        most = {Split.NONE: 1, Split.WHITESPACE: (size + 1) // 2, Split.CHARACTERS: size}[self.split]
        return most * self.ngrams


def _check(holds: bool, argument: str, got: object) -> None:
    if not holds:
        raise CompileError(f"TextVectorization: {argument} cannot be that", got=got)
