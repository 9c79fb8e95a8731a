"""The runtime's branch of the exception tree."""

from evensong.wire.errors import EvensongError


class RuntimeFault(EvensongError):  # noqa: N818 - RuntimeError is taken, and a fault is what an engine reports
    """Base of what can go wrong while an artifact is loaded or run."""


class ProgramError(RuntimeFault):
    """The artifact is well formed but an operation's operands do not fit it: refused before anything runs."""


class ExampleError(RuntimeFault):
    """Examples or labels have the wrong shape, dtype or range."""


class DivergedError(RuntimeFault):
    """The loss, a gradient or a weight became NaN or infinite.

    A loss stops the step before anything has changed. A gradient or a weight that left float32's range may show only
    after other weights were updated: the message then says that a checkpoint has to be restored.
    """


class VariableError(RuntimeFault):
    """A variable is unknown, or its new value has the wrong shape or dtype or is not finite."""


class CheckpointError(RuntimeFault):
    """A checkpoint is damaged or belongs to another artifact."""


class CompileError(EvensongError):
    """The model cannot be compiled."""


class UnsupportedOperation(CompileError):  # noqa: N818 - says what it is
    """The model uses an operation that the runtime does not have; ``what`` names it and its place in the model."""


class BudgetError(CompileError):
    """The memory budget cannot be met; ``table`` lists what takes the memory."""

    table: str = ""
