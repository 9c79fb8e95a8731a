"""The device SDK: examples stay on the device, models come to it, sealed updates leave it.

The names below are the public ones; they are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evensong.client.cache import Cache, FolderCache, MemoryCache
    from evensong.client.conditions import AlwaysReady, Conditions, LinuxConditions, Unmet
    from evensong.client.context import Limits, in_thread, inline
    from evensong.client.device import Device
    from evensong.client.errors import (
        ClientError,
        ConditionsChangedError,
        EnrolmentError,
        IdentityError,
        LeaseExpiredError,
        NoModelError,
        RefusedError,
        StateError,
        StorageFullError,
        UnfitError,
        UntrustedError,
    )
    from evensong.client.examples import ArrayExamples, Batch, Examples, ExampleStore
    from evensong.client.grpc_transport import GrpcTransport, Tls
    from evensong.client.outcomes import Aborted, Dropped, Evaluated, Idle, NotReady, Outcome, Postponed, Trained

__version__ = "0.1.0"  #: of the SDK and the runtime that it brings: what a check-in tells the coordinator

_HOMES = {
    "cache": ("Cache", "FolderCache", "MemoryCache"),
    "conditions": ("AlwaysReady", "Conditions", "LinuxConditions", "Unmet"),
    "context": ("Limits", "in_thread", "inline"),
    "device": ("Device",),
    "errors": (
        "ClientError",
        "ConditionsChangedError",
        "EnrolmentError",
        "IdentityError",
        "LeaseExpiredError",
        "NoModelError",
        "RefusedError",
        "StateError",
        "StorageFullError",
        "UnfitError",
        "UntrustedError",
    ),
    "examples": ("ArrayExamples", "Batch", "ExampleStore", "Examples"),
    "grpc_transport": ("GrpcTransport", "Tls"),
    "outcomes": ("Aborted", "Dropped", "Evaluated", "Idle", "NotReady", "Outcome", "Postponed", "Trained"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Aborted",
    "AlwaysReady",
    "ArrayExamples",
    "Batch",
    "Cache",
    "ClientError",
    "Conditions",
    "ConditionsChangedError",
    "Device",
    "Dropped",
    "EnrolmentError",
    "Evaluated",
    "ExampleStore",
    "Examples",
    "FolderCache",
    "GrpcTransport",
    "IdentityError",
    "Idle",
    "LeaseExpiredError",
    "Limits",
    "LinuxConditions",
    "MemoryCache",
    "NoModelError",
    "NotReady",
    "Outcome",
    "Postponed",
    "RefusedError",
    "StateError",
    "StorageFullError",
    "Tls",
    "Trained",
    "UnfitError",
    "Unmet",
    "UntrustedError",
    "in_thread",
    "inline",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
