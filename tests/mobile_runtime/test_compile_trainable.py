"""Which parameters are trained, and what training few of them keeps of the forward pass."""

from __future__ import annotations

import pytest
import torch
from compile_harness import assert_trains_like_torch, classified, normal
from torch import nn

from evensong.mobile_runtime.compiler import compile, zoo
from evensong.mobile_runtime.errors import CompileError
from evensong.mobile_runtime.verify_rules import LOSSES
from evensong.wire.program import DType, Program, Region

pytestmark = pytest.mark.torch

CLASSES = 4


class HeadFirst(nn.Module):
    """Declares its last layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, CLASSES)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("trainable", "names"),
    [
        ("last-1", ["head.weight", "head.bias"]),
        ("last-2", ["head.weight", "head.bias", "body.2.weight", "body.2.bias"]),
        ("last-9", ["head.weight", "head.bias", "body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]),
        ("biases", ["head.bias", "body.0.bias", "body.2.bias"]),
        ("head", ["head.weight", "head.bias"]),
        (["body", "head.bias"], ["head.bias", "body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]),
        ("*.0", ["body.0.weight", "body.0.bias"]),
        ("none", []),
    ],
)
def test_what_is_trained(trainable: str | list[str], names: list[str]) -> None:
    assert compile(HeadFirst(), torch.zeros(1, 5), trainable=trainable).artifact.manifest["trainable"] == names


@pytest.mark.parametrize("trainable", ["last-0", "last-", "lost", ["body.1"]])
def test_a_selection_of_nothing_is_refused(trainable: str | list[str]) -> None:
    with pytest.raises(CompileError, match="no parameter matches"):
        compile(HeadFirst(), torch.zeros(1, 5), trainable=trainable)


def convolutional() -> nn.Module:
    """Convolutions of single pixels, by channel, and of 3x3, with batch norm, both ReLUs, and a sum."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        zoo.InvertedResidual(8, 8, 1, 2),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1.0, 0.2)
            module.train(False)  # and so it stays: a batch norm whose scale is frozen keeps its statistics
            module.train = lambda mode=True: None  # type: ignore[method-assign, misc]
    return model


def test_biases_train_like_torch_and_keep_one_bit_an_element() -> None:
    compiled = assert_trains_like_torch(
        convolutional(), normal((6, 2, 4, 4)), classified(CLASSES, 6), trainable="biases"
    )
    train = compiled.artifact.program("train")
    names = [op.name for op in train.ops]
    assert not any("GRAD_WEIGHT" in name or name in ("LINEAR_UPDATE", "UNARY_GRAD") for name in names)
    kept = kept_for_backward(train)
    assert kept and set(kept) == {DType.U8}
    assert names.count("BATCH_NORM_EVAL") == names.count("BATCH_NORM_TRAIN") == 0  # folded; the shift is added


def test_some_weights_and_biases_train_like_torch() -> None:
    """Only the layers whose weights are trained keep what they read."""
    trainable = ["1.layers.2.weight", "1.layers.3.bias", "6.*"]
    compiled = assert_trains_like_torch(
        convolutional(), normal((6, 2, 4, 4)), classified(CLASSES, 6), trainable=trainable
    )
    kept = kept_for_backward(compiled.artifact.program("train"))
    pooled, rectified, filtered = 8, 8 * 2 * 2, 16 * 4 * 4  # a mask of `rectified` would not lower the peak
    assert sorted(kept[DType.F32]) == [6 * 4 * size for size in (pooled, rectified, filtered)]


def kept_for_backward(program: Program) -> dict[DType, list[int]]:
    """Bytes of each arena tensor that is written before the loss and read after it, by dtype."""
    loss = next(at for at, op in enumerate(program.ops) if op.name in LOSSES)
    maker: dict[int, int] = {}
    kept: dict[DType, list[int]] = {}
    for at, op in enumerate(program.ops):
        for index in op.inputs if at > loss else ():
            tensor = program.tensors[index]
            if tensor.region == Region.ARENA and maker.pop(tensor.offset, loss) < loss:
                kept.setdefault(tensor.dtype, []).append(tensor.nbytes)
        for index in op.outputs:
            if program.tensors[index].region == Region.ARENA:
                maker[program.tensors[index].offset] = at
    return kept
