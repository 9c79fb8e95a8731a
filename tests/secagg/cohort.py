"""A cohort in memory: devices and one coordinator that play the protocol over any vectors, with or without accidents.

    cohort = Cohort(vectors)                                   # uint64 [devices, lanes]
    total = cohort.play({ServerStage.MASKED: {3}})             # device 3 does not send its vector, nor anything after

An attack changes what passes: ``cohort.to_server`` and ``cohort.to_device`` are called with (device, message).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evensong.secagg import (
    AbortedError,
    DeviceMachine,
    Policy,
    Primitives,
    ServerMachine,
    ServerStage,
    Session,
    SharedPrimitives,
    apply_masks,
    certificates,
)
from evensong.secagg.server import SENDING
from evensong.wire.chunks import sha256
from evensong.wire.signing import device_id_of, public_key_of

NOW = 1_700_000_000_000  #: ms since 1970
DAY = 86_400_000
POLICY = Policy(corrupted_share=0.1, dropout_share=0.3, min_survivors=3, max_cohort=10_000)
SESSION = Session(
    bundle_sha256=sha256(b"bundle"),
    manifest_sha256=sha256(b"manifest"),
    task_id="0123456789abcdef" * 2,
    work=1,
    round=7,
    attempt=1,
    population="bells",
)

Lanes = npt.NDArray[np.uint64]


class Cohort:
    """Device ``i`` has ``vectors[i]``; the roster has another order. All randomness comes from ``seed``."""

    def __init__(
        self,
        vectors: Lanes,
        *,
        policy: Policy = POLICY,
        session: Session = SESSION,
        seed: int = 0,
        primitives: Primitives | None = None,
        excluded: frozenset[str] = frozenset(),
    ) -> None:
        self.random = random.Random(seed)
        self.policy = policy
        self.session = session
        self.primitives = primitives or SharedPrimitives()
        self.authority = self.new_key()
        self.signer = self.new_key()
        self.vectors = vectors
        self.masked: dict[int, Lanes] = {}  #: what was uploaded
        self.sent: dict[tuple[int, ServerStage], Any] = {}  #: what each device has sent
        self.to_server: Callable[[int, Any], Any] = lambda device, message: message
        self.to_device: Callable[[int, Any], Any] = lambda device, message: message
        self.identities = [self.new_key() for _ in vectors]
        self.ids = [device_id_of(public_key_of(identity)) for identity in self.identities]
        self.devices = [self.new_device(index) for index in range(len(vectors))]
        self.server = ServerMachine(
            session,
            policy,
            signer=self.signer,
            authority_public_key=public_key_of(self.authority),
            excluded=excluded,
            primitives=self.primitives,
        )

    def new_key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.random.randbytes(32))

    def new_device(self, index: int, **changes: Any) -> DeviceMachine:
        """A machine for device ``index``, as after a restart."""
        identity = self.identities[index]
        certificate = certificates.issue(
            self.authority, public_key_of(identity), self.session.population, NOW + DAY, self.random.randbytes(16)
        )
        settings: dict[str, Any] = {
            "session": self.session,
            "policy": self.policy,
            "identity": identity,
            "certificate": certificate,
            "authority_public_key": public_key_of(self.authority),
            "coordinator_public_key": public_key_of(self.signer),
            "draw": self.random.randbytes,
            "primitives": self.primitives,
        }
        return DeviceMachine(**(settings | changes))

    # ----------------------------------------------------------------------------------------------------------- play

    def play(self, dropped: Mapping[ServerStage, Collection[int]] | None = None) -> Lanes:
        """The sum of the survivors' vectors modulo 2^64; :class:`AbortedError` if there is none. ``dropped`` tells who
        sends nothing from a stage on."""
        self.play_until(None, dropped)
        return self.unmask()

    def play_until(
        self, last: ServerStage | None, dropped: Mapping[ServerStage, Collection[int]] | None = None
    ) -> None:
        """Plays all stages before ``last``, each with all devices that are still there, and closes them."""
        present = set(range(len(self.devices)))
        for stage in SENDING:
            if stage is last:
                return
            present -= set((dropped or {}).get(stage, ()))
            for index in sorted(present):
                self.send(index, stage)
            self.close()

    def send(self, index: int, stage: ServerStage) -> bool:
        """Brings the message of a device in ``stage`` to the coordinator: what was sent before, or else a new one."""
        if (index, stage) not in self.sent:
            self.sent[index, stage] = self.next_message(index, stage)
        message = self.to_server(index, self.sent[index, stage])
        vector = sha256(self.masked[index].tobytes()) if stage is ServerStage.MASKED else None
        return self.server.receive(self.ids[index], message, vector_sha256=vector, now_unix_ms=NOW)

    def next_message(self, index: int, stage: ServerStage) -> Any:
        """What a device says in ``stage``, after the coordinator's answer to what it said in the one before."""
        device = self.devices[index]
        if stage is ServerStage.ADVERTISE:
            return device.advertise()
        before = SENDING[SENDING.index(stage) - 1]
        answer = self.to_device(index, self.server.answer(self.ids[index], before))
        if stage is ServerStage.SHARES:
            return device.on_roster(answer, NOW)
        if stage is ServerStage.MASKED:
            device.on_delivery(answer)
            lanes = self.vectors[index].copy()
            device.mask(lanes)
            self.masked[index] = lanes
            return device.masked(sha256(lanes.tobytes()))
        return device.on_survivors(answer) if stage is ServerStage.COMMIT else device.on_quorum(answer)

    def close(self) -> None:
        if self.server.close() is ServerStage.ABORTED:
            raise AbortedError(self.server.reason)

    def unmask(self) -> Lanes:
        """What the coordinator learns."""
        survivors = [self.masked[self.ids.index(device_id)] for device_id in self.server.survivors]
        total = np.sum(survivors, axis=0, dtype=np.uint64)
        apply_masks(total, self.server.unmasking().masks)
        return total
