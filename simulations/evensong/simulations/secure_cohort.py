"""A whole cohort's secure sum in one process: the real machines of all devices and the coordinator, and all messages.

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

_NOW_UNIX_MS = 1_767_225_600_000
_DAY_MS = 86_400_000


@dataclass(frozen=True)
class CohortResult:
    """What the coordinator learns, and what became of the cohort."""

    total: Lanes  #: the sum of the survivors' vectors modulo 2^64
    survivors: tuple[int, ...]  #: their indices, ascending
    parameters: Parameters
    reached: Mapping[ServerStage, int]  #: how many devices completed each stage


@dataclass(frozen=True)
class Upload:
    """A masked vector, and the hash that coordinators check uploads against."""

    lanes: Lanes
    sha256: bytes


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
    """What :func:`run_cohort` runs, with a device's turn and the unmasking as methods: a benchmark can watch them.

    ``primitives_of(index)`` gives the primitives of a device, or with None of the coordinator; all share by default.
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
        shared = SharedPrimitives()
        self.random = random.Random(seed)
        self.policy = policy
        self.threads = threads
        self.vector_of = vector_of
        self.primitives_of = primitives_of or (lambda _: shared)
        self.authority, self.signer = self._new_key(), self._new_key()
        self.session = Session(
            bundle_sha256=sha256(b"bundle"),
            manifest_sha256=sha256(b"manifest"),
            task_id=self.random.randbytes(16).hex(),
            work=device_pb2.WORK_TRAIN,
            round=1,
            attempt=1,
            population="simulation",
        )
        self.devices: list[DeviceMachine] = []
        self.ids: list[str] = []
        for index in range(devices):
            identity = self._new_key()
            self.ids.append(device_id_of(public_key_of(identity)))
            self.devices.append(self._new_device(index, identity))
        self.server = ServerMachine(
            self.session,
            policy,
            signer=self.signer,
            authority_public_key=public_key_of(self.authority),
            primitives=self.primitives_of(None),
        )
        self._total: Lanes | None = None

    def run(self, dropped: Mapping[ServerStage, Collection[int]]) -> CohortResult:
        """See :func:`run_cohort`. Once."""
        present = set(range(len(self.devices)))
        for stage in SENDING:
            present -= set(dropped.get(stage, ()))
            for index in sorted(present):
                self._exchange(index, stage)
            if self.server.close() is ServerStage.ABORTED:
                raise AbortedError("the cohort has no sum", got=self.server.reason)
        total, parameters = self._total, self.server.parameters
        assert total is not None and parameters is not None
        self.unmask(total)
        server, index_of = self.server, {device_id: index for index, device_id in enumerate(self.ids)}
        senders = (server.members, server.sharers, server.survivors, server.signers, server.revealers)
        return CohortResult(
            total,
            tuple(sorted(index_of[device_id] for device_id in server.survivors)),
            parameters,
            dict(zip(SENDING, map(len, senders), strict=True)),
        )

    def _exchange(self, index: int, stage: ServerStage) -> None:
        """The device gets the answer to its last message and sends the next."""
        device_id = self.ids[index]
        answer = None
        if stage is not ServerStage.ADVERTISE:
            answer = self.server.answer(device_id, SENDING[SENDING.index(stage) - 1])
        message, upload = self.device_turn(index, answer)
        digest = upload.sha256 if upload else None
        self.server.receive(device_id, message, vector_sha256=digest, now_unix_ms=_NOW_UNIX_MS)
        if upload:
            self._total = upload.lanes if self._total is None else np.add(self._total, upload.lanes, out=self._total)

    def device_turn(self, index: int, answer: Answer | None) -> tuple[DeviceMessage, Upload | None]:
        """What a device does with an answer, None at first: its message, and what it uploaded before that message."""
        device = self.devices[index]
        if answer is None:
            return device.advertise(), None
        if isinstance(answer, secagg_pb2.SecureRoster):
            return device.on_roster(answer, _NOW_UNIX_MS), None
        if isinstance(answer, secagg_pb2.SecureDelivery):
            device.on_delivery(answer)
            lanes = self.vector_of(index)
            device.mask(lanes)
            upload = Upload(lanes, sha256(lanes.data))
            return device.masked(upload.sha256), upload
        if isinstance(answer, secagg_pb2.SecureSurvivors):
            return device.on_survivors(answer), None
        return device.on_quorum(answer), None

    def unmask(self, total: Lanes) -> None:
        """Takes the masks off the sum of the survivors' vectors, in place."""
        apply_masks(total, self.server.unmasking().masks, self.threads)

    def _new_device(self, index: int, identity: Ed25519PrivateKey) -> DeviceMachine:
        certificate = certificates.issue(
            self.authority,
            public_key_of(identity),
            self.session.population,
            _NOW_UNIX_MS + _DAY_MS,
            self.random.randbytes(certificates.SERIAL_BYTES),
        )
        return DeviceMachine(
            self.session,
            self.policy,
            identity=identity,
            certificate=certificate,
            authority_public_key=public_key_of(self.authority),
            coordinator_public_key=public_key_of(self.signer),
            draw=self.random.randbytes,
            primitives=self.primitives_of(index),
        )

    def _new_key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.random.randbytes(32))
