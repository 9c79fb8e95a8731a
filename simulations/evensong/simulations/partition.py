"""Ways to divide labelled examples over devices; each returns one array of positions per device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from evensong.simulations.data import DataError, Indices, Labels

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def label_skew(labels: Labels, devices: int, concentration: float, random: np.random.Generator) -> list[Indices]:
    """Devices of equal size (to within one), each with its own mix of classes drawn from Dirichlet(``concentration``).

    Hsu, Qi and Brown, *Measuring the effects of non-identical data distribution for federated visual classification*,
    2019. A small concentration gives each device few classes. Devices take turns, one example at a time, so that none
    is left with the remainder; a class that runs out is dropped from the mixes that are left.
    """
    classes = int(labels.max()) + 1
    if devices > len(labels):
        raise DataError("more devices than examples", expected=f"at most {len(labels)}", got=devices)
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


def with_partitioner(labels: Labels, partitioner: Partitioner) -> list[Indices]:
    """Any partitioner of flwr-datasets that works on labels, run offline on a table with the columns ``label`` and
    ``position``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from datasets import Dataset, disable_progress_bars
    except ImportError:
        raise DataError(
            "partitioners come with flwr-datasets", fix="Run: pip install 'evensong[simulations]'"
        ) from None
    disable_progress_bars()
    partitioner.dataset = Dataset.from_dict({"label": labels, "position": np.arange(len(labels))})
    return [
        np.asarray(partitioner.load_partition(index)["position"], dtype=np.int64)
        for index in range(partitioner.num_partitions)
    ]
