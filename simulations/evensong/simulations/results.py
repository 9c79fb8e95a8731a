"""What a run found out: plain figures, from which ``results.json`` and the report are made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean


@dataclass(frozen=True)
class DeviceOutcome:
    """Accuracies in [0, 1] on the device's own test examples, of the initial, federated and personalised model."""

    name: str
    train_examples: int
    test_examples: int
    class_counts: tuple[int, ...]  #: training examples of each class
    before: float
    federated: float
    personalised: float


@dataclass(frozen=True)
class RoundOutcome:
    """One committed round. Bytes are sums over all devices, of updates up, and of artifact and parameters down."""

    number: int
    seconds: float  #: since the task started
    reports: int
    training_loss: float
    bytes_up: int
    bytes_down: int
    accuracy: float | None = None  #: of the version that it committed, measured on the devices' test examples


@dataclass(frozen=True)
class Traffic:
    """Bytes that the devices themselves counted, every message of every call, per device and round."""

    up_per_device_round: float
    down_per_device_round: float
    float32_per_device_round: int  #: the travelling tensors as bare float32, one way


@dataclass(frozen=True)
class Sample:
    """A test example, for a person to look at: grey values in [0, 1], row by row, and what each model took it for."""

    device: str
    picture: tuple[tuple[float, ...], ...]
    label: int
    before: int
    federated: int
    personalised: int


@dataclass(frozen=True)
class Results:
    """A whole run."""

    title: str
    dataset: str
    classes: tuple[str, ...]
    devices: tuple[DeviceOutcome, ...]
    rounds: tuple[RoundOutcome, ...]
    traffic: Traffic
    parameters: int
    arena_bytes: int  #: the largest that any program of the artifact needs while it runs
    memory: Mapping[str, int]  #: what takes the memory of a device, in bytes
    seconds: float
    seed: int
    newcomers: tuple[DeviceOutcome, ...] = ()
    global_test: Mapping[str, float] = field(default_factory=dict)  #: "before" and "federated" on examples of no device
    samples: tuple[Sample, ...] = ()
    coordinator_saw: str = ""  #: one sentence: what it could see of the devices, and what not
    notes: Mapping[str, str] = field(default_factory=dict)  #: engine, versions, hashes: shown as they are

    def accuracy(self) -> dict[str, float]:
        """The figures that matter: means over devices, and the device that fares worst."""
        return _summary(self.devices)

    def accuracy_of_newcomers(self) -> dict[str, float]:
        """The same for people who never took part."""
        return _summary(self.newcomers)

    def to_json(self) -> dict[str, object]:
        """The content of ``results.json``; ``docs/demo.md`` names every key."""
        document: dict[str, object] = {
            "dataset": self.dataset,
            "accuracy": self.accuracy(),
            "bytes": asdict(self.traffic),
            "arena_bytes": self.arena_bytes,
            "parameters": self.parameters,
            "rounds": len(self.rounds),
            "devices": len(self.devices),
            "seconds": round(self.seconds, 3),
            "seed": self.seed,
            "memory": dict(self.memory),
            "coordinator_saw": self.coordinator_saw,
            "per_device": [asdict(device) for device in self.devices],
            "per_round": [asdict(each) for each in self.rounds],
            "notes": dict(self.notes),
        }
        if self.newcomers:
            document["newcomers"] = {
                "accuracy": self.accuracy_of_newcomers(),
                "per_device": [asdict(device) for device in self.newcomers],
            }
        if self.global_test:
            document["global_test"] = dict(self.global_test)
        return document


def write_json(results: Results, path: Path) -> None:
    """Writes ``results.json``."""
    path.write_text(json.dumps(results.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _summary(devices: Sequence[DeviceOutcome]) -> dict[str, float]:
    return {
        "before": fmean(device.before for device in devices),
        "federated": fmean(device.federated for device in devices),
        "federated_worst": min(device.federated for device in devices),
        "personalised_mean": fmean(device.personalised for device in devices),
        "personalised_worst": min(device.personalised for device in devices),
    }
