"""Dropout's generator against the known answers of Random123 (``kat_vectors``, philox4x32 with 10 rounds)."""

from __future__ import annotations

import numpy as np
import pytest

from evensong.mobile_runtime.philox import philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(philox(np.array([counter], np.uint64), key), [expected])


def test_uniform_is_in_range_and_changes_with_each_of_seed_step_and_stream() -> None:
    first = uniform(10_001, seed=1, step=2, stream=3)
    assert first.dtype == np.float32
    assert first.min() >= 0 and first.max() < 1
    assert abs(float(first.mean()) - 0.5) < 0.02
    others = [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**32, 2, 3), (1, 2 + 2**32, 3), (1, 2, -3)]
    for seed, step, stream in others:
        assert not np.array_equal(first, uniform(10_001, seed, step, stream))
    np.testing.assert_array_equal(first[:7], uniform(7, 1, 2, 3))
