"""``compile``: from a PyTorch model to one artifact, in the order that the steps below have."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import nn

from evensong.mobile_runtime.compiler.autodiff import differentiate
from evensong.mobile_runtime.compiler.batch_norm import fold_batch_norms
from evensong.mobile_runtime.compiler.bytes_first import fold_byte_tables
from evensong.mobile_runtime.compiler.calibrate import Calibrator, PostTrainingInt8
from evensong.mobile_runtime.compiler.emit import emit
from evensong.mobile_runtime.compiler.export import Trace, trace
from evensong.mobile_runtime.compiler.int8_training import Int8State, Int8Training, prepare_int8, train_in_int8
from evensong.mobile_runtime.compiler.ir import Graph, Value
from evensong.mobile_runtime.compiler.keras_model import KerasModule, is_keras_model
from evensong.mobile_runtime.compiler.layout import arrange
from evensong.mobile_runtime.compiler.lora import LoRA
from evensong.mobile_runtime.compiler.losses import add_loss, loss_name
from evensong.mobile_runtime.compiler.lowering import Forward, lower
from evensong.mobile_runtime.compiler.optimizer import SGD, Optimizer, apply_optimizer
from evensong.mobile_runtime.compiler.passes import pointwise_as_linear, remove_dead, simplify
from evensong.mobile_runtime.compiler.planner import Plan, plan
from evensong.mobile_runtime.compiler.qat import QuantizationAwareTraining
from evensong.mobile_runtime.compiler.quantize import quantize_frozen
from evensong.mobile_runtime.compiler.saved_values import keep_masks
from evensong.mobile_runtime.compiler.trainable import trainable_names
from evensong.mobile_runtime.compiler.weights import Weights
from evensong.mobile_runtime.errors import BudgetError, CompileError
from evensong.mobile_runtime.memory import MemoryReport, memory_report
from evensong.wire.artifact import artifact_hash, encode_artifact
from evensong.wire.program import Artifact, Region

if TYPE_CHECKING:
    import keras

COMPILER_VERSION = "1"  #: changes when the same model would give other bytes

Example = npt.ArrayLike | torch.Tensor


def compile(
    model: nn.Module | keras.Model,
    example_inputs: Example | Sequence[Example],
    *,
    loss: str | nn.Module = "cross_entropy",
    trainable: Sequence[str] | str | LoRA | None = None,
    quantize: PostTrainingInt8 | QuantizationAwareTraining | Int8Training | None = None,
    optimizer: Optimizer | None = None,
    batch_size: int = 32,
    predict_batch: int = 1,
    memory_budget: int | None = None,
    name: str = "model",
    labels: Sequence[str] | None = None,
) -> CompiledArtifact:
    """Compiles ``model`` into programs that predict, evaluate and train without torch.

    Args:
        model: any module that ``torch.export`` can trace, with one result, or a Keras 3 model (see
            :class:`KerasModule`). It is not changed.
        example_inputs: one array ``[n, ...]`` for each input, with ``n >= 1``; only shapes and dtypes count.
        loss: ``"cross_entropy"`` (int32 labels), ``"mse"`` or ``"bce"`` (float32 targets), or the ``torch.nn`` loss.
        trainable: what to train: None takes those with ``requires_grad``; patterns of parameters or layers like
            ``["head.*"]``; ``"last-3"`` the last three layers that have parameters; ``"biases"``; ``"none"``; or
            low-rank adapters, :class:`LoRA`.
        quantize: :class:`PostTrainingInt8` runs what is frozen in int8; with nothing trainable, the whole model. A
            :class:`QuantizationAwareTraining` does so with the weights that it has trained. :class:`Int8Training`
            also trains in int8.
        optimizer: :class:`SGD` (the default) or :class:`Adam`; the learning rate comes with each step.
        batch_size: the most examples of one training step.
        predict_batch: the most examples of one prediction call.
        memory_budget: bytes that an engine may take besides the artifact's constants (``MemoryReport.peak``).
        name: what reports call the model.
        labels: names of the classes, kept in the manifest.

    Raises:
        UnsupportedOperation: an operation that the runtime does not have, with its place in the model.
        BudgetError: the budget cannot be met; its ``table`` lists what takes the memory.
        CompileError: anything else that cannot be compiled.
    """
    _check_sizes(batch_size, predict_batch)
    if is_keras_model(model):
        model = KerasModule(model)
    chosen_loss, optimizer = loss_name(loss), optimizer or SGD()
    examples = _tensors(example_inputs)
    int8_settings = quantize if isinstance(quantize, Int8Training) else None
    if int8_settings is not None:
        model = fold_batch_norms(model, trace(model, examples, training=False))
    if isinstance(trainable, LoRA):
        model, trainable = trainable.adapt(model)

    # 1. trace the model in each mode, 2. lower each trace to engine operations
    inference = trace(model, examples, training=False)
    names = trainable_names(model, trainable, inference)
    weights = Weights(model, names, inference)
    calibrator = None if quantize is None else quantize.calibrator(_input_ports(inference, weights))
    int8 = None
    if int8_settings is not None and calibrator is not None:
        int8 = _int8_state(int8_settings, inference, weights, calibrator, optimizer)
    graphs: list[tuple[Graph, int]] = []
    if names:
        training = trace(model, examples, training=True)
        graphs.append((_train(training, weights, calibrator, int8, chosen_loss, optimizer, batch_size), batch_size))
    graphs.append((_evaluate(inference, weights, calibrator, int8, chosen_loss), batch_size))
    predict, description = _predict(inference, weights, calibrator, int8)
    graphs.append((predict, predict_batch))
    _check_labels(labels, predict.outputs["output"].dims)

    if int8 is not None:
        int8.finish()

    # 3. plan the memory, 4. write the artifact
    planned = [(graph, plan(graph, batch), batch) for graph, batch in reversed(graphs)]
    manifest = {
        "format": "evensong/1",
        "compiler": COMPILER_VERSION,
        "name": name,
        "task": {"loss": chosen_loss, "optimizer": {"kind": type(optimizer).__name__.lower(), **asdict(optimizer)}},
        **description,
        "labels": None if labels is None else list(labels),
        "trainable": names,
        "quantized": quantize is not None,
        "batch_size": batch_size,
        "memory": {graph.name: _bound(found) for graph, found, _ in planned},
    }
    artifact = emit(planned, weights, manifest)
    compiled = CompiledArtifact(artifact)
    _check_budget(compiled.memory(), memory_budget)
    return compiled


@dataclass(frozen=True)
class CompiledArtifact:
    """What ``compile`` made: the artifact, its bytes and its content address."""

    artifact: Artifact

    @cached_property
    def _bytes(self) -> bytes:
        return encode_artifact(self.artifact)

    def to_bytes(self) -> bytes:
        """The artifact file; the same model gives the same bytes."""
        return self._bytes

    @property
    def hash(self) -> str:
        """Lower-case hex SHA-256 of the bytes."""
        return artifact_hash(self._bytes)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the artifact file and returns its path."""
        target = Path(path)
        target.write_bytes(self._bytes)
        return target

    def memory(self) -> MemoryReport:
        """What a device needs, known before anything runs."""
        return memory_report(self.artifact)

    def explain(self) -> str:
        """The largest tensors alive where each program needs the most memory."""
        return self.memory().explain()


