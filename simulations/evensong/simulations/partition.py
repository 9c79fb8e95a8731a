"""Ways to divide labelled examples over devices; each returns one array of positions per device."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from evensong.simulations.data import DataError, Indices, Labels

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


#: Labels int32 ``[n]``, number of devices, generator: positions for each device.
Divide = Callable[[Labels, int, np.random.Generator], list[Indices]]


def divide_by(text: str) -> Divide:
    """A division by its name on the command line: ``skew:0.2``, ``iid``, ``dirichlet:0.3``, ``pathological:2``."""
    name, _, argument = text.partition(":")
    try:
        if name == "skew":
            return label_skew(float(argument))
        if name == "iid" and not argument:
            return flower(lambda module, devices, seed: module.IidPartitioner(devices))
        if name == "dirichlet":
            alpha = float(argument)
            return flower(lambda module, devices, seed: module.DirichletPartitioner(devices, "label", alpha, seed=seed))
        if name == "pathological":
            count = int(argument)
            return flower(
                lambda module, devices, seed: module.PathologicalPartitioner(devices, "label", count, seed=seed)
            )
    except ValueError:
        pass
    raise DataError("unknown partition", expected="skew:ALPHA, iid, dirichlet:ALPHA or pathological:CLASSES", got=text)


def label_skew(concentration: float) -> Divide:
    """Devices of equal size (to within one), each with its own mix of classes drawn from Dirichlet(``concentration``).

    Hsu, Qi and Brown, *Measuring the effects of non-identical data distribution for federated visual classification*,
    2019. A small concentration gives each device few classes. Devices take turns, one example at a time, so that none
    is left with the remainder; a class that runs out is dropped from the mixes that are left. (The Dirichlet
    partitioner of flwr-datasets draws the other way round, devices for each class, and leaves sizes to chance.)
    """
    if not concentration > 0:
        raise DataError("the concentration is wrong", expected="a number above 0", got=concentration)

    def divide(labels: Labels, devices: int, random: np.random.Generator) -> list[Indices]:
        if devices > len(labels):
            raise DataError("more devices than examples", expected=f"at most {len(labels)}", got=devices)
        classes = int(labels.max()) + 1
        mixes = random.dirichlet(np.full(classes, concentration), size=devices)
        pools = [list(random.permutation(np.flatnonzero(labels == label))) for label in range(classes)]
        parts: list[list[int]] = [[] for _ in range(devices)]
        for turn in range(len(labels)):
            left = np.array([len(pool) > 0 for pool in pools])
            device = turn % devices
            # The floor keeps a device going when all the classes of its mix have run out.
            mix = (mixes[device] + 1e-9) * left
            label = random.choice(classes, p=mix / mix.sum())
            parts[device].append(pools[label].pop())
        return [np.array(part, dtype=np.int64) for part in parts]

    return divide


def flower(make: Callable[[Any, int, int], Partitioner]) -> Divide:
    """Any partitioner of flwr-datasets that looks at labels: ``make(flwr_datasets.partitioner, devices, seed)``.

    It runs offline on a table with the columns ``label`` and ``position``.
    """

    def divide(labels: Labels, devices: int, random: np.random.Generator) -> list[Indices]:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
        try:
            from datasets import Dataset, disable_progress_bars
            from flwr_datasets import partitioner as module
        except ImportError:
            raise DataError(
                "partitioners come with flwr-datasets", fix="Run: pip install 'evensong[simulations]'"
            ) from None
        disable_progress_bars()
        partitioner = make(module, devices, int(random.integers(2**31)))
        partitioner.dataset = Dataset.from_dict({"label": labels, "position": np.arange(len(labels))})
        return [np.asarray(partitioner.load_partition(index)["position"], np.int64) for index in range(devices)]

    return divide
