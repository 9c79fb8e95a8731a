"""``evensong compile`` from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evensong.mobile_runtime import load
from evensong.mobile_runtime.compiler.command import main
from evensong.wire.artifact import artifact_hash, decode_artifact

pytestmark = pytest.mark.torch

HAR = "evensong.mobile_runtime.compiler.zoo:har_cnn"


def test_a_file_becomes_an_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "tiny_model.py"
    source.write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))\n"
        "    return model, torch.zeros(1, 4)\n"
    )
    output = tmp_path / "tiny.evsg"
    arguments = [f"{source}:build", "-o", str(output), "--batch-size", "7", "--labels", "no,yes", "--optimizer", "adam"]
    assert main([*arguments, "--trainable", "2.*", "--show-memory"]) == 0
    artifact = decode_artifact(output.read_bytes())
    assert artifact.manifest["batch_size"] == 7
    assert artifact.manifest["labels"] == ["no", "yes"]
    assert artifact.manifest["trainable"] == ["2.weight", "2.bias"]
    printed = capsys.readouterr().out
    assert artifact_hash(output.read_bytes()) in printed and "lower bound" in printed
    assert load(output).predict(np.zeros((1, 4), np.float32)).shape == (1, 2)


def test_int8_from_a_file(tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.npz"
    np.savez(calibration, x=np.random.default_rng(0).normal(size=(32, 9, 128)).astype(np.float32))
    output = tmp_path / "har.evsg"
    options = ["--input", "9x128", "--int8", str(calibration), "--trainable", "none", "-o", str(output)]
    assert main([HAR, *options]) == 0
    assert "QCONV2D" in {op.name for op in decode_artifact(output.read_bytes()).program("predict").ops}


def test_adapters_from_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "har.evsg"
    assert main([HAR, "--input", "9x128", "--lora", "2", "--trainable", "head", "-o", str(output)]) == 0
    assert decode_artifact(output.read_bytes()).manifest["trainable"] == ["head.lora_a", "head.lora_b"]


def test_pixels_and_text_are_ports_of_bytes(tmp_path: Path) -> None:
    source = tmp_path / "captioned_model.py"
    source.write_text(
        "import torch\n"
        "from evensong.mobile_runtime.preprocessing import Rescaling, TextVectorization\n"
        "class Captioned(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.words = TextVectorization(hash_bins=8, mode='count')\n"
        "        self.pixels = Rescaling(1 / 255)\n"
        "        self.linear = torch.nn.Linear(12, 2)\n"
        "    def forward(self, image, caption):\n"
        "        parts = [self.pixels(image).flatten(1), self.words(caption)]\n"
        "        return self.linear(torch.cat(parts, dim=1))\n"
    )
    output = tmp_path / "captioned.evsg"
    shapes = ["--input", "1x2x2:uint8", "--input", "32:uint8"]
    assert main([f"{source}:Captioned", *shapes, "-o", str(output)]) == 0
    session = load(output)
    assert [port["dtype"] for port in session.artifact.manifest["inputs"]] == ["u8", "text"]
    assert session.predict(np.zeros((2, 1, 2, 2), np.uint8), ["a cat", "no cat"]).shape == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([HAR, "--input", "9x128", "--memory-budget", "64K"], 1, "conv"),
        ([HAR], 1, "--input"),
        ([HAR, "--input", "9 by 128"], 1, "1x28x28"),
        ([HAR, "--input", "9x128", "--memory-budget", "lots"], 1, "512K"),
        ([HAR, "--input", "9x128", "--optimizer", "lion"], 1, "sgd"),
        (["evensong.mobile_runtime.compiler.zoo:nothing", "--input", "1"], 1, "no function 'nothing'"),
        (["no_such_module:build", "--input", "1"], 1, "cannot be imported"),
        (["nothing", "--input", "1"], 1, "module:function"),
        (["missing.py:build", "--input", "1"], 1, "missing.py"),
        ([HAR, "--bogus"], 2, "--bogus"),
    ],
)
def test_wrong_use_is_told(
    arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(arguments) == code
    assert told.lower() in capsys.readouterr().err.lower()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--memory-budget" in capsys.readouterr().out
