"""A session over any machine: everything that does not depend on which engine runs the program.

Inputs are checked here and cut into the program's batches; variables are read and written here, in the author's layout.
A prediction or a training step costs a few microseconds on top of the engine: inputs with the dtypes and shapes of the
ones before take a short path, where everything else is prepared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Self, TypeGuard

import numpy as np
import numpy.typing as npt

from evensong.mobile_runtime.checkpoint import Checkpoint, decode_checkpoint, encode_checkpoint
from evensong.mobile_runtime.errors import (
    CheckpointError,
    DivergedError,
    ExampleError,
    ProgramError,
    RuntimeFault,
    VariableError,
)
from evensong.mobile_runtime.examples import Array, InputPort, all_finite, rows_per_example
from evensong.mobile_runtime.machine import Machine
from evensong.mobile_runtime.scaled import scaled_weights
from evensong.mobile_runtime.session import Evaluation, Inputs, StepResult
from evensong.wire.program import OPS, Artifact, DType, Program, Variable, VariableFlag

_MAX_SEED = (1 << 64) - 1
_F32 = np.dtype(np.float32)
_MAX_FLOAT = float(np.finfo(np.float32).max)


class HostSession:
    """Implements :class:`evensong.mobile_runtime.session.Session`, whose docstrings say what each method promises."""

    def __init__(self, artifact: Artifact, machine: Machine, artifact_hash: str, *, seed: int = 0) -> None:
        self.artifact = artifact
        self.engine = machine.engine
        for program in artifact.programs:
            _check_role(program)
        self._hash = artifact_hash
        self._machine: Machine | None = machine
        self._programs = {
            program.name: _Runner(index, program, machine) for index, program in enumerate(artifact.programs)
        }
        shown = {v.name: replace(v, dtype=v.value_dtype) for v in artifact.variables if not v.is_scale}
        self._variables = MappingProxyType(shown)
        self._scaled = scaled_weights(artifact, machine.state, machine.slots)
        plain = [v for v in artifact.variables if not v.is_scale and not v.is_scaled]
        self._views = {v.name: _view(v, machine.state) for v in plain}  # author's layout, live
        self._step = 0
        self._seed = _checked_seed(seed)
        self._ready_prediction: _Ready | None = None  # the last one, should the next one have its shapes
        self._ready_step: _Ready | None = None

    # ------------------------------------------------------------------------------------------------- running programs

    def predict(self, *inputs: npt.ArrayLike) -> Array:
        ready = self._ready_prediction
        if ready is not None and ready.takes(inputs):
            ready.run(inputs)
            return ready.outputs[0].copy()
        runner = self._runner("predict")
        values, examples = runner.check_inputs(inputs)
        if examples <= runner.max_batch:
            self._ready_prediction = runner.ready(self._live(), values, examples)
        outputs = runner.fresh_outputs(examples)
        for start in range(0, examples, runner.max_batch):
            runner.run_slice(values, outputs, start, min(runner.max_batch, examples - start))
        return outputs[0]

    def train_step(self, inputs: Inputs, target: npt.ArrayLike, *, learning_rate: float) -> StepResult:
        if not 0 <= learning_rate <= _MAX_FLOAT:
            raise ExampleError("the learning rate is wrong", expected="a finite number >= 0", got=learning_rate)
        ready = self._ready_step
        values: tuple[Any, ...] = (*inputs, target) if type(inputs) is tuple else (inputs, target)
        if ready is None or not ready.takes(values):
            ready, values = self._prepared_step(inputs, target)
        loss, correct = ready.outputs
        loss[0] = math.nan  # until the engine has found a finite one
        try:
            ready.run(values, learning_rate=learning_rate, step=self._step + 1, seed=self._seed)
        except DivergedError as error:
            raise _explained(error, float(loss[0])) from None
        self._step += 1
        return StepResult(loss.item(), correct.item(), ready.examples)

    def evaluate(self, inputs: Inputs, target: npt.ArrayLike) -> Evaluation:
        runner = self._runner("evaluate")
        values, examples = runner.check_inputs((*runner.split(inputs), target))
        loss, correct = runner.loss_outputs
        total, right = 0.0, 0
        for start in range(0, examples, runner.max_batch):
            count = min(runner.max_batch, examples - start)
            runner.run_slice(values, runner.loss_outputs, start, count)
            total += float(loss[0]) * count
            right += int(correct[0])
        return Evaluation(total / examples, right, examples, answers=values[-1].size)

    # ------------------------------------------------------------------------------------------------------- variables

    @property
    def variables(self) -> Mapping[str, Variable]:
        return self._variables

    def get(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        self._live()
        return {name: self._value(name) for name in (self._variables if names is None else names)}

    def set(self, values: Mapping[str, npt.ArrayLike]) -> None:
        self._live()
        checked = {name: self._checked(name, value) for name, value in values.items()}
        for name, value in checked.items():
            if name in self._scaled:
                self._scaled[name].set(value)
            else:
                self._views[name][...] = value

    def delta(self, reference: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        self._live()
        checked = {name: self._checked(name, value) for name, value in reference.items()}
        return {
            name: np.subtract(self._live_value(name), value, dtype=np.float32, order="C")
            for name, value in checked.items()
        }

    def freeze(self, names: Iterable[str]) -> None:
        machine = self._live()
        index = {variable.name: position for position, variable in enumerate(self.artifact.variables)}
        frozen = []
        for name in names:
            self._live_value(name)
            if not self._variables[name].flags & VariableFlag.TRAINABLE:
                raise VariableError(f"{name!r} cannot be frozen: it is not trainable")
            frozen.append(index[name])
        machine.freeze(frozen)

    def reset(self, *, seed: int | None = None) -> None:
        machine = self._live()
        self._seed = self._seed if seed is None else _checked_seed(seed)
        machine.state[:] = np.frombuffer(self.artifact.state, np.uint8)
        machine.slots[:] = 0
        self._step = 0

    def reset_optimizer(self) -> None:
        slots = self._live().slots
        kept = [(w.residual_bytes, slots[w.residual_bytes].copy()) for w in self._scaled.values()]
        slots[:] = 0
        for span, residual in kept:  # they belong to the weights
            slots[span] = residual
        self._step = 0

    # ----------------------------------------------------------------------------------------------------- persistence

    def checkpoint(self) -> bytes:
        machine = self._live()
        return encode_checkpoint(
            Checkpoint(self._hash, self._step, self._seed, machine.state.tobytes(), machine.slots.tobytes())
        )

    def restore(self, checkpoint: bytes) -> None:
        machine = self._live()
        found = decode_checkpoint(checkpoint)
        if found.artifact_hash != self._hash:
            raise CheckpointError(
                "the checkpoint belongs to another artifact", expected=self._hash, got=found.artifact_hash
            )
        if len(found.state) != len(machine.state) or len(found.slots) != len(machine.slots):
            raise CheckpointError(
                "the checkpoint's sizes do not fit its artifact",
                expected=(len(machine.state), len(machine.slots)),
                got=(len(found.state), len(found.slots)),
            )
        machine.state[:] = np.frombuffer(found.state, np.uint8)
        machine.slots[:] = np.frombuffer(found.slots, np.uint8)
        self._step, self._seed = found.step, found.seed

    def close(self) -> None:
        if self._machine is None:
            return
        self._ready_prediction = self._ready_step = None
        self._programs.clear()
        self._views.clear()  # these two point into the machine's memory
        self._scaled = {}
        machine, self._machine = self._machine, None
        machine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------------------- details

    def _live(self) -> Machine:
        if self._machine is None:
            raise RuntimeFault("the session is closed", fix="Load the artifact again.")
        return self._machine

    def _prepared_step(self, inputs: Inputs, target: npt.ArrayLike) -> tuple[_Ready, tuple[Array, ...]]:
        """The checked and cast examples of a training step, and the run that takes them."""
        runner = self._runner("train")
        values, examples = runner.check_inputs((*runner.split(inputs), target))
        if examples > runner.max_batch:
            raise ExampleError(
                "too many examples for one training step",
                expected=f"at most {runner.max_batch}",
                got=examples,
                fix="Call train_step once per batch, or compile with a larger batch size.",
            )
        if self._ready_step is None or not self._ready_step.takes(tuple(values)):
            self._ready_step = runner.ready(self._live(), values, examples)
        return self._ready_step, tuple(values)

    def _runner(self, name: str) -> _Runner:
        self._live()
        runner = self._programs.get(name)
        if runner is None:
            raise ProgramError(
                f"the artifact has no program {name!r}",
                expected=f"one of {sorted(self._programs)}",
                fix="Compile the model with a loss to train and evaluate it." if name != "predict" else None,
            )
        return runner

    def _live_value(self, name: str) -> Array:
        """The variable ``name`` in the author's shape: a live view where it is stored as the author has it."""
        if name in self._scaled:
            return self._scaled[name].get()
        view = self._views.get(name)
        if view is None:
            raise VariableError(f"unknown variable {name!r}", expected=f"one of {list(self._variables)}")
        return view

    def _value(self, name: str) -> Array:
        value = self._live_value(name)
        return value if name in self._scaled else value.copy(order="C")

    def _checked(self, name: str, value: npt.ArrayLike) -> Array:
        """``value`` as an array that may be written to (or subtracted from) the variable ``name``."""
        if name not in self._variables:
            self._live_value(name)  # which says what there is
        variable = self._variables[name]
        array = np.asarray(value)
        if array.shape != variable.shape:
            raise VariableError(f"{name!r} has the wrong shape", expected=variable.shape, got=array.shape)
        if variable.dtype == DType.F32:
            if array.dtype.kind not in "fiu":
                raise VariableError(f"{name!r} has the wrong dtype", expected="float32", got=array.dtype)
            with np.errstate(over="ignore"):
                array = array.astype(_F32, copy=False)
            if not all_finite(array):
                raise VariableError(f"the new value of {name!r} is not finite")
            return array
        dtype = np.dtype(variable.dtype.numpy)
        if not np.can_cast(array.dtype, dtype, "safe"):
            raise VariableError(f"{name!r} has the wrong dtype", expected=dtype, got=array.dtype)
        return array


