"""Keras 3 models as torch modules, so that ``compile`` takes them: one torch layer for each Keras layer.

The module has weights of its own, copied from the model, in torch's layouts; :meth:`KerasModule.update` writes trained
ones back. Images stay channels-last at its ports, as Keras has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from evensong.mobile_runtime.errors import CompileError, UnsupportedOperation

if TYPE_CHECKING:
    import keras


def is_keras_model(model: object) -> TypeGuard[keras.Model]:
    """Whether ``model`` is a Keras model; Keras itself is not imported for that."""
    return any(cls.__module__.partition(".")[0] == "keras" and cls.__name__ == "Model" for cls in type(model).__mro__)


class KerasModule(nn.Module):
    """A Sequential or functional Keras model, with any backend, as a torch module with the same results.

    Weights are named ``layers.LAYER.weight`` and so on, in torch's layouts. BatchNormalization becomes torch's: in
    training its running variance takes the unbiased variance of the batch, where Keras takes the biased one.

    Raises:
        UnsupportedOperation: a layer that has no counterpart here, or an option of it.
        CompileError: a model that is not built, or a subclass of Model with a ``call`` of its own.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        operations = _operations(model)
        self.layers = nn.ModuleDict()
        self._steps: list[_Step] = []
        self._copies: list[_Copy] = []
        self._inputs = [id(tensor) for tensor in model.inputs]
        if len(model.outputs) != 1:
            raise CompileError("the model must return one tensor", got=f"{len(model.outputs)} results")
        self._output = id(model.outputs[0])
        for operation in operations:
            name = operation.name.replace(".", "_")
            made = _converted(operation)
            self.layers[name] = made.module
            self._copies += [_Copy(v, f"layers.{name}.{p}", axes) for v, p, axes in made.weights]
            sources = operation.input if isinstance(operation.input, (list, tuple)) else [operation.input]
            self._steps.append(_Step(name, tuple(map(id, sources)), id(operation.output), made))
        self._check_connected()
        state = self.state_dict()
        for copy in self._copies:
            array = np.asarray(copy.variable.numpy(), np.float32).transpose(copy.axes).reshape(state[copy.name].shape)
            state[copy.name].copy_(torch.from_numpy(np.array(array)))
        for parameter, trainable in self._trainable():
            parameter.requires_grad_(trainable)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The model's result; images are ``[n, height, width, channels]``."""
        known = dict(zip(self._inputs, inputs, strict=True))
        for step in self._steps:
            known[step.result] = step.made.call(self.layers[step.name], [known[source] for source in step.sources])
        return known[self._output]

    def update(self, values: Mapping[str, npt.ArrayLike]) -> None:
        """Writes variables, as ``Session.get()`` gives them, back into the Keras model that this was made of."""
        for copy in self._copies:
            if copy.name in values:
                shape = tuple(copy.variable.shape)
                array = np.asarray(values[copy.name]).reshape([shape[axis] for axis in copy.axes])
                copy.variable.assign(array.transpose(np.argsort(copy.axes)))

    def _check_connected(self) -> None:
        """Keras tells the tensors of a layer's first call only."""
        known = set(self._inputs)
        for step in self._steps:
            if not known.issuperset(step.sources):
                raise UnsupportedOperation(f"a Keras layer before {step.name} is called more than once")
            known.add(step.result)
        if self._output not in known:
            raise UnsupportedOperation("the last Keras layer is called more than once")

    def _trainable(self) -> list[tuple[nn.Parameter, bool]]:
        parameters = dict(self.named_parameters())
        return [(parameters[c.name], bool(c.variable.trainable)) for c in self._copies if c.name in parameters]


