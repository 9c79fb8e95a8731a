"""Quantisation-aware training, cross-layer equalisation, bias correction, and the report of int8 against float32."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from compile_harness import ENGINES
from test_compile_layers import IMAGE, SEQUENCE, VECTOR, Between

from evensong.mobile_runtime import load, profile, quantization_report
from evensong.mobile_runtime.compiler import PostTrainingInt8, QuantizationAwareTraining, compile, zoo
from evensong.mobile_runtime.compiler.equalize import equalize
from evensong.mobile_runtime.compiler.export import trace
from evensong.mobile_runtime.compiler.interpret import Interpreter
from evensong.mobile_runtime.compiler.ir import Graph, Value
from evensong.mobile_runtime.compiler.lowering import lower
from evensong.mobile_runtime.compiler.passes import simplify
from evensong.mobile_runtime.compiler.qat import check_supported
from evensong.mobile_runtime.compiler.torch_ops import TABLE, result_of
from evensong.mobile_runtime.compiler.weights import Weights
from evensong.mobile_runtime.errors import CompileError, ProgramError, UnsupportedOperation

pytestmark = pytest.mark.torch


class Everything(nn.Module):
    """Every operation that has an integer form: residual, pools, tables, strided, grouped, depthwise and 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.depthwise(x)
        y = torch.relu(self.grouped(x) + x)
        y = nn.functional.avg_pool2d(y, 3, stride=2, padding=1, count_include_pad=False)
        z = nn.functional.max_pool2d(torch.sigmoid(y), 2)
        return self.head(torch.cat([y.mean((2, 3)), z.amax((2, 3))], dim=1))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "everything": (Everything, (2, 12, 12)),
    "digits": (zoo.digits_cnn, (1, 8, 8)),
    "har": (zoo.har_cnn, (9, 128)),
    "keywords": (lambda: zoo.DsCnn(channels=16, blocks=2), (1, 49, 10)),
}