# ------------------------------------------------------------------------------------------------------------- programs


def _train(
    traced: Trace,
    weights: Weights,
    calibrator: Calibrator | None,
    int8: Int8State | None,
    loss: str,
    optimizer: Optimizer,
    batch: int,
) -> Graph:
    forward = lower(traced, weights, "train")
    graph = forward.graph
    trainable = {weights.view(name).value for name in weights.trainable}
    behind = graph.reached(trainable)
    _finish(forward, weights, calibrator, lambda value: value.root in behind, int8, batch)
    seeds = add_loss(graph, forward.output, loss, gradient=True)
    gradients = differentiate(graph, seeds, trainable, int8, optimizer.weight_decay)
    keep_masks(graph, batch)
    apply_optimizer(graph, gradients, weights.variables, optimizer, batch)
    if int8 is not None:
        moved = {"grow": int8.settings.grow, "shrink": int8.settings.shrink}
        graph.add("Q_ADAPT", [int8.scales, int8.peaks], [], "scales", **moved)
    return graph


def _evaluate(
    traced: Trace, weights: Weights, calibrator: Calibrator | None, int8: Int8State | None, loss: str
) -> Graph:
    forward = lower(traced, weights, "evaluate")
    _finish(forward, weights, calibrator, lambda value: False, int8)
    add_loss(forward.graph, forward.output, loss, gradient=False)
    return forward.graph


