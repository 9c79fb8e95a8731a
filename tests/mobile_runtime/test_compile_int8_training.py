"""Int8 training: near float32 step by step, the same bytes on every engine, and float32 to everyone outside."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from compile_harness import ENGINES
from torch import nn

from evensong.mobile_runtime import load
from evensong.mobile_runtime.compiler import SGD, Adam, CompiledArtifact, Int8Training, compile, zoo
from evensong.mobile_runtime.errors import CompileError, VariableError
from evensong.wire.artifact import decode_artifact
from evensong.wire.errors import ArtifactError
from evensong.wire.program import VariableFlag
from evensong.wire.tensors import layout_of
from evensong.wire.variables import initial_values, scales_of

pytestmark = pytest.mark.torch


class Branches(nn.Module):
    """What has integer forms and what has none: residual sums, ReLU6, pooling with and without overlap, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.left(x))
        x = torch.relu(nn.functional.max_pool2d(self.down(x), 3, stride=2))
        return self.head(self.norm(x.mean((2, 3))))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)), (12,), 5),
    "digits": (zoo.digits_cnn, (1, 8, 8), 10),
    "har": (zoo.har_cnn, (9, 128), 6),
    "branches": (Branches, (2, 13, 13), 5),
    "keywords": (lambda: zoo.DsCnn(channels=16, blocks=2), (1, 49, 10), 12),
}


def _case(name: str) -> tuple[nn.Module, torch.Tensor, np.ndarray]:
    make, shape, classes = MODELS[name]
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(16, *shape)
    with torch.no_grad():
        for _ in range(40):
            model(x)
    return model.eval(), x, np.arange(16, dtype=np.int32) % classes


def _compiled(name: str, **settings: object) -> tuple[CompiledArtifact, np.ndarray, np.ndarray]:
    model, x, y = _case(name)
    return compile(model, x, batch_size=16, quantize=Int8Training(x, **settings)), x.numpy(), y  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rounding", ["compensated", "stochastic"])
def test_training_follows_float32(name: str, rounding: str) -> None:
    """Losses of twenty steps on one batch are near those of float32 SGD with the batch norms folded."""
    artifact, x, y = _compiled(name, rounding=rounding)
    session = load(artifact)
    losses = [session.train_step(x, y, learning_rate=0.05).loss for _ in range(20)]

    model, images, _ = _case(name)
    from evensong.mobile_runtime.compiler.batch_norm import fold_batch_norms
    from evensong.mobile_runtime.compiler.export import trace

    folded = fold_batch_norms(model, trace(model, [images], training=False))
    optimizer = torch.optim.SGD(folded.parameters(), lr=0.05)
    expected = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(folded(images), torch.from_numpy(y).long())
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert losses[0] == pytest.approx(expected[0], rel=0.05)
    share = 0.5 if rounding == "compensated" else 0.3
    assert losses[-1] < losses[0] - share * (expected[0] - expected[-1])
    assert session.evaluate(x, y).loss < 1.3 * losses[-1] + 0.1


@pytest.mark.parametrize("name", ["mlp", "digits"])
def test_engines_take_the_same_integer_steps(name: str) -> None:
    """Where the loss is the only float32 part, engines differ by what its last bits do to a rounding now and then."""
    artifact, x, y = _compiled(name)
    states = []
    for engine in ENGINES:
        session = load(artifact, engine=engine, seed=3)
        for _ in range(3):
            session.train_step(x, y, learning_rate=0.05)
        states.append(session.get())
        again = load(artifact, engine=engine, seed=3)
        for _ in range(3):
            again.train_step(x, y, learning_rate=0.05)
        assert all(np.array_equal(a, b) for a, b in zip(again.get().values(), states[-1].values(), strict=True))
    for first, second in zip(states[0].values(), states[-1].values(), strict=True):
        np.testing.assert_allclose(first, second, atol=2e-3 * max(1.0, np.abs(first).max()))


def test_the_arena_is_a_third_of_float32s() -> None:
    for name in ("digits", "har", "branches", "keywords"):
        artifact, x, _ = _compiled(name)
        whole = compile(_case(name)[0], torch.from_numpy(x), batch_size=16)
        arenas = [c.artifact.program("train").arena_bytes for c in (artifact, whole)]
        assert arenas[0] <= 0.36 * arenas[1], name


