"""Memory plans: nothing alive overlaps, plans are near the bound, reports add up, and bytes never change by chance."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evensong.mobile_runtime.compiler import SGD, CompiledArtifact, compile, zoo
from evensong.mobile_runtime.compiler.planner import Lifetime, lower_bound, place
from evensong.mobile_runtime.memory import memory_report
from evensong.wire.artifact import align, decode_artifact
from evensong.wire.program import ALIGNMENT

pytestmark = pytest.mark.torch

SHAPES = {"mlp": (784,), "small_cnn": (1, 28, 28), "har_cnn": (9, 128), "digits_cnn": (1, 8, 8)}


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    found = []
    for _ in range(draw(st.integers(0, 24))):
        first = draw(st.integers(0, 20))
        found.append(Lifetime(draw(st.integers(1, 5000)), first, first + draw(st.integers(0, 8))))
    return found


@settings(max_examples=150, deadline=None)
@given(lifetimes())
def test_no_two_live_tensors_overlap(items: list[Lifetime]) -> None:
    offsets = place(items)
    for (a, start_a), (b, start_b) in combinations(zip(items, offsets, strict=True), 2):
        if a.first <= b.last and b.first <= a.last:
            assert start_a + a.nbytes <= start_b or start_b + b.nbytes <= start_a
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert offsets == place(items)
    # the bound, by its definition
    bound = max((sum(align(i.nbytes) for i in items if i.first <= t <= i.last) for t in range(30)), default=0)
    assert lower_bound(items) == bound
    height = max((offset + align(item.nbytes) for item, offset in zip(items, offsets, strict=True)), default=0)
    assert bound <= height <= max(bound, 1.25 * bound)


@pytest.mark.parametrize("name", SHAPES)
def test_the_shared_models_reach_the_lower_bound(name: str) -> None:
    compiled = compile(getattr(zoo, name)(), torch.zeros(1, *SHAPES[name]), batch_size=20)
    for memory in compiled.artifact.manifest["memory"].values():
        assert memory["arena"] == memory["lower_bound"]


def test_the_report_adds_up_and_needs_only_the_artifact() -> None:
    compiled = compile(zoo.digits_cnn(), torch.zeros(1, 1, 8, 8), optimizer=SGD(momentum=0.9), batch_size=16)
    artifact = compiled.artifact
    report = memory_report(decode_artifact(compiled.to_bytes()))
    assert report == compiled.memory()
    train, predict = artifact.program("train"), artifact.program("predict")
    weights = sum(v.nbytes for v in artifact.variables)
    assert weights <= report.state <= weights + ALIGNMENT * len(artifact.variables)
    assert report.slots == report.state == artifact.slot_bytes
    assert report.training_peak == report.state + report.slots + train.arena_bytes + train.workspace_bytes
    assert report.inference_peak == report.state + predict.arena_bytes + predict.workspace_bytes
    live = report.program("train")
    assert live is not None and sum(tensor.nbytes for tensor in live.live) == live.lower_bound <= live.arena
    assert "body.3 (Conv2d)" in report.explain("train") and f"{report.training_peak:,}" in str(report)


def test_training_only_the_head_takes_less() -> None:
    full = compile(zoo.digits_cnn(), torch.zeros(1, 1, 8, 8)).memory()
    head = compile(zoo.digits_cnn(), torch.zeros(1, 1, 8, 8), trainable=["head.*"]).memory()
    none = compile(zoo.digits_cnn(), torch.zeros(1, 1, 8, 8), trainable="none").memory()
    assert head.training_peak < 0.85 * full.training_peak
    assert none.training_peak == 0 and none.inference_peak < none.peak < head.peak


def test_running_statistics_are_counted_twice() -> None:
    """Training keeps a copy to undo a diverged step with."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2))
    report = compile(model, torch.zeros(1, 4)).memory()
    train = report.program("train")
    assert train is not None and report.statistics == 2 * 64  # each at a multiple of 64
    assert report.training_peak == report.state + report.statistics + train.arena + train.workspace


def test_gradients_stop_where_nothing_is_trained() -> None:
    compiled = compile(zoo.digits_cnn(), torch.zeros(1, 1, 8, 8))
    names = [op.name for op in compiled.artifact.program("train").ops]
    assert names.count("CONV2D_GRAD_WEIGHT") == 2
    assert names.count("CONV2D_GRAD_INPUT") == 1  # none for the first layer
    assert names.count("UNARY") == 2  # two activations moved behind their pool, the third is fused


_SCRIPT = """
import torch
from evensong.mobile_runtime.compiler import compile, zoo, PostTrainingInt8
x = torch.rand(40, 9, 128, generator=torch.Generator().manual_seed(1))
a = compile(zoo.har_cnn(), x)
b = compile(zoo.har_cnn(), x, trainable=["head.*"], quantize=PostTrainingInt8(x.numpy()))
print(a.hash, b.hash)
"""


def test_the_same_model_gives_the_same_bytes_in_every_process() -> None:
    """Neither hash seeds nor the number of threads change a bit."""
    answers = {
        subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert len(answers) == 1 and len(answers.pop().split()) == 2


def test_the_file_is_the_artifact(tmp_path: Path) -> None:
    compiled = compile(zoo.mlp(), torch.zeros(1, 784), labels=[str(i) for i in range(10)], name="digits")
    path = compiled.save(tmp_path / "digits.evsg")
    artifact = decode_artifact(path.read_bytes())
    assert artifact == compiled.artifact
    assert CompiledArtifact(artifact).hash == compiled.hash
    assert artifact.manifest["inputs"] == [{"name": "input", "dtype": "f32", "shape": [784]}]
    assert artifact.manifest["output"] == {"name": "output", "dtype": "f32", "shape": [10]}
    assert artifact.manifest["name"] == "digits" and artifact.manifest["labels"] == [str(i) for i in range(10)]
    assert [v.name for v in artifact.variables] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [v.shape for v in artifact.variables] == [(200, 784), (200,), (10, 200), (10,)]
    places = artifact.manifest["places"]
    assert {name: len(found) for name, found in places.items()} == {p.name: len(p.ops) for p in artifact.programs}
