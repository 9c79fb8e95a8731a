"""What the compiler refuses, and that it says where in the author's model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from evensong.mobile_runtime.compiler import SGD, Adam, PostTrainingInt8, compile
from evensong.mobile_runtime.errors import BudgetError, CompileError, UnsupportedOperation

pytestmark = pytest.mark.torch

X = np.zeros((1, 6), np.float32)


class Calls(nn.Module):
    """A linear layer and one function of its result."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Softplus())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_an_unknown_operation_is_named_with_its_place() -> None:
    with pytest.raises(UnsupportedOperation) as caught:
        compile(nn.Sequential(nn.Linear(6, 6), Block()), X)
    assert "aten.softplus.default" in str(caught.value)
    assert "1.inner.1 (Softplus)" in str(caught.value)
    assert "linear" in str(caught.value.expected) and "conv2d" in str(caught.value.expected)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: x.cumsum(1), "aten.cumsum"),
        (lambda x: x @ x.t() @ x, "two computed tensors"),
        (lambda x: x.masked_fill(x > 0, 1.0), "computed from the examples|aten.gt"),
        (lambda x: x[:, ::2], "step"),
        (lambda x: x**0.3, "power"),
        (lambda x: x.double().float(), "conversion"),
        (lambda x: x.max(1).indices.float(), "indices"),
        (lambda x: x + torch.rand(6), "aten.rand"),
    ],
)
def test_an_unknown_use_is_explained(function: Callable[[torch.Tensor], torch.Tensor], told: str) -> None:
    with pytest.raises(UnsupportedOperation, match=told):
        compile(Calls(function), X)


@pytest.mark.parametrize(
    ("layer", "run", "told"),
    [
        (nn.LSTM(6, 4, batch_first=True), lambda layer, x: layer(x)[1][1][0], "last cell states"),
        (nn.LSTM(6, 4, proj_size=2, batch_first=True), lambda layer, x: layer(x)[0], "projections"),
        (nn.GRU(6, 6, batch_first=True), lambda layer, x: layer(x, x.transpose(0, 1))[0], "starts from a given state"),
        (
            nn.MultiheadAttention(6, 2, batch_first=True),
            lambda layer, x: layer(x, x, x, key_padding_mask=x[:, :, 0] > 0)[0],
            "key_padding_mask",
        ),
        (nn.MultiheadAttention(6, 2, batch_first=True, add_zero_attn=True), lambda layer, x: layer(x, x, x)[0], "zero"),
        (nn.Linear(6, 6), lambda layer, x: torch.einsum("nij,nkl->nil", x, layer(x)), "no matrix product"),
        (nn.Linear(6, 6), lambda layer, x: x.transpose(0, 1) @ layer(x).transpose(0, 1).mT, "examples"),
    ],
)
def test_layers_over_sequences_have_their_limits(
    layer: nn.Module, run: Callable[[nn.Module, torch.Tensor], torch.Tensor], told: str
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run(self.layer, x[:, None])

    with pytest.raises(CompileError, match=told):
        compile(Model(), X)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(dim=0),
        lambda x: x.softmax(dim=0),
        lambda x: torch.cat([x, x], dim=0),
        lambda x: x[1:],
        lambda x: x.reshape(-1),
        lambda x: x.reshape(2, -1, 31)[0],
        lambda x: x.t().reshape(x.shape),
        lambda x: x.sum(),
    ],
)
def test_what_mixes_examples_is_refused(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(CompileError):
        compile(Calls(function), X)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "hinge"}, "unknown loss"),
        ({"loss": nn.L1Loss()}, "unknown loss"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "label_smoothing"),
        ({"loss": nn.CrossEntropyLoss(weight=torch.ones(6))}, "weight"),
        ({"loss": nn.MSELoss(reduction="sum")}, "reduction"),
        ({"trainable": ["head.*"]}, "no parameter matches 'head.*'"),
        ({"batch_size": 0}, "batch_size"),
        ({"predict_batch": -1}, "predict_batch"),
        ({"labels": ["yes", "no"]}, "6 names"),
        ({"quantize": PostTrainingInt8(np.zeros((4, 7), np.float32)), "trainable": "none"}, "calibration examples"),
        ({"quantize": PostTrainingInt8([]), "trainable": "none"}, "calibration examples"),
    ],
)
def test_bad_options_are_explained(options: dict[str, object], told: str) -> None:
    with pytest.raises(CompileError) as caught:
        compile(nn.Linear(6, 6), X, **options)  # type: ignore[arg-type]
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(momentum=1.0),
        lambda: SGD(nesterov=True),
        lambda: SGD(weight_decay=-1),
        lambda: Adam(beta2=1),
        lambda: Adam(eps=0),
        lambda: PostTrainingInt8(X, activations="median"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(CompileError):
        make()


def test_models_that_cannot_be_traced_are_explained() -> None:
    with pytest.raises(CompileError, match="trace the model"):
        compile(Calls(lambda x: x if x.sum() > 0 else -x), X)
    with pytest.raises(CompileError, match="one tensor"):
        compile(Calls(lambda x: (x, x)), X)  # type: ignore[arg-type, return-value]
    with pytest.raises(CompileError, match="trace the model"):
        compile(Calls(lambda x: x.reshape(4, 6)), X)
    with pytest.raises(CompileError, match="does not depend on its input"):
        compile(Calls(lambda x: torch.ones(3, 6)), X)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = nn.Linear(6, 6)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(CompileError, match="weight is not finite"):
        compile(model, X)


def test_a_budget_that_cannot_be_met_shows_what_takes_the_memory() -> None:
    model = nn.Sequential(nn.Linear(6, 500), nn.ReLU(), nn.Linear(500, 3))
    peak = compile(model, X, batch_size=8).memory().training_peak
    assert compile(model, X, batch_size=8, memory_budget=peak).memory().training_peak == peak
    with pytest.raises(BudgetError) as caught:
        compile(model, X, batch_size=8, memory_budget=peak - 1)
    assert f"{peak:,}" in str(caught.value) and f"{peak - 1:,}" in str(caught.value)
    assert "8x500" in caught.value.table and "0 (Linear)" in caught.value.table


def test_float64_examples_are_taken_for_float32() -> None:
    model = nn.Linear(6, 6)
    assert compile(model, np.zeros((4, 6))).hash == compile(model, X).hash == compile(model, [X]).hash


def test_the_model_keeps_its_modes() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(6))
    model.eval()
    model[1].train()
    compile(model, X)
    assert [module.training for module in model] == [False, True, False]
    assert int(model[2].num_batches_tracked) == 0
