"""The committed model, adapted to this device's own examples, for ``predict`` here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from evensong.client.callbacks import Personalized, StepDone
from evensong.client.context import Context
from evensong.client.errors import UnfitError
from evensong.client.model import Material, open_training_session
from evensong.client.train import BetweenSteps, Training, run_epochs
from evensong.client.trust import TrustedModel
from evensong.mobile_runtime.session import Session
from evensong.wire.program import VariableFlag
from evensong.wire.tensors import encode_tensors, layout_of


@dataclass(frozen=True)
class Recipe:
    """How to adapt; ``trainable`` are fnmatch patterns, empty adapts every trainable tensor."""

    epochs: int
    learning_rate: float
    trainable: tuple[str, ...] = ()


def personalize(
    context: Context, material: Material, recipe: Recipe, between_steps: BetweenSteps = lambda: None
) -> Training:
    """Trains from the version and the personal tensors, and stores the result as the overlay of this version.

    Starts afresh each time, and nothing of it travels. Raises :class:`DivergedError`, :class:`UnfitError` or what
    ``between_steps`` raises, with the former overlay left as it was.
    """
    model = material.model
    order = context.randomness.generator()
    session = open_training_session(context, material, int(order.integers(1 << 63)))
    try:
        session.freeze(_frozen(session, recipe.trainable))
        training = run_epochs(
            session,
            context.examples,
            epochs=recipe.epochs,
            batch_size=model.bundle.local.batch_size,
            learning_rate=recipe.learning_rate,
            order=order,
            most_steps=context.limits.training_steps,
            between_steps=between_steps,
            on_step=lambda step, steps, result: context.callbacks.emit(
                StepDone(model.task_id, step, steps, result.loss)
            ),
        )
        layout = layout_of(material.artifact.variables)
        tensors = encode_tensors(session.get([spec.name for spec in layout]), layout)
    finally:
        session.close()
    context.state.set_overlay(model.task_id, model.version_sha256, tensors, json.dumps(asdict(recipe)))
    context.callbacks.emit(Personalized(model.task_id, model.version.number, training.steps, training.loss))
    return training


def recipe_of(
    model: TrustedModel, epochs: int | None, learning_rate: float | None, trainable: Sequence[str] | None
) -> Recipe:
    """The task's recipe with the caller's changes."""
    plan = model.bundle.local.personalization
    recipe = Recipe(
        plan.epochs if epochs is None else epochs,
        (plan.learning_rate or model.bundle.local.learning_rate) if learning_rate is None else learning_rate,
        tuple(plan.trainable if trainable is None else trainable),
    )
    if recipe.epochs < 1:
        raise UnfitError(
            "the task does not say how to personalise", fix="Say it here: personalize(epochs=..., learning_rate=...)."
        )
    return recipe


def recipe_for_new_version(context: Context, model: TrustedModel) -> Recipe | None:
    """What to do for a version that has no overlay yet: the last recipe used here, else the task's, else nothing."""
    if context.state.overlay(model.task_id, model.version_sha256) is not None:
        return None
    if (last := context.state.recipe(model.task_id)) is not None:
        values = json.loads(last)
        return Recipe(values["epochs"], values["learning_rate"], tuple(values["trainable"]))
    if not model.bundle.local.personalization.epochs or not context.examples.count("train"):
        return None
    return recipe_of(model, None, None, None)


def _frozen(session: Session, patterns: Sequence[str]) -> list[str]:
    """The trainable variables that no pattern names."""
    names = [name for name, variable in session.variables.items() if variable.flags & VariableFlag.TRAINABLE]
    chosen = [name for name in names if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise UnfitError(
            "nothing is left to adapt", expected=f"a pattern that matches one of {names}", got=list(patterns)
        )
    return [name for name in names if name not in chosen]
