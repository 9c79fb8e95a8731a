"""Structured pruning: a model without some channels computes what the whole one computes with these at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evensong.mobile_runtime import load
from evensong.mobile_runtime.compiler import compile, prune_channels, zoo
from evensong.mobile_runtime.errors import CompileError

pytestmark = pytest.mark.torch


class Branches(nn.Module):
    """Residual sums, a depthwise convolution, a concatenation, a squeeze and a flattened end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1))
        self.right = nn.Conv2d(8, 6, 1)
        self.squeeze, self.excite = nn.Linear(14, 5), nn.Linear(5, 14)
        self.head = nn.Linear(14 * 9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([torch.relu(x + self.left(x)), torch.tanh(self.right(x))], dim=1)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        x = nn.functional.max_pool2d(x * gate[:, :, None, None], 2)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """Linear layers over a sequence, whose channels are last."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(9, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.positions = nn.Parameter(torch.randn(5, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.positions
        x = x + self.second(torch.nn.functional.gelu(self.first(x)))
        return self.head(x.mean(dim=1))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "branches": (Branches, lambda: torch.randn(4, 3, 6, 6)),
    "tokens": (Tokens, lambda: torch.randint(0, 9, (4, 5))),
    "mlp": (zoo.mlp, lambda: torch.randn(4, 784)),
    "har": (zoo.har_cnn, lambda: torch.randn(4, 9, 128)),
    "keywords": (lambda: zoo.DsCnn(channels=12, blocks=2), lambda: torch.randn(4, 1, 49, 10)),
    "mobilenet block": (
        lambda: nn.Sequential(
            zoo.InvertedResidual(3, 8, 2, 2), zoo.InvertedResidual(8, 8, 1, 6), nn.Flatten(), nn.Linear(8 * 16, 3)
        ),
        lambda: torch.randn(4, 3, 8, 8),
    ),
}


def _randomised(model: nn.Module) -> nn.Module:
    """Every tensor, running statistics included, away from its initial value."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
                tensor *= torch.where(torch.rand_like(tensor) < 0.5, -1.0, 1.0) if tensor.dim() > 1 else 1.0
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8, deadline=None)
@given(amount=st.sampled_from([0.2, 0.5, 0.9]), multiple_of=st.sampled_from([1, 4]), seed=st.integers(0, 99))
def test_pruned_is_the_whole_with_channels_at_zero(name: str, amount: float, multiple_of: int, seed: int) -> None:
    torch.manual_seed(seed)
    make, examples = MODELS[name]
    model, x = _randomised(make()), examples()
    pruned = prune_channels(model, x, amount, multiple_of=multiple_of)
    silenced = copy.deepcopy(model)
    modules = dict(silenced.named_modules())
    with torch.no_grad():
        for layer, channels in pruned.removed.items():
            modules[layer].weight[list(channels)] = 0
            if modules[layer].bias is not None:
                modules[layer].bias[list(channels)] = 0
        torch.testing.assert_close(pruned.model(x), silenced(x), rtol=1e-4, atol=1e-4)
    assert pruned.parameters_after < pruned.parameters_before
    assert pruned.model(x).shape == model(x).shape


def test_the_least_channels_go_first_and_every_layer_keeps_some() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 1.0, 6.0, 2.0, 5.0, 4.0])[:, None].expand(6, 4))
    pruned = prune_channels(model, torch.randn(1, 4), 0.5)
    assert pruned.removed == {"0": (0, 1, 3)}
    assert prune_channels(model, torch.randn(1, 4), 0.99).layers[0].after == 1
    assert prune_channels(model, torch.randn(1, 4), 0.99, least=4).layers[0].after == 4
    assert prune_channels(model, torch.randn(1, 4), {"0": 0.5}).removed == {"0": (0, 1, 3)}
    assert prune_channels(model, torch.randn(1, 4), {"2": 0.5}).removed == {}  # what the model gives is never touched
    assert "parameters: 44 -> 23" in str(pruned)


def test_what_blurs_is_kept() -> None:
    """Grouped convolutions, layer norms over channels and the model's own input hold their channels together."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 3))
    assert prune_channels(model, torch.randn(1, 4, 6, 6), 0.5).removed == {}
    normed = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert prune_channels(normed, torch.randn(1, 4), 0.5).removed == {}

    class AddsItsInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x + self.body(x))  # type: ignore[no-any-return]

    assert prune_channels(AddsItsInput(), torch.randn(1, 4), 0.5).removed == {}


def test_a_pruned_model_is_smaller_on_the_device_and_trains() -> None:
    model, x = zoo.har_cnn(), torch.randn(16, 9, 128)
    pruned = prune_channels(model, x, 0.5, multiple_of=4)
    whole, small = compile(model, x, batch_size=16), compile(pruned.model, x, batch_size=16)
    assert len(small.to_bytes()) < 0.5 * len(whole.to_bytes())
    arenas = [c.artifact.program("train").arena_bytes for c in (small, whole)]
    assert arenas[0] < 0.6 * arenas[1]
    session = load(small)
    y = np.arange(16, dtype=np.int32) % 6
    losses = [session.train_step(x.numpy(), y, learning_rate=0.05).loss for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


def test_wrong_amounts_are_refused_and_the_model_is_as_before() -> None:
    model, x = zoo.har_cnn().train(), torch.randn(1, 9, 128)
    before = copy.deepcopy(model.state_dict())
    for amount in (1.0, -0.1, {"body.0": 1.5}):
        with pytest.raises(CompileError, match="out of range"):
            prune_channels(model, x, amount)
    with pytest.raises(CompileError, match="no layer 'tail'"):
        prune_channels(model, x, {"tail": 0.5})
    prune_channels(model, x, 0.5)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
