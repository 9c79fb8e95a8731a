"""Secure sums: against Flower's SecAgg+, at a thousand and at ten thousand devices, and how near the keystream's limit.

Real cryptography, and every sum that comes out is compared with the plain one. CPU seconds count, all threads together;
only where two cores share the masks' removal (``round_1000/server_seconds_*``) and in ``round_10000_seconds`` it is the
wall clock. In the cohorts the coordinator and the measured devices compute everything by themselves; the other devices
share what they would compute alike.
"""

from __future__ import annotations

import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CTR

from benchmarks.harness import Row, in_turns, wanted
from evensong.secagg import Policy, Primitives, ServerStage, SharedPrimitives, apply_masks
from evensong.secagg.server import Answer, DeviceMessage
from evensong.secagg.vector import VectorPlan
from evensong.simulations.secure_cohort import CohortResult, SecureCohort, Upload, run_cohort

PARAMETERS = 1_000_000
CORRUPTED = 0.05
DROPOUT = 0.3  # 1,000 devices then have degree 66 and threshold 23
DROPOUT_OF_TEN_THOUSAND = 0.15  # a little more than really drop out: degree 50
CORES = 2
KINDS = 8  # of different vectors in a cohort

Lanes = npt.NDArray[np.uint64]


def run(only: str) -> Iterator[Row]:
    """Rows ``mask_expansion/limit``, ``*_cpu/flower_*``, ``round_1000/*``, ``round_10000_*``,
    ``upload_bytes_a_parameter/*`` and ``protocol_bytes/*``."""
    if wanted("mask_expansion/limit", only):
        yield Row("mask_expansion/limit", *_mask_expansion(), "GB/s", "higher")
    for bits, cohort in ((8, 250), (6, 1000)):
        if wanted(name := f"upload_bytes_a_parameter/{bits}_bits_{cohort}_devices", only):
            plan = VectorPlan(size=PARAMETERS, bits=bits, max_cohort=cohort)
            yield Row(name, plan.nbytes / PARAMETERS, None, "B", "lower")
    yield from _a_thousand(only)
    yield from _ten_thousand(only)
    yield from _against_flower(only)


# --------------------------------------------------------------------------------------------------------- keystreams


