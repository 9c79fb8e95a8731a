"""The model's persistent tensors: which are trained, in which layout each is kept, and their initial content."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from evensong.mobile_runtime.compiler.export import Trace
from evensong.mobile_runtime.compiler.ir import Data, Value
from evensong.mobile_runtime.compiler.layout import View
from evensong.mobile_runtime.errors import CompileError
from evensong.wire.program import DType, Region, VariableFlag

#: What stands for infinity in a mask: far from every score, and sums of it with one stay finite.
FAR = float(np.finfo(np.float32).max) / 4

_CHANNELS_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1)}
_CONVOLUTIONS = (
    "aten.conv1d.default",
    "aten.conv1d.padding",
    "aten.conv2d.default",
    "aten.conv2d.padding",
    "aten.conv_transpose1d.default",
    "aten.conv_transpose2d.input",
)
_MATMULS = ("aten.matmul.default", "aten.mm.default")


class Weights:
    """Parameters, buffers and constants by name; every program of an artifact shares these values."""

    def __init__(self, model: nn.Module, trainable: Iterable[str], trace: Trace) -> None:
        self.trainable = frozenset(trainable)
        self.flags: dict[Value, VariableFlag] = {}
        self.order: dict[Value, tuple[int, ...]] = {}
        self._tensors = {**trace.constants, **dict(model.named_buffers()), **dict(model.named_parameters())}
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._first_names = _first_names(model)
        self._orders = {self.first_name(name): order for name, order in _first_orders(trace).items()}
        self._views: dict[str, View] = {}
        self._added: list[Value] = []

    def first_name(self, name: str) -> str:
        """The name of a tensor that the model may hold under several (tied weights)."""
        return self._first_names.get(name, name)

    def view(self, name: str) -> View:
        """The author's view of a persistent tensor: STATE if it is trainable, else CONST."""
        name = self.first_name(name)
        if name not in self._views:
            data = as_array(self._tensors[name], name, is_mask=name not in self._parameters)
            order = self._orders.get(name, tuple(range(data.ndim)))
            region = Region.STATE if name in self.trainable else Region.CONST
            content = np.ascontiguousarray(data.transpose(order))
            dtype = DType.I32 if data.dtype == np.int32 else DType.F32
            value = Value(tuple(content.shape), dtype, region, name=name, data=content)
            self._views[name] = View(value, data.shape, order)
            self.order[value] = order
            if region == Region.STATE:
                self.flags[value] = VariableFlag.TRAINABLE
        return self._views[name]

    def make_buffer(self, name: str) -> None:
        """From now on ``name`` is a running statistic: it changes in training, though no optimiser updates it."""
        value = self.view(name).value
        value.region = Region.STATE
        self.flags[value] = VariableFlag.BUFFER

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of the author's tensor."""
        return self._tensors[self.first_name(name)].detach().cpu().clone()

    def add(self, value: Value, flag: VariableFlag) -> None:
        """A STATE value that is no tensor of the author's."""
        self.flags[value] = flag
        self.order[value] = tuple(range(len(value.dims)))
        self._added.append(value)

    @property
    def variables(self) -> list[Value]:
        """The STATE values in use, in the order of the state dict; then those that were added."""
        used = {view.value for view in self._views.values() if view.value.region == Region.STATE}
        known = [
            self._views[name].value for name in self._tensors if name in self._views and self._views[name].value in used
        ]
        return known + self._added


def _first_names(model: nn.Module) -> dict[str, str]:
    names: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: names.setdefault(id(tensor), name) for name, tensor in tensors}


def as_array(tensor: torch.Tensor, name: str, *, is_mask: bool = False) -> Data:
    """``tensor`` as a float32 or int32 array of its own; ``name`` is for the message when it cannot be one.

    What may be a mask may hold infinite numbers: they become :data:`FAR`.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.int64, torch.int32, torch.bool):
        return tensor.numpy().astype(np.int32)
    if not tensor.dtype.is_floating_point:
        raise CompileError(f"{name} has an unknown dtype", expected="float32 or an integer", got=str(tensor.dtype))
    data = tensor.to(torch.float32).numpy()
    if is_mask and not np.isnan(data).any():
        data = np.clip(data, -FAR, FAR)
    if not np.isfinite(data).all():
        raise CompileError(f"{name} is not finite", fix="Initialise the model before compiling it.")
    return data.copy()


def _first_orders(trace: Trace) -> dict[str, tuple[int, ...]]:
    """The layout that each tensor's first use wants, so that convolution weights need no transpose on the device."""
    orders: dict[str, tuple[int, ...]] = {}
    for placeholder in trace.nodes:
        name = trace.persistent.get(placeholder.name) if placeholder.op == "placeholder" else None
        for user in placeholder.users if name else ():
            rank = placeholder.meta["val"].dim()
            at = [index for index, arg in enumerate(user.args) if arg is placeholder]
            if str(user.target) in _CONVOLUTIONS and at == [1]:
                orders[str(name)] = _CHANNELS_LAST[rank]
            elif str(user.target) in _MATMULS and at == [1] and rank == 2:
                orders[str(name)] = (1, 0)
            break
    return orders
