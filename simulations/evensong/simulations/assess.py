"""From what models answered to what a report shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from evensong.coordinator import EventKind, Task, TaskEvent
from evensong.mobile_runtime import engine_info, load
from evensong.mobile_runtime.memory import memory_report
from evensong.mobile_runtime.session import Session
from evensong.simulations.fleet import Examples, Fleet, Shard
from evensong.simulations.report import write_report
from evensong.simulations.results import DeviceOutcome, Results, RoundOutcome, Sample, Traffic, write_json
from evensong.simulations.witness import Account, Answers, classes_of
from evensong.wire.artifact import artifact_hash, decode_artifact


def summarise(
    fleet: Fleet,
    artifact: bytes,
    trained: bytes,
    events: Sequence[TaskEvent],
    accounts: Mapping[str, Account],
    *,
    title: str,
    seed: int,
    seconds: float,
    notes: Mapping[str, str],
    task: Task,
) -> Results:
    """A whole run of ``task``. ``accounts`` are by the names of the fleet's shards; ``events`` are the task's history.

    What the devices answered is taken from their accounts; only the initial model, and the models on examples of no
    device, are asked here.
    """
    initial, final = load(artifact), load(trained)
    decoded = decode_artifact(artifact)
    memory, float32_bytes = memory_report(decoded), sum(variable.nbytes for variable in decoded.variables)
    rounds = rounds_of(events)

    def testify(shard: Shard) -> Testimony:
        account = accounts[shard.name]
        return Testimony(shard, ask(initial, shard.test), account.federated, account.personalised)

    participants = [testify(shard) for shard in fleet.participants]
    shares = [accounts[shard.name] for shard in fleet.participants]
    classes, test = len(fleet.classes), fleet.test
    return Results(
        title=title,
        dataset=fleet.dataset,
        classes=fleet.classes,
        devices=tuple(device_outcome(testimony, classes) for testimony in participants),
        newcomers=tuple(device_outcome(testify(shard), classes) for shard in fleet.newcomers),
        rounds=rounds,
        traffic=Traffic(
            up_per_device_round=fmean(share.bytes_up for share in shares) / len(rounds),
            down_per_device_round=fmean(share.bytes_down for share in shares) / len(rounds),
            float32_per_device_round=float32_bytes,
        ),
        parameters=float32_bytes // 4,
        arena_bytes=max(program.arena + program.workspace for program in memory.programs),
        memory={
            "to predict": memory.inference_peak,
            "to train": memory.training_peak,
            "of which parameters": memory.state,
            **({"of which optimiser": memory.slots} if memory.slots else {}),
        },
        seconds=seconds,
        seed=seed,
        global_test={}
        if test is None
        else {"before": accuracy(ask(initial, test), test), "federated": accuracy(ask(final, test), test)},
        samples=samples_of(participants),
        coordinator_saw=what_the_coordinator_saw(task),
        notes={
            "engine": " ".join(filter(None, (engine_info().engine, engine_info().instruction_set))),
            "artifact": artifact_hash(artifact),
            "trained artifact": artifact_hash(trained),
            **notes,
        },
    )


def what_the_coordinator_saw(task: Task) -> str:
    """In one sentence."""
    if task.secure is None:
        return "The coordinator saw each device's update and accuracy while it added them up, and kept only the sums."
    least = task.to_bundle().secure.min_survivors
    return (
        f"Of each round the coordinator saw masked vectors and their sum over {least} devices or more: who took part, "
        "but no single device's update, loss or accuracy."
    )


def write_all(results: Results, artifact: bytes, trained: bytes, folder: Path) -> None:
    """``report.html``, ``results.json``, and the artifact before (``initial.evsg``) and after (``trained.evsg``)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "initial.evsg").write_bytes(artifact)
    (folder / "trained.evsg").write_bytes(trained)
    write_json(results, folder / "results.json")
    write_report(results, folder / "report.html")


@dataclass(frozen=True)
class Testimony:
    """What three models answered to one device's test examples."""

    shard: Shard
    before: Answers
    federated: Answers
    personalised: Answers


def ask(session: Session, examples: Examples) -> Answers:
    """What a model that runs here answers."""
    return classes_of(session.predict(examples.inputs))


def accuracy(answers: Answers, examples: Examples) -> float:
    """The share of right answers."""
    return float(np.mean(np.asarray(answers) == examples.labels))


def device_outcome(testimony: Testimony, classes: int) -> DeviceOutcome:
    """The figures of one device."""
    shard = testimony.shard
    return DeviceOutcome(
        name=shard.name,
        train_examples=len(shard.train),
        test_examples=len(shard.test),
        class_counts=tuple(int(count) for count in np.bincount(shard.train.labels, minlength=classes)),
        before=accuracy(testimony.before, shard.test),
        federated=accuracy(testimony.federated, shard.test),
        personalised=accuracy(testimony.personalised, shard.test),
    )


def samples_of(testimonies: Iterable[Testimony], limit: int = 12) -> tuple[Sample, ...]:
    """Test pictures on which the federated and the personalised model disagree, a few from each device in turn."""
    found: list[list[Sample]] = []
    for testimony in testimonies:
        test = testimony.shard.test
        if test.inputs.ndim != 4 or test.inputs.shape[1] != 1:
            return ()  # not grey pictures: nothing that a person could look at
        answers = zip(testimony.before, testimony.federated, testimony.personalised, strict=True)
        found.append(
            [
                Sample(testimony.shard.name, _rows(test.inputs[index, 0]), int(test.labels[index]), *three)
                for index, three in enumerate(answers)
                if three[1] != three[2]
            ]
        )
    in_turn = [samples[place] for place in range(limit) for samples in found if place < len(samples)]
    return tuple(in_turn[:limit])


def rounds_of(events: Sequence[TaskEvent]) -> tuple[RoundOutcome, ...]:
    """The committed rounds of a task's history, each with the evaluation of its version where there was one."""
    evaluated = {
        event.version: event.metrics.accuracy
        for event in events
        if event.kind == EventKind.VERSION_EVALUATED and event.metrics
    }
    return tuple(
        RoundOutcome(
            number=event.version,
            seconds=(event.time - events[0].time).total_seconds(),
            reports=event.reports,
            training_loss=event.metrics.loss if event.metrics else 0.0,
            bytes_up=event.bytes_up,
            bytes_down=event.bytes_down,
            accuracy=evaluated.get(event.version),
        )
        for event in events
        if event.kind == EventKind.VERSION_COMMITTED
    )


def _rows(picture: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in picture)