def _mask_expansion() -> tuple[float, float]:
    """GB/s of one thread: 67 masks over a vector of a million fields, and the loop that nothing can be faster than."""
    masks = [(os.urandom(16), 1 - 2 * (number % 2)) for number in range(67)]
    lanes = np.zeros(PARAMETERS // 4, np.uint64)
    keystream, total = np.zeros((2, 1 << 14), np.uint64)  # 128 KiB each: of the powers of two the fastest
    buffer, zeros = keystream.view(np.uint8).data, bytes(keystream.nbytes)
    context = Cipher(AES128(os.urandom(16)), CTR(bytes(16))).encryptor()
    pieces = len(masks) * lanes.nbytes // keystream.nbytes

    def limit() -> None:
        for _ in range(pieces):
            context.update_into(zeros, buffer)
            np.add(total, keystream, out=total)

    ours_seconds, limit_seconds = in_turns(lambda: apply_masks(lanes, masks), limit)
    return len(masks) * lanes.nbytes / ours_seconds / 1e9, pieces * keystream.nbytes / limit_seconds / 1e9


# ------------------------------------------------------------------------------------------------------------- cohorts


def _a_thousand(only: str) -> Iterator[Row]:
    """1,000 devices with a million 16-bit fields each; 30 % or 10 % drop out after they shared their secrets."""
    devices = 1_000
    for percent in (30, 10):
        names = [f"round_1000/{what}_{percent}_dropped" for what in ("server_seconds", "server_cpu_seconds")]
        if percent == 30:
            names += [f"round_1000/device_cpu_seconds_{when}" for when in ("first_round", "later_rounds")]
            names += ["round_1000/device_mb_beyond_the_vector"]
            names += [f"protocol_bytes/{what}" for what in ("shares", "sent", "received")]
        if not any(wanted(name, only) for name in names):
            continue
        vectors = RandomFields(PARAMETERS // 4)
        cohort = MeasuredCohort(devices, vectors, measured=range(500, 506), traced=500)
        result = cohort.play({ServerStage.MASKED: range(devices * percent // 100)})
        vectors.check(result)
        assert (result.parameters.degree, result.parameters.threshold) == (66, 23)
        values = (
            (cohort.server_seconds - cohort.seconds_saved_by_cores, "s"),
            (cohort.server_seconds, "s"),
            (cohort.device_seconds(knowing=False), "s"),
            (cohort.device_seconds(knowing=True), "s"),
            (cohort.traced_bytes / 1e6, "MB"),
            (cohort.sizes["SecureShares"], "B"),
            (sum(cohort.sizes[f"Secure{what}"] for what in ("Advertise", "Shares", "Masked", "Commit", "Unmask")), "B"),
            (sum(cohort.sizes[f"Secure{what}"] for what in ("Roster", "Delivery", "Survivors", "Quorum")), "B"),
        )
        for name, (value, unit) in zip(names, values, strict=False):
            if wanted(name, only):
                yield Row(name, value, None, unit, "lower")


def _ten_thousand(only: str) -> Iterator[Row]:
    """One process, with the keys and certificates of all devices; some drop out in every stage."""
    names = ("round_10000_seconds", "round_10000_cpu_seconds")
    if not any(wanted(name, only) for name in names):
        return
    devices = 10_000
    vectors = RandomFields(lanes=16)
    began = time.perf_counter(), time.process_time()
    result = run_cohort(
        devices,
        vectors,
        policy=Policy(CORRUPTED, DROPOUT_OF_TEN_THOUSAND, min_survivors=devices // 2, max_cohort=devices),
        dropped={
            ServerStage.SHARES: range(100),
            ServerStage.MASKED: range(1_000),
            ServerStage.COMMIT: range(1_100),
            ServerStage.UNMASK: range(1_200),
        },
    )
    seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    vectors.check(result)
    for name, value in zip(names, seconds, strict=True):
        if wanted(name, only):
            yield Row(name, value, None, "s", "lower")


def _against_flower(only: str) -> Iterator[Row]:
    """64 devices with a million parameters each, none drops. Turning updates into fields and back counts on both sides:
    it is part of Flower's SecAgg+."""
    names = ("server_cpu/flower_11_shares", "client_cpu/flower_11_shares", "server_cpu/flower_all_neighbours")
    if not any(wanted(name, only) for name in names):
        return
    from benchmarks.secagg_flower import flower_round  # needs flwr, and takes a second

    devices = 64
    vectors = Updates(VectorPlan(size=PARAMETERS, bits=8, max_cohort=devices, private=True))
    cohort = MeasuredCohort(devices, vectors, measured=range(10, 15))
    result = cohort.play({})
    began = time.process_time()
    update = vectors.decode(result)
    server_seconds = cohort.server_seconds + time.process_time() - began
    vectors.check(update, result)
    if wanted(names[0], only) or wanted(names[1], only):
        flower = flower_round(devices, PARAMETERS, 11)
        yield Row(names[0], server_seconds, flower.server_seconds, "s", "lower")
        yield Row(names[1], cohort.device_seconds(knowing=False), flower.client_seconds, "s", "lower")
    if wanted(names[2], only):
        yield Row(names[2], server_seconds, flower_round(devices, PARAMETERS, 1.0).server_seconds, "s", "lower")


class MeasuredCohort(SecureCohort):
    """Counts what the coordinator and the ``measured`` devices do; of one of these, ``traced``, the memory instead."""

    def __init__(
        self,
        devices: int,
        vectors: Callable[[int], Lanes],
        *,
        measured: Collection[int],
        traced: int | None = None,
    ) -> None:
        # Every other measured device knows the others' certificates from an earlier round, as the coordinator does.
        shared, known = SharedPrimitives(), Primitives()
        own = {index: known if place % 2 else Primitives() for place, index in enumerate(measured)}
        super().__init__(
            devices,
            vectors,
            policy=Policy(CORRUPTED, DROPOUT, min_survivors=devices // 2, max_cohort=devices),
            primitives_of=lambda index: known if index is None else own.get(index, shared),
        )
        self._knowing = {index for index, primitives in own.items() if primitives is known}
        self.server_seconds = 0.0  #: of CPU; uploads are hashed as they come in, secure or not, and not here
        self.seconds_saved_by_cores = 0.0
        self.traced_bytes = 0  #: at the worst moment, without the vector
        self.sizes: dict[str, int] = {}  #: of a measured device's messages, in bytes, by name
        self._measured = {index: 0.0 for index in measured if index != traced}
        self._traced = traced
        self._kept_bytes = 0
        self._not_server = 0.0

    def play(self, dropped: Mapping[ServerStage, Collection[int]]) -> CohortResult:
        began = time.process_time()
        result = self.run(dropped)
        self.server_seconds = time.process_time() - began - self._not_server
        return result

    def device_seconds(self, *, knowing: bool) -> float:
        """Of CPU in all stages: the median of the measured devices that know the others' certificates, or do not."""
        return statistics.median(
            seconds for index, seconds in self._measured.items() if (index in self._knowing) == knowing
        )

    def device_turn(self, index: int, answer: Answer | None) -> tuple[DeviceMessage, Upload | None]:
        began = time.process_time()
        turn = self._traced_turn if index == self._traced else super().device_turn
        message, upload = turn(index, answer)
        seconds = time.process_time() - began
        self._not_server += seconds
        if index in self._measured:
            self._measured[index] += seconds
            for part in (message, answer):
                if part is not None:
                    self.sizes[type(part).__name__] = part.ByteSize()
        return message, upload

    def _traced_turn(self, index: int, answer: Answer | None) -> tuple[DeviceMessage, Upload | None]:
        """What Python and NumPy allocate, and three times the message: it arrives as bytes and is parsed."""
        arrived = 0 if answer is None else 3 * answer.ByteSize()
        tracemalloc.start()
        message, upload = super().device_turn(index, answer)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        of_vector = upload.lanes.nbytes if upload else 0
        self.traced_bytes = max(self.traced_bytes, self._kept_bytes + arrived + peak - of_vector)
        self._kept_bytes += kept - of_vector
        return message, upload

    def unmask(self, total: Lanes) -> None:
        masks = self.server.unmasking().masks
        cpu, wall = time.process_time(), time.perf_counter()
        apply_masks(total, masks, CORES)
        self.seconds_saved_by_cores = (time.process_time() - cpu) - (time.perf_counter() - wall)


# ------------------------------------------------------------------------------------------------------------- vectors


class RandomFields:
    """Vectors of random lanes."""

    def __init__(self, lanes: int) -> None:
        self._lanes = np.random.default_rng(0).integers(0, 1 << 64, (KINDS, lanes), dtype=np.uint64)

    def __call__(self, index: int) -> Lanes:
        lanes: Lanes = self._lanes[index % KINDS]
        return lanes.copy()

    def check(self, result: CohortResult) -> None:
        """Raises unless the sum is that of the survivors' vectors."""
        counts = np.bincount(np.array(result.survivors) % KINDS, minlength=KINDS).astype(np.uint64)
        if not (result.total == (self._lanes * counts[:, None]).sum(axis=0, dtype=np.uint64)).all():
            raise RuntimeError("the secure sum is not the sum")


class Updates:
    """Vectors made from updates, as a device makes them."""

    CLIP_NORM = 200.0  # twice what they have
    SEED = bytes(16)

    def __init__(self, plan: VectorPlan) -> None:
        self._plan = plan
        self._updates = np.random.default_rng(0).normal(0.0, 0.1, (KINDS, plan.size)).astype(np.float32)

    def __call__(self, index: int) -> Lanes:
        keystream = Cipher(AES128(os.urandom(16)), CTR(bytes(16))).encryptor()
        lanes, _ = self._plan.encode(
            self._updates[index % KINDS],
            clip_norm=self.CLIP_NORM,
            seed=self.SEED,
            weight=1,
            metrics=None,
            words=lambda count: np.frombuffer(keystream.update(bytes(4 * count)), np.uint32),
        )
        return lanes

    def decode(self, result: CohortResult) -> npt.NDArray[np.float64]:
        """The sum of the survivors' updates."""
        devices = len(result.survivors)
        return self._plan.decode(result.total, devices, clip_norm=self.CLIP_NORM, seed=self.SEED).update

    def check(self, update: npt.NDArray[np.float64], result: CohortResult) -> None:
        """Raises unless ``update`` is the sum, up to rounding."""
        plain = np.bincount(np.array(result.survivors) % KINDS, minlength=KINDS) @ self._updates
        rounding = self._plan.step(self.CLIP_NORM) / 2 * (len(result.survivors) * self._plan.size) ** 0.5
        if np.linalg.norm(update - plain) > rounding:
            raise RuntimeError("the secure sum is not the sum")
