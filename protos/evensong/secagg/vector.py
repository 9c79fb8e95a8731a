"""The vector of a secure sum: an update and its metrics as unsigned fields, and their sum back to numbers.

``docs/secagg.md`` ("The vector") is the format. The device clips, weighs, rotates, rounds at random to a grid that all
devices share, and packs; sums of fields are exact integers, so the only errors are those made here. With ``C`` the clip
norm, ``d`` the parameters, ``A = 2^(b-1) - 1`` and step ``s = r_b C / (A sqrt(d))``, a device's vector is off by

- *rounding*: unbiased, in a rotated coordinate less than ``s``, with variance at most ``s^2 / 4``. So the sum of ``n``
  devices is off by less than ``n s`` in each, and by at most ``n d s^2 / 4 = n (r_b C / 2A)^2`` in expected squared L2
  norm;
- *clamping*: what exceeds ``r_b C / sqrt(d)`` in a rotated coordinate is taken off. It is the only bias.

A rotated vector of norm C has coordinates that are about Gaussian of standard deviation ``C / sqrt(d)``; or, at worst,
``sqrt(2) C / sqrt(d)`` in half of them and nothing in the others, if its energy lay in one window of the rotation
(:mod:`evensong.wire.rotation`). :data:`RANGE` minimises, for the worse of the two, the expected squared error of the
mean of ten devices whose clamping errors all agree, ``rounding / 10 + clamping``. Relative to C^2, a device's rounding
and clamping then come to 0.7 and 0.009 at 2 bits, 0.044 and 4e-5 at 4 bits, 3e-4 and below 1e-8 at 8 bits.

With weights, a device's ``x w / W`` is what is rounded: the error stays, relative to W. So W should be near the weights
that devices have; a W of a hundred times that buries an 8-bit update in rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evensong.secagg.errors import ParameterError, ProtocolError
from evensong.secagg.noise import DISTRIBUTED, local_sigma, noise_bound
from evensong.secagg.packing import Fields, Lanes, width_for
from evensong.v1 import common_pb2, device_pb2, task_pb2
from evensong.wire.codecs import MAX_MAGNITUDE, RandomWords
from evensong.wire.errors import UpdateError
from evensong.wire.rotation import inner_product, rotate, unrotate
from evensong.wire.tensors import FloatArray, layout_from_proto, layout_size

#: r_b by bits: how far the grid reaches, in units of C / sqrt(d).
RANGE = {
    2: 2.1, 3: 3.0, 4: 3.6, 5: 4.1, 6: 4.5, 7: 5.0, 8: 5.4, 9: 5.8,
    10: 6.1, 11: 6.5, 12: 6.9, 13: 7.2, 14: 7.5, 15: 7.8, 16: 8.1,
}  # fmt: skip

#: Of the loss in the vector: it travels as a whole number of these.
LOSS_UNIT = 2.0**-12

MAX_WEIGHT = (1 << 31) - 1

#: ``noise(n)`` gives the next ``n`` integers of noise, int64, in grid steps.
Noise = Callable[[int], npt.NDArray[np.int64]]

_PIECE = 120 * 546  # values worked on at once: in the cache, and whole lanes at every width
_ROUNDINGS = 200  # tries at conditional rounding; each succeeds with probability above 0.39
_MIN_CLIP = 1e-30
_METRIC_BITS = {"examples": 32, "correct": 32, "loss": 48}


@dataclass(frozen=True)
class VectorSum:
    """What a cohort's vectors come to. ``update`` is the sum over devices of weight times clipped delta, float64 [d];
    ``within`` counts devices whose norm was at most the clip norm."""

    update: npt.NDArray[np.float64]
    total_weight: int
    devices: int
    within: int
    metrics: common_pb2.Metrics | None


@dataclass(frozen=True)
class VectorPlan:
    """How a task's vectors are made: the same on every device and the coordinator.

    ``size``: parameters, 0 for an evaluation. ``bits``: 2 to 16. ``max_cohort``: devices in a sum at most.
    ``max_weight``: W, 1 where every update weighs the same. ``private``: no metrics travel. ``noise_bound``: the
    largest magnitude of a device's integer noise.
    """

    size: int
    bits: int
    max_cohort: int
    max_weight: int = 1
    private: bool = False
    noise_bound: int = 0

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("size", self.size, 0, 1 << 40),
            ("bits", self.bits, min(RANGE), max(RANGE)),
            ("max_cohort", self.max_cohort, 1, 1 << 24),
            ("max_weight", self.max_weight, 1, MAX_WEIGHT),
            ("noise_bound", self.noise_bound, 0, 1 << 31),
        ):
            if not least <= value <= most:
                raise ParameterError(f"{name} of a vector is out of range", expected=f"{least} to {most}", got=value)
        width_for(self.max_cohort * 2 * self.bound)  # or no field holds the sum

    @classmethod
    def from_bundle(cls, bundle: task_pb2.TaskBundle, work: device_pb2.Work) -> VectorPlan:
        """The vectors of a task with a SecurePlan; :class:`ParameterError` if its bundle allows none.

        Fields have room for the noise of devices if the privacy plan asks for it.
        """
        update = bundle.update
        if update.codec != task_pb2.CODEC_FIELDS or not bundle.HasField("secure"):
            raise ParameterError("the task has no secure sums", expected="CODEC_FIELDS and a secure plan")
        weight = update.max_weight if update.weighting == task_pb2.WEIGHTING_EXAMPLES else 1.0
        if not (1 <= weight <= MAX_WEIGHT and weight == int(weight)):
            raise ParameterError(
                "the largest weight cannot be summed in secret", expected=f"a whole number to {MAX_WEIGHT}", got=weight
            )
        plan = cls(
            size=0 if work == device_pb2.WORK_EVALUATE else layout_size(layout_from_proto(bundle.layout)),
            bits=update.bits,
            max_cohort=bundle.secure.max_cohort,
            max_weight=int(weight),
            private=bundle.HasField("privacy"),
        )
        if not plan.size or bundle.privacy.mechanism not in DISTRIBUTED:
            return plan
        # The noise is relative to the clip norm, as the step is. One more, for what rounds differently at another norm.
        return replace(plan, noise_bound=noise_bound(local_sigma(bundle, 1.0, plan.step(1.0))) + 1)

    @property
    def largest(self) -> int:
        """A, the largest magnitude of a rounded coordinate."""
        return (1 << self.bits - 1) - 1

    @property
    def bound(self) -> int:
        """Of a coordinate with its noise; also what is added, so that fields are not negative."""
        return self.largest + self.noise_bound

    @cached_property
    def fields(self) -> Fields:
        width = width_for(self.max_cohort * 2 * self.bound)
        return Fields(self.size + sum(limbs for _, _, limbs in self._slots(width)), width)

    @property
    def nbytes(self) -> int:
        return self.fields.nbytes

    def step(self, clip_norm: float) -> float:
        """Between two points of the grid, in the update's unit."""
        if not _MIN_CLIP <= clip_norm <= MAX_MAGNITUDE:
            raise UpdateError(
                "a secure sum needs a clip norm", expected=f"{_MIN_CLIP:g} to {MAX_MAGNITUDE:g}", got=clip_norm
            )
        return RANGE[self.bits] * clip_norm / (self.largest * math.sqrt(max(1, self.size)))

    # --------------------------------------------------------------------------------------------------------- encoding

    def encode(
        self,
        delta: FloatArray,
        *,
        clip_norm: float,
        seed: bytes,
        weight: float,
        metrics: common_pb2.Metrics | None,
        words: RandomWords,
        noise: Noise | None = None,
        norm_bound: float | None = None,
    ) -> tuple[Lanes, float]:
        """The device's lanes, uint64 [``fields.lanes``], and the L2 norm of ``delta`` before clipping.

        ``delta``: float32 [``size``], not clipped. ``seed``: of the rotation. ``weight``: a whole number from 1 to
        ``max_weight``. ``metrics``: None exactly if the plan is private. ``words`` should be cryptographic: parameter
        ``i`` takes word ``i``, rounding to ``floor(x / step + word * 2^-32)``. ``noise`` is added after rounding.
        ``norm_bound`` repeats the rounding, with new words, until the rounded vector's L2 norm is at most that, in the
        update's unit and before noise (:func:`conditional_norm_bound`). Beyond ``delta`` and the lanes all this takes
        4 bytes a parameter and some cache.

        Raises :class:`UpdateError` for a delta, weight or metrics that are not finite or out of range.
        """
        if delta.shape != (self.size,) or delta.dtype != np.float32:
            raise UpdateError(
                "a delta does not fit the vector", expected=f"float32 [{self.size}]", got=f"{delta.dtype} {delta.shape}"
            )
        if not 1 <= weight <= self.max_weight or weight != int(weight):
            raise UpdateError(
                "a weight is out of range", expected=f"a whole number from 1 to {self.max_weight}", got=weight
            )
        step, norm = self.step(clip_norm), _norm(delta)
        scale = weight / self.max_weight / step
        if norm > clip_norm:
            scale *= clip_norm / norm * (1 - 2.0**-20)  # as in clip_to_norm: what float32 rounds stays below
        slots = self._encode_slots(int(weight), norm <= clip_norm, metrics)
        rotated = rotate(delta, seed)
        square_bound = math.inf if norm_bound is None else (norm_bound / step) ** 2
        for _ in range(_ROUNDINGS):
            lanes, square = self._round(rotated, scale, slots, words, noise)
            if square <= square_bound:
                return lanes, norm
        raise UpdateError("rounding never stayed below its norm bound", expected=norm_bound, fix="Check the bound.")

    def _round(
        self,
        rotated: FloatArray,
        scale: float,
        slots: npt.NDArray[np.uint64],
        words: RandomWords,
        noise: Noise | None,
    ) -> tuple[Lanes, int]:
        """Rounded, noised and packed, with the squared L2 norm between rounding and noise."""
        fields = self.fields
        lanes = np.empty(fields.lanes, np.uint64)
        square = first_lane = 0
        places, uniform = np.empty(_PIECE), np.empty(_PIECE)
        for start in range(0, max(1, self.size), _PIECE):
            part = rotated[start : start + _PIECE]
            place, word = places[: part.size], uniform[: part.size]
            np.multiply(part, scale, out=place, dtype=np.float64)
            np.multiply(words(part.size), 2.0**-32, out=word, dtype=np.float64)
            place += word
            np.floor(place, out=place)
            np.clip(place, -self.largest, self.largest, out=place)
            square += int(inner_product(place, place))  # exact: at most 2^16 squares below 2^30
            if noise is not None:
                place += self._checked_noise(noise(part.size), part.size)
            place += self.bound
            values = place.astype(np.uint32)
            if start + _PIECE >= self.size:
                values = np.concatenate([values, slots.astype(np.uint32)])
            packed = Fields(values.size, fields.width).pack(values)
            lanes[first_lane : first_lane + packed.size] = packed
            first_lane += packed.size
        return lanes, square

    def _checked_noise(self, noise: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        if noise.shape != (count,) or (noise.size and int(np.abs(noise).max()) > self.noise_bound):
            raise UpdateError("noise is out of range", expected=f"[{count}], magnitudes up to {self.noise_bound}")
        return noise

    # --------------------------------------------------------------------------------------------------------- decoding

    def decode(self, lanes: Lanes, survivors: int, *, clip_norm: float, seed: bytes) -> VectorSum:
        """The unmasked sum of ``survivors`` devices' lanes, modulo 2^64, as numbers.

        Raises :class:`ProtocolError` if the fields cannot be such a sum: then the unmasking was wrong, or a device lied
        about its fields.
        """
        if not 1 <= survivors <= self.max_cohort:
            raise ProtocolError(
                "a sum has an impossible number of devices", expected=f"1 to {self.max_cohort}", got=survivors
            )
        step = self.step(clip_norm)
        values = self.fields.unpack(lanes)
        slots = self._decode_slots(values[self.size :])
        self._check_slots(slots, survivors)
        if self.size and int(values[: self.size].max()) > survivors * 2 * self.bound:
            raise ProtocolError("a field of a sum is too large", expected=f"at most {survivors * 2 * self.bound}")
        update = values[: self.size].astype(np.float64)
        update -= survivors * self.bound
        update *= step * self.max_weight
        metrics = None
        if not self.private:
            metrics = common_pb2.Metrics(
                examples=slots["examples"], correct=slots["correct"], loss_sum=slots["loss"] * LOSS_UNIT
            )
        return VectorSum(unrotate(update, seed), slots["weight"], survivors, slots["within"], metrics)

    def _check_slots(self, slots: dict[str, int], survivors: int) -> None:
        if slots["count"] != survivors:
            raise ProtocolError(
                "the count in a sum is not that of its survivors", expected=survivors, got=slots["count"]
            )
        for name, least, most in (("within", 0, survivors), ("weight", survivors, survivors * self.max_weight)):
            if not least <= slots[name] <= most:
                raise ProtocolError(f"{name} of a sum is out of range", expected=f"{least} to {most}", got=slots[name])
        if not self.private and slots["correct"] > slots["examples"]:
            raise ProtocolError("a sum has more correct than examples")

    # ------------------------------------------------------------------------------------------------------------ slots

    def _slots(self, width: int) -> list[tuple[str, int, int]]:
        """Name, bits of one device's value, and limbs of every slot, in order."""
        bits = {"count": 1, "within": 1, "weight": self.max_weight.bit_length()}
        if not self.private:
            bits |= _METRIC_BITS
        limb = self._limb_bits(width)
        return [(name, count, -(-count // limb)) for name, count in bits.items()]

    def _limb_bits(self, width: int) -> int:
        """What a device may use of a field: the rest is for the sum's carries."""
        return width - (self.max_cohort - 1).bit_length()

    def _encode_slots(self, weight: int, within: bool, metrics: common_pb2.Metrics | None) -> npt.NDArray[np.uint64]:
        if (metrics is None) != self.private:
            raise UpdateError("metrics do not fit the plan", expected="none" if self.private else "some")
        # Where devices add noise, no exact count of what they learned leaves them.
        values = {"count": 1, "within": int(within and not self.noise_bound), "weight": weight}
        if metrics is not None:
            loss = metrics.loss_sum / LOSS_UNIT
            if not math.isfinite(loss):
                raise UpdateError("a loss is not finite", fix="Train with a smaller learning rate.")
            values |= {"examples": metrics.examples, "correct": metrics.correct, "loss": round(loss)}
        width = self.fields.width
        limb = self._limb_bits(width)
        limbs: list[int] = []
        for name, bits, count in self._slots(width):
            if not 0 <= values[name] < 1 << bits:
                raise UpdateError(f"{name} is out of range", expected=f"at most {bits} bits", got=values[name])
            limbs += [values[name] >> index * limb & (1 << limb) - 1 for index in range(count)]
        return np.array(limbs, np.uint64)

    def _decode_slots(self, sums: npt.NDArray[np.uint64]) -> dict[str, int]:
        """Each slot's sum: of its limbs, the lowest first, every one a sum itself."""
        width = self.fields.width
        limb = self._limb_bits(width)
        values: dict[str, int] = {}
        start = 0
        for name, _, count in self._slots(width):
            values[name] = sum(int(part) << index * limb for index, part in enumerate(sums[start : start + count]))
            start += count
        return values


def conditional_norm_bound(clip_norm: float, step: float, size: int) -> float:
    """The sensitivity after conditional rounding: the L2 norm that a vector of norm ``clip_norm``, rounded to multiples
    of ``step``, keeps below in each try with probability at least ``1 - e^(-1/2)``.

    Kairouz, Liu & Steinke, *The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation*
    (ICML 2021), with beta = e^(-1/2).
    """
    beta_term = math.sqrt(2 * 0.5)  # sqrt(2 log(1 / beta))
    likely = clip_norm**2 + step**2 * size / 4 + beta_term * step * (clip_norm + step * math.sqrt(size) / 2)
    certain = (clip_norm + step * math.sqrt(size)) ** 2
    return math.sqrt(min(likely, certain))


def _norm(delta: FloatArray) -> float:
    """The L2 norm in float64; :class:`UpdateError` unless it is finite and can be rotated in float32."""
    square = inner_product(delta, delta)
    norm = math.sqrt(square) if math.isfinite(square) else square
    if not norm <= MAX_MAGNITUDE:
        raise UpdateError(
            "the update is not finite, or too large to rotate",
            expected=f"an L2 norm up to {MAX_MAGNITUDE:g}",
            fix="Train with a smaller learning rate.",
        )
    return norm
