"""The compiler: ``torch.nn.Module`` in, training program out. Needs torch; what it makes does not."""

from __future__ import annotations

from evensong.mobile_runtime.compiler.calibrate import PostTrainingInt8
from evensong.mobile_runtime.compiler.compile import CompiledArtifact, compile
from evensong.mobile_runtime.compiler.int8_training import Int8Training
from evensong.mobile_runtime.compiler.keras_model import KerasModule
from evensong.mobile_runtime.compiler.lora import LoRA
from evensong.mobile_runtime.compiler.optimizer import SGD, Adam
from evensong.mobile_runtime.compiler.qat import QuantizationAwareTraining
from evensong.mobile_runtime.compiler.structured_pruning import StructuredPruning, prune_channels

__all__ = [
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
]
