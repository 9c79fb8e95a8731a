"""A coordinator of secure rounds for one real device: the rest of the cohort are bare machines that it plays itself.

Honest by default. ``lie`` is called with each answer to a step before it leaves and may change it, or give another.
``secrets_of`` records what a device draws and derives, to be looked for where it must not be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scripted import SECOND, Coordinator, refusal

from evensong.client import Device, work
from evensong.secagg import DeviceMachine, Policy, Primitives, ServerMachine, ServerStage, Session, certificates
from evensong.secagg import device as device_machine
from evensong.secagg.masks import Mask, apply_masks
from evensong.v1 import common_pb2, device_pb2, secagg_pb2, task_pb2
from evensong.wire.chunks import sha256
from evensong.wire.signing import public_key_of

DAY_MS = 24 * 3600 * SECOND
DONE = secagg_pb2.SECURE_OUTCOME_DONE
AGAIN = secagg_pb2.SECURE_OUTCOME_AGAIN
ABORTED = secagg_pb2.SECURE_OUTCOME_ABORTED

_FIELD = {
    secagg_pb2.SecureRoster: "roster",
    secagg_pb2.SecureDelivery: "delivery",
    secagg_pb2.SecureSurvivors: "survivors",
    secagg_pb2.SecureQuorum: "quorum",
}


def secure(bundle: task_pb2.TaskBundle) -> None:
    """The plan of a task with secure sums, for ``Coordinator(plan=...)``."""
    bundle.update.CopyFrom(
        task_pb2.UpdatePlan(
            codec=task_pb2.CODEC_FIELDS, bits=8, clip_norm=1.0, weighting=task_pb2.WEIGHTING_UNIFORM, max_weight=1
        )
    )
    bundle.secure.CopyFrom(
        task_pb2.SecurePlan(
            corrupted_share=0.05, dropout_share=0.3, min_survivors=3, max_cohort=10, stage_ms=30 * SECOND
        )
    )


@dataclass
class SecureCoordinator(Coordinator):
    plan: Callable[[task_pb2.TaskBundle], None] = secure
    peers: int = 4
    lie: Callable[[str, secagg_pb2.SecureResponse], None] = lambda step, response: None
    #: Of the first attempts: what they end with instead of an answer to the step.
    ends: list[tuple[str, secagg_pb2.SecureResponse]] = field(default_factory=list)
    authority: Ed25519PrivateKey | None = None  #: one of its own, not the coordinator
    certificate_days: int = 365
    renew: bool = False
    told: secagg_pb2.SecureResponse | None = None  #: to a new process, whatever is true

    task_id = "0123456789abcdef" * 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rng = np.random.default_rng(5)
        self.identities = [Ed25519PrivateKey.from_private_bytes(self.rng.bytes(32)) for _ in range(self.peers)]
        self.keys: dict[str, bytes] = {}  # public keys of real devices
        self.attempts: dict[tuple[int, int], Attempt] = {}
        self.vectors: list[bytes] = []  # masked, as they were uploaded
        self.steps: list[tuple[str, secagg_pb2.SecureRequest]] = []
        self.asked: list[secagg_pb2.SecureRequest] = []  # by new processes, what became of an attempt

    @property
    def signing_authority(self) -> Ed25519PrivateKey:
        return self.authority or self.signer

    def certificate(self, public_key: bytes, days: int | None = None) -> bytes:
        not_after = self.clock.now + (self.certificate_days if days is None else days) * DAY_MS
        return certificates.issue(self.signing_authority, public_key, "default", not_after, self.rng.bytes(16))

    def sums(self) -> list[np.ndarray]:
        """Of the attempts that came to one: what the real device added, the peers' vectors taken off."""
        return [attempt.opened() for attempt in self.attempts.values() if attempt.server.stage is ServerStage.DONE]

    # the calls

    def _Enrol(self, request: device_pb2.EnrolRequest) -> device_pb2.EnrolResponse:  # noqa: N802
        response = super()._Enrol(request)
        response.authority_public_key = public_key_of(self.signing_authority)
        response.certificate = request.certificate
        if self.authority is None:
            response.certificate = self.certificate(request.public_key)
        return response

    def _CheckIn(self, request: device_pb2.CheckInRequest) -> device_pb2.CheckInResponse:  # noqa: N802
        response = super()._CheckIn(request)
        [public_key] = self.devices.values()
        if self.renew:
            response.certificate = self.certificate(public_key)
        return response

    def _CommitUpload(self, request: device_pb2.CommitUploadRequest) -> device_pb2.CommitUploadResponse:  # noqa: N802
        _, data = self.uploads.pop(request.upload_id)
        assert not (request.weight or request.within_clip_norm or request.HasField("metrics"))
        attempt = self.attempts[int(request.lease.fencing_token), request.masked.attempt]
        attempt.take_vector(bytes(data), request.masked)
        self.vectors.append(bytes(data))
        return device_pb2.CommitUploadResponse()

    def _Secure(self, request: secagg_pb2.SecureRequest) -> secagg_pb2.SecureResponse:  # noqa: N802
        step = request.WhichOneof("step")
        if not request.wait_ms:
            self.asked.append(request)
            return self._what_became_of(request)
        self.steps.append((step, request))
        if self.ends and self.ends[0][0] == step:
            return self.ends.pop(0)[1]
        at = int(request.lease.fencing_token), request.attempt
        if at not in self.attempts:
            self.attempts[at] = Attempt(self, *at)
        answer = self.attempts[at].take(step, getattr(request, step))
        response = secagg_pb2.SecureResponse(attempt=request.attempt)
        if isinstance(answer, secagg_pb2.SecureEnd):
            response.end.CopyFrom(answer)
        else:
            getattr(response, _FIELD[type(answer)]).CopyFrom(answer)
        self.lie(step, response)
        return response

    def _what_became_of(self, request: secagg_pb2.SecureRequest) -> secagg_pb2.SecureResponse:
        """The question of a device that started anew."""
        assert request.WhichOneof("step") == "masked"
        if self.told is not None:
            return self.told
        attempt = self.attempts.get((int(request.lease.fencing_token), request.attempt))
        if attempt and attempt.server.stage is ServerStage.DONE:
            return end(DONE, request.attempt)
        if attempt and attempt.has_vector():
            return secagg_pb2.SecureResponse(attempt=request.attempt)
        return secagg_pb2.SecureResponse(refusal=refusal(common_pb2.REFUSAL_REASON_TOO_LATE))


