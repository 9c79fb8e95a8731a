"""Who holds which examples: a data set divided over devices, with nothing shared between training and testing.

Every split is made by block, never by example (overlapping windows of one recording stay together), and class by class,
so that a device is tested on what it sees in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from evensong.simulations.data import DataError, Dataset, Indices, Labels
from evensong.simulations.partition import Divide, label_skew


@dataclass(frozen=True)
class Examples:
    """``inputs`` ``[n, ...]``, float32 or what else the model's port takes, and ``labels`` int32 ``[n]``."""

    inputs: npt.NDArray[Any]
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Shard:
    """What one device holds: it learns from ``train`` and is judged on ``test``, which no device ever trains on."""

    name: str
    train: Examples
    test: Examples


@dataclass(frozen=True)
class Fleet:
    """Devices that take part, people who come later and never take part, and examples that no device holds."""

    dataset: str
    classes: tuple[str, ...]
    participants: tuple[Shard, ...]
    newcomers: tuple[Shard, ...] = ()
    test: Examples | None = None


def make_fleet(
    dataset: Dataset,
    devices: int,
    *,
    seed: int,
    divide: Divide | None = None,
    test_share: float = 0.25,
    global_test: int = 360,
    limit: int | None = None,
) -> Fleet:
    """Divides ``dataset`` the way its data suggests: by person where it knows people, else by label skew.

    With people, each is a device, and asking for more than take part is refused. Without, ``global_test`` examples are
    set aside first, and the rest goes to devices as ``divide`` says (by default label skew with concentration 0.2).
    ``test_share`` of each device's blocks are its own test. With ``limit``, devices hold at most that many examples
    each on average.
    """
    if devices < 1:
        raise DataError("a fleet needs a device", got=devices)
    random = np.random.default_rng(seed)
    if dataset.people is not None:
        return _fleet_by_person(dataset, devices, test_share, random)
    order = random.permutation(len(dataset))
    held_out, rest = order[:global_test], order[global_test:]
    if limit is not None:
        rest = rest[: limit * devices]
    divide = divide or label_skew(0.2)
    parts = [rest[part] for part in divide(dataset.labels[rest], devices, random)]
    shards = tuple(_shard(dataset, f"device {i + 1}", part, test_share, random) for i, part in enumerate(parts))
    return Fleet(dataset.name, dataset.classes, shards, test=_examples(dataset, held_out))


def _fleet_by_person(dataset: Dataset, devices: int, test_share: float, random: np.random.Generator) -> Fleet:
    assert dataset.people is not None
    everyone = np.unique(dataset.people)
    taking_part = [person for person in everyone if person not in dataset.newcomers]
    if devices > len(taking_part):
        raise DataError("more devices than people", expected=f"at most {len(taking_part)}", got=devices)
    if devices < len(taking_part):
        taking_part = sorted(random.choice(taking_part, devices, replace=False))

    def shards(people: Sequence[int]) -> tuple[Shard, ...]:
        owned = ((person, np.flatnonzero(dataset.people == person)) for person in people)
        return tuple(_shard(dataset, f"person {person + 1}", part, test_share, random) for person, part in owned)

    fleet = Fleet(dataset.name, dataset.classes, shards(taking_part), shards(dataset.newcomers))
    return standardise(fleet)


def standardise(fleet: Fleet) -> Fleet:
    """Every channel (axis 1) to zero mean and unit variance over the participants' training examples.

    Test examples and newcomers are scaled by the same numbers and contribute nothing to them.
    """
    train = np.concatenate([shard.train.inputs for shard in fleet.participants])
    axes = (0, *range(2, train.ndim))
    mean = train.mean(axis=axes, dtype=np.float64, keepdims=True)
    deviation = train.std(axis=axes, dtype=np.float64, keepdims=True)

    def scale(examples: Examples) -> Examples:
        return Examples(((examples.inputs - mean) / deviation).astype(np.float32), examples.labels)

    def rescale(shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
        return tuple(Shard(shard.name, scale(shard.train), scale(shard.test)) for shard in shards)

    return replace(
        fleet,
        participants=rescale(fleet.participants),
        newcomers=rescale(fleet.newcomers),
        test=scale(fleet.test) if fleet.test is not None else None,
    )


def _shard(dataset: Dataset, name: str, owned: Indices, test_share: float, random: np.random.Generator) -> Shard:
    train, test = split_by_block(dataset.labels[owned], dataset.blocks[owned], test_share, random)
    if not len(train) or not len(test):
        raise DataError(f"{name} has too few examples to learn and be tested", got=len(owned), fix="Use fewer devices.")
    return Shard(name, _examples(dataset, owned[train]), _examples(dataset, owned[test]))


def split_by_block(
    labels: Labels, blocks: Labels, test_share: float, random: np.random.Generator
) -> tuple[Indices, Indices]:
    """Positions for training and testing: of each class, about ``test_share`` of its blocks are for testing.

    A class with a single block is only trained on; with two or more, at least one is tested.
    """
    testing: list[int] = []
    for label in np.unique(labels):
        of_class = np.unique(blocks[labels == label])
        count = min(max(round(test_share * len(of_class)), 1), len(of_class) - 1)
        testing.extend(random.permutation(of_class)[:count])
    in_test = np.isin(blocks, testing)
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)


def _examples(dataset: Dataset, indices: Indices) -> Examples:
    return Examples(dataset.inputs[indices], dataset.labels[indices])
