"""The peers of ``benchmarks.runtime``: PyTorch eager, ONNX Runtime and ExecuTorch, one thread each."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower
from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer, _unsafe_reset_threadpool
from executorch.extension.training import _load_for_executorch_for_training_from_buffer, get_sgd_optimizer
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn
from torch.export.experimental import _export_forward_backward

from evensong.mobile_runtime.compiler import zoo

Floats = npt.NDArray[np.float32]


def quiet() -> None:
    """One thread for torch, and no words about packages that are not installed or interfaces that are new."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


# ------------------------------------------------------------------------------------------------------------- training


def eager_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, learning_rate: float) -> Callable[[], float]:
    """One step of SGD in PyTorch eager; gives the loss before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    criterion = nn.CrossEntropyLoss()

    def step() -> float:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def executorch_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, learning_rate: float) -> Callable[[], float]:
    """One step of SGD with ExecuTorch's training API and its portable kernels; gives the loss before it.

    Two things cannot be exported, and the peer gets something as large or smaller in their place: batch norm in
    training mode (it normalises by fixed statistics, and trains scale and shift), and 1-D convolutions (the same
    products as 2-D ones).
    """
    exported = torch.export.export(_Loss(_exportable(model).eval()), (x, y), strict=True)
    edge = to_edge(_export_forward_backward(exported), compile_config=EdgeCompileConfig(_check_ir_validity=False))
    program = edge.to_executorch().buffer
    module = _load_for_executorch_for_training_from_buffer(program)
    module.forward_backward("forward", (x, y))  # parameters have names from here on
    optimizer = get_sgd_optimizer(module.named_parameters(), learning_rate)

    def step(program: bytes = program) -> float:  # the module reads the bytes as long as it lives
        (loss,) = module.forward_backward("forward", (x, y))
        optimizer.step(module.named_gradients())
        return float(loss)

    return step


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(x), y)


class _HarCnn2d(nn.Module):
    """:class:`zoo.HarCnn` with its 1-D convolutions written as 2-D ones over pictures of one line."""

    def __init__(self, model: zoo.HarCnn) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = x.unsqueeze(2)
        for layer in self.model.body:
            if isinstance(layer, nn.Conv1d):
                stride = (1, *layer.stride)
                features = nn.functional.conv2d(features, layer.weight.unsqueeze(2), layer.bias, stride)
            else:
                features = layer(features)
        features = features.squeeze(2)
        pooled = torch.cat([features.mean(dim=-1), features.amax(dim=-1)], dim=1)
        return self.model.head(pooled)  # type: ignore[no-any-return]


def _exportable(model: nn.Module) -> nn.Module:
    return _HarCnn2d(model) if isinstance(model, zoo.HarCnn) else model


# ------------------------------------------------------------------------------------------------------------ inference


def executorch_prediction(model: nn.Module, one: torch.Tensor) -> Callable[[], Floats]:
    """The prediction for one example by ExecuTorch with its XNNPACK backend."""
    exported = torch.export.export(model, (one,), strict=True)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer
    module = _load_for_executorch_from_buffer(program)
    _unsafe_reset_threadpool(1)
    inputs = (one,)

    def predict(program: bytes = program) -> Floats:  # the module reads the bytes as long as it lives
        result: Floats = module.forward(inputs)[0].numpy()
        return result

    return predict


def onnx_prediction(
    model: nn.Module, one: torch.Tensor, calibration: torch.Tensor | None = None
) -> Callable[[], Floats]:
    """The prediction for one example by ONNX Runtime; with ``calibration`` examples, in its static int8 form."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (one,), str(path), dynamo=True, verbose=False)
        if calibration is not None:
            path = _quantized(path, calibration)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: one.numpy().copy()}

    def predict() -> Floats:
        result: Floats = session.run(None, feed)[0]
        return result

    return predict


def _quantized(path: Path, calibration: torch.Tensor) -> Path:
    prepared, quantized = path.with_name("prepared.onnx"), path.with_name("quantized.onnx")
    quant_pre_process(str(path), str(prepared))
    quantize_static(
        str(prepared),
        str(quantized),
        _Reader(prepared, calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return quantized


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds the calibration examples to ONNX Runtime's quantiser, one at a time."""

    def __init__(self, model: Path, calibration: torch.Tensor) -> None:
        name = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).get_inputs()[0].name
        self._feeds = iter([{name: example[None].numpy()} for example in calibration])

    def get_next(self) -> dict[str, Floats] | None:
        return next(self._feeds, None)