class _Runner:
    """One program, ready to run: its ports' shapes and the machine's entry, looked up once."""

    def __init__(self, index: int, program: Program, machine: Machine) -> None:
        self.index = index
        self.name = program.name
        self.max_batch = program.max_batch
        self.run: Callable[..., None] = machine.run
        self._ports = [InputPort.of(program, position) for position in range(len(program.inputs))]
        outputs = [program.tensors[port.tensor] for port in program.outputs]
        self._outputs = [(rows_per_example(t, program), t.dims, np.dtype(t.dtype.numpy)) for t in outputs]
        #: Reused by every evaluation: loss [1] float32 and correct [1] int32.
        self.loss_outputs = [np.zeros(t.dims, t.dtype.numpy) for t in outputs] if program.name != "predict" else []

    def split(self, inputs: Inputs) -> Sequence[Any]:
        """The model's inputs one by one: a program with several takes them as a tuple or list."""
        count = len(self._ports) - 1  # the last port is the target
        if count == 1 and not (isinstance(inputs, tuple) and len(inputs) == 1):
            return (inputs,)
        if not isinstance(inputs, tuple | list) or len(inputs) != count:
            raise ExampleError(
                f"program {self.name!r} takes {count} inputs", expected="a tuple of arrays", got=type(inputs).__name__
            )
        return inputs

    def check_inputs(self, values: Sequence[npt.ArrayLike]) -> tuple[list[Array], int]:
        """The checked inputs and how many examples they hold."""
        if len(values) != len(self._ports):
            names = [port.name for port in self._ports]
            raise ExampleError(f"program {self.name!r} takes {len(names)} inputs", expected=names, got=len(values))
        arrays = [port.check(value) for port, value in zip(self._ports, values, strict=True)]
        counts = {p.name: len(a) // p.rows for p, a in zip(self._ports, arrays, strict=True) if p.rows}
        if len(set(counts.values())) > 1:
            raise ExampleError("the inputs hold different numbers of examples", got=counts)
        return arrays, next(iter(counts.values()), self.max_batch)

    def ready(self, machine: Machine, inputs: Sequence[Array], examples: int) -> _Ready:
        """The short path for inputs like these, which fit one batch."""
        return _Ready(self.index, machine, inputs, self.fresh_outputs(examples), examples)

    def fresh_outputs(self, examples: int) -> list[Array]:
        return [np.zeros((rows * examples, *dims[1:]) if rows else dims, dtype) for rows, dims, dtype in self._outputs]

    def run_slice(self, inputs: Sequence[Array], outputs: Sequence[Array], start: int, count: int) -> None:
        """Runs examples ``start`` to ``start + count``; unbatched ports are passed whole."""
        self.run(
            self.index,
            count,
            [_part(a, p.rows, start, count) for p, a in zip(self._ports, inputs, strict=True)],
            [_part(a, rows, start, count) for (rows, _, _), a in zip(self._outputs, outputs, strict=True)],
        )


class _Ready:
    """A run made ready for inputs like the ones before: buffers for its outputs, and the call."""

    __slots__ = ("_inputs", "examples", "outputs", "run")

    def __init__(
        self, program: int, machine: Machine, inputs: Sequence[Array], outputs: list[Array], examples: int
    ) -> None:
        self._inputs = [(array.dtype, array.shape) for array in inputs]
        self.outputs = outputs
        self.examples = examples
        self.run = machine.prepare(program, examples, inputs, outputs)

    def takes(self, values: tuple[object, ...]) -> TypeGuard[tuple[Array, ...]]:
        """Whether ``values`` need no cast and no copy, and have the shapes of the ones before."""
        if len(values) != len(self._inputs):
            return False
        for value, (dtype, shape) in zip(values, self._inputs, strict=True):
            if type(value) is not np.ndarray or value.dtype is not dtype or value.shape != shape:
                return False
            if not value.flags.c_contiguous:
                return False
        return True


def _check_role(program: Program) -> None:
    """Whether the ports of ``predict``, ``evaluate`` and ``train`` are what their names promise (docs/artifact.md)."""
    if program.name not in ("predict", "evaluate", "train"):
        return
    inputs, outputs = ([program.tensors[port.tensor] for port in side] for side in (program.inputs, program.outputs))
    if program.name == "predict":
        fits = len(inputs) >= 1 and len(outputs) >= 1
        batched = [*inputs, *outputs]
    else:
        results = [(t.dtype, t.elements, t.batched) for t in outputs]
        fits = len(inputs) >= 2 and results == [(DType.F32, 1, False), (DType.I32, 1, False)]
        batched = inputs
    if not fits or (program.max_batch > 1 and not all(tensor.batched for tensor in batched)):
        raise ProgramError(f"the ports of program {program.name!r} are not those of its name")
    if program.name != "train" and any(OPS[op.name].updates for op in program.ops):
        raise ProgramError(f"program {program.name!r} would change the model")


def _explained(error: DivergedError, loss: float) -> DivergedError:
    """What a training step that diverged has left behind.

    Updates follow the loss, but not all of them follow the last gradient: each weight is updated once nothing needs
    its old value any more, while the gradients of the layers before it are still to come (docs/artifact.md).
    """
    if not math.isfinite(loss):
        return DivergedError(
            "the loss is not finite; nothing was changed",
            got=error.got,
            fix="Lower the learning rate, or look at the examples.",
        )
    return DivergedError(
        "a gradient or an updated weight is not finite; other layers may have been updated already",
        fix="Restore a checkpoint from before the step, or call reset(); then lower the learning rate.",
    )


def _part(array: Array, rows: int, start: int, count: int) -> Array:
    return array[start * rows : (start + count) * rows] if rows else array


def _view(variable: Variable, state: npt.NDArray[np.uint8]) -> Array:
    """The live variable in the author's layout."""
    size = math.prod(variable.dims) * variable.dtype.itemsize
    stored = state[variable.offset : variable.offset + size].view(variable.dtype.numpy).reshape(variable.dims)
    return stored.transpose(variable.perm)


def _checked_seed(seed: int) -> int:
    if not 0 <= seed <= _MAX_SEED:
        raise RuntimeFault("the seed is wrong", expected="an unsigned 64-bit integer", got=seed)
    return seed
