"""A whole cohort's secure sum in one process: the real machines of every device and of the coordinator, and all messages.

    result = run_cohort(10_000, vector_of, policy=policy, dropped={ServerStage.MASKED: late, ServerStage.COMMIT: gone})

Nothing of the protocol is left out or made up. Only, with :class:`evensong.secagg.SharedPrimitives`, what all members
would compute alike is computed once: an agreement is the same for both its ends, a signature that held still holds, and
one reading of the roster serves everybody. There is no network and no storage here; ``simulate`` has those.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.secagg import (
    AbortedError,
    DeviceMachine,
    Parameters,
    Policy,
    Primitives,
    ServerMachine,
    ServerStage,
    Session,
    SharedPrimitives,
    apply_masks,
    certificates,
)
from evensong.secagg.server import SENDING, Answer, DeviceMessage
from evensong.v1 import device_pb2, secagg_pb2
from evensong.wire.chunks import sha256
from evensong.wire.signing import device_id_of, public_key_of

Lanes = npt.NDArray[np.uint64]

_POPULATION = "simulation"
_NOW_UNIX_MS = 1_767_225_600_000
_DAY_MS = 86_400_000


@dataclass(frozen=True)
class CohortResult:
    """What the coordinator learns, and what became of the cohort."""

    total: Lanes  #: the sum of the survivors' vectors modulo 2^64
    survivors: tuple[int, ...]  #: their indices, ascending
    parameters: Parameters
    reached: Mapping[ServerStage, int]  #: how many devices completed each stage


def run_cohort(
    devices: int,
    vector_of: Callable[[int], Lanes],
    *,
    policy: Policy,
    dropped: Mapping[ServerStage, Collection[int]] | None = None,
    seed: int = 0,
    threads: int = 1,
) -> CohortResult:
    """One attempt at a secure sum over ``devices`` (indices from 0 on).

    ``vector_of(index)`` gives a device's vector, uint64 [lanes], which is masked in place. ``dropped`` tells who sends
    nothing from a stage on. Keys and all other randomness come from ``seed``; ``threads`` take the masks off.
    :class:`~evensong.secagg.AbortedError` if too few are left, :class:`~evensong.secagg.ParameterError` if the cohort
    gives no security.
    """
    return SecureCohort(devices, vector_of, policy=policy, seed=seed, threads=threads).run(dropped or {})


class SecureCohort:
    """What :func:`run_cohort` runs, with the two turns of the protocol as methods, so that a benchmark can watch them.

    ``primitives_of(index)`` gives a device's primitives, and with None the coordinator's; all share by default.
    """

    def __init__(
        self,
        devices: int,
        vector_of: Callable[[int], Lanes],
        *,
        policy: Policy,
        seed: int = 0,
        threads: int = 1,
        primitives_of: Callable[[int | None], Primitives] | None = None,
    ) -> None:
        self._random = random.Random(seed)
        self._vector_of = vector_of
        self._policy = policy
        self._threads = threads
        self._total: Lanes | None = None
        shared = SharedPrimitives()
        primitives_of = primitives_of or (lambda index: shared)
        authority, signer = self._new_key(), self._new_key()
        session = Session(
            bundle_sha256=sha256(b"bundle"),
            manifest_sha256=sha256(b"manifest"),
            task_id=self._random.randbytes(16).hex(),
            work=device_pb2.WORK_TRAIN,
            round=1,
            attempt=1,
            population=_POPULATION,
        )

        def machine(index: int) -> DeviceMachine:
            identity = self._new_key()
            return DeviceMachine(
                session,
                policy,
                identity=identity,
                certificate=certificates.issue(
                    authority,
                    public_key_of(identity),
                    _POPULATION,
                    _NOW_UNIX_MS + _DAY_MS,
                    self._random.randbytes(certificates.SERIAL_BYTES),
                ),
                authority_public_key=public_key_of(authority),
                coordinator_public_key=public_key_of(signer),
                draw=self._random.randbytes,
                primitives=primitives_of(index),
            )

        self.devices = [machine(index) for index in range(devices)]
        self.ids: list[str] = []  #: by index, known once a device advertised
        self.server = ServerMachine(
            session,
            policy,
            signer=signer,
            authority_public_key=public_key_of(authority),
            primitives=primitives_of(None),
        )

    def run(self, dropped: Mapping[ServerStage, Collection[int]]) -> CohortResult:
        """See :func:`run_cohort`. Once."""
        present = set(range(len(self.devices)))
        for stage in SENDING:
            present -= set(dropped.get(stage, ()))
            for index in sorted(present):
                self._turn(index, stage)
            if self.server.close() is ServerStage.ABORTED:
                raise AbortedError(f"the cohort's sum was given up: {self.server.reason}")
        return self._result()
