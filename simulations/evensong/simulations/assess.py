"""From what models answered to what a report shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from evensong.mobile_runtime.memory import MemoryReport
from evensong.mobile_runtime.session import Session
from evensong.simulations.fleet import Examples, Shard
from evensong.simulations.results import DeviceOutcome, RoundOutcome, Sample
from evensong.simulations.witness import Answers, classes_of
from evensong.v1 import operator_pb2


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


def rounds_of(events: Sequence[operator_pb2.TaskEvent]) -> tuple[RoundOutcome, ...]:
    """The committed rounds of a task's history, each with the evaluation of its version where there was one."""
    evaluated = {
        event.version: event.metrics.correct / event.metrics.examples
        for event in events
        if event.kind == operator_pb2.EVENT_KIND_VERSION_EVALUATED and event.metrics.examples
    }
    return tuple(
        RoundOutcome(
            number=event.version,
            seconds=(event.time_unix_ms - events[0].time_unix_ms) / 1000,
            reports=event.reports,
            training_loss=event.metrics.loss_sum / max(event.metrics.examples, 1),
            bytes_up=event.bytes_up,
            bytes_down=event.bytes_down,
            accuracy=evaluated.get(event.version),
        )
        for event in events
        if event.kind == operator_pb2.EVENT_KIND_VERSION_COMMITTED
    )


def memory_table(memory: MemoryReport) -> dict[str, int]:
    """What takes the memory of a device, in bytes."""
    return {
        "to predict": memory.inference_peak,
        "to train": memory.training_peak,
        "of it parameters": memory.state,
        "of it optimiser": memory.slots,
    }


def arena_bytes(memory: MemoryReport) -> int:
    """The largest scratch that one of the programs needs while it runs."""
    return max(program.arena + program.workspace for program in memory.programs)


def _rows(picture: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in picture)
