"""A task says at once what is wrong with it; a bundle from anybody is held to the same rules."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served_coordinator import trainable_artifact

import evensong.coordinator
from evensong.coordinator.task import (
    AdaptiveClipping,
    LocalTraining,
    Personalization,
    SecureAggregation,
    Strategy,
    Task,
    TaskError,
    check_bundle,
)
from evensong.v1 import task_pb2
from evensong.wire import CorruptError, TensorSpec, UpdateCodec, decode_tensors, sha256
from evensong.wire.artifact import decode_artifact, encode_artifact

ARTIFACT = trainable_artifact()


def test_the_defaults_make_a_whole_bundle() -> None:
    bundle = Task("digits", ARTIFACT).to_bundle()
    check_bundle(bundle)
    assert bundle.artifact.sha256 == sha256(ARTIFACT)
    assert [(spec.name, tuple(spec.shape)) for spec in bundle.layout] == [
        ("body.weight", (2, 3)),
        ("body.mean", (3,)),
        ("head.bias", (2,)),
    ]
    assert (bundle.update.codec, bundle.update.bits) == (task_pb2.CODEC_FIELDS, 8)
    assert (bundle.secure.min_survivors, bundle.secure.max_cohort, bundle.secure.stage_ms) == (6, 11, 30_000)
    assert bundle.update.adaptive_clipping.initial == 1.0 and not bundle.update.clip_norm
    assert (bundle.update.weighting, bundle.update.max_weight) == (task_pb2.WEIGHTING_UNIFORM, 1.0)
    assert (bundle.round.goal_reports, bundle.round.min_reports) == (8, 6)
    assert bundle.server.strategy == "fedavg"
    assert not bundle.local.HasField("personalization")
    assert bundle.training_bytes == 256 + 128 + 640 + 64  # state, slots, arena, workspace


def test_every_field_arrives() -> None:
    task = Task(
        "digits",
        ARTIFACT,
        population="phones",
        rounds=3,
        goal=10,
        min_reports=2,
        over_selection=1.5,
        deadline=1.5,
        evaluate_every=2,
        evaluation_reports=4,
        local=LocalTraining(
            epochs=2,
            learning_rate=0.5,
            final_learning_rate=0.1,
            batch_size=4,
            max_steps=7,
            min_examples=5,
            personal=["head.*"],
        ),
        personalization=Personalization(epochs=3, learning_rate=0.2, trainable=("head.*",)),
        secure=None,
        update=UpdateCodec(4, 64),
        clip_norm=2.0,
        weighting="uniform",
        max_weight=50.0,
        strategy=Strategy("fedadam", eta=0.01, beta_1=0.5),
    )
    bundle = task.to_bundle()
    assert task_pb2.TaskBundle.FromString(bundle.SerializeToString()) == bundle
    assert bundle.local == task_pb2.LocalPlan(
        epochs=2,
        learning_rate=0.5,
        final_learning_rate=0.1,
        batch_size=4,
        max_steps=7,
        min_examples=5,
        personal=["head.*"],
        personalization=task_pb2.Personalization(epochs=3, learning_rate=0.2, trainable=["head.*"]),
    )
    assert bundle.update == task_pb2.UpdatePlan(
        codec=task_pb2.CODEC_QUANTIZED,
        bits=4,
        block_size=64,
        clip_norm=2.0,
        weighting=task_pb2.WEIGHTING_UNIFORM,
        max_weight=50.0,
    )
    assert bundle.round == task_pb2.RoundPolicy(
        goal_reports=10,
        min_reports=2,
        over_selection=1.5,
        deadline_ms=1500,
        rounds=3,
        evaluate_every=2,
        evaluation_reports=4,
    )
    assert dict(bundle.server.arguments) == {"eta": 0.01, "beta_1": 0.5}
    assert task.layout == (TensorSpec("body.weight", (2, 3)), TensorSpec("body.mean", (3,)))


def test_the_initial_parameters_have_the_authors_layout() -> None:
    task = Task("digits", ARTIFACT, local=LocalTraining(personal=["body.mean"]))
    parameters = task.initial_parameters()
    assert list(parameters) == ["body.weight", "head.bias"]
    np.testing.assert_array_equal(parameters["body.weight"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(parameters["head.bias"], [-1, 0.5])
    decoded = decode_tensors(task.encoded_parameters(), task.layout)
    assert all((decoded[name] == values).all() for name, values in parameters.items())


def test_an_artifact_comes_as_bytes_file_or_object(tmp_path: Path) -> None:
    class Compiled:
        def to_bytes(self) -> bytes:
            return ARTIFACT

    path = tmp_path / "model.evsg"
    path.write_bytes(ARTIFACT)
    bundles = [Task("digits", source).to_bundle() for source in (ARTIFACT, path, str(path), Compiled())]
    assert all(bundle == bundles[0] for bundle in bundles)
    with pytest.raises(TaskError, match="cannot be read"):
        Task("digits", tmp_path / "missing")
    with pytest.raises(CorruptError):
        Task("digits", ARTIFACT[:-1])


def without_training() -> bytes:
    artifact = decode_artifact(ARTIFACT)
    return encode_artifact(type(artifact)({}, artifact.variables, (), b"", artifact.state, 0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "name is malformed"),
        ({"name": "a b"}, "name is malformed"),
        ({"population": "x" * 101}, "population is malformed"),
        ({"rounds": 0}, "rounds"),
        ({"max_weight": "ten"}, "wrong type"),
        ({"population": 3}, "wrong type"),
        ({"rounds": 1.5}, "rounds is out of range.*whole number"),
        ({"goal": 0}, "goal"),
        ({"goal": -1}, "goal"),
        ({"goal": 1 << 40}, "goal"),
        ({"min_reports": 9}, "min_reports is above the goal"),
        ({"min_reports": 0}, "min_reports"),
        ({"over_selection": 0.5}, "over_selection"),
        ({"over_selection": float("nan")}, "over_selection"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": float("inf")}, "deadline"),
        ({"evaluate_every": -1}, "evaluate_every"),
        ({"evaluation_reports": 0}, "evaluation_reports"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"weighting": "votes"}, "weighting is unknown.*examples or uniform"),
        ({"max_weight": 0.0}, "max_weight"),
        ({"max_weight": float("inf")}, "max_weight"),
        ({"local": LocalTraining(epochs=0)}, "local.epochs"),
        ({"local": LocalTraining(learning_rate=float("nan"))}, "local.learning_rate"),
        ({"local": LocalTraining(learning_rate=0)}, "local.learning_rate"),
        ({"local": LocalTraining(final_learning_rate=-0.1)}, "local.final_learning_rate"),
        ({"local": LocalTraining(batch_size=9)}, "batch_size is larger than the artifact's batch.*at most 8"),
        ({"local": LocalTraining(batch_size=0)}, "local.batch_size"),
        ({"local": LocalTraining(max_steps=0)}, "local.max_steps"),
        ({"local": LocalTraining(min_examples=0)}, "local.min_examples"),
        ({"local": LocalTraining(personal=["haed.*"])}, "haed"),
        ({"local": LocalTraining(personal="head.*")}, "sequence of patterns"),
        ({"local": LocalTraining(personal=["*"])}, "the layout has no tensor"),
        ({"personalization": Personalization(epochs=0)}, "personalization.epochs"),
        ({"personalization": Personalization(learning_rate=-1)}, "personalization.learning_rate"),
        ({"personalization": Personalization(trainable=["body.mean"])}, "body.mean"),
        ({"strategy": Strategy("fedadam", learning_rate=0.1)}, "no argument 'learning_rate'"),
        ({"strategy": Strategy("fedadam", eta=-1)}, "eta of 'fedadam' is out of range"),
        ({"strategy": "fed avg"}, "strategy's name is malformed"),
        ({"goal": 2}, "three devices or more"),
        ({"update": UpdateCodec(4)}, "packs updates itself"),
        ({"weighting": "examples"}, "need a bound"),
        ({"weighting": "examples", "max_weight": 1.5}, "must be whole"),
        ({"clip_norm": AdaptiveClipping(quantile=1.5)}, "adaptive_clipping.quantile"),
        ({"secure": SecureAggregation(bits=1)}, "secure.bits"),
        ({"secure": SecureAggregation(corrupted=0.5)}, "secure.corrupted_share"),
        ({"secure": SecureAggregation(corrupted=0.45, dropout=0.45)}, "secure sum cannot be"),
        ({"artifact": without_training()}, "no program 'train'"),
    ],
)
def test_what_cannot_be_is_refused_at_once(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Task(**{"name": "digits", "artifact": ARTIFACT, **fields})


def test_a_strategy_that_only_the_coordinator_knows_is_left_to_it() -> None:
    assert Task("digits", ARTIFACT, strategy=Strategy("mine", power=2)).to_bundle().server.strategy == "mine"


def change(path: str, value: Any) -> Callable[[task_pb2.TaskBundle], None]:
    def apply(bundle: task_pb2.TaskBundle) -> None:
        *parents, field = path.split(".")
        message: Any = bundle
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, field, value)

    apply.__name__ = f"{path}={value!r}"[:60]
    return apply


@pytest.mark.parametrize(
    "spoil",
    [
        change("name", "../etc"),
        change("population", ""),
        change("artifact.sha256", b"short"),
        change("artifact.size_bytes", 0),
        change("artifact.size_bytes", 1 << 40),
        lambda bundle: bundle.ClearField("layout"),
        lambda bundle: bundle.layout.add(name="x", shape=[1 << 31, 1 << 31]),
        lambda bundle: bundle.ClearField("local"),
        lambda bundle: bundle.ClearField("update"),
        lambda bundle: bundle.ClearField("round"),
        lambda bundle: bundle.ClearField("server"),
        lambda bundle: bundle.local.personal.extend(["x"] * 1001),
        lambda bundle: bundle.local.personal.append(""),
        change("local.learning_rate", float("inf")),
        change("local.epochs", 1 << 31),
        change("update.bits", 17),
        change("update.codec", 9),
        change("update.block_size", 7),
        change("update.clip_norm", float("nan")),
        change("update.max_weight", -1.0),
        change("update.weighting", 7),
        change("round.goal_reports", 1 << 31),
        change("round.over_selection", 1e9),
        change("round.deadline_ms", 1 << 62),
        change("training_bytes", 0),
        lambda bundle: bundle.server.arguments.update({"eta": float("nan")}),
        lambda bundle: bundle.server.arguments.update({"not a name": 1.0}),
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_hostile_bundles_are_refused(spoil: Callable[[task_pb2.TaskBundle], None]) -> None:
    bundle = Task("digits", ARTIFACT, secure=None).to_bundle()
    spoil(bundle)
    with pytest.raises(TaskError):
        check_bundle(bundle)


def test_the_public_names_are_sorted_documented_and_light() -> None:
    assert sorted(evensong.coordinator.__all__) == evensong.coordinator.__all__
    assert all(getattr(evensong.coordinator, name).__doc__ for name in evensong.coordinator.__all__)
    code = (
        "import sys, evensong.coordinator; "
        "found = {'flwr', 'sqlalchemy', 'pydantic', 'typer', 'rich', 'torch'} & set(sys.modules); "
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
