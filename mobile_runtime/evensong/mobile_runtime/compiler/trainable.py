"""Which parameters a model trains: by name or layer, the last layers, or the biases alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from evensong.mobile_runtime.compiler.export import Trace
from evensong.mobile_runtime.errors import CompileError

_LAST = re.compile(r"last-([1-9]\d*)")


def trainable_names(model: nn.Module, trainable: Sequence[str] | str | None, traced: Trace) -> list[str]:
    """Names of the parameters that ``trainable`` selects, in the order of the state dict.

    None takes those with ``requires_grad``, ``"none"`` takes none, ``"biases"`` each layer's bias, ``"last-3"`` the
    three layers with parameters that ``traced`` runs last. Anything else is a pattern, or several, of names of
    parameters (``"head.*"``) or of the layers that hold them (``"head"``).

    Raises :class:`CompileError` for a pattern that matches nothing.
    """
    parameters = dict(model.named_parameters())
    if trainable is None:
        return [name for name, parameter in parameters.items() if parameter.requires_grad]
    if trainable == "none":
        return []
    if trainable == "biases":
        return [name for name in parameters if name.endswith("bias")]
    if isinstance(trainable, str) and (last := _LAST.fullmatch(trainable)):
        layers = set(_layers(traced, parameters)[-int(last[1]) :])
        return [name for name in parameters if _layer(name) in layers]
    patterns = [trainable] if isinstance(trainable, str) else list(trainable)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in parameters):
            raise CompileError(f"no parameter matches {pattern!r}", expected=f"one of {', '.join(parameters)}")
    return [name for name in parameters if any(matches(name, pattern) for pattern in patterns)]


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` fits a parameter, its layer, or a module around that."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


def _layers(traced: Trace, parameters: Iterable[str]) -> list[str]:
    """The modules that hold parameters of their own, in the order in which they first run."""
    order = {node: at for at, node in enumerate(traced.nodes)}
    first_use = {
        traced.persistent[node.name]: min(order[user] for user in node.users)
        for node in traced.nodes
        if node.op == "placeholder" and node.name in traced.persistent and node.users
    }
    used = sorted((name for name in parameters if name in first_use), key=first_use.__getitem__)
    return list(dict.fromkeys(_layer(name) for name in used))


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