def _predict(
    traced: Trace, weights: Weights, calibrator: Calibrator | None, int8: Int8State | None
) -> tuple[Graph, dict[str, object]]:
    """The predict program, and the manifest's description of its ports."""
    forward = lower(traced, weights, "predict")
    _finish(forward, weights, calibrator, lambda value: False, int8)
    graph, view = forward.graph, forward.output
    if view.batch_axis != 0:
        raise CompileError("the model's result must have the batch first")
    value = arrange(graph, view, range(len(view.shape)), "output")
    if value.root not in graph.producers():
        copy = value.like(name="output")
        graph.add("COPY", [value], [copy], "output")
        value = copy
    value.root.region = Region.OUTPUT
    graph.outputs["output"] = value
    texts = {node.inputs[0].root for node in graph.nodes if node.op == "TOKENIZE"}
    inputs = [
        {**_describe(port, value), **({"dtype": "text"} if value in texts else {})}
        for port, value in graph.inputs.items()
    ]
    return graph, {"inputs": inputs, "output": _describe("output", value)}


def _int8_state(
    settings: Int8Training, traced: Trace, weights: Weights, calibrator: Calibrator, optimizer: Optimizer
) -> Int8State:
    if not isinstance(optimizer, SGD) or optimizer.momentum:
        raise CompileError(
            "int8 training takes plain SGD", expected="SGD without momentum", got=optimizer, fix="Drop the momentum."
        )
    forward = lower(traced, weights, "calibrate")
    forward.graph.outputs["output"] = forward.output.value
    simplify(forward.graph, lambda value: True)
    return prepare_int8(settings, weights, forward.graph, calibrator)


def _finish(
    forward: Forward,
    weights: Weights,
    calibrator: Calibrator | None,
    trained: Callable[[Value], bool],
    int8: Int8State | None = None,
    batch: int = 1,
) -> None:
    """Simplifies the forward pass, quantises its frozen part and brings the rest to int8 if it trains so; its result
    may become another value.
    """
    graph, view = forward.graph, forward.output
    graph.outputs["output"] = view.value
    simplify(graph, trained if int8 is None else lambda value: True)  # programs of one model have one structure
    if calibrator is not None:
        quantize_frozen(graph, calibrator, set(weights.flags))
        fold_byte_tables(graph)
        if int8 is not None:
            train_in_int8(graph, int8, training=graph.name == "train", batch=batch)
        remove_dead(graph)
    pointwise_as_linear(graph)
    forward.output = replace(view, value=graph.outputs.pop("output"))


def _input_ports(traced: Trace, weights: Weights) -> list[Value]:
    return list(lower(traced, weights, "predict").graph.inputs.values())


def _describe(port: str, value: Value) -> dict[str, object]:
    return {"name": port, "dtype": value.dtype.name.lower(), "shape": list(value.dims[1:])}


# --------------------------------------------------------------------------------------------------------------- checks


def _tensors(example_inputs: Any) -> list[torch.Tensor]:
    several = isinstance(example_inputs, (list, tuple)) and any(hasattr(item, "shape") for item in example_inputs)
    examples = list(example_inputs) if several else [example_inputs]
    tensors = [item if isinstance(item, torch.Tensor) else torch.as_tensor(item) for item in examples]
    return [tensor if tensor.dtype == torch.uint8 else _widened(tensor) for tensor in tensors]


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)


def _check_labels(labels: Sequence[str] | None, shape: tuple[int, ...]) -> None:
    classes = shape[1] if len(shape) > 1 else 1
    if labels is not None and len(labels) != classes:
        raise CompileError("labels do not fit the model's result", expected=f"{classes} names", got=len(labels))


def _check_sizes(batch_size: int, predict_batch: int) -> None:
    for what, size in (("batch_size", batch_size), ("predict_batch", predict_batch)):
        if not 1 <= size <= 1 << 20:
            raise CompileError(f"{what} is out of range", expected="1 to 1048576", got=size)


def _bound(planned: Plan) -> dict[str, int]:
    return {"arena": planned.arena_bytes, "lower_bound": planned.lower_bound}


def _check_budget(report: MemoryReport, budget: int | None) -> None:
    if budget is None or report.peak <= budget:
        return
    largest = max(report.programs, key=lambda program: program.arena).name
    table = f"{report}\n\n{report.explain(largest)}"
    error = BudgetError(
        f"the model needs {report.peak:,} bytes, most of them for {largest!r}",
        expected=f"at most {budget:,}",
        fix=f"Lower the batch size, train fewer parameters, or raise the budget.\n\n{table}",
    )
    error.table = table
    raise error
