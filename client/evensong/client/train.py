"""Step 3 of a round: the engine runs the program over local examples, and the difference is what may travel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from evensong.client.errors import UnfitError
from evensong.client.examples import Batch, Examples
from evensong.mobile_runtime.session import Array, Session, StepResult
from evensong.v1 import task_pb2

BetweenSteps = Callable[[], None]  #: raises to end the work
OnStep = Callable[[int, int, StepResult], None]  #: step from 1, steps in all, its result


@dataclass(frozen=True)
class Training:
    """What ran. ``examples`` counts each pass over an example, ``distinct`` each example once."""

    steps: int
    examples: int
    distinct: int
    loss_sum: float
    correct: int

    @property
    def loss(self) -> float:
        """Mean over all examples seen."""
        return self.loss_sum / self.examples


@dataclass(frozen=True)
class LocalUpdate:
    """``delta`` is trained - reference for the tensors that travel, ``personal`` the trained ones that do not."""

    training: Training
    delta: dict[str, Array]
    personal: dict[str, Array]


def train(
    session: Session,
    plan: task_pb2.LocalPlan,
    *,
    reference: Mapping[str, npt.ArrayLike],
    personal: Iterable[str],
    examples: Examples,
    learning_rate: float,
    order: np.random.Generator,
    most_steps: int,
    between_steps: BetweenSteps,
    on_step: OnStep,
) -> LocalUpdate:
    """Local SGD (McMahan et al. 2017, ClientUpdate) over shuffled local examples, from where ``session`` stands.

    ``reference`` are the tensors that travel, as they were; ``personal`` names those that stay.
    Raises :class:`DivergedError`, :class:`UnfitError` (too few examples, too much work), :class:`ExampleError`
    (examples that are not the artifact's), and whatever ``between_steps`` raises.
    """
    training = run_epochs(
        session,
        examples,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        learning_rate=learning_rate,
        order=order,
        max_steps=plan.max_steps,
        most_steps=most_steps,
        min_examples=plan.min_examples,
        between_steps=between_steps,
        on_step=on_step,
    )
    return LocalUpdate(training, session.delta(reference), session.get(personal))


def run_epochs(
    session: Session,
    examples: Examples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    order: np.random.Generator,
    most_steps: int,
    max_steps: int = 0,
    min_examples: int = 1,
    between_steps: BetweenSteps,
    on_step: OnStep,
) -> Training:
    """``epochs`` passes, each in a new order, cut after ``max_steps`` if not 0; more than ``most_steps`` is refused."""
    count = examples.count("train")
    if count < max(1, min_examples):
        raise UnfitError("there are too few training examples", expected=f"at least {max(1, min_examples)}", got=count)
    batch_size = _batch_size(session, batch_size)
    steps = epochs * math.ceil(count / batch_size)
    if max_steps:
        steps = min(steps, max_steps)
    if steps > most_steps:
        raise UnfitError("the task asks for too much work", expected=f"at most {most_steps} steps", got=steps)
    done = seen = correct = 0
    loss_sum = 0.0
    passes = chain.from_iterable(examples.batches(batch_size, order=order) for _ in range(epochs))
    for batch in islice(passes, steps):
        between_steps()
        result = session.train_step(model_inputs(batch), batch.target, learning_rate=learning_rate)
        done, seen, correct = done + 1, seen + result.examples, correct + result.correct
        loss_sum += result.loss * result.examples
        on_step(done, steps, result)
    if not done:
        raise UnfitError("the training examples are gone")  # their age limit passed between count and use
    return Training(done, seen, min(count, seen), loss_sum, correct)


def learning_rate_of(plan: task_pb2.LocalPlan, round_number: int, rounds: int) -> float:
    """The rate of round 1..rounds: linear from ``learning_rate`` in the first to ``final_learning_rate`` in the last.

    The round's number comes with the assignment and is clamped, so that it can only choose between rates that were
    signed.
    """
    if not plan.final_learning_rate or rounds < 2:
        return plan.learning_rate
    progress = min(max((round_number - 1) / (rounds - 1), 0.0), 1.0)
    return plan.learning_rate + progress * (plan.final_learning_rate - plan.learning_rate)


def model_inputs(batch: Batch) -> npt.ArrayLike | tuple[Array, ...]:
    """As :meth:`Session.train_step` takes them: one array, or a tuple for several inputs."""
    return batch.inputs[0] if len(batch.inputs) == 1 else batch.inputs


def _batch_size(session: Session, wanted: int) -> int:
    for program in session.artifact.programs:
        if program.name == "train":
            if wanted > program.max_batch:
                raise UnfitError("the batch is too large", expected=f"at most {program.max_batch}", got=wanted)
            return wanted or program.max_batch
    raise UnfitError("the artifact has no training program", fix="Compile it with a loss.")