def _model(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A model whose batch norms have seen examples, and examples."""
    make, shape = MODELS[name]
    torch.manual_seed(seed)
    model = make().train()
    examples = torch.randn(48, *shape)
    with torch.no_grad():
        for _ in range(5):
            model(examples)
    return model.eval(), examples


@pytest.mark.parametrize("name", MODELS)
def test_what_qat_computes_is_bit_for_bit_what_the_engine_computes(name: str) -> None:
    model, x = _model(name)
    qat = QuantizationAwareTraining(model, x[:1], PostTrainingInt8(x))
    optimizer = torch.optim.SGD(qat.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        qat.train()(x).square().mean().backward()
        optimizer.step()
    artifact = compile(model, x[:1], trainable="none", quantize=qat, predict_batch=7)
    with torch.no_grad():
        expected = qat.eval()(x).numpy()
    for engine in ENGINES:
        np.testing.assert_array_equal(load(artifact, engine=engine).predict(x.numpy()), expected)


def test_fake_quantised_training_differs_from_exact_integers_by_rounding_only() -> None:
    model, x = _model("everything")
    qat = QuantizationAwareTraining(model, x[:1], PostTrainingInt8(x))
    with torch.no_grad():
        fake, exact, reference = qat.train()(x), qat.eval()(x), model(x)
    assert (fake - exact).abs().mean() < 0.02 * reference.abs().mean()
    assert (exact - reference).abs().mean() < 0.1 * reference.abs().mean()


def test_gradients_pass_through_the_rounding() -> None:
    """Where nothing is clamped, the gradient of the fake-quantised model is near that of the float32 one."""
    model, x = _model("digits")
    qat = QuantizationAwareTraining(model, x[:1], PostTrainingInt8(x, activations="minmax"))
    qat(x).square().sum().backward()
    model(x).square().sum().backward()
    weights = {name.replace("/", "."): value for name, value in qat.weights.items()}
    for name, parameter in model.named_parameters():
        got, expected = weights[name].grad, parameter.grad
        assert got is not None and expected is not None
        if expected.dim() == 4:  # the engine's layout is channels-last
            expected = expected.permute(0, 2, 3, 1)
        if name.startswith("body.7") and expected.dim() == 2:  # its columns follow the channels-last image
            expected = expected.reshape(32, 32, 2, 2).permute(0, 2, 3, 1).reshape(32, -1)
        cosine = nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.98, name


def test_qat_mends_a_model_that_coarse_ranges_have_hurt() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    x, y = torch.from_numpy((data.images[:, None] / 16).astype(np.float32)), torch.from_numpy(data.target)
    torch.manual_seed(0)
    model = zoo.digits_cnn()
    _fit(model, x[500:], y[500:], epochs=4, rate=0.1)
    hurt = PostTrainingInt8(x[500:700], activations="percentile", percentile=80.0)
    before = load(compile(model, x[:1], trainable="none", quantize=hurt)).evaluate(x[:500].numpy(), y[:500].numpy())
    qat = QuantizationAwareTraining(model, x[:1], hurt)
    _fit(qat, x[500:], y[500:], epochs=3, rate=0.02)
    after = load(compile(model, x[:1], trainable="none", quantize=qat)).evaluate(x[:500].numpy(), y[:500].numpy())
    assert after.loss < 0.8 * before.loss and after.accuracy >= before.accuracy


def _fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epochs: int, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for i in range(0, len(x) - 31, 32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 32]), y[i : i + 32]).backward()
            optimizer.step()


_IN_TORCH = [
    *(("image", name) for name in ("transposed conv", "transposed conv options", "transposed conv depthwise")),
    *(("image", name) for name in ("transposed conv dilated", "group norm", "instance norm", "standardised")),
    *(("vector", name) for name in ("rms norm", "exp and log", "powers", "sign", "largest and smallest")),
    *(("sequence", name) for name in ("gru deep", "lstm both ways", "encoder and decoder", "class token", "matmul")),
]


@pytest.mark.parametrize(("kind", "name"), _IN_TORCH)
def test_float_operations_are_those_of_the_twin(kind: str, name: str) -> None:
    """Inside an int8 model they run in torch while it trains."""
    torch.manual_seed(3)
    layers, first, shape = {
        "image": (IMAGE, nn.Conv2d(2, 4, 3, padding=1), (2, 7, 5)),
        "vector": (VECTOR, nn.Linear(4, 6), (4,)),
        "sequence": (SEQUENCE, nn.Linear(2, 4), (6, 2)),
    }[kind]
    model = Between(first, layers[name], shape).eval()
    examples = torch.randn(3, *shape)
    traced = trace(model, [examples], training=False)
    graph = lower(traced, Weights(model, [], traced), "predict").graph
    run = Interpreter(dict(zip(graph.inputs.values(), [examples.numpy()], strict=True)))
    for node in graph.nodes:
        made = result_of(node)
        operands = [torch.from_numpy(np.asarray(run.content(value))) for value in node.inputs]
        result = TABLE[node.op](node, [operand.float() for operand in operands], run.shape(made))
        run.run(node)
        np.testing.assert_allclose(result.detach().numpy().ravel(), run.contents[made.root].ravel(), atol=1e-5)


def test_qat_refuses_what_it_cannot_go_through() -> None:
    model, x = nn.EmbeddingBag(5, 3, mode="mean"), torch.zeros(4, 2, dtype=torch.int64)
    graph = _graph(model, x)
    graph.add("SUM_ROWS", [Value((2, 1))], [Value((1,))], "somewhere")
    with pytest.raises(UnsupportedOperation, match=r"SUM_ROWS \(somewhere\).*PostTrainingInt8"):
        check_supported(graph)


# ----------------------------------------------------------------------------------------- equalisation and biases


def _graph(model: nn.Module, x: torch.Tensor) -> Graph:
    traced = trace(model, [x], training=False)
    forward = lower(traced, Weights(model, [], traced), "predict")
    forward.graph.outputs["output"] = forward.output.value
    simplify(forward.graph, lambda value: False)
    return forward.graph


def _output(graph: Graph, x: torch.Tensor) -> np.ndarray:
    run = Interpreter({next(iter(graph.inputs.values())): x.numpy()})
    for node in graph.nodes:
        run.run(node)
    return np.asarray(run.content(graph.outputs["output"]))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    channels=st.integers(1, 6),
    hidden=st.sampled_from(["conv", "depthwise", "linear", "pooled"]),
)
def test_equalising_changes_nothing_but_the_weights(seed: int, channels: int, hidden: str) -> None:
    torch.manual_seed(seed)
    second: list[nn.Module] = {
        "conv": [nn.Conv2d(channels, 3, 3, padding=1)],
        "depthwise": [nn.Conv2d(channels, channels, 3, groups=channels), nn.ReLU(), nn.Conv2d(channels, 2, 1)],
        "linear": [nn.Flatten(), nn.Linear(channels * 36, 4)],
        "pooled": [nn.MaxPool2d(2), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(channels, 4, bias=False)],
    }[hidden]
    model = nn.Sequential(nn.Conv2d(2, channels, 1), nn.ReLU(), *second).eval()
    with torch.no_grad():
        model[0].weight *= torch.logspace(-3, 2, channels).reshape(-1, 1, 1, 1)
    x = torch.randn(5, 2, 6, 6)
    graph = _graph(model, x)
    before = _output(graph, x)
    assert equalize(graph, graph.nodes)
    np.testing.assert_allclose(_output(graph, x), before, rtol=2e-4, atol=2e-4 * np.abs(before).max())
    layers = [node for node in graph.nodes if node.op in ("CONV2D", "LINEAR")]
    rows = np.abs(layers[0].inputs[1].content).reshape(channels, -1).max(axis=1)
    assert rows.max() / rows.min() < 1e4


def test_equalisation_is_kept_where_it_pays() -> None:
    """Channels of very unequal size share one grid of activations: equalised, the small ones are not lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        factors = torch.logspace(-2, 1, 16)
        model[0].weight *= factors[:, None]
        model[0].bias *= factors
        model[2].weight /= factors
    x = torch.randn(256, 16)
    expected = model(x).detach().numpy()
    errors = {}
    for choice in (False, True, "auto"):
        compiled = compile(model, x[:1], trainable="none", quantize=PostTrainingInt8(x, equalize=choice))
        errors[choice] = float(np.square(load(compiled).predict(x.numpy()) - expected).mean())
    assert errors[True] < 0.1 * errors[False]
    assert errors["auto"] == errors[True]


def test_bias_correction_takes_the_mean_error_away() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)).eval()
    x = torch.rand(32, 32) + 1.0  # inputs with a mean: rounding errors of weights add up
    expected = model(x).detach().numpy()
    shift = {}
    for corrected in (False, True):
        quantize = PostTrainingInt8(x, bias_correction=corrected, activations="minmax")
        predicted = load(compile(model, x[:1], trainable="none", quantize=quantize)).predict(x.numpy())
        shift[corrected] = float(np.abs((predicted - expected).mean(axis=0)).mean())
    assert shift[True] < 0.5 * shift[False]


