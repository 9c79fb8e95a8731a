"""Low-rank adapters train like torch's, leave the model's weights alone, and merge into them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compile_harness import ENGINES, assert_trains_like_torch, classified, normal
from torch import nn

from evensong.mobile_runtime import LoRA, load
from evensong.mobile_runtime.compiler import PostTrainingInt8, compile, zoo
from evensong.mobile_runtime.errors import CompileError

pytestmark = pytest.mark.torch

CLASSES = 4


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, CLASSES),
    )


def test_adapters_of_convolutions_and_linear_layers_train_like_torch() -> None:
    adapted, patterns = LoRA(rank=3, alpha=6).adapt(model())
    assert patterns == [f"{layer}.{part}" for layer in ("0", "4", "7") for part in ("lora_a", "lora_b")]
    for layer in ("0", "4", "7"):
        nn.init.normal_(adapted.get_parameter(f"{layer}.lora_b"), std=0.2)
    compiled = assert_trains_like_torch(adapted, normal((6, 2, 8, 8)), classified(CLASSES, 6), trainable=patterns)
    shapes = {variable.name: variable.shape for variable in compiled.artifact.variables}
    assert shapes["0.lora_a"] == (3, 2, 3, 3) and shapes["0.lora_b"] == (8, 3, 1, 1)
    assert shapes["7.lora_a"] == (3, 96) and shapes["7.lora_b"] == (4, 3)
    assert len(compiled.artifact.variables) == 6


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_learned_merges_into_the_models_own_weights(engine: str) -> None:
    plain, lora = model(), LoRA(rank=2, alpha=3, targets=["0", "7"], also=["7.bias"])
    x, y = normal((16, 2, 8, 8)), classified(CLASSES, 16)
    session = load(compile(plain, x[:1], trainable=lora, batch_size=16), engine=engine)
    with torch.no_grad():
        np.testing.assert_allclose(session.predict(x), plain(torch.from_numpy(x)), atol=1e-5)
    first = session.train_step(x, y, learning_rate=0.1).loss
    for _ in range(30):
        last = session.train_step(x, y, learning_rate=0.1).loss
    assert last < 0.95 * first
    learned = session.get()
    assert set(learned) == {"0.lora_a", "0.lora_b", "7.lora_a", "7.lora_b", "7.bias"}
    merged = lora.merge({**plain.state_dict(), **{name: torch.from_numpy(value) for name, value in learned.items()}})
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    with torch.no_grad():
        np.testing.assert_allclose(session.predict(x), plain(torch.from_numpy(x)), atol=1e-4)
    arrays = lora.merge({name: np.asarray(value) for name, value in {**model().state_dict(), **learned}.items()})
    np.testing.assert_allclose(arrays["0.weight"], merged["0.weight"], atol=1e-6)


def test_the_frozen_model_may_be_int8() -> None:
    x = normal((32, 9, 128))
    lora = LoRA(rank=2, targets=["body.4", "head"])
    compiled = compile(zoo.har_cnn(), x[:1], trainable=lora, quantize=PostTrainingInt8(x), batch_size=16)
    train = compiled.artifact.program("train")
    places = compiled.artifact.manifest["places"]["train"]
    integer = {place for op, place in zip(train.ops, places, strict=True) if op.name == "QCONV2D"}
    assert {place.split()[0] for place in integer} == {"body.0", "body.2", "body.4"}
    session, y = load(compiled), classified(6, 16)
    losses = [session.train_step(x[:16], y, learning_rate=0.1).loss for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


def test_dropout_is_for_training_only() -> None:
    x, y = normal((8, 5)), classified(CLASSES, 8)
    session = load(compile(nn.Linear(5, CLASSES), x[:1], trainable=LoRA(2, dropout=0.5), batch_size=8))
    session.set({"lora_b": normal((CLASSES, 2))})
    assert np.array_equal(session.predict(x), session.predict(x))
    losses = {session.train_step(x, y, learning_rate=0.0).loss for _ in range(4)}
    assert len(losses) == 4


def test_adapters_are_the_same_every_time() -> None:
    first, second = (compile(model(), np.zeros((1, 2, 8, 8), np.float32), trainable=LoRA(2)).hash for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (lambda: compile(model(), np.zeros((1, 2, 8, 8), np.float32), trainable=LoRA(2, targets=["2"])), "0, 4, 7"),
        (lambda: LoRA(0), "rank"),
        (lambda: LoRA(2, dropout=1.0), "dropout"),
        (lambda: LoRA(2).merge({"0.lora_a": np.zeros((2, 3))}), "session.get"),
    ],
)
def test_wrong_use_is_told(use: object, told: str) -> None:
    assert callable(use)
    with pytest.raises(CompileError, match=told):
        use()
