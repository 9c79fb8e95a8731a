"""Operations between raw data and the first layer: text, categories, numbers, images.

The layers of :mod:`evensong.mobile_runtime.preprocessing` compute with the functions of this module too, so that what
an author trains with in torch is what a device does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evensong.mobile_runtime.errors import ExampleError
from evensong.mobile_runtime.philox import philox
from evensong.mobile_runtime.text import PUNCTUATION, SPACES
from evensong.mobile_runtime.twin_call import Array, Call, Clock, Kernel, rows
from evensong.wire.program import Interpolation, Split

# ------------------------------------------------------------------------------------------------- numbers, categories


def cast(call: Call, x: Array) -> Array:
    return x.astype(np.float32)


def one_hot(call: Call, ids: Array, *, first: int, count: int) -> Array:
    return counted(rows(ids), call.shapes[0][-1], first=first, count=bool(count))


def counted(ids: Array, columns: int, *, first: int, count: bool) -> Array:
    """ids ``[M, W]`` -> float32 ``[M, columns]``: which of the ids ``first``, ``first + 1``, ... a row holds, or how
    often (``count``). Raises :class:`ExampleError` for an id past the last column.
    """
    column = ids.astype(np.int64) - first
    if column.size and column.max() >= columns:
        raise ExampleError("an id has no column", expected=f"below {first + columns}", got=int(column.max()) + first)
    y = np.zeros((len(ids), columns), np.float32)
    row, place = np.nonzero(column >= 0)
    np.add.at(y, (row, column[row, place]), np.float32(1))
    return y if count else np.minimum(y, np.float32(1))


def bucketize(call: Call, x: Array, boundaries: Array, *, right: int) -> Array:
    return bisected(boundaries, x, np.less_equal if right else np.less)


def bisected(sorted_values: Array, x: Array, before: np.ufunc) -> Array:
    """For each element of ``x`` how many values stand ``before`` it: what bisection finds, whatever their order is."""
    low, high = np.zeros(x.shape, np.int64), np.full(x.shape, len(sorted_values), np.int64)
    while (searching := low < high).any():
        middle = (low + high) // 2
        up = searching & before(sorted_values[np.minimum(middle, len(sorted_values) - 1)], x)
        low, high = np.where(up, middle + 1, low), np.where(searching & ~up, middle, high)
    return low.astype(np.int32)


def lookup(call: Call, x: Array, table: Array | None = None, *, first: int, bins: int, salt: int) -> Array:
    return looked_up(x, table, first=first, bins=bins, salt=salt)


def looked_up(x: Array, table: Array | None, *, first: int, bins: int, salt: int) -> Array:
    """int32 ``x`` -> int32 ids: from the rows (key, id) of ``table [K, 2]``; others are hashed into ``bins`` ids from
    ``first`` on.
    """
    hashed = mixed(x.astype(np.int32).view(np.uint32) ^ np.uint32(salt & 0xFFFFFFFF)).astype(np.uint64)
    unknown = first + (hashed * np.uint64(bins) >> np.uint64(32)).astype(np.int64)
    if table is None:
        return unknown.astype(np.int32)
    at = np.minimum(bisected(table[:, 0], x, np.less), len(table) - 1)
    return np.where(table[at, 0] == x, table[at, 1], unknown).astype(np.int32)


def mixed(words: Array) -> Array:
    """The finaliser of MurmurHash3 (Appleby 2011) over uint32: every bit of the input moves half of the output's."""
    h = words.astype(np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return h ^ (h >> np.uint32(16))


# ------------------------------------------------------------------------------------------------- text

_FNV_BASIS, _FNV_PRIME = 2166136261, np.uint32(16777619)
_SPACES = np.zeros(256, bool)
_SPACES[[*SPACES]] = True
_PUNCTUATION = np.zeros(256, bool)
_PUNCTUATION[[*PUNCTUATION]] = True


def tokenize(call: Call, text: Array, **how: int) -> Array:
    return token_hashes(rows(text), call.shapes[0][-1], **how)


def token_hashes(text: Array, width: int, *, lower: int, strip: int, split: int, ngrams: int, salt: int) -> Array:
    """uint8 text ``[M, B]`` -> int32 ``[M, width]``: one hash a token in the order of their ends, then zeros.

    One pass over the bytes, all texts side by side; docs/artifact.md ("Tokens") states the rules.
    """
    count = len(text)
    hashes = np.zeros((count, width), np.uint32)
    found = np.zeros(count, np.int64)  # hashes written, per text
    tokens = np.zeros(count, np.int64)  # tokens that have ended
    live, inside = np.ones(count, bool), np.zeros(count, bool)
    running = np.zeros((ngrams, count), np.uint32)  # hash of the last k tokens and the current one
    ended = np.zeros((ngrams, count), np.uint32)  # hash of the last k + 1 tokens

    def end(where: Array) -> None:
        nonlocal found, tokens
        tokens = tokens + where
        for k in range(ngrams):
            at = np.nonzero(where & (tokens > k) & (found < width))[0]
            hashes[at, found[at]] = np.maximum(running[k, at], 1)
            found[at] += 1
        ended[:, where] = running[:, where]

    for column in text.T:
        byte = np.where((column >= 65) & (column <= 90), column | 32, column) if lower else column
        live &= byte != 0
        taken = live & ~_PUNCTUATION[byte] if strip else live
        if split == Split.WHITESPACE:
            space = taken & _SPACES[byte]
            end(space & inside)
            inside &= ~space
            taken = taken & ~space
        elif split == Split.CHARACTERS:
            begins = taken & inside & ((byte & 0xC0) != 0x80)
            end(begins)
            inside &= ~begins
        fresh = taken & ~inside
        running[0, fresh] = _FNV_BASIS ^ (salt & 0xFFFFFFFF)
        for k in range(1, ngrams):
            running[k, fresh] = (ended[k - 1, fresh] ^ np.uint32(32)) * _FNV_PRIME  # tokens are joined by a space
        running[:, taken] = (running[:, taken] ^ byte[taken]) * _FNV_PRIME
        inside |= taken
    end(inside)
    return hashes.view(np.int32)


# ------------------------------------------------------------------------------------------------- images


def resize2d(call: Call, x: Array, *, mode: int) -> Array:
    low, high, share = _grid(x.shape, call.shapes[0], mode)
    x = x.astype(np.float32)
    if mode != Interpolation.BILINEAR:
        return x[:, low[0]][:, :, low[1]]
    shares = share[0][:, None, None], share[1][:, None]
    upper, lower = (
        (1 - shares[1]) * x[:, row][:, :, low[1]] + shares[1] * x[:, row][:, :, high[1]] for row in (low[0], high[0])
    )
    return (1 - shares[0]) * upper + shares[0] * lower


def resize2d_grad(call: Call, dy: Array, *, mode: int) -> Array:
    dx = np.zeros(call.shapes[0], np.float32)
    low, high, share = _grid(dx.shape, dy.shape, mode)
    images = np.arange(len(dx))[:, None, None]
    for row, row_share in ((low[0], 1 - share[0]), (high[0], share[0])):
        for column, column_share in ((low[1], 1 - share[1]), (high[1], share[1])):
            part = dy * row_share[:, None, None] * column_share[:, None]
            np.add.at(dx, (images, row[:, None], column), part)
    return dx


def _grid(image: tuple[int, ...], resized: tuple[int, ...], mode: int) -> tuple[list[Array], list[Array], list[Array]]:
    """For rows and for columns of the result: the two pixels that it lies between and the share of the second."""
    taps = [_taps(image[axis], resized[axis], mode) for axis in (1, 2)]
    low, high, share = ([tap[part] for tap in taps] for part in range(3))
    return low, high, share


def _taps(size: int, resized: int, mode: int) -> tuple[Array, Array, Array]:
    scale = np.float32(size) / np.float32(resized)
    at = np.arange(resized).astype(np.float32)
    if mode == Interpolation.BILINEAR:
        place = np.maximum(scale * (at + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    else:
        place = (at + np.float32(0.5)) * scale if mode == Interpolation.NEAREST_EXACT else at * scale
    low = np.minimum(place.astype(np.int64), size - 1)
    if mode != Interpolation.BILINEAR:
        return low, low, np.zeros(resized, np.float32)
    return low, np.minimum(low + 1, size - 1), np.minimum(place - low.astype(np.float32), np.float32(1))


def crop2d(call: Call, x: Array, **how: int) -> Array:
    return cropped(x, call.shapes[0][1:3], call.clock, **how)


def cropped(
    x: Array,
    size: Sequence[int],
    clock: Clock,
    *,
    random: int,
    pad_h: int,
    pad_w: int,
    flip_h: int,
    flip_v: int,
    stream: int,
) -> Array:
    """Windows ``[N, *size, C]`` of images ``[N, H, W, C]``: in the middle, or where Philox says (``random``)."""
    count, height, width, _ = x.shape
    numbers = np.zeros((count, 4), np.uint64)
    numbers[:, 0] = np.arange(count, dtype=np.uint64)
    numbers[:, 1:] = (stream & 0xFFFFFFFF, clock.step & 0xFFFFFFFF, clock.step >> 32)
    words = philox(numbers, (clock.seed & 0xFFFFFFFF, clock.seed >> 32))
    places = []
    for axis, (whole, part, pad, flip) in enumerate(
        ((height, size[0], pad_h, flip_v), (width, size[1], pad_w, flip_h))
    ):
        if not random:
            places.append(np.tile((whole - part) // 2 + np.arange(part), (count, 1)))
            continue
        choices = np.uint64(whole + 2 * pad - part + 1)
        start = (words[:, axis] * choices >> np.uint64(32)).astype(np.int64) - pad
        mirrored = (flip * (words[:, 2 + axis] >> np.uint64(31))).astype(bool)[:, None]
        steps = np.arange(part)[None]
        places.append(start[:, None] + np.where(mirrored, part - 1 - steps, steps))
    inside = [(place >= 0) & (place < whole) for place, whole in zip(places, (height, width), strict=True)]
    row, column = (np.where(i, place, 0) for i, place in zip(inside, places, strict=True))
    picked = x[np.arange(count)[:, None, None], row[:, :, None], column[:, None, :]]
    return np.where((inside[0][:, :, None] & inside[1][:, None, :])[..., None], picked, x.dtype.type(0))


# ------------------------------------------------------------------------------------------------- int8


def qlut_u8(call: Call, x: Array, table: Array) -> Array:
    return table[np.arange(len(table)), x]


KERNELS: dict[str, Kernel] = {
    "CAST": cast,
    "ONE_HOT": one_hot,
    "BUCKETIZE": bucketize,
    "LOOKUP": lookup,
    "TOKENIZE": tokenize,
    "RESIZE2D": resize2d,
    "RESIZE2D_GRAD": resize2d_grad,
    "CROP2D": crop2d,
    "QLUT_U8": qlut_u8,
}