@dataclass(frozen=True)
class _Copy:
    """``torch.transpose(keras, axes)`` is the torch tensor ``name`` (or its reshape)."""

    variable: Any
    name: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class _Converted:
    """A torch layer, and what happens around it: images turned channels-first, zeros put around them, an activation."""

    module: nn.Module
    weights: Sequence[tuple[Any, str, tuple[int, ...]]] = ()
    turns: bool = False
    padding: Sequence[int] = ()
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None

    def call(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """One call; ``module`` is this one, or the copy of it that a copied model has."""
        if not self.turns:
            return self._activated(module(*inputs))
        axes = range(inputs[0].dim())
        x = inputs[0].permute(0, axes[-1], *axes[1:-1])
        if any(self.padding):
            x = F.pad(x, list(self.padding))
        return self._activated(module(x)).permute(0, *axes[2:], 1)

    def _activated(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.activation is None else self.activation(y)


@dataclass(frozen=True)
class _Step:
    """One call; tensors are known by the ids of their Keras tensors."""

    name: str
    sources: tuple[int, ...]
    result: int
    made: _Converted


def _operations(model: Any) -> list[Any]:
    if not getattr(model, "built", False) or not hasattr(model, "operations"):
        functional = getattr(model, "_functional", None)  # of a Sequential model that is built
        if functional is None:
            raise CompileError(
                "the Keras model has no graph of layers",
                expected="a built keras.Sequential or a functional keras.Model",
                got=type(model).__name__,
                fix="Give the model an Input, or write it with the functional interface.",
            )
        return _operations(functional)
    found = []
    for operation in model.operations:
        if type(operation).__name__ == "InputLayer":
            continue
        if hasattr(operation, "operations") or hasattr(operation, "_functional"):
            raise UnsupportedOperation(f"a model inside a model ({operation.name})", fix="Call its layers instead.")
        found.append(operation)
    return found


def _converted(operation: Any) -> _Converted:
    kind = type(operation).__name__
    convert = _LAYERS.get(kind)
    if convert is None:
        raise UnsupportedOperation(
            f"the Keras layer {kind} ({operation.name}) has no counterpart", expected=sorted(_LAYERS), got=kind
        )
    if getattr(operation, "data_format", "channels_last") != "channels_last":
        raise UnsupportedOperation(f"{operation.name}: channels first", expected="data_format='channels_last'")
    return convert(operation)


# -------------------------------------------------------------------------------------------------------------- layers


class _Call(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._function(*inputs)


def _dense(layer: Any) -> _Converted:
    linear = nn.Linear(int(layer.kernel.shape[0]), layer.units, bias=layer.use_bias)
    return _Converted(linear, _kernel(layer, (1, 0)), activation=_activation_of(layer))


def _convolution(layer: Any) -> _Converted:
    channels = int(layer.input.shape[-1])
    return _window(layer, layer.filters, layer.groups, (layer.rank + 1, layer.rank, *range(layer.rank)), channels)


def _depthwise(layer: Any) -> _Converted:
    if layer.depth_multiplier != 1:
        raise UnsupportedOperation(f"{layer.name}: depth_multiplier", expected=1, got=layer.depth_multiplier)
    channels = int(layer.input.shape[-1])
    return _window(layer, channels, channels, (layer.rank, layer.rank + 1, *range(layer.rank)), channels)


def _window(layer: Any, filters: int, groups: int, axes: tuple[int, ...], channels: int) -> _Converted:
    kind = nn.Conv1d if layer.rank == 1 else nn.Conv2d
    convolution = kind(
        channels, filters, layer.kernel_size, layer.strides, 0, layer.dilation_rate, groups, layer.use_bias
    )
    around = _around(layer, layer.kernel_size, layer.dilation_rate)
    return _Converted(convolution, _kernel(layer, axes), True, around, _activation_of(layer))


def _kernel(layer: Any, axes: tuple[int, ...]) -> list[tuple[Any, str, tuple[int, ...]]]:
    bias = [(layer.bias, "bias", (0,))] if layer.use_bias else []
    return [(layer.kernel, "weight", axes), *bias]


def _batch_normalization(layer: Any) -> _Converted:
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis
    rank = len(layer.input.shape)
    if axis not in (-1, rank - 1):
        raise UnsupportedOperation(f"{layer.name}: axis", expected=-1, got=axis)
    if not (layer.scale and layer.center):
        raise UnsupportedOperation(f"{layer.name}: without scale or center", expected="both")
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[rank]
    norm = kind(int(layer.gamma.shape[0]), layer.epsilon, 1 - layer.momentum)
    names = {"weight": layer.gamma, "bias": layer.beta}
    names |= {"running_mean": layer.moving_mean, "running_var": layer.moving_variance}
    return _Converted(norm, [(variable, name, (0,)) for name, variable in names.items()], turns=rank > 2)


def _layer_normalization(layer: Any) -> _Converted:
    rank = len(layer.input.shape)
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if [axis % rank for axis in axes] != [rank - 1] or not (layer.scale and layer.center):
        raise UnsupportedOperation(f"{layer.name}: another axis than the last, or without scale or center")
    norm = nn.LayerNorm(int(layer.gamma.shape[0]), layer.epsilon)
    return _Converted(norm, [(layer.gamma, "weight", (0,)), (layer.beta, "bias", (0,))])


def _embedding(layer: Any) -> _Converted:
    table = nn.Embedding(layer.input_dim, layer.output_dim)
    return _Converted(table, [(layer.embeddings, "weight", (0, 1))])


def _pooling(function: Callable[..., nn.Module]) -> Callable[[Any], _Converted]:
    def convert(layer: Any) -> _Converted:
        if layer.padding != "valid" and any(_around(layer, layer.pool_size, (1,) * len(layer.pool_size))):
            raise UnsupportedOperation(f"{layer.name}: padding that does not come out even", expected="'valid'")
        return _Converted(function(layer.pool_size, layer.strides), turns=True)

    return convert


def _reduction(function: Callable[..., torch.Tensor]) -> Callable[[Any], _Converted]:
    def convert(layer: Any) -> _Converted:
        axes = tuple(range(1, len(layer.input.shape) - 1))
        return _Converted(_Call(lambda x: function(x, dim=axes, keepdim=bool(layer.keepdims))))

    return convert


def _join(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Any], _Converted]:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        result = inputs[0]
        for other in inputs[1:]:
            result = function(result, other)
        return result

    return lambda layer: _Converted(_Call(run))


def _reshape(layer: Any) -> _Converted:
    shape = tuple(int(size) for size in layer.output.shape[1:])
    return _Converted(_Call(lambda x: x.reshape(x.shape[0], *shape)))


def _zero_padding(layer: Any) -> _Converted:
    pairs = layer.padding if isinstance(layer.padding[0], (list, tuple)) else [layer.padding]
    return _Converted(nn.Identity(), turns=True, padding=[size for pair in reversed(pairs) for size in pair])


def _activation_of(layer: Any) -> nn.Module:
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    if name not in _ACTIVATIONS:
        raise UnsupportedOperation(f"{layer.name}: activation {name}", expected=sorted(_ACTIVATIONS), got=name)
    return _ACTIVATIONS[name]()


def _around(layer: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """What ``padding="same"`` or ``"causal"`` puts around the image, in the order of ``F.pad``."""
    if layer.padding == "valid":
        return []
    sizes = layer.input.shape[1:-1]
    padding: list[int] = []
    for size, window, stride, step in reversed(list(zip(sizes, kernel, layer.strides, dilation, strict=True))):
        reach = (window - 1) * step + 1
        if layer.padding == "causal":
            padding += [reach - 1, 0]
            continue
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        padding += [total // 2, total - total // 2]
    return padding


def _relu(layer: Any) -> _Converted:
    if layer.threshold or layer.max_value not in (None, 6.0):
        raise UnsupportedOperation(f"{layer.name}: threshold or max_value", expected="0 and None or 6")
    if layer.negative_slope:
        return _Converted(nn.LeakyReLU(float(layer.negative_slope)))
    return _Converted(nn.ReLU6() if layer.max_value else nn.ReLU())


_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "hard_silu": nn.Hardswish,
    "hard_sigmoid": nn.Hardsigmoid,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "softmax": lambda: nn.Softmax(dim=-1),
    "log_softmax": lambda: nn.LogSoftmax(dim=-1),
}

_LAYERS: Mapping[str, Callable[[Any], _Converted]] = {
    "Dense": _dense,
    "Conv1D": _convolution,
    "Conv2D": _convolution,
    "DepthwiseConv1D": _depthwise,
    "DepthwiseConv2D": _depthwise,
    "BatchNormalization": _batch_normalization,
    "LayerNormalization": _layer_normalization,
    "Embedding": _embedding,
    "MaxPooling1D": _pooling(nn.MaxPool1d),
    "MaxPooling2D": _pooling(nn.MaxPool2d),
    "AveragePooling1D": _pooling(nn.AvgPool1d),
    "AveragePooling2D": _pooling(nn.AvgPool2d),
    "GlobalAveragePooling1D": _reduction(torch.mean),
    "GlobalAveragePooling2D": _reduction(torch.mean),
    "GlobalMaxPooling1D": _reduction(torch.amax),
    "GlobalMaxPooling2D": _reduction(torch.amax),
    "Activation": lambda layer: _Converted(_activation_of(layer)),
    "ReLU": _relu,
    "LeakyReLU": lambda layer: _Converted(nn.LeakyReLU(float(layer.negative_slope))),
    "Softmax": lambda layer: _Converted(nn.Softmax(dim=-1)),
    "Dropout": lambda layer: _Converted(nn.Dropout(layer.rate)),
    "Flatten": lambda layer: _Converted(nn.Flatten()),
    "Reshape": _reshape,
    "ZeroPadding1D": _zero_padding,
    "ZeroPadding2D": _zero_padding,
    "Concatenate": lambda layer: _Converted(_Call(lambda *x: torch.cat(x, dim=layer.axis))),
    "Add": _join(torch.add),
    "Subtract": _join(torch.sub),
    "Multiply": _join(torch.mul),
    "Rescaling": lambda layer: _Converted(_Call(lambda x: x * float(layer.scale) + float(layer.offset))),
}