def test_a_float_head_on_an_int8_middle_on_a_frozen_int8_body() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)
    )
    x, y = torch.randn(16, 1, 8, 8), np.arange(16, dtype=np.int32) % 10
    quantize = Int8Training(x, layers=["2.*"])
    artifact = compile(model, x, trainable=["2.*", "5.*"], quantize=quantize, batch_size=16)
    names = [op.name for op in artifact.artifact.program("train").ops]
    assert names[:4] == ["QUANTIZE", "QCONV2D", "Q_PREPARE", "QCONV2D"]  # the body hands its bytes on
    assert "LINEAR" in names and "G_CONV2D_UPDATE" in names and "G_CONV2D_INPUT" not in names
    session = load(artifact)
    losses = [session.train_step(x.numpy(), y, learning_rate=0.1).loss for _ in range(50)]
    assert losses[-1] < 0.7 * losses[0]
    assert session.variables.keys() == {"2.weight", "2.bias", "5.weight", "5.bias", "quantization.scales"}


def test_outside_the_engine_weights_are_float32() -> None:
    artifact, x, y = _compiled("digits")
    session = load(artifact)
    decoded = decode_artifact(artifact.to_bytes())
    names = list(session.variables)
    assert [spec.name for spec in layout_of(decoded.variables)] == names
    assert not any(name.endswith(".scale") for name in names)
    initial = initial_values(decoded)
    state = _case("digits")[0].state_dict()
    for name, value in state.items():
        assert session.variables[name].shape == tuple(value.shape)
        step = np.abs(value.numpy()).max() / 127 * 1.21
        np.testing.assert_allclose(initial[name], value.numpy(), atol=step / 2 + 1e-6)

    new = {name: np.asarray(value + 0.01 * torch.randn_like(value)) for name, value in state.items()}
    session.set(new)
    for name, value in session.get(new).items():  # sixteen bits of each weight are kept
        np.testing.assert_allclose(value, new[name], atol=np.abs(new[name]).max() / 127 / 256)
    reference = session.get()
    session.train_step(x, y, learning_rate=0.05)
    delta = session.delta(reference)
    assert all(np.abs(value).max() > 0 for name, value in delta.items() if name != "quantization.scales")
    with pytest.raises(VariableError, match=r"unknown variable 'body\.0\.weight\.scale'"):
        session.get(["body.0.weight.scale"])


def test_residuals_live_as_long_as_their_weights() -> None:
    artifact, x, y = _compiled("mlp")
    session = load(artifact)
    for _ in range(3):
        session.train_step(x, y, learning_rate=0.01)
    before = session.get()
    session.reset_optimizer()
    assert all(np.array_equal(value, before[name]) for name, value in session.get().items())
    checkpoint = session.checkpoint()
    session.train_step(x, y, learning_rate=0.1)
    session.restore(checkpoint)
    assert all(np.array_equal(value, before[name]) for name, value in session.get().items())
    session.freeze(["0.weight"])
    session.train_step(x, y, learning_rate=0.1)
    after = session.get()
    assert np.array_equal(after["0.weight"], before["0.weight"])
    assert not np.array_equal(after["2.weight"], before["2.weight"])


def test_scales_follow_activations_that_grow() -> None:
    artifact, x, y = _compiled("mlp")
    session = load(artifact)
    before = session.get(["quantization.scales"])["quantization.scales"]
    session.set({"0.weight": 20 * session.get()["0.weight"]})
    for _ in range(40):
        session.train_step(x, y, learning_rate=0.0)
    after = session.get(["quantization.scales"])["quantization.scales"]
    assert 10 < after[1] / before[1] < 30  # of the hidden layer


def test_what_cannot_train_in_int8_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
    for optimizer in (SGD(momentum=0.9), Adam()):
        with pytest.raises(CompileError, match="int8 training takes plain SGD"):
            compile(model, x, quantize=Int8Training(x), optimizer=optimizer)
    with pytest.raises(CompileError, match="no layer is left"):
        compile(model, x, quantize=Int8Training(x, layers=["head.*"]))
    with pytest.raises(CompileError, match="unknown rounding"):
        Int8Training(x, rounding="nearest")  # type: ignore[arg-type]
    image = torch.randn(4, 1, 64, 64)
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 64 * 64, 2))
    with pytest.raises(CompileError, match=r"batch is too large.*batch_size=16 or less"):
        compile(convolution, image, quantize=Int8Training(image), batch_size=32)


def test_a_weight_without_its_scales_is_no_artifact() -> None:
    decoded = decode_artifact(_compiled("mlp")[0].to_bytes())
    assert scales_of(decoded).keys() == {"0.weight", "2.weight"}
    without = tuple(v for v in decoded.variables if not v.flags & VariableFlag.SCALE)
    object.__setattr__(decoded, "variables", without)
    with pytest.raises(ArtifactError, match="its scales do not fit"):
        scales_of(decoded)
