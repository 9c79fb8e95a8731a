"""The harness: a whole fleet in one process under simulated time, and the demo with real processes.

>>> from evensong.simulations import load_dataset, make_fleet, simulate     # doctest: +SKIP
>>> fleet = make_fleet(load_dataset("digits"), 20, seed=0)
>>> result = simulate(task, fleet.participants, seed=0)
>>> result.parameters_sha256                                                 # the same every time
"""

from __future__ import annotations

import importlib

_HOMES = {
    "data": ("DataError", "Dataset", "load_dataset"),
    "fleet": ("Examples", "Fleet", "Shard", "make_fleet"),
    "in_memory": ("InMemoryTransport", "Network"),
    "partition": ("divide_by", "flower", "label_skew"),
    "secure_cohort": ("CohortResult", "run_cohort"),
    "simulation": ("ClientResult", "SimulationError", "SimulationResult", "simulate"),
    "virtual_time": ("SimulatedClock", "VirtualTimeLoop"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ClientResult",
    "CohortResult",
    "DataError",
    "Dataset",
    "Examples",
    "Fleet",
    "InMemoryTransport",
    "Network",
    "Shard",
    "SimulatedClock",
    "SimulationError",
    "SimulationResult",
    "VirtualTimeLoop",
    "divide_by",
    "flower",
    "label_skew",
    "load_dataset",
    "make_fleet",
    "run_cohort",
    "simulate",
]


def __getattr__(name: str) -> object:
    # On first use: a device process of the demo needs none of this.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
