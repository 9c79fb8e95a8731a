"""``torch.nn.MultiheadAttention`` while a model is traced: the same function, with the batch in one axis.

torch's own code folds heads into the batch and time into examples, and in evaluation mode calls a kernel that does
everything at once. Both hide what the layer computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F

from evensong.mobile_runtime.errors import UnsupportedOperation


@contextlib.contextmanager
def readable_attention(model: nn.Module) -> Iterator[None]:
    """Gives the attention layers of ``model`` another ``forward``, and takes it away again."""
    layers = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for layer in layers:
            del layer.forward  # the one of its class is seen again


def _forward(
    self: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    _check(self, query, key_padding_mask, attn_mask)
    q, k, v = (_heads(self, part) for part in _projected(self, query, key, value))
    mask = None if is_causal else _additive(attn_mask)
    dropout = self.dropout if self.training else 0.0
    weights = None
    if need_weights:  # they are not computed unless the model reads them
        weights = _weights(q, k, mask, is_causal)
    if weights is not None and dropout:
        weights = F.dropout(weights, dropout)
        y = weights @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    y = self.out_proj(y.transpose(1, 2).flatten(2))
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    return y if self.batch_first else y.transpose(0, 1), weights


def _check(
    layer: nn.MultiheadAttention,
    query: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
) -> None:
    refused = {
        "attention with key_padding_mask": key_padding_mask is not None,
        "attention with a mask for each example": attn_mask is not None and attn_mask.dim() != 2,
        "attention with add_bias_kv or add_zero_attn": layer.bias_k is not None or layer.add_zero_attn,
        "attention over one sequence without a batch axis": query.dim() != 3,
    }
    for what, found in refused.items():
        if found:
            raise UnsupportedOperation(what, fix="Use sequences of equal length, and a mask [queries, keys] if any.")


def _projected(
    layer: nn.MultiheadAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> list[torch.Tensor]:
    """q, k and v, each ``[n, steps, embed_dim]``."""
    if not layer.batch_first:
        same = query is key, key is value
        query = query.transpose(0, 1)
        key = query if same[0] else key.transpose(0, 1)
        value = key if same[1] else value.transpose(0, 1)
    sources = (query, key, value)
    size = layer.embed_dim
    if not layer._qkv_same_embed_dim:
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
        return _linear_layers(sources, weights, layer.in_proj_bias, [size] * 3)
    if query is key and key is value:
        return list(torch.chunk(F.linear(query, layer.in_proj_weight, layer.in_proj_bias), 3, dim=-1))
    sizes = [size, 2 * size] if key is value else [size] * 3
    made = _linear_layers(sources, torch.split(layer.in_proj_weight, sizes), layer.in_proj_bias, sizes)
    return made if len(made) == 3 else [made[0], *torch.chunk(made[1], 2, dim=-1)]


def _linear_layers(
    sources: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    sizes: list[int],
) -> list[torch.Tensor]:
    biases: Sequence[torch.Tensor | None] = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
    return [F.linear(x, w, b) for x, w, b in zip(sources, weights, biases, strict=False)]


def _heads(layer: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """``[n, steps, embed_dim]`` as ``[n, heads, steps, head_dim]``."""
    return x.reshape(*x.shape[:2], layer.num_heads, layer.head_dim).transpose(1, 2)


def _additive(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of truth values (where a query may NOT look) as what is added to the scores."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, float("-inf"))


def _weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if is_causal:
        mask = nn.Transformer.generate_square_subsequent_mask(scores.shape[-1])[: scores.shape[-2]]
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)
