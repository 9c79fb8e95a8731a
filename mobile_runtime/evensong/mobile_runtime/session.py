"""The one face of every engine: what a host may ask of a loaded artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from evensong.wire.program import Artifact, Variable

Array = npt.NDArray[np.generic]
Inputs = npt.ArrayLike | Sequence[npt.ArrayLike]


@dataclass(frozen=True)
class StepResult:
    """One training step: mean loss over the batch, right answers in it, and its number of examples."""

    loss: float
    correct: int
    examples: int


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and right answers over a data set.

    ``answers`` is how many there are: one an example, or more where each example asks for several (a label for every
    token, say); 0 stands for ``examples``. ``accuracy`` is the share of right ones.
    """

    loss: float
    correct: int
    examples: int
    answers: int = 0

    @property
    def accuracy(self) -> float:
        answers = self.answers or self.examples
        return self.correct / answers if answers else float("nan")


class Session(Protocol):
    """A loaded artifact with its mutable state. Not safe for use from two threads at once.

    Inputs take the artifact's shapes ``[n, ...]`` (the author's layout); any ``n >= 1`` is accepted and split into the
    program's batches, except in :meth:`train_step`, which takes at most ``max_batch`` examples and updates once. A
    float32 input takes any float or integer type except uint8 (pixels have to be scaled first); an integer input or a
    label takes integers in range. A uint8 input ``[n, ..., bytes]`` takes strings ``[n, ...]`` as well: they become
    UTF-8 padded with zeros, and lose what does not fit. Wrong shapes, dtypes or values raise :class:`ExampleError`.

    A loss that is not finite raises :class:`DivergedError` and leaves the state as it was before the step. A gradient
    that overflows although the loss was finite, or a weight that its update pushes out of float32's range, raises it
    too: by then other weights may have been updated, since each is as soon as nothing needs its old value any more.
    The message says so, and a checkpoint has to be restored (or the session :meth:`reset`).
    """

    @property
    def artifact(self) -> Artifact: ...

    @property
    def engine(self) -> str:
        """ "native" or "twin"."""
        ...

    def predict(self, *inputs: npt.ArrayLike) -> Array:
        """The model's output ``[n, ...]``."""
        ...

    def train_step(self, inputs: Inputs, target: npt.ArrayLike, *, learning_rate: float) -> StepResult:
        """One optimiser step on ``1 <= n <= max_batch`` examples; ``learning_rate`` must be finite and >= 0."""
        ...

    def evaluate(self, inputs: Inputs, target: npt.ArrayLike) -> Evaluation:
        """Loss and right answers over ``n`` examples; changes nothing."""
        ...

    @property
    def variables(self) -> Mapping[str, Variable]:
        """Trainable tensors and buffers, in the artifact's order."""
        ...

    def get(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Copies of the named variables (all by default) in the author's shapes."""
        ...

    def set(self, values: Mapping[str, npt.ArrayLike]) -> None:
        """Replaces variables; every value is checked (name, shape, dtype, finite) before the first is written."""
        ...

    def delta(self, reference: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        """``current - reference`` in float32 for each variable of ``reference``."""
        ...

    def freeze(self, names: Iterable[str]) -> None:
        """The named trainable variables are left alone by the optimiser from now on; replaces the earlier choice."""
        ...

    def reset(self, *, seed: int | None = None) -> None:
        """Initial variables, zero optimiser state, step 0; ``seed`` (unsigned 64 bits) drives dropout."""
        ...

    def reset_optimizer(self) -> None:
        """Zero optimiser state and step 0; variables stay."""
        ...

    def checkpoint(self) -> bytes:
        """Variables, optimiser state, step and seed, bound to the artifact's hash; the same bytes from every engine."""
        ...

    def restore(self, checkpoint: bytes) -> None:
        """Back to a checkpoint; damaged or foreign bytes raise :class:`CheckpointError` and change nothing."""
        ...

    def close(self) -> None:
        """Frees the native memory; later calls raise. A session also closes at the end of a ``with`` block."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...
