"""What the demo and the simulator run on each data set: model, plan and prebuilt artifact."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from evensong.simulations.data import DataError

if TYPE_CHECKING:
    from evensong.mobile_runtime.compiler import CompiledArtifact


@dataclass(frozen=True)
class Scenario:
    """One run of the demo. Rates, epochs and rounds were chosen offline, on seeds other than the default one."""

    name: str
    title: str
    model: str  #: a function of evensong.mobile_runtime.compiler.zoo
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    devices: int
    rounds: int
    epochs: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    personal_epochs: int
    personal_learning_rate: float
    concentration: float = 0.2  #: of the mix of classes; not used where people are the devices
    held_out: int = 0  #: examples that no device holds
    limit: int | None = None  #: examples of a device

    def artifact(self) -> bytes:
        """The prebuilt artifact that ships with evensong."""
        return (files("evensong.simulations.demo") / f"{self.name}.evsg").read_bytes()

    def compile(self) -> CompiledArtifact:
        """The same artifact from the model's source; needs torch."""
        import numpy as np

        from evensong.mobile_runtime.compiler import compile, zoo

        return compile(
            getattr(zoo, self.model)(),
            np.zeros((1, *self.input_shape), np.float32),
            loss="cross_entropy",
            batch_size=self.batch_size,
            name=self.name,
            labels=self.classes,
        )


DIGITS = Scenario(
    name="digits",
    title="Handwritten digits",
    model="digits_cnn",
    input_shape=(1, 8, 8),
    classes=tuple("0123456789"),
    devices=8,
    rounds=24,
    epochs=2,
    batch_size=16,
    learning_rate=0.1,
    final_learning_rate=0.05,
    personal_epochs=5,
    personal_learning_rate=0.03,
    held_out=360,
)

#: The settings of the reference runs on this set: all people in every round, one epoch each.
HAR = Scenario(
    name="har",
    title="Human activity from a phone's motion sensors",
    model="har_cnn",
    input_shape=(9, 128),
    classes=("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "laying"),
    devices=21,
    rounds=40,
    epochs=1,
    batch_size=32,
    learning_rate=0.1,
    final_learning_rate=0.03,
    personal_epochs=5,
    personal_learning_rate=0.03,
)

FASHION = Scenario(
    name="fashion",
    title="Pictures of clothes",
    model="small_cnn",
    input_shape=(1, 28, 28),
    classes=(
        "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "trainer", "bag", "ankle boot"
    ),
    devices=8,
    rounds=20,
    epochs=1,
    batch_size=20,
    learning_rate=0.05,
    final_learning_rate=0.02,
    personal_epochs=3,
    personal_learning_rate=0.02,
    held_out=2_000,
    limit=800,
)  # fmt: skip

SCENARIOS = {scenario.name: scenario for scenario in (DIGITS, HAR, FASHION)}


def scenario_named(name: str) -> Scenario:
    """One of :data:`SCENARIOS`."""
    if name not in SCENARIOS:
        raise DataError("the demo has no such data", expected=" or ".join(SCENARIOS), got=name)
    return SCENARIOS[name]
