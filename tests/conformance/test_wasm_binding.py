"""The JavaScript binding in Node gives what the compiled engine gives: ``binding.test.mjs`` asks the questions."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import needs_native
from toolchains import tool, wasm_modules
from torch import nn

from evensong.mobile_runtime import SGD, compile, load, memory_report
from evensong.mobile_runtime.compiler import PostTrainingInt8
from evensong.wire.artifact import decode_artifact

BATCH, SEED = 6, 2**63 + 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_native]


class Model(nn.Module):
    """Something of everything: convolution, batch norm, pooling, dropout, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.25), nn.Linear(80, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x))
        return result


def test_the_binding_does_what_the_engine_does(tmp_path: Path) -> None:
    wasm_modules(tmp_path)
    (tmp_path / "expected.json").write_text(json.dumps(_expected(tmp_path)))
    done = subprocess.run(
        [tool("node"), "--test", str(Path(__file__).with_name("binding.test.mjs"))],
        env={**os.environ, "EVENSONG_TEST_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _expected(folder: Path) -> dict[str, object]:
    """Writes the artifacts, and returns what the compiled engine makes of them."""
    torch.manual_seed(3)
    model = Model()
    artifact = compile(
        model, torch.zeros(1, 1, 8, 8), optimizer=SGD(momentum=0.5), batch_size=BATCH, predict_batch=4, name="binding"
    )
    artifact.save(folder / "trained.evsg")
    images = np.random.default_rng(0).standard_normal((11, 1, 8, 8), np.float32)
    labels = (np.arange(11) % 4).astype(np.int32)
    calibration = torch.from_numpy(images)
    compile(model.eval(), calibration, trainable="none", quantize=PostTrainingInt8(calibration)).save(
        folder / "quantised.evsg"
    )
    session = load(folder / "trained.evsg", engine="native", seed=SEED)
    shapes = {name: list(variable.shape) for name, variable in session.variables.items()}
    losses = []
    for step in range(8):
        start = step * BATCH % (len(labels) - BATCH + 1)
        part = slice(start, start + BATCH)
        losses.append(session.train_step(images[part], labels[part], learning_rate=0.05).loss)
    evaluation = session.evaluate(images, labels)
    return {
        "batch": BATCH,
        "seed": str(SEED),
        "state_bytes": memory_report(decode_artifact((folder / "trained.evsg").read_bytes())).state,
        "images": images.ravel().tolist(),
        "labels": labels.tolist(),
        "shapes": shapes,
        "losses": losses,
        "variables": {name: value.ravel().tolist() for name, value in session.get().items()},
        "predictions": session.predict(images).ravel().tolist(),
        "evaluation": {"loss": evaluation.loss, "correct": evaluation.correct},
        "quantised": load(folder / "quantised.evsg", engine="native").predict(images).ravel().tolist(),
    }
