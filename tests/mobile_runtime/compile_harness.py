"""What the compiler's differential tests share: the same training in torch and on an engine, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evensong.mobile_runtime import load
from evensong.mobile_runtime.compiler import SGD, Adam, CompiledArtifact, compile
from evensong.mobile_runtime.errors import RuntimeFault


def _native_available() -> bool:
    try:
        from evensong.mobile_runtime import native

        native.library_path()
    except (ImportError, OSError, RuntimeFault):
        return False
    return True


#: Every engine that this machine has. Compiling costs more than running, so a test runs one artifact on each.
ENGINES = ["twin", "native"] if _native_available() else ["twin"]

LEARNING_RATE = 0.05


def torch_optimizer(optimizer: SGD | Adam, model: nn.Module) -> torch.optim.Optimizer:
    """The torch optimiser that ``optimizer`` stands for."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(optimizer, SGD):
        return torch.optim.SGD(
            parameters,
            lr=LEARNING_RATE,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            nesterov=optimizer.nesterov,
        )
    kind: Any = torch.optim.AdamW if optimizer.decoupled else torch.optim.Adam
    return kind(
        parameters,
        lr=LEARNING_RATE,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
    )


TORCH_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": lambda scores, labels: nn.functional.cross_entropy(scores, labels.long()),
    "mse": nn.functional.mse_loss,
    "bce": nn.functional.binary_cross_entropy_with_logits,
}


@dataclass
class Reference:
    """What torch did: the model before training, the loss of each step, and the model after."""

    model: nn.Module
    first_scores: np.ndarray
    losses: list[float]
    scores: np.ndarray
    evaluation: float
    state: dict[str, np.ndarray]


def assert_trains_like_torch(
    model: nn.Module,
    x: np.ndarray,
    y: np.ndarray,
    *,
    optimizer: SGD | Adam | None = None,
    loss: str = "cross_entropy",
    trainable: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (),
    steps: int = 8,
    loss_tolerance: float = 1e-5,
    weight_tolerance: float = 2e-5,
) -> CompiledArtifact:
    """Compiles ``model``, trains it in torch and on every engine, and compares each loss, prediction and variable.

    ``batch_sizes`` cycles through the numbers of examples of a step; by default each takes all of ``x``.
    """
    torch.manual_seed(0)
    optimizer = optimizer or SGD()
    compiled = compile(
        model, x[:1], loss=loss, optimizer=optimizer, batch_size=len(x), predict_batch=2, trainable=trainable
    )
    sizes = [batch_sizes[step % len(batch_sizes)] if batch_sizes else len(x) for step in range(steps)]
    expected = _train_in_torch(model, x, y, loss, optimizer, compiled.artifact.manifest["trainable"], sizes)
    for engine in ENGINES:
        session = load(compiled, engine=engine)
        _close(session.predict(x), expected.first_scores, 2e-5, f"{engine}: predictions before training")
        for step, n in enumerate(sizes):
            result = session.train_step(x[:n], y[:n], learning_rate=LEARNING_RATE)
            told = f"{engine}: loss of step {step}"
            assert result.loss == pytest.approx(expected.losses[step], rel=loss_tolerance, abs=5e-7), told
            assert result.examples == n
        for name, value in session.get().items():
            _close(value, expected.state[name], weight_tolerance, f"{engine}: {name}")
        _close(session.predict(x), expected.scores, 20 * weight_tolerance, f"{engine}: predictions after training")
        result = session.evaluate(x, y)
        assert result.loss == pytest.approx(expected.evaluation, rel=2e-3, abs=1e-5)
        if loss == "cross_entropy" and expected.scores.ndim == 2:
            assert abs(result.correct - int((expected.scores.argmax(1) == y).sum())) <= 1
    return compiled


def _train_in_torch(
    model: nn.Module, x: np.ndarray, y: np.ndarray, loss: str, optimizer: SGD | Adam, trainable: Any, sizes: list[int]
) -> Reference:
    reference = copy.deepcopy(model)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name in trainable)
    inputs, target = torch.from_numpy(x), torch.from_numpy(y)
    with torch.no_grad():
        first = reference.eval()(inputs).numpy()
    stepper = torch_optimizer(optimizer, reference)
    reference.train()
    losses = []
    for n in sizes:
        stepper.zero_grad()
        value = TORCH_LOSSES[loss](reference(inputs[:n]), target[:n])
        value.backward()
        stepper.step()
        losses.append(value.item())
    with torch.no_grad():
        scores = reference.eval()(inputs)
        evaluation = TORCH_LOSSES[loss](scores, target).item()
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    return Reference(reference, first, losses, scores.numpy(), evaluation, state)


def _close(value: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * scale, err_msg=what)


def classified(classes: int, count: int, seed: int = 1) -> np.ndarray:
    """Labels from a seed."""
    return np.random.default_rng(seed).integers(0, classes, count).astype(np.int32)


def normal(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers from a seed."""
    return np.random.default_rng(seed).normal(size=tuple(shape)).astype(np.float32)
