"""The rotation is orthogonal on exactly d coordinates, and what it does to them is held against dense matrices."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from evensong.wire.rotation import rotate, rotation_seed, unrotate

SEED = bytes(range(16))

seeds = st.binary(min_size=16, max_size=16)


def choices(size: int, seed: bytes) -> tuple[list[int], list[np.ndarray]]:
    """Where each permuted value comes from, and the two sets of signs, from the description."""
    stride = -(-size // 8)
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(16 + 2 * stride))
    step = 1 + int.from_bytes(stream[:8], "little") % max(1, size - 1)
    while math.gcd(step, size) != 1:
        step += 1
    start = int.from_bytes(stream[8:16], "little") % size
    sources = [i if size & (size - 1) == 0 else (step * i + start) % size for i in range(size)]
    bits = np.unpackbits(np.frombuffer(stream, np.uint8, offset=16).reshape(2, -1), axis=1, bitorder="little")
    return sources, list(1.0 - 2.0 * bits[:, :size])


def dense(size: int, seed: bytes) -> np.ndarray:
    """The rotation as one matrix, from its description."""
    window = max(power for power in (1 << k for k in range(20)) if power <= size)
    sources, signs = choices(size, seed)
    hadamard = np.array([[1 - 2 * ((i & j).bit_count() & 1) for j in range(window)] for i in range(window)])
    first, second = np.eye(size), np.eye(size)
    first[:window, :window] = second[size - window :, size - window :] = hadamard / np.sqrt(window)
    matrix = (first * signs[0]) @ np.eye(size)[sources]
    return matrix if window == size else second * signs[1] @ matrix


@given(st.integers(1, 130), seeds)
@example(1, SEED)
@example(64, SEED)
@example(65, SEED)
@example(127, SEED)
@settings(max_examples=40)
def test_it_is_the_matrix_of_its_description(size, seed):
    rows = [rotate(row, seed) for row in np.eye(size)]
    np.testing.assert_allclose(np.array(rows).T, dense(size, seed), atol=1e-14)


@given(npst.arrays(np.float32, st.integers(0, 300), elements=st.floats(-1, 1, width=32)), seeds)
def test_it_keeps_lengths_and_can_be_undone(values, seed):
    before = values.copy()
    rotated = rotate(values, seed)
    assert rotated.dtype == np.float32 and rotated.shape == values.shape
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(values), rel=1e-5)
    np.testing.assert_allclose(unrotate(rotated, seed), values, atol=1e-5)
    wide = values.astype(np.float64)
    np.testing.assert_allclose(rotated, rotate(wide, seed), atol=1e-5)
    np.testing.assert_allclose(unrotate(rotate(wide, seed), seed), values, atol=1e-13)
    assert (values == before).all()


@pytest.mark.parametrize("size", [4097, 5000, 6144, 8191])
def test_both_windows_get_their_share_of_every_layer(size):
    """Of a vector whose energy lies in one stretch, the rotated one has the same energy everywhere."""
    for start in (0, size // 3, size - size // 8):
        vector = np.zeros(size)
        vector[start : start + size // 8] = np.random.default_rng(1).standard_normal(size // 8)
        energies = [np.square(rotate(vector, bytes([seed] * 16))) for seed in range(20)]
        share = np.sum(energies, axis=0)[: size - 4096].sum() / np.sum(energies)
        assert share == pytest.approx((size - 4096) / size, rel=0.15, abs=0.002)


@pytest.mark.parametrize("size", [4096, 4097, 5000, 6144, 8191])
def test_no_coordinate_keeps_more_than_its_share_of_a_concentrated_vector(size):
    for place in (0, 1, size // 2, size - 1):
        vector = np.zeros(size, np.float32)
        vector[place] = 1
        energy = rotate(vector, SEED).astype(np.float64) ** 2
        # The first pass leaves 1 / 4096 each; the second mixes its own 4096 with random signs.
        assert energy.max() <= (1 if size == 4096 else 25) / 4096
        assert np.mean(energy[energy > 0]) <= 2.0 / size


def test_large_vectors_go_by_pieces_and_take_little_memory():
    size = 300_001
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    sources, sets = choices(size, SEED)
    expected = values.astype(np.float64)[sources]
    for start, signs in zip((0, size - (1 << 18)), sets, strict=True):
        expected *= signs
        window = expected[start : start + (1 << 18)]
        half = 1
        while half < window.size:  # the textbook's butterflies
            pairs = window.reshape(-1, 2, half)
            pairs[:, 0], pairs[:, 1] = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
            half *= 2
        window /= 2.0**9
    tracemalloc.start()
    rotated = rotate(values, SEED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(rotated, expected, atol=1e-5)
    np.testing.assert_allclose(unrotate(rotated, SEED), values, atol=1e-5)
    assert peak < values.nbytes + (1 << 20)


def test_the_seed_depends_on_bundle_work_and_round():
    seeds = {
        rotation_seed(bytes([bundle]) * 32, work, round) for bundle in (0, 1) for work in (1, 2) for round in (1, 2)
    }
    assert len(seeds) == 8 and all(len(seed) == 16 for seed in seeds)


def test_it_refuses_what_it_cannot_rotate():
    for values in (np.zeros((2, 2)), np.zeros(4, np.int64), np.zeros(8)[::2]):
        with pytest.raises(ValueError, match="contiguous"):
            rotate(values, SEED)
    with pytest.raises(ValueError, match="16 bytes"):
        rotate(np.zeros(4), bytes(8))
