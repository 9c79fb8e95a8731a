"""ONNX export: what ONNX Runtime computes from it is what the session predicts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from test_compile_layers import IMAGE, SEQUENCE, SIGNAL, VECTOR, Between
from test_compile_qat import MODELS, _model

from evensong.mobile_runtime import load, to_onnx
from evensong.mobile_runtime.compiler import PostTrainingInt8, compile, zoo
from evensong.mobile_runtime.errors import ProgramError
from evensong.mobile_runtime.session import Session

pytestmark = pytest.mark.torch
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


def _run(session: Session, x: np.ndarray) -> np.ndarray:
    peer = onnxruntime.InferenceSession(to_onnx(session), providers=["CPUExecutionProvider"])
    (port,) = peer.get_inputs()
    return np.asarray(peer.run(None, {port.name: x})[0])


LAYERS: dict[str, tuple[Any, nn.Module, tuple[int, ...]]] = {
    **{f"image: {name}": (layer, nn.Conv2d(2, 4, 3, padding=1), (2, 7, 5)) for name, layer in IMAGE.items()},
    **{f"signal: {name}": (layer, nn.Conv1d(2, 4, 3, padding=1), (2, 6)) for name, layer in SIGNAL.items()},
    **{f"sequence: {name}": (layer, nn.Linear(2, 4), (6, 2)) for name, layer in SEQUENCE.items()},
    **{f"vector: {name}": (layer, nn.Linear(4, 6), (4,)) for name, layer in VECTOR.items()},
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str) -> None:
    torch.manual_seed(3)
    layer, first, shape = LAYERS[name]
    x = torch.randn(5, *shape)
    session = load(compile(Between(first, layer, shape), x[:1], trainable="none", predict_batch=3))
    np.testing.assert_allclose(_run(session, x.numpy()), session.predict(x.numpy()), rtol=1e-4, atol=1e-5)


def test_what_was_learned_on_the_engine_is_exported(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype(np.float32)
    y = np.arange(16, dtype=np.int32) % 10
    session = load(compile(zoo.digits_cnn(), x, batch_size=16))
    before = _run(session, x)
    for _ in range(3):
        session.train_step(x, y, learning_rate=0.1)
    data = to_onnx(session, tmp_path / "digits.onnx")
    assert (tmp_path / "digits.onnx").read_bytes() == data
    after = _run(session, x)
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(after, session.predict(x), rtol=1e-4, atol=1e-5)


def test_tokens() -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(24, 3))
    ids = np.random.default_rng(0).integers(0, 11, (5, 4)).astype(np.int32)
    session = load(compile(model, ids, trainable="none"))
    np.testing.assert_allclose(_run(session, ids), session.predict(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_int8_models_differ_by_a_step_of_the_grid_at_most(name: str) -> None:
    model, x = _model(name)
    session = load(compile(model, x[:1], trainable="none", quantize=PostTrainingInt8(x)))
    expected = session.predict(x.numpy())
    difference = np.abs(_run(session, x.numpy()) - expected)
    program = session.artifact.program("predict")
    step = max(program.tensors[op.inputs[0]].scale for op in program.ops if op.name == "DEQUANTIZE")
    assert difference.max() <= 3 * step and difference.mean() < 0.3 * step


def test_an_operation_without_a_form_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    session = load(compile(model, torch.zeros(1, 3)))
    program = session.artifact.program("train")
    object.__setattr__(program, "name", "predict")
    object.__setattr__(session.artifact.programs[0], "name", "old")
    with pytest.raises(ProgramError, match="DROPOUT has no form in ONNX"):
        to_onnx(session)
