"""The coordinator: hands out work, adds up what comes back, and commits a better model.

The names below are the engineers' side: they need grpc and the contract, no database and no Flower. The daemon is
:class:`evensong.coordinator.server.CoordinatorServer`.
"""

from evensong.coordinator.bundle import TaskError
from evensong.coordinator.credentials import AccessError, Tls
from evensong.coordinator.handle import Coordinator, NotFoundError, RejectedError, TaskHandle
from evensong.coordinator.strategies import Optimizers, ServerOptimizer
from evensong.coordinator.strategy_state import StrategyError
from evensong.coordinator.task import (
    AdaptiveClipping,
    Compression,
    LocalTraining,
    Personalization,
    Privacy,
    SecureAggregation,
    Strategy,
    Task,
)
from evensong.coordinator.views import (
    DeviceStatus,
    EventKind,
    IssuedToken,
    Metrics,
    PrivacyLedger,
    PrivacyRelease,
    TaskEvent,
    TaskState,
    TaskStatus,
    Version,
)
from evensong.wire.codecs import UpdateCodec
from evensong.wire.rotated import RotatedCodec
from evensong.wire.top_k import TopKCodec

__all__ = [
    "AccessError",
    "AdaptiveClipping",
    "Compression",
    "Coordinator",
    "DeviceStatus",
    "EventKind",
    "IssuedToken",
    "LocalTraining",
    "Metrics",
    "NotFoundError",
    "Optimizers",
    "Personalization",
    "Privacy",
    "PrivacyLedger",
    "PrivacyRelease",
    "RejectedError",
    "RotatedCodec",
    "SecureAggregation",
    "ServerOptimizer",
    "Strategy",
    "StrategyError",
    "Task",
    "TaskError",
    "TaskEvent",
    "TaskHandle",
    "TaskState",
    "TaskStatus",
    "Tls",
    "TopKCodec",
    "UpdateCodec",
    "Version",
]
