"""A session over any machine: everything that does not depend on which engine runs the program.

Inputs are checked here and cut into the program's batches; variables are read and written here, in the author's layout.
One prediction costs one or two microseconds on top of the engine: an input with the dtype and shape of the one before
takes a short path, where everything else is prepared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self

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
from evensong.mobile_runtime.session import Evaluation, Inputs, StepResult
from evensong.wire.program import OPS, Artifact, DType, Program, Variable, VariableFlag

_MAX_SEED = (1 << 64) - 1
_F32 = np.dtype(np.float32)
_MAX_FLOAT = float(np.finfo(np.float32).max)
_SMALL = 1 << 16  # bytes of an input that are copied faster than they are described to the engine anew


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
        self._variables = MappingProxyType({variable.name: variable for variable in artifact.variables})
        self._views = {v.name: _view(v, machine.state) for v in artifact.variables}  # author's layout, live
        self._step = 0
        self._seed = _checked_seed(seed)
        self._ready: _Ready | None = None  # the last prediction, should the next one have its shape

    # ------------------------------------------------------------------------------------------------- running programs

    def predict(self, *inputs: npt.ArrayLike) -> Array:
        ready = self._ready
        if len(inputs) == 1 and ready is not None:  # the short path: an array like the one before
            x = inputs[0]
            if type(x) is np.ndarray and x.dtype is _F32 and x.shape == ready.shape:
                np.copyto(ready.input, x)
                if math.isfinite(np.vdot(ready.input, ready.input)):
                    ready.run()
                    return ready.output.copy()
        runner = self._runner("predict")
        values, examples = runner.check_inputs(inputs)
        self._ready = runner.ready(self._live(), values, examples)
        outputs = runner.fresh_outputs(examples)
        for start in range(0, examples, runner.max_batch):
            runner.run_slice(values, outputs, start, min(runner.max_batch, examples - start))
        return outputs[0]

    def train_step(self, inputs: Inputs, target: npt.ArrayLike, *, learning_rate: float) -> StepResult:
        runner = self._runner("train")
        if not 0 <= learning_rate <= _MAX_FLOAT:
            raise ExampleError("the learning rate is wrong", expected="a finite number >= 0", got=learning_rate)
        values, examples = runner.check_inputs((*runner.split(inputs), target))
        if examples > runner.max_batch:
            raise ExampleError(
                "too many examples for one training step",
                expected=f"at most {runner.max_batch}",
                got=examples,
                fix="Call train_step once per batch, or compile with a larger batch size.",
            )
        loss, correct = runner.loss_outputs
        try:
            runner.run(
                runner.index,
                examples,
                values,
                runner.loss_outputs,
                learning_rate=learning_rate,
                step=self._step + 1,
                seed=self._seed,
            )
        except DivergedError as error:
            raise self._explained(error) from None
        self._step += 1
        return StepResult(float(loss[0]), int(correct[0]), examples)

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
        return {name: self._view(name).copy(order="C") for name in (self._variables if names is None else names)}

    def set(self, values: Mapping[str, npt.ArrayLike]) -> None:
        self._live()
        checked = {name: self._checked(name, value) for name, value in values.items()}
        for name, value in checked.items():
            self._views[name][...] = value

    def delta(self, reference: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
        self._live()
        checked = {name: self._checked(name, value) for name, value in reference.items()}
        return {
            name: np.subtract(self._views[name], value, dtype=np.float32, order="C") for name, value in checked.items()
        }

    def freeze(self, names: Iterable[str]) -> None:
        machine = self._live()
        index = {name: position for position, name in enumerate(self._variables)}
        frozen = []
        for name in names:
            self._view(name)
            if not self._variables[name].flags & VariableFlag.TRAINABLE:
                raise VariableError(f"{name!r} cannot be frozen: it is not trainable")
            frozen.append(index[name])
        machine.freeze(frozen)

    def reset(self, *, seed: int | None = None) -> None:
        machine = self._live()
        self._seed = self._seed if seed is None else _checked_seed(seed)
        machine.state[:] = np.frombuffer(self.artifact.state, np.uint8)
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        self._live().slots[:] = 0
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
        self._ready = None
        self._programs.clear()
        self._views.clear()  # they point into the machine's memory
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

    def _view(self, name: str) -> Array:
        view = self._views.get(name)
        if view is None:
            raise VariableError(f"unknown variable {name!r}", expected=f"one of {list(self._variables)}")
        return view

    def _checked(self, name: str, value: npt.ArrayLike) -> Array:
        """``value`` as an array that may be written to (or subtracted from) the variable ``name``."""
        view, variable = self._view(name), self._variables[name]
        array = np.asarray(value)
        if array.shape != view.shape:
            raise VariableError(f"{name!r} has the wrong shape", expected=view.shape, got=array.shape)
        if variable.dtype == DType.F32:
            if array.dtype.kind not in "fiu":
                raise VariableError(f"{name!r} has the wrong dtype", expected="float32", got=array.dtype)
            with np.errstate(over="ignore"):
                array = array.astype(_F32, copy=False)
            if not all_finite(array):
                raise VariableError(f"the new value of {name!r} is not finite")
            return array
        if not np.can_cast(array.dtype, view.dtype, "safe"):
            raise VariableError(f"{name!r} has the wrong dtype", expected=view.dtype, got=array.dtype)
        return array

    def _explained(self, error: DivergedError) -> DivergedError:
        """Engines stop before the first update, unless a finite gradient pushes a weight out of float32's range."""
        if all(np.isfinite(view).all() for view in self._views.values() if view.dtype == _F32):
            return DivergedError(
                "the loss or a gradient is not finite; nothing was changed",
                got=error.got,
                fix="Lower the learning rate, or look at the examples.",
            )
        return DivergedError(
            "a weight is not finite after its update",
            fix="Restore a checkpoint from before the step, and lower the learning rate.",
        )


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
        #: Reused by every training step and evaluation: loss [1] float32 and correct [1] int32.
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

    def ready(self, machine: Machine, inputs: Sequence[Array], examples: int) -> _Ready | None:
        """The short path for the same shape again; only for one small float32 input that fits one batch."""
        if len(inputs) != 1 or inputs[0].dtype != _F32 or inputs[0].nbytes > _SMALL or examples > self.max_batch:
            return None
        source, targets = np.empty_like(inputs[0]), self.fresh_outputs(examples)
        run = machine.prepare(self.index, examples, (source,), targets)
        return _Ready(source.shape, source, targets[0], run)

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


class _Ready(NamedTuple):
    """A prepared prediction: its own buffers, and the call that runs over them."""

    shape: tuple[int, ...]
    input: Array
    output: Array
    run: Callable[[], None]


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