class Attempt:
    """One attempt: the real device's steps come in, all peers do the same, the stage is closed, the answer goes out."""

    def __init__(self, coordinator: SecureCoordinator, round: int, attempt: int) -> None:
        self._coordinator = coordinator
        self.session = Session(
            bundle_sha256=sha256(coordinator.bundle.payload),
            manifest_sha256=sha256(coordinator.version.payload),
            task_id=coordinator.task_id,
            work=device_pb2.WORK_TRAIN,
            round=round,
            attempt=attempt,
            population="default",
        )
        bundle = task_pb2.TaskBundle.FromString(coordinator.bundle.payload)
        self.policy = Policy.from_plan(bundle.secure)
        authority = public_key_of(coordinator.signing_authority)
        self.server = ServerMachine(
            self.session, self.policy, signer=coordinator.signer, authority_public_key=authority
        )
        self.machines = [
            DeviceMachine(
                self.session,
                self.policy,
                identity=identity,
                certificate=coordinator.certificate(public_key_of(identity)),
                authority_public_key=authority,
                coordinator_public_key=public_key_of(coordinator.signer),
                draw=coordinator.rng.bytes,
            )
            for identity in coordinator.identities
        ]
        [self._device] = coordinator.devices
        self._vectors: list[np.ndarray] = []
        self._peers_vectors: list[np.ndarray] = []
        self._answers: dict[str, Any] = {}

    def take(self, step: str, message: Any) -> Any:
        """The same answer again to a step that is over."""
        if step not in self._answers:
            if step != "masked":
                self.server.receive(self._device, message, now_unix_ms=self._coordinator.clock.now)
            for machine in self.machines:
                self._play(machine, step)
            self.server.close()
            done = self.server.stage is ServerStage.DONE
            self._answers[step] = (
                secagg_pb2.SecureEnd(outcome=DONE) if done else self.server.answer(self._device, ServerStage(step))
            )
        return self._answers[step]

    def _play(self, machine: DeviceMachine, step: str) -> None:
        device_id = _id(machine)
        before = {"shares": "advertise", "masked": "shares", "commit": "masked", "unmask": "commit"}.get(step)
        answer: Any = self.server.answer(device_id, ServerStage(before)) if before else None
        vector_sha256 = None
        if step == "advertise":
            message: Any = machine.advertise()
        elif step == "shares":
            message = machine.on_roster(answer, self._coordinator.clock.now)
        elif step == "masked":
            machine.on_delivery(answer)
            lanes = self._coordinator.rng.integers(0, 1 << 63, len(self._vectors[0]), dtype=np.uint64)
            self._peers_vectors.append(lanes.copy())
            machine.mask(lanes)
            self._vectors.append(lanes)
            vector_sha256 = sha256(lanes.tobytes())
            message = machine.masked(vector_sha256)
        else:
            message = machine.on_survivors(answer) if step == "commit" else machine.on_quorum(answer)
        self.server.receive(device_id, message, vector_sha256=vector_sha256, now_unix_ms=self._coordinator.clock.now)

    def take_vector(self, data: bytes, word: secagg_pb2.SecureMasked) -> None:
        self.server.receive(self._device, word, vector_sha256=sha256(data), now_unix_ms=self._coordinator.clock.now)
        self._vectors.append(np.frombuffer(data, "<u8").astype(np.uint64))

    def has_vector(self) -> bool:
        """Of the real device."""
        return self._device in self.server._received[ServerStage.MASKED]

    def opened(self) -> np.ndarray:
        total = np.sum(self._vectors, axis=0, dtype=np.uint64)
        apply_masks(total, self.server.unmasking().masks)
        return np.asarray(total - np.sum(self._peers_vectors, axis=0, dtype=np.uint64))