# --------------------------------------------------------------------------------------------------------------- report


def test_the_report_tells_error_and_time_of_each_layer() -> None:
    model, x = _model("har")
    exact = compile(model, x[:1], trainable="none")
    rounded = compile(model, x[:1], trainable="none", quantize=PostTrainingInt8(x))
    report = quantization_report(exact, rounded, [x.numpy()], labels=np.zeros(len(x), np.int32))
    layers = {layer.place: layer for layer in report.layers}
    assert {"body.0 (Conv1d)", "body.2 (Conv1d)", "body.4 (Conv1d)", "head (Linear)"} <= layers.keys()
    assert all(20 < layers[f"body.{i} (Conv1d)"].signal_to_noise < 60 for i in (0, 2, 4))
    assert 0.9 <= report.agreement <= 1 and report.int8_bytes < report.float_bytes
    assert report.float_seconds > 0 and report.int8_seconds > 0
    text = str(report)
    assert "dB" in text and "times faster" in text and "accuracy" in text
    assert np.isinf(quantization_report(exact, exact, [x.numpy()]).signal_to_noise)


def test_the_report_refuses_two_models() -> None:
    model, x = _model("har")
    other, z = _model("digits")
    artifacts = [compile(m, e[:1], trainable="none") for m, e in ((model, x), (other, z))]
    with pytest.raises(ProgramError, match="not of one model"):
        quantization_report(*artifacts, [x.numpy()])


def test_profile_names_every_operation() -> None:
    model, x = _model("digits")
    artifact = compile(copy.deepcopy(model), x[:1], batch_size=4).artifact
    times = profile(artifact, "train", batch=2, seconds_each=0.001)
    assert [entry.op for entry in times] == [op.name for op in artifact.program("train").ops]
    assert all(entry.seconds >= 0 for entry in times) and any(entry.seconds > 0 for entry in times)
    assert times[0].place == "body.0 (Conv2d)"


def test_settings_are_checked() -> None:
    with pytest.raises(CompileError):
        PostTrainingInt8(np.zeros((1, 2)), equalize="always")  # type: ignore[arg-type]
