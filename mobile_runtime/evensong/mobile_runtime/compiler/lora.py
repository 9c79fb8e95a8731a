"""Low-rank adapters: a frozen layer plus a trained correction of small rank (Hu et al., *LoRA: Low-Rank Adaptation of
Large Language Models*, ICLR 2022).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from evensong.mobile_runtime.compiler.trainable import matches
from evensong.mobile_runtime.errors import CompileError

_A, _B = "lora_a", "lora_b"
_FUNCTIONS: Mapping[type[nn.Module], Callable[..., torch.Tensor]] = {
    nn.Linear: functional.linear,
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
}


@dataclass(frozen=True)
class LoRA:
    """``compile(..., trainable=LoRA(4))``: adapters learn, the model's own weights are constants.

    A linear layer ``x W^T`` becomes ``x W^T + alpha / rank (x A^T) B^T``. A convolution gets one of the same geometry
    with ``rank`` channels, and one of single pixels behind it. Where a layer is called ``NAME``, its adapters are
    ``NAME.lora_a`` (random at first) and ``NAME.lora_b`` (zero at first: the model starts as it was).

    Args:
        rank: of the corrections.
        alpha: their strength is ``alpha / rank``; ``rank`` by default.
        targets: patterns of the layers that get one; grouped convolutions get none.
        dropout: of what goes into the adapters, in training.
        also: patterns of parameters and layers that are trained in full besides, such as a new head.
        seed: of the first ``lora_a``.
    """

    rank: int
    alpha: float | None = None
    targets: Sequence[str] = ("*",)
    dropout: float = 0.0
    also: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise CompileError("LoRA takes a rank of at least 1 and 0 <= dropout < 1", got=self)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def adapt(self, model: nn.Module) -> tuple[nn.Module, list[str]]:
        """A copy of ``model`` with adapters, and patterns of what is trained in it.

        Raises :class:`CompileError` if no layer fits ``targets``.
        """
        adapted = copy.deepcopy(model)
        layers = {name: module for name, module in adapted.named_modules() if _can_adapt(module)}
        chosen = [name for name in layers if any(matches(name, pattern) for pattern in self.targets)]
        if not chosen:
            raise CompileError(
                f"no linear layer or ungrouped convolution matches {list(self.targets)}",
                expected=f"one of {', '.join(layers)}" if layers else "a model with such a layer",
            )
        generator = torch.Generator().manual_seed(self.seed)
        for name in chosen:
            adapter = _Adapted(layers[name], self, generator)
            if name:
                adapted.set_submodule(name, adapter)
            else:
                adapted = adapter
        prefixes = [f"{name}." if name else "" for name in chosen]
        return adapted, [*(prefix + part for prefix in prefixes for part in (_A, _B)), *self.also]

    def merge(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict of the model without adapters, which then computes what the adapted one did.

        ``state_dict`` holds tensors or arrays by name: those of the model, with ``session.get()`` over them.
        """
        merged = {name: value for name, value in state_dict.items() if _split(name)[1] not in (_A, _B)}
        for layer in [_split(name)[0] for name in state_dict if _split(name)[1] == _A]:
            weight, b = merged.get(f"{layer}weight"), state_dict.get(layer + _B)
            if weight is None or b is None:
                raise CompileError(
                    f"{layer}{_A} cannot be merged",
                    expected=f"{layer}weight and {layer}{_B} in the state dict",
                    fix="Merge {**model.state_dict(), **session.get()}.",
                )
            low, high = (torch.as_tensor(np.asarray(factor)).flatten(1) for factor in (state_dict[layer + _A], b))
            total = torch.as_tensor(np.asarray(weight)) + self.scale * (high @ low).reshape(tuple(weight.shape))
            merged[f"{layer}weight"] = total if isinstance(weight, torch.Tensor) else total.numpy()
        return merged


class _Adapted(nn.Module):
    """A linear layer or convolution, under the names of its own parameters, with an adapter beside it."""

    def __init__(self, layer: nn.Module, settings: LoRA, generator: torch.Generator) -> None:
        super().__init__()
        self._settings, self._function = settings, _FUNCTIONS[type(layer)]
        self._geometry = {
            name: getattr(layer, name) for name in ("stride", "padding", "dilation") if hasattr(layer, name)
        }
        self.weight: nn.Parameter = layer.get_parameter("weight")
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]  # a parameter or None
        low = self.weight.new_empty((settings.rank, *self.weight.shape[1:]))
        self.lora_a = nn.Parameter(nn.init.kaiming_uniform_(low, a=5**0.5, generator=generator))
        self.lora_b = nn.Parameter(self.weight.new_zeros((len(self.weight), settings.rank, *[1] * (low.dim() - 2))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropout, scale = self._settings.dropout, self._settings.scale
        y = self._function(x, self.weight, self.bias, **self._geometry)
        kept = functional.dropout(x, dropout, self.training) if dropout else x
        low = self._function(kept, self.lora_a, **self._geometry)
        return y + self._function(low if scale == 1 else low * scale, self.lora_b)


def _can_adapt(module: nn.Module) -> bool:
    """Layers of exactly these types: a subclass may compute something else."""
    plain = getattr(module, "groups", 1) == 1 and getattr(module, "padding_mode", "zeros") == "zeros"
    return type(module) in _FUNCTIONS and plain


def _split(name: str) -> tuple[str, str]:
    """A parameter's layer, with its dot, and its name there."""
    layer, dot, part = name.rpartition(".")
    return layer + dot, part
