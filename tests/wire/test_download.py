"""Versions as differences: both sides get the very same bytes, few of them, and no enemy gets more than a refusal."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from evensong.wire import CorruptError, TensorSpec, UpdateError, WireError, crc32c, encode_tensors
from evensong.wire.download import apply_download, download_words, encode_download

LAYOUT = (TensorSpec("weight", (40, 30)), TensorSpec("bias", (30,)), TensorSpec("scale", ()))


def parameters(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {spec.name: (scale * rng.standard_normal(spec.shape)).astype(np.float32) for spec in LAYOUT}


def step(parent: dict[str, np.ndarray], scale: float = 0.01) -> dict[str, np.ndarray]:
    return {name: values + parameters(9, scale)[name] for name, values in parent.items()}


def words(round: int = 1):
    return download_words(bytes(32), round)


@given(
    npst.arrays(np.float32, 50, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    npst.arrays(np.float32, 50, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.integers(2, 8),
)
@settings(max_examples=60)
def test_both_ways_lead_to_the_same_bytes(before, after, bits):
    layout = (TensorSpec("x", (50,)),)
    version, blob = encode_download({"x": before}, {"x": after}, layout, bits, words())
    received = apply_download({"x": before}, blob, layout, bits)
    assert encode_tensors(received, layout) == encode_tensors(version, layout)
    assert encode_download({"x": before}, {"x": after}, layout, bits, words())[1] == blob  # again after a crash


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_is_below_a_step_of_the_difference(bits):
    parent = parameters(0)
    target = step(parent)
    version, blob = encode_download(parent, target, LAYOUT, bits, words())
    for name, values in target.items():
        spread = np.ptp(values - parent[name])
        assert np.abs(version[name] - values).max() <= 2 * spread / (2**bits - 1) + 1e-6
    assert len(blob) < bits / 8 * 1231 + 200


def test_a_difference_that_is_mostly_zero_is_coded():
    parent = parameters(0)
    target = {name: values.copy() for name, values in parent.items()}
    target["weight"][3] += 0.5
    _, blob = encode_download(parent, target, LAYOUT, 8, words())
    assert blob[20] == 1 and len(blob) < 500


def test_other_words_for_another_round_or_parent():
    drawn = {tuple(download_words(bytes([parent]) * 32, round)(4)) for parent in (0, 1) for round in (1, 2)}
    assert len(drawn) == 4


def test_a_difference_beyond_all_bounds_cannot_be():
    far = {name: np.full_like(values, 3e38) for name, values in parameters(0).items()}
    near = {name: -values for name, values in far.items()}
    with pytest.raises(UpdateError):
        encode_download(near, far, LAYOUT, 8, words())


def reframe(body: bytes) -> bytes:
    return struct.pack("<4sHHQI", b"EVDL", 1, 0, 20 + len(body), crc32c(body)) + body


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(2, 8))
def test_hostile_differences_never_crash(junk, keep, bits):
    parent = parameters(0)
    _, blob = encode_download(parent, step(parent), LAYOUT, 4, words())
    for body in (blob[20:][:keep] + junk, blob[20:][:keep] + junk + blob[20 + keep + len(junk) :]):
        try:
            apply_download(parent, reframe(body), LAYOUT, bits)
        except WireError:
            continue


def test_damage_is_detected():
    parent = parameters(0)
    _, blob = encode_download(parent, step(parent), LAYOUT, 4, words())
    for bit in range(0, 8 * len(blob), 7):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            apply_download(parent, bytes(damaged), LAYOUT, 4)
    for body in (b"", b"\x02\0\0\0", b"\0\x01\0\0"):
        with pytest.raises(CorruptError):
            apply_download(parent, reframe(body), LAYOUT, 4)
