"""The accumulator is the weighted mean, whatever the order's length, and nothing bad gets in."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evensong.coordinator.aggregate import Accumulator
from evensong.wire import TensorSpec, UpdateCodec, UpdateError, WireError

LAYOUT = (TensorSpec("weight", (3, 4)), TensorSpec("scale", ()))


def update(seed: int, codec: UpdateCodec) -> bytes:
    rng = np.random.default_rng(seed)
    return codec.encode({spec.name: rng.normal(size=spec.shape) for spec in LAYOUT}, LAYOUT, rng)


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.floats(1e-3, 1e4)), min_size=1, max_size=8),
    st.sampled_from([UpdateCodec(None), UpdateCodec(8), UpdateCodec(4, 8)]),
)
def test_the_mean_is_the_weighted_mean_of_the_decoded_updates(
    reports: list[tuple[int, float]], codec: UpdateCodec
) -> None:
    accumulator = Accumulator(LAYOUT, codec)
    for seed, weight in reports:
        accumulator.add(update(seed, codec), weight)
    weights = [weight for _, weight in reports]
    mean = accumulator.mean()
    for spec in LAYOUT:
        decoded = [codec.decode(update(seed, codec), LAYOUT)[spec.name].astype(np.float64) for seed, _ in reports]
        np.testing.assert_allclose(
            mean[spec.name], np.average(decoded, axis=0, weights=weights), rtol=1e-12, atol=1e-15
        )
        assert mean[spec.name].shape == spec.shape
    assert accumulator.count == len(reports)
    assert accumulator.total_weight == pytest.approx(math.fsum(weights))


def test_the_same_order_gives_the_same_bits() -> None:
    def run() -> npt.NDArray[np.float64]:
        accumulator = Accumulator(LAYOUT, UpdateCodec(8))
        for seed in range(20):
            accumulator.add(update(seed, UpdateCodec(8)), 1 + seed / 7)
        return accumulator.mean()["weight"]

    assert run().tobytes() == run().tobytes()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 100.1])
def test_bad_weights_are_refused_and_change_nothing(weight: float) -> None:
    accumulator = Accumulator(LAYOUT, UpdateCodec(8), max_weight=100)
    accumulator.add(update(0, UpdateCodec(8)), 100)
    before = accumulator.mean()
    with pytest.raises(UpdateError, match="weight"):
        accumulator.add(update(1, UpdateCodec(8)), weight)
    assert accumulator.count == 1
    assert all((before[name] == values).all() for name, values in accumulator.mean().items())


def test_bad_updates_are_refused_and_change_nothing() -> None:
    accumulator = Accumulator(LAYOUT, UpdateCodec(8))
    accumulator.add(update(0, UpdateCodec(8)), 1)
    before = accumulator.mean()
    damaged = bytearray(update(1, UpdateCodec(8)))
    damaged[-1] ^= 1
    for bad in (bytes(damaged), update(1, UpdateCodec(4)), b"", update(1, UpdateCodec(8))[:-1]):
        with pytest.raises(WireError):
            accumulator.add(bad, 1)
    assert (accumulator.count, accumulator.total_weight) == (1, 1.0)
    assert all((before[name] == values).all() for name, values in accumulator.mean().items())


def test_there_is_no_mean_of_nothing() -> None:
    with pytest.raises(UpdateError, match="no updates"):
        Accumulator(LAYOUT, UpdateCodec(8)).mean()


def test_memory_does_not_grow_with_the_reports() -> None:
    layout, codec = (TensorSpec("weight", (1 << 18,)),), UpdateCodec(8)
    data = codec.encode({"weight": np.random.default_rng(0).normal(size=1 << 18)}, layout, np.random.default_rng(0))
    tracemalloc.start()
    accumulator = Accumulator(layout, codec)
    for _ in range(50):
        accumulator.add(data, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * (1 << 18) + (1 << 20)