def _id(machine: DeviceMachine) -> str:
    return sha256(public_key_of(machine._identity))[:16].hex()


def end(outcome: int, attempt: int = 0, message: str = "") -> secagg_pb2.SecureResponse:
    told = secagg_pb2.SecureEnd(outcome=outcome, message=message)  # type: ignore[arg-type]
    return secagg_pb2.SecureResponse(attempt=attempt, end=told)


def seen_sealed(device: Device, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Grows with each vector that the device seals: its lanes, before any mask."""
    sealed: list[np.ndarray] = []
    original = work.seal_vector

    def seal(*arguments: object, **options: object) -> object:
        vector = original(*arguments, **options)  # type: ignore[arg-type]
        sealed.append(np.frombuffer(vector.data, "<u8"))
        return vector

    monkeypatch.setattr(work, "seal_vector", seal)
    return sealed


# ------------------------------------------------------------------------------------------------------------- secrets


class Recording(Primitives):
    """Keeps what two ends agree on, and the shares that come in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bytes] = set()

    def agree(self, private_key: X25519PrivateKey, public_key: bytes) -> bytes:
        agreed = super().agree(private_key, public_key)
        self.seen |= {agreed, private_key.private_bytes_raw()}
        return agreed

    def seal(self, key: bytes, plaintext: bytes, associated: bytes) -> bytes:
        self.seen |= {key, plaintext[:33], plaintext[33:]}
        return super().seal(key, plaintext, associated)

    def open(self, key: bytes, ciphertext: bytes, associated: bytes) -> bytes | None:
        plaintext = super().open(key, ciphertext, associated)
        self.seen |= {key, (plaintext or key)[:33], (plaintext or key)[33:]} - {b""}
        return plaintext


class Secrets:
    """All that a device draws, its machines derive and they hold; of masks, those of its peers too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.primitives = Recording()
        self.drawn: set[bytes] = set()
        self.mask_keys: set[bytes] = set()

        def recording(lanes: Any, masks: list[Mask], threads: int = 1) -> None:
            self.mask_keys |= {key for key, _ in masks}
            apply_masks(lanes, masks, threads)

        monkeypatch.setattr(device_machine, "apply_masks", recording)

    def watch(self, device: Device) -> None:
        """From now on; before the device's first step."""
        randomness = device._context.randomness
        token = randomness.token

        def draw(count: int) -> bytes:
            data = token(count)
            if count >= 32:
                self.drawn.add(data)
            return data

        randomness.token = draw  # type: ignore[method-assign]

    @property
    def all(self) -> set[bytes]:
        return self.drawn | self.primitives.seen | self.mask_keys

    def assert_absent(self, where: str, data: bytes) -> None:
        """In no spelling that a log or a file may have."""
        lower = data.lower()
        for secret in self.all:
            for spelling in (secret, secret.hex().encode(), repr(secret)[2:-1].encode(), str(list(secret)).encode()):
                assert spelling.lower() not in lower if spelling is not secret else secret not in data, where
