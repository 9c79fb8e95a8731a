"""Training in int8 against training in float32: the arena, the step, and what personalisation on an int8 body needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Row, in_turns, wanted
from evensong.mobile_runtime import compile, load
from evensong.mobile_runtime.compiler import CompiledArtifact, Int8Training

Model = tuple[Callable[[], nn.Module], tuple[int, ...], int]


def int8_training(models: Mapping[str, Model], batch: int, only: str) -> Iterator[Row]:
    """``int8_train_arena/*`` as a fraction of float32's, and ``int8_train_step/*`` against float32's."""
    for name, (make, shape, classes) in models.items():
        rows = [f"int8_train_arena/{name}", f"int8_train_step/{name}"]
        if not any(wanted(row, only) for row in rows):
            continue
        torch.manual_seed(0)
        model, x, y = make(), torch.randn(batch, *shape), np.arange(batch, dtype=np.int32) % classes
        with torch.no_grad():
            for _ in range(30):  # statistics of batch norms, which int8 training folds
                model.train()(x)
        model.eval()
        stored, whole = (compile(model, x, batch_size=batch, quantize=q) for q in (Int8Training(x), None))
        if wanted(rows[0], only):
            arenas = [artifact.artifact.program("train").arena_bytes for artifact in (stored, whole)]
            yield Row(rows[0], arenas[0] / arenas[1], None, "of float32's", "lower")
        if wanted(rows[1], only):
            ours, peer = in_turns(_step(stored, x, y), _step(whole, x, y), seconds=5)
            yield Row(rows[1], ours * 1e6, peer * 1e6, "us", "lower")


def _step(artifact: CompiledArtifact, x: torch.Tensor, y: np.ndarray) -> Callable[[], object]:
    session = load(artifact, engine="native")
    images = x.numpy()
    return lambda: session.train_step(images, y, learning_rate=0.001)
