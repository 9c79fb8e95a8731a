"""The arithmetic of quantised updates: grids for groups of values, and codes as a stream of bits.

:mod:`evensong.wire.codecs` says what they are for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evensong.wire.tensors import FloatArray

# ---------------------------------------------------------------------------------------------------------------- grids


def min_max_grid(
    least: npt.NDArray[np.float64], most: npt.NDArray[np.float64], bits: int
) -> tuple[FloatArray, FloatArray]:
    """``lower`` and ``step`` of the finest grid from ``least`` to ``most``, its step a float64 quotient rounded up."""
    step = round_up((most - least) / ((1 << bits) - 1), 24 - bits)
    return least.astype(np.float32), step


def zero_aligned_grid(
    least: npt.NDArray[np.float64], most: npt.NDArray[np.float64], bits: int
) -> tuple[FloatArray, FloatArray]:
    """The finest grid over [least, most] with 0 as a grid point inside; the min-max grid where 0 is not inside."""
    top = (1 << bits) - 1
    lower, step = min_max_grid(least, most, bits)
    inside = (least < 0) & (most > 0)
    below, above = -least[inside], most[inside]
    share = below / (below + above) * top
    candidates = [np.clip(rounded, 1, top - 1) for rounded in (np.floor(share), np.ceil(share))]
    steps = [np.maximum(below / zero, above / (top - zero)) for zero in candidates]
    zero = np.where(steps[0] <= steps[1], *candidates)
    step[inside] = round_up(np.minimum(*steps), 24 - bits)
    lower[inside] = -zero * step[inside]  # exact, as zero takes `bits` bits and step the other 24 - bits
    return lower, step


def round_up(values: npt.NDArray[np.float64], significant_bits: int) -> FloatArray:
    """The smallest float32 of at most ``significant_bits`` significant bits that is not below, for values >= 0."""
    _, exponents = np.frexp(values)
    unit = np.maximum(exponents - significant_bits, -149)  # 2^-149 is the smallest float32
    rounded: FloatArray = np.ldexp(np.ceil(np.ldexp(values, -unit)), unit).astype(np.float32)
    return rounded


def position(values: FloatArray, lower: FloatArray, step: FloatArray) -> npt.NDArray[np.float64]:
    """Where each value [rows, columns] lies on its row's grid, in steps from ``lower``; a grid of one point gives 0."""
    divisor = np.where(step > 0, step, 1.0).astype(np.float64)
    position = values - lower.astype(np.float64)[:, None]
    position /= divisor[:, None]
    return position


# ----------------------------------------------------------------------------------------------------------------- bits


def _codes_of_a_byte(bits: int) -> npt.NDArray[np.unsignedinteger]:
    """For each byte its 8 / bits codes, side by side in one word."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = np.arange(256, dtype=np.uint8)[:, None] >> shifts & np.uint8((1 << bits) - 1)
    return codes.view(f"u{len(shifts)}").reshape(-1)


_CODES_OF_A_BYTE = {bits: _codes_of_a_byte(bits) for bits in (1, 2, 4)}


def pack(codes: npt.NDArray[np.uint16], bits: int) -> npt.NDArray[np.uint8]:
    """Codes below 2^bits as a stream of bits, least significant first, filled with zero codes to a multiple of 8."""
    codes = np.pad(codes, (0, -codes.size % 8))
    if bits == 8:
        return codes.astype(np.uint8)
    if bits == 16:
        return codes.astype("<u2").view(np.uint8)
    words = np.zeros((codes.size // 8, 2), "<u8")  # eight codes fill `bits` bytes
    for place, column in enumerate(codes.reshape(-1, 8).T.astype(np.uint64)):
        word, shift = divmod(place * bits, 64)
        words[:, word] |= column << np.uint64(shift)
        if shift + bits > 64:
            words[:, 1] |= column >> np.uint64(64 - shift)
    return words.view(np.uint8)[:, :bits].reshape(-1)


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """The codes of :func:`_pack`, with their padding."""
    if bits == 8:
        return packed
    if bits == 16:
        return packed.view("<u2")
    if bits in _CODES_OF_A_BYTE:
        return _CODES_OF_A_BYTE[bits].take(packed).view(np.uint8)
    groups = packed.size // bits
    padded = np.zeros((groups, 16), np.uint8)
    padded[:, :bits] = packed.reshape(groups, bits)
    words = padded.view("<u8")
    codes = np.empty((groups, 8), np.uint16)
    mask = np.uint64((1 << bits) - 1)
    for place in range(8):
        word, shift = divmod(place * bits, 64)
        column = words[:, word] >> np.uint64(shift)
        if shift + bits > 64:
            column |= words[:, 1] << np.uint64(64 - shift)
        codes[:, place] = column & mask
    return codes.reshape(-1)
