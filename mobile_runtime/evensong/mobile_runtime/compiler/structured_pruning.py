"""Structured pruning: whole channels and neurons go, and what is left is a smaller model of the same kind.

Which channels belong together (a residual sum needs all of its terms to lose the same one, a batch norm and a depthwise
convolution follow their input) is found by looking: a channel is set to NaN and the model tells where it arrives. That
holds for any ``forward``, and a channel whose trace blurs (through attention, a recurrence, a norm over channels) is
simply kept. The idea of pruning dependent layers as one group is that of Fang et al., *DepGraph: towards any structural
pruning*, CVPR 2023; magnitude as importance that of Li et al., *Pruning filters for efficient ConvNets*, ICLR 2017.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from evensong.mobile_runtime.errors import CompileError

_PROBES = 32  #: channels that one forward pass looks at, one in each example

Importance = Literal["l1", "l2"]
Feature = tuple[str, int]  #: a module's name and the number of one of its outputs or inputs


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one layer: output channels before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class StructuredPruning:
    """The smaller model, and what was taken from each layer: ``removed`` has the numbers of the channels that went."""

    model: nn.Module
    layers: tuple[PrunedLayer, ...]
    removed: Mapping[str, tuple[int, ...]]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        rows = [f"{layer.name}: {layer.before} -> {layer.after}" for layer in self.layers]
        return "\n".join([*rows, f"parameters: {self.parameters_before:,} -> {self.parameters_after:,}"])


def prune_channels(
    model: nn.Module,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    amount: float | Mapping[str, float],
    *,
    importance: Importance = "l2",
    multiple_of: int = 1,
    least: int = 1,
) -> StructuredPruning:
    """A copy of ``model`` without the least important channels and neurons.

    Args:
        model: any module; convolutions, linear layers and batch norms in it are made smaller.
        example_inputs: one tensor ``[n, ...]`` for each input.
        amount: the share of channels to take from each group of layers that must agree, 0 to 1, or a share by the name
            of a layer (a group takes the largest of its layers').
        importance: norm of a channel's weights in all layers that make it, relative to the largest of its group.
        multiple_of: channels that are left are a multiple of this where the layer has that many (8 suits the kernels).
        least: channels that every layer keeps.

    The outputs of the model and channels that cannot be told apart are never touched. The model's result changes:
    train it on, and prune in several rounds where much is to go.

    Raises:
        CompileError: an amount out of range, or a layer's name that does not exist.
    """
    inputs = [example_inputs] if isinstance(example_inputs, torch.Tensor) else list(example_inputs)
    shares = _checked(model, amount)
    groups = _groups(model, [example[:1] for example in inputs])
    whole = _Group()
    for layers, members in _by_layers(groups).items():
        share = max((shares.get(name, shares.get("", 0.0)) for name in layers), default=0.0)
        part = _Group()
        for group in _least_important(model, members, share, importance, multiple_of, least):
            part.outputs |= group.outputs
            part.inputs |= group.inputs
        if part.outputs and _can_go(model, part, inputs):
            whole.outputs |= part.outputs
            whole.inputs |= part.inputs
    smaller, removed = _without(model, whole), _by_name(whole.outputs)
    layers_before = {name: _channels(module) for name, module in model.named_modules() if _is_producer(module)}
    return StructuredPruning(
        smaller,
        tuple(PrunedLayer(name, before, before - len(removed.get(name, ()))) for name, before in layers_before.items()),
        {name: tuple(sorted(channels)) for name, channels in removed.items()},
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in smaller.parameters()),
    )


# -------------------------------------------------------------------------------------------------------------- groups


@dataclass
class _Group:
    """What has to go together: outputs of layers, and the inputs of others that then have nothing left to read."""

    outputs: set[Feature] = field(default_factory=set)
    inputs: set[Feature] = field(default_factory=set)
    fixed: bool = False


def _is_producer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == module.in_channels == module.out_channels > 1


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups > 1 and not _is_depthwise(module)


def _follows(module: nn.Module) -> bool:
    """Whether each output channel depends on the input channel of its number alone."""
    return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) or _is_depthwise(module)


def _channels(module: nn.Module) -> int:
    return len(module.weight) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) else 0


def _groups(model: nn.Module, examples: Sequence[torch.Tensor]) -> list[_Group]:
    """Every output channel of every layer in exactly one group; outputs of the model and grouped layers are fixed."""
    watched = {name: m for name, m in model.named_modules() if _is_producer(m) or _follows(m)}
    sources = [(name, c) for name, m in watched.items() if not _follows(m) for c in range(_channels(m))]
    arrivals = {source: _Group({source}) for source in sources}
    for start in range(0, len(sources), _PROBES):
        batch = sources[start : start + _PROBES]
        _probe(model, watched, examples, batch, [arrivals[source] for source in batch])
    given = _probe_inputs(model, watched, examples)
    groups = _merged([*arrivals.values(), *given])
    grouped = {name for name, module in watched.items() if _is_grouped(module)}
    for group in groups:
        group.fixed = group.fixed or any(name in grouped for name, _ in (*group.outputs, *group.inputs))
    return groups


def _merged(found: Sequence[_Group]) -> list[_Group]:
    """Joins groups that share an input of a layer, or something that follows."""
    leader = list(range(len(found)))

    def top(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    first: dict[tuple[str, Feature], int] = {}
    for index, group in enumerate(found):
        for key in [*(("in", f) for f in group.inputs), *(("out", f) for f in group.outputs)]:
            leader[top(index)] = top(first.setdefault(key, index))
    joined: dict[int, _Group] = {}
    for index, group in enumerate(found):
        whole = joined.setdefault(top(index), _Group())
        whole.outputs |= group.outputs
        whole.inputs |= group.inputs
        whole.fixed = whole.fixed or group.fixed
    return list(joined.values())


def _probe(
    model: nn.Module,
    watched: Mapping[str, nn.Module],
    examples: Sequence[torch.Tensor],
    sources: Sequence[Feature],
    groups: Sequence[_Group],
) -> None:
    """Sets one channel to NaN in each example and notes where it arrives."""

    def poison(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        mine = [(example, channel) for example, (layer, channel) in enumerate(sources) if layer == name]

        def apply(y: torch.Tensor) -> torch.Tensor:
            for example, channel in mine:
                _channel(watched[name], y)[example, channel] = torch.nan
            return y

        return apply

    inputs = [example.expand(len(sources), *example.shape[1:]) for example in examples]
    result = _watch(model, watched, inputs, poison, groups)
    for example, group in enumerate(groups):
        group.fixed = group.fixed or bool(result[example].isnan().any())


def _probe_inputs(model: nn.Module, watched: Mapping[str, nn.Module], examples: Sequence[torch.Tensor]) -> list[_Group]:
    """The model's inputs feed layers as well; what they reach must stay."""
    groups = []
    for index, example in enumerate(examples):
        if not example.is_floating_point():
            continue
        group = _Group(fixed=True)
        inputs = [e.clone() for e in examples]
        inputs[index] = torch.full_like(example, torch.nan)
        _watch(model, watched, inputs, lambda name: lambda y: y, [group])
        groups.append(group)
    return groups


def _watch(
    model: nn.Module,
    watched: Mapping[str, nn.Module],
    inputs: Sequence[torch.Tensor],
    change: Callable[[str], Callable[[torch.Tensor], torch.Tensor]],
    groups: Sequence[_Group],
) -> torch.Tensor:
    """One forward pass in which layers tell which of their inputs are NaN, and compute without them."""
    handles = []

    def before(name: str, module: nn.Module) -> Callable[..., tuple[torch.Tensor, ...]]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0]
            seen = _channel(module, x).isnan()
            seen = seen.flatten(2).any(dim=2) if seen.dim() > 2 else seen
            for example, channel in seen.nonzero().tolist():
                feature = (name, channel)
                (groups[example].outputs if _follows(module) else groups[example].inputs).add(feature)
            return args if _follows(module) else (torch.nan_to_num(x, nan=0.0), *args[1:])

        return hook

    def after(name: str) -> Callable[..., torch.Tensor]:
        apply = change(name)
        return lambda module, args, y: apply(y.clone())

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for name, module in watched.items():
            handles.append(module.register_forward_pre_hook(before(name, module)))
            if not _follows(module):
                handles.append(module.register_forward_hook(after(name)))
        with torch.no_grad():
            result = model(*inputs)
        if not isinstance(result, torch.Tensor):
            raise CompileError("the model must return one tensor", got=type(result).__name__)
        return result
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _channel(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``x`` as ``[n, channels, ...]``, a view."""
    if isinstance(module, nn.Linear):
        return x.movedim(-1, 1)
    return x


# ----------------------------------------------------------------------------------------------------------- importance


def _by_layers(groups: Sequence[_Group]) -> dict[tuple[str, ...], list[_Group]]:
    """Groups of the same layers, which compete with one another. Fixed ones stand out."""
    found: dict[tuple[str, ...], list[_Group]] = {}
    for group in groups:
        names = tuple(sorted({name for name, _ in group.outputs}))
        counted = {name: sum(other == name for other, _ in group.outputs) for name in names}
        if names and not group.fixed and all(count == 1 for count in counted.values()):
            found.setdefault(names, []).append(group)
    return found


def _least_important(
    model: nn.Module, groups: list[_Group], share: float, importance: Importance, multiple_of: int, least: int
) -> list[_Group]:
    kept = max(len(groups) - int(share * len(groups) + 1e-9), least, 1)
    if multiple_of > 1 and len(groups) > multiple_of:
        kept = min(len(groups), max(multiple_of, round(kept / multiple_of) * multiple_of))
    if kept >= len(groups):
        return []
    modules = dict(model.named_modules())
    order = 1 if importance == "l1" else 2
    norms: dict[str, torch.Tensor] = {}
    for name in {name for group in groups for name, _ in group.outputs}:
        if not isinstance(modules[name], (nn.BatchNorm1d, nn.BatchNorm2d)):
            weight = modules[name].weight.detach()
            norm = torch.linalg.vector_norm(weight.flatten(1), ord=order, dim=1)
            norms[name] = norm / norm.max().clamp_min(1e-30)
    scores = [sum(float(norms[name][channel]) for name, channel in g.outputs if name in norms) for g in groups]
    ranked = sorted(range(len(groups)), key=lambda index: (scores[index], index))
    return [groups[index] for index in ranked[: len(groups) - kept]]


# -------------------------------------------------------------------------------------------------------------- surgery


def _without(model: nn.Module, group: _Group) -> nn.Module:
    """A copy of ``model`` that lacks what ``group`` holds."""
    smaller = copy.deepcopy(model)
    outputs, inputs = _by_name(group.outputs), _by_name(group.inputs)
    for name, module in smaller.named_modules():
        _shrink(module, outputs.get(name, set()), inputs.get(name, set()))
    return smaller


def _can_go(model: nn.Module, group: _Group, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether the model without ``group`` is the model with these channels at zero: what is added to them from
    outside any layer (an embedding, a parameter of ``forward``) leaves no trace, but makes a difference here.
    """
    silenced = copy.deepcopy(model).eval()
    modules = dict(silenced.named_modules())
    smaller = _without(model, group).eval()
    with torch.no_grad():
        for name, channel in group.outputs:
            for tensor in (modules[name].weight, modules[name].bias):
                if isinstance(tensor, torch.Tensor):
                    tensor[channel] = 0
        expected = silenced(*inputs)
        try:
            got = smaller(*inputs)
        except RuntimeError:  # torch's word for shapes that do not fit
            return False
    return got.shape == expected.shape and bool(torch.allclose(got, expected, rtol=1e-3, atol=1e-4, equal_nan=True))


def _by_name(features: set[Feature]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for name, number in features:
        found.setdefault(name, set()).add(number)
    return found


def _shrink(module: nn.Module, outputs: set[int], inputs: set[int]) -> None:
    """Takes channels from one module, in place."""
    if not outputs and not inputs:
        return
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(module, name, 0, outputs)
        module.num_features -= len(outputs)
    elif isinstance(module, nn.Linear):
        _select(module, "weight", 0, outputs)
        _select(module, "weight", 1, inputs)
        _select(module, "bias", 0, outputs)
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
        depthwise = _is_depthwise(module)
        _select(module, "weight", 0, outputs)
        _select(module, "bias", 0, outputs)
        module.out_channels -= len(outputs)
        if depthwise:
            module.in_channels = module.groups = module.out_channels
        else:
            _select(module, "weight", 1, inputs)
            module.in_channels -= len(inputs)


def _select(module: nn.Module, name: str, axis: int, without: set[int]) -> None:
    tensor = getattr(module, name)
    if tensor is None or not without:
        return
    kept = torch.tensor([index for index in range(tensor.shape[axis]) if index not in without])
    content = tensor.detach().index_select(axis, kept).clone()
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(content, requires_grad=tensor.requires_grad))
    else:
        setattr(module, name, content)


def _checked(model: nn.Module, amount: float | Mapping[str, float]) -> dict[str, float]:
    """Shares by layer; the share of all others stands under the empty name."""
    shares = {"": float(amount)} if isinstance(amount, (int, float)) else dict(amount)
    layers = {name for name, module in model.named_modules() if _is_producer(module)}
    for name, share in shares.items():
        if name and name not in layers:
            raise CompileError(f"there is no layer {name!r} to prune", expected=f"one of {sorted(layers)}", got=name)
        if not 0 <= share < 1:
            raise CompileError("the amount to prune is out of range", expected="0 <= amount < 1", got=share)
    return shares
