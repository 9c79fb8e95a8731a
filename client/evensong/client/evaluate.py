"""How good is a model on this device's own test examples? Sums leave the device, examples do not."""

from __future__ import annotations

from collections.abc import Callable

from evensong.client.errors import UnfitError
from evensong.client.examples import Examples
from evensong.client.train import model_inputs
from evensong.mobile_runtime.session import Evaluation, Session

_EXAMPLES_AT_ONCE = 256


def evaluate(session: Session, examples: Examples, *, between_batches: Callable[[], None] = lambda: None) -> Evaluation:
    """Mean loss and right answers over the split ``test``; UnfitError if it is empty."""
    count = correct = 0
    loss_sum = 0.0
    for batch in examples.batches(_EXAMPLES_AT_ONCE, split="test"):
        between_batches()
        result = session.evaluate(model_inputs(batch), batch.target)
        count, correct = count + result.examples, correct + result.correct
        loss_sum += result.loss * result.examples
    if not count:
        raise UnfitError("there are no test examples", fix='Add some: device.examples.add(x, y, split="test").')
    return Evaluation(loss_sum / count, correct, count)
