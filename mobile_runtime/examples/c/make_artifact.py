"""Compiles the example's model: ``python mobile_runtime/examples/c/make_artifact.py`` writes ``spirals.evsg``.

Only this step needs Python and torch; the device needs the file that it writes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from evensong.mobile_runtime import SGD, compile

ARTIFACT = Path(__file__).with_name("spirals.evsg")


def main() -> None:
    artifact = spirals()
    ARTIFACT.write_bytes(artifact)
    print(f"{ARTIFACT.name}: {len(artifact)} bytes")


def spirals() -> bytes:
    """Points of the plane to one of three classes, trained with SGD and momentum, 30 at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    return compile(
        model, torch.zeros(1, 2), optimizer=SGD(momentum=0.9), batch_size=30, name="spirals", labels=["a", "b", "c"]
    ).to_bytes()


if __name__ == "__main__":
    main()
