"""Batch norms that become part of the layers before them, in a copy of the author's model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from evensong.mobile_runtime.compiler.export import Trace

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def fold_batch_norms(model: nn.Module, traced: Trace) -> nn.Module:
    """A copy of ``model`` without the batch norms that alone read a convolution or a linear layer, in evaluation mode:
    their statistics and factors are in the layer's weight and bias, which train as the weight did.
    """
    folded = copy.deepcopy(model)
    for norm in traced.nodes:
        layer = norm.args[0] if norm.op == "call_function" and str(norm.target) == "aten.batch_norm.default" else None
        if not isinstance(layer, torch.fx.Node) or len(layer.users) != 1:
            continue
        names = _module_name(layer), _module_name(norm)
        modules = [folded.get_submodule(name) for name in names]
        if not isinstance(modules[0], _LAYERS) or not isinstance(modules[1], _NORMS):
            continue
        before, statistics = modules[0].eval(), modules[1].eval()
        trains = before.weight.requires_grad
        fused: nn.Module
        if isinstance(before, nn.Linear):
            fused = fuse_linear_bn_eval(before, statistics)
        else:
            fused = fuse_conv_bn_eval(before, statistics)
        for parameter in fused.parameters():
            parameter.requires_grad_(trains)
        folded.set_submodule(names[0], fused)
        folded.set_submodule(names[1], nn.Identity())
    return folded


def _module_name(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
