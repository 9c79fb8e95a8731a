"""The runtime: a compiler from PyTorch to a training program, and the engines that run it.

>>> from evensong.mobile_runtime import compile, load              # doctest: +SKIP
>>> artifact = compile(model, example_inputs, loss="cross_entropy")   # needs torch: pip install "evensong[compile]"
>>> session = load(artifact)                                          # needs neither torch nor a compiler
>>> session.train_step(x, y, learning_rate=0.1)
"""

from __future__ import annotations

import importlib
from typing import Any

from evensong.mobile_runtime.errors import (
    BudgetError,
    CheckpointError,
    CompileError,
    DivergedError,
    ExampleError,
    ProgramError,
    RuntimeFault,
    UnsupportedOperation,
    VariableError,
)
from evensong.mobile_runtime.loading import EngineInfo, engine_info, load
from evensong.mobile_runtime.memory import MemoryReport, memory_report
from evensong.mobile_runtime.onnx_export import to_onnx
from evensong.mobile_runtime.profile import OperationTime, profile
from evensong.mobile_runtime.quantization_report import QuantizationReport, quantization_report
from evensong.mobile_runtime.session import Evaluation, Session, StepResult

__all__ = [
    "SGD",
    "Adam",
    "BudgetError",
    "CheckpointError",
    "CompileError",
    "CompiledArtifact",
    "DivergedError",
    "EngineInfo",
    "Evaluation",
    "ExampleError",
    "Int8Training",
    "KerasModule",
    "LoRA",
    "MemoryReport",
    "OperationTime",
    "PostTrainingInt8",
    "ProgramError",
    "QuantizationAwareTraining",
    "QuantizationReport",
    "RuntimeFault",
    "Session",
    "StepResult",
    "StructuredPruning",
    "UnsupportedOperation",
    "VariableError",
    "compile",
    "engine_info",
    "load",
    "memory_report",
    "profile",
    "prune_channels",
    "quantization_report",
    "to_onnx",
]

#: Imported on first use: they need torch.
_COMPILER = frozenset(
    {
        "SGD",
        "Adam",
        "CompiledArtifact",
        "Int8Training",
        "KerasModule",
        "LoRA",
        "PostTrainingInt8",
        "QuantizationAwareTraining",
        "StructuredPruning",
        "compile",
        "prune_channels",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _COMPILER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        compiler = importlib.import_module("evensong.mobile_runtime.compiler")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torch":
            raise
        raise ImportError(f'{name} needs torch: pip install "evensong[compile]"') from None
    return getattr(compiler, name)


def __dir__() -> list[str]:
    return sorted(__all__)
