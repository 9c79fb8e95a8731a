"""Compressed updates and downloads through a whole fleet: fewer bytes both ways, and it learns all the same."""

from __future__ import annotations

import pytest

from evensong.coordinator import (
    Compression,
    EventKind,
    LocalTraining,
    RotatedCodec,
    SecureAggregation,
    Task,
    TaskError,
    TopKCodec,
    UpdateCodec,
)
from evensong.simulations import SimulationResult, load_dataset, make_fleet, simulate
from evensong.simulations.demo.scenarios import DIGITS

CLIENTS = make_fleet(load_dataset("digits"), 4, seed=1, limit=60).participants


def run(**options: object) -> SimulationResult:
    local = LocalTraining(epochs=2, learning_rate=0.1)
    task = Task("digits", DIGITS.artifact(), rounds=4, goal=4, over_selection=1.0, local=local, **options)
    return simulate(task, CLIENTS, seed=11)


def committed(result: SimulationResult) -> list:
    return [event for event in result.events if event.kind == EventKind.VERSION_COMMITTED]


@pytest.fixture(scope="module")
def full() -> SimulationResult:
    return run(secure=None, update=UpdateCodec(None))


@pytest.mark.parametrize(
    ("compression", "up", "down"),
    [
        (Compression(), 3.9, 3.9),
        (Compression(RotatedCodec(1), download_bits=4), 30, 8),
        (Compression(TopKCodec(0.1), download_bits=2), 22, 20),
    ],
    ids=["default", "rotated", "sparse"],
)
def test_fewer_bytes_both_ways_and_it_learns(compression, up, down, full):
    result = run(secure=None, compression=compression)
    for event, reference in zip(committed(result)[1:], committed(full)[1:], strict=True):
        assert reference.bytes_up / event.bytes_up > up
        assert reference.bytes_down / event.bytes_down > down
        assert event.reports == 4
    losses = [event.metrics.loss for event in committed(result)]
    assert losses[3] < losses[1] < losses[0]
    assert losses[3] < 1.15 * committed(full)[3].metrics.loss


def test_the_same_seed_gives_the_same_bits():
    options = {"secure": None, "compression": Compression(RotatedCodec(2), download_bits=3)}
    assert run(**options).parameters_sha256 == run(**options).parameters_sha256


def test_a_secure_sum_has_its_own_codec():
    with pytest.raises(TaskError, match="packs updates itself"):
        run(secure=SecureAggregation(), compression=Compression(RotatedCodec(1)))
    with pytest.raises(TaskError, match="two codecs"):
        run(secure=None, update=UpdateCodec(4), compression=Compression(RotatedCodec(1)))


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_download_bits_are_bounded(bits):
    with pytest.raises(TaskError, match="download_bits"):
        run(secure=None, compression=Compression(download_bits=bits))
