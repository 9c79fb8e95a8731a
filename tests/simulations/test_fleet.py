"""Dividing data: nobody shares an example, no block is on both sides of a split, seeds decide everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evensong.simulations.data import HAR_NEWCOMERS, DataError, Dataset, load_dataset
from evensong.simulations.fleet import Fleet, make_fleet, split_by_block
from evensong.simulations.partition import divide_by, label_skew


@settings(deadline=None, max_examples=50)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=200),
    devices=st.integers(1, 12),
    concentration=st.floats(0.05, 50),
    seed=st.integers(0, 2**32),
)
def test_label_skew_deals_every_example_once_in_equal_parts(
    labels: list[int], devices: int, concentration: float, seed: int
) -> None:
    array = np.array(labels, dtype=np.int32)
    if devices > len(labels):
        with pytest.raises(DataError, match="more devices than examples"):
            label_skew(concentration)(array, devices, np.random.default_rng(seed))
        return
    parts = label_skew(concentration)(array, devices, np.random.default_rng(seed))
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    again = label_skew(concentration)(array, devices, np.random.default_rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_small_concentration_gives_devices_fewer_classes() -> None:
    labels = np.repeat(np.arange(10, dtype=np.int32), 100)

    def largest_share(concentration: float) -> float:
        parts = label_skew(concentration)(labels, 10, np.random.default_rng(0))
        return float(np.mean([np.bincount(labels[part], minlength=10).max() / len(part) for part in parts]))

    assert largest_share(0.1) > 0.4 > 0.2 > largest_share(100.0)


@settings(deadline=None, max_examples=100)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=100),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**32),
)
def test_no_block_is_on_both_sides_and_every_class_is_trained_on(
    pairs: list[tuple[int, int]], share: float, seed: int
) -> None:
    # A block has one class, as a bout has one activity.
    blocks = np.array([4 * block + label for block, label in pairs], dtype=np.int32)
    labels = np.array([label for _, label in pairs], dtype=np.int32)
    train, test = split_by_block(labels, blocks, share, np.random.default_rng(seed))
    assert sorted([*train, *test]) == list(range(len(pairs)))
    assert not set(blocks[train]) & set(blocks[test])
    assert set(labels[train]) == set(labels)
    assert all(label in labels[test] for label in labels if len(set(blocks[labels == label])) > 1)


def test_digits_are_divided_without_sharing() -> None:
    fleet = make_fleet(load_dataset("digits"), 8, seed=3)
    assert len(fleet.participants) == 8 and fleet.test is not None and len(fleet.test) == 360
    held = [part.inputs for shard in fleet.participants for part in (shard.train, shard.test)]
    rows = np.concatenate([fleet.test.inputs, *held]).reshape(-1, 64)
    assert len(rows) == 1797
    assert np.array_equal(np.sort(rows.sum(axis=1)), np.sort(load_dataset("digits").inputs.reshape(-1, 64).sum(axis=1)))


def test_a_limit_bounds_what_a_device_holds() -> None:
    fleet = make_fleet(load_dataset("digits"), 4, seed=0, limit=100)
    assert [len(shard.train) + len(shard.test) for shard in fleet.participants] == [100] * 4


def test_people_are_devices_and_newcomers_never_take_part() -> None:
    fleet = make_fleet(_walkers(), 21, seed=0)
    assert len(fleet.participants) == 21 and len(fleet.newcomers) == 9
    newcomers = {f"person {person + 1}" for person in HAR_NEWCOMERS}
    assert {shard.name for shard in fleet.newcomers} == newcomers
    assert not newcomers & {shard.name for shard in fleet.participants}
    assert len(make_fleet(_walkers(), 5, seed=0).participants) == 5
    with pytest.raises(DataError, match="at most 21"):
        make_fleet(_walkers(), 22, seed=0)


def test_standardisation_learns_from_training_examples_only() -> None:
    walkers = _walkers()
    fleet = make_fleet(walkers, 21, seed=0)
    train = np.concatenate([shard.train.inputs for shard in fleet.participants])
    assert train.mean(axis=(0, 2)) == pytest.approx(np.zeros(2), abs=1e-5)
    assert train.std(axis=(0, 2)) == pytest.approx(np.ones(2), abs=1e-5)

    # Whatever the test examples and the newcomers hold, training sees the same numbers.
    held_out = {float(x) for shard in fleet.participants for x in shard.test.inputs[:, 0, 0]}
    known = {float(x) for shard in fleet.participants for x in shard.train.inputs[:, 0, 0]}
    assert not held_out & known
    spoiled = walkers.inputs.copy()
    assert walkers.people is not None
    spoiled[np.isin(walkers.people, HAR_NEWCOMERS)] *= 1000
    other = make_fleet(Dataset(**{**vars(walkers), "inputs": spoiled}), 21, seed=0)
    assert _training_bytes(other) == _training_bytes(fleet)


@pytest.mark.parametrize("name", ["iid", "dirichlet:0.5", "pathological:2"])
def test_flower_partitioners_deal_no_example_twice_and_follow_the_seed(name: str) -> None:
    pytest.importorskip("flwr_datasets", reason="needs flwr-datasets")
    labels = np.repeat(np.arange(5, dtype=np.int32), 60)
    divide = divide_by(name)
    parts = divide(labels, 5, np.random.default_rng(1))
    assert len(parts) == 5 and len(np.unique(np.concatenate(parts))) == sum(map(len, parts)) <= len(labels)
    again = divide(labels, 5, np.random.default_rng(1))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if name == "pathological:2":
        assert all(len(np.unique(labels[part])) == 2 for part in parts)


@pytest.mark.parametrize("name", ["", "skew", "skew:-1", "dirichlet:x", "iid:3", "shards:2", "pathological:1.5"])
def test_a_partition_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"partition|concentration"):
        divide_by(name)


def _walkers() -> Dataset:
    """30 people, two classes, four bouts each of three windows, two channels far from standard; values are unique."""
    people = np.repeat(np.arange(30, dtype=np.int32), 24)
    blocks = np.repeat(np.arange(240, dtype=np.int32), 3)
    random = np.random.default_rng(5)
    inputs = random.normal(size=(720, 2, 4)) * np.array([[5.0], [0.1]]) + np.array([[100.0], [-3.0]])
    return Dataset("walkers", inputs.astype(np.float32), blocks % 2, ("still", "moving"), people, blocks, HAR_NEWCOMERS)


def _training_bytes(fleet: Fleet) -> bytes:
    return b"".join(shard.train.inputs.tobytes() for shard in fleet.participants)
