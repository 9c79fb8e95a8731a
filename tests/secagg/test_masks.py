"""Masks against the plainest keystream, over every boundary of pieces and threads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st

from evensong.secagg.masks import PIECE_BYTES, Scratch, add_mask, apply_masks

pytestmark = pytest.mark.secagg

PIECE = PIECE_BYTES // 8


def naive(key: bytes, lanes: int) -> npt.NDArray[np.uint64]:
    stream = Cipher(AES128(key), CTR(bytes(16))).encryptor().update(bytes(8 * lanes))
    return np.frombuffer(stream, "<u8").astype(np.uint64)


@settings(max_examples=25)
@given(
    size=st.sampled_from([0, 1, 2, 99, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 3, 5 * PIECE - 1]),
    masks=st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.sampled_from([1, -1])), max_size=5),
    threads=st.integers(1, 4),
)
def test_masks_are_the_keystreams_from_counter_zero(size: int, masks: list[tuple[bytes, int]], threads: int) -> None:
    lanes = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = lanes.copy()
    for key, sign in masks:
        expected = expected + naive(key, size) if sign > 0 else expected - naive(key, size)
    apply_masks(lanes, masks, threads)
    assert np.array_equal(lanes, expected)


def test_more_streams_than_are_open_at_a_time() -> None:
    masks = [(number.to_bytes(16, "little"), 1 if number % 3 else -1) for number in range(600)]
    lanes = np.zeros(11, np.uint64)
    apply_masks(lanes, masks)
    expected = sum((naive(key, 11) * np.uint64(sign % 2**64) for key, sign in masks), np.zeros(11, np.uint64))
    assert np.array_equal(lanes, expected)


def test_what_one_adds_another_takes_away() -> None:
    lanes, scratch = np.zeros(2 * PIECE + 5, np.uint64), Scratch()
    add_mask(lanes, b"k" * 16, 1, scratch)
    assert len(np.unique(lanes)) == len(lanes)  # the keystream never starts again, in no piece
    add_mask(lanes, b"k" * 16, -1, scratch)
    assert not lanes.any()


@pytest.mark.parametrize("lanes", [np.zeros(4), np.zeros((2, 2), np.uint64), np.zeros(8, np.uint64)[::2]])
def test_other_arrays_are_refused(lanes: npt.NDArray[np.uint64]) -> None:
    with pytest.raises(ValueError):
        apply_masks(lanes, [(b"k" * 16, 1)])
