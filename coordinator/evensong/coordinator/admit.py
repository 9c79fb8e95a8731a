"""Step 1 of a round: who is calling, and what may they do?"""

from __future__ import annotations

import hmac
import threading
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import insert, select, update

from evensong.coordinator import requests, tables
from evensong.coordinator.context import Context
from evensong.coordinator.database import Transaction
from evensong.coordinator.errors import RefusalError
from evensong.coordinator.plan import Plan
from evensong.coordinator.requests import RequestKey
from evensong.secagg import certificates
from evensong.secagg.errors import ProtocolError
from evensong.v1 import common_pb2, device_pb2
from evensong.wire.errors import EvensongError, SignatureError
from evensong.wire.signing import EnrolmentToken, device_id_of, parse_caller, verify_request
from evensong.wire.transport import DEVICE_SERVICE, Metadata

_DAY_MS = 24 * 3_600_000


@dataclass(frozen=True)
class DeviceIdentity:
    """An enrolled device whose signature on the present call has been verified."""

    device_id: str
    public_key: bytes
    population: str


@dataclass(frozen=True)
class Call:
    """A verified call: its caller, and the bytes that were signed."""

    device: DeviceIdentity
    method: str
    body: bytes

    def key(self, request_id: bytes) -> RequestKey:
        return RequestKey.of(self.device.device_id, request_id, self.method, self.body)


class Registry:
    """Enrolled devices in memory, and what is not worth a transaction of its own: last seen, last refusal."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, DeviceIdentity] = {}
        self._seen: dict[str, int] = {}
        self._refused: dict[str, tuple[int, str]] = {}
        self._fleet = 0

    @property
    def fleet(self) -> int:
        """Devices that called since the coordinator started: how far retry windows are spread."""
        return self._fleet

    def authenticate(self, context: Context, method: str, body: bytes, metadata: Metadata) -> DeviceIdentity:
        """The device that signed this call, or :class:`RefusalError`."""
        device_id = _claimed(metadata)
        device = self._known.get(device_id) or self._load(context, device_id)
        now = context.now()
        try:
            verify_request(metadata, method, body, device.public_key, now, context.settings.signature_tolerance_ms)
        except SignatureError as error:
            raise RefusalError(common_pb2.REFUSAL_REASON_BAD_SIGNATURE, str(error)) from None
        with self._lock:
            if device_id not in self._known:
                self._known[device_id] = device
                self._fleet += 1
            self._seen[device_id] = now
        return device

    def note_refusal(self, device_id: str, reason: int, message: str) -> None:
        """Kept for operators; the newest counts."""
        with self._lock:
            self._refused[device_id] = (reason, message[:500])

    def forget(self, device_id: str) -> None:
        """The device was revoked: ask the database the next time."""
        with self._lock:
            self._known.pop(device_id, None)

    def flush(self, tx: Transaction) -> None:
        """Writes what was noted since the last time."""
        with self._lock:
            seen, self._seen = self._seen, {}
            refused, self._refused = self._refused, {}
        for device_id, unix_ms in seen.items():
            tx.execute(
                update(tables.devices).where(tables.devices.c.device_id == device_id).values(last_seen_ms=unix_ms)
            )
        for device_id, (reason, message) in refused.items():
            tx.execute(
                update(tables.devices)
                .where(tables.devices.c.device_id == device_id)
                .values(refusal_reason=reason, refusal_message=message)
            )

    def _load(self, context: Context, device_id: str) -> DeviceIdentity:
        with context.database.read() as tx:
            row = tx.execute(select(tables.devices).where(tables.devices.c.device_id == device_id)).one_or_none()
        if row is None or row.revoked:
            raise RefusalError(
                common_pb2.REFUSAL_REASON_UNKNOWN_DEVICE,
                "the device is revoked" if row is not None else "the device is not enrolled",
                got=device_id[:64],
                fix="Enrol it with a new token.",
            )
        return DeviceIdentity(row.device_id, row.public_key, row.population)


# ---------------------------------------------------------------------------------------------------------- enrolment


def enrol(
    context: Context, request: device_pb2.EnrolRequest, body: bytes, metadata: Metadata
) -> device_pb2.EnrolResponse:
    """Registers a key with a one-time token. The request proves that its sender holds the key."""
    method = DEVICE_SERVICE + "Enrol"
    device_id = _check_own_signature(context, method, request.public_key, body, metadata)
    key = RequestKey.of(device_id, request.request_id, method, body)
    now = context.now()
    with context.database.transaction() as tx:
        if (stored := requests.recall(tx, key)) is not None:
            return device_pb2.EnrolResponse.FromString(stored)
        population = _use_token(context, tx, request, now)
        certificate = _certificate(context, request.certificate, request.public_key, population)
        known = tx.execute(
            select(tables.devices.c.revoked).where(tables.devices.c.device_id == device_id)
        ).one_or_none()
        if known is not None and known.revoked:
            raise RefusalError(common_pb2.REFUSAL_REASON_UNKNOWN_DEVICE, "this key was revoked", fix="Use a new key.")
        if known is None:
            tx.execute(
                insert(tables.devices).values(
                    device_id=device_id,
                    public_key=request.public_key,
                    population=population,
                    enrolled_ms=now,
                    last_seen_ms=now,
                )
            )
        else:
            tx.execute(
                update(tables.devices).where(tables.devices.c.device_id == device_id).values(population=population)
            )
        response = device_pb2.EnrolResponse(
            device_id=device_id,
            signer_public_key=context.signer_public_key,
            certificate=certificate,
            authority_public_key=context.authority_public_key,
        )
        requests.remember(tx, key, response, now)
        tx.after_commit(context.due.beat)  # a round may wait for its population
        context.fault("enrol.before_commit")
    context.fault("enrol.after_commit")
    return response


def _check_own_signature(context: Context, method: str, public_key: bytes, body: bytes, metadata: Metadata) -> str:
    try:
        Ed25519PublicKey.from_public_bytes(public_key)
    except (ValueError, UnsupportedAlgorithm):
        raise RefusalError(
            common_pb2.REFUSAL_REASON_INVALID_REQUEST, "public_key is not Ed25519", expected="32 bytes"
        ) from None
    device_id = device_id_of(public_key)
    if _claimed(metadata) != device_id:
        raise RefusalError(
            common_pb2.REFUSAL_REASON_BAD_SIGNATURE, "the signature is not by the key that enrols", expected=device_id
        )
    try:
        verify_request(metadata, method, body, public_key, context.now(), context.settings.signature_tolerance_ms)
    except SignatureError as error:
        raise RefusalError(common_pb2.REFUSAL_REASON_BAD_SIGNATURE, str(error)) from None
    return device_id


def _use_token(context: Context, tx: Transaction, request: device_pb2.EnrolRequest, now: int) -> str:
    """Takes one use off the token; its population. Why it failed is not told apart, so that nothing can be guessed."""
    refusal = RefusalError(
        common_pb2.REFUSAL_REASON_BAD_TOKEN,
        "the enrolment token is wrong, used up, expired or of another population",
        fix="Ask the operator for a new one.",
    )
    try:
        token = EnrolmentToken.parse(request.token)
    except EvensongError:
        raise refusal from None
    row = tx.execute(
        select(tables.enrolment_tokens).where(tables.enrolment_tokens.c.token_id == token.token_id)
    ).one_or_none()
    if row is None or not hmac.compare_digest(token.secret_hash().hex(), row.secret_sha256):
        raise refusal
    if row.uses_left < 1 or row.expires_ms <= now or request.population not in ("", row.population):
        raise refusal
    tx.execute(
        update(tables.enrolment_tokens)
        .where(tables.enrolment_tokens.c.token_id == token.token_id)
        .values(uses_left=row.uses_left - 1)
    )
    population: str = row.population
    return population


def _certificate(context: Context, shown: bytes, public_key: bytes, population: str) -> bytes:
    """The one that the device shows, checked; or a new one, where the coordinator is its own authority. Empty where it
    is not: the device cannot take part in secure sums until its authority has certified it."""
    if not shown:
        return issue_certificate(context, public_key, population) if context.is_own_authority else b""
    try:
        certificates.check(shown, public_key, population, context.authority_public_key, context.now())
    except ProtocolError as error:
        raise RefusalError(
            common_pb2.REFUSAL_REASON_INVALID_REQUEST,
            f"the certificate does not hold: {error}",
            fix="Get one from this coordinator's enrolment authority.",
        ) from None
    return shown


def issue_certificate(context: Context, public_key: bytes, population: str) -> bytes:
    """By the coordinator as its own authority, valid from now on."""
    not_after = context.now() + context.settings.certificate_days * _DAY_MS
    return certificates.issue(context.signer, public_key, population, not_after, bytes.fromhex(context.new_id()))


def renewed_certificate(context: Context, device: DeviceIdentity, expires_unix_ms: int) -> bytes:
    """A new one for a device whose own (if any) has less than a third of its life left; else empty."""
    lifetime = context.settings.certificate_days * _DAY_MS
    if not context.is_own_authority or expires_unix_ms > context.now() + lifetime // 3:
        return b""
    return issue_certificate(context, device.public_key, device.population)


def _claimed(metadata: Metadata) -> str:
    try:
        return parse_caller(metadata).device_id
    except SignatureError as error:
        raise RefusalError(common_pb2.REFUSAL_REASON_BAD_SIGNATURE, str(error)) from None


# -------------------------------------------------------------------------------------------------------- eligibility


def check_runtime(context: Context, request: device_pb2.CheckInRequest) -> None:
    """Refuses runtimes that this coordinator does not serve any more."""
    least = context.settings.minimum_runtime_version
    if _version(request.runtime_version) < _version(least):
        raise RefusalError(
            common_pb2.REFUSAL_REASON_INELIGIBLE,
            "the device's runtime is too old",
            expected=f"{least} or newer",
            got=request.runtime_version,
            fix="Update evensong on the device.",
        )


def unfit(plan: Plan, work: device_pb2.Work, request: device_pb2.CheckInRequest) -> str:
    """Why the device cannot do this work, with the numbers; empty if it can."""
    if work == device_pb2.WORK_EVALUATE:
        return "" if request.evaluation_examples else "evaluation needs examples, the device has none"
    needed, least = plan.bundle.training_bytes, max(1, plan.bundle.local.min_examples)
    if request.memory_bytes < needed:
        return f"training needs {needed} bytes of memory, the device offers {request.memory_bytes}"
    if request.training_examples < least:
        return f"training needs {least} examples, the device has {request.training_examples}"
    return ""


def _version(text: str) -> tuple[int, int, int]:
    parts = text.split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise RefusalError(
            common_pb2.REFUSAL_REASON_INVALID_REQUEST,
            "runtime_version is malformed",
            expected="major.minor.patch",
            got=text[:40],
        )
    return int(parts[0]), int(parts[1]), int(parts[2])


# ------------------------------------------------------------------------------------------------------------- pacing


class Pacing:
    """When a caller should come back. A small fleet at once, a large one spread so that it does not arrive together."""

    def __init__(self, context: Context, registry: Registry) -> None:
        self._settings = context.settings
        self._registry = registry

    def spread_ms(self) -> int:
        return int(1000 * self._registry.fleet / self._settings.check_ins_per_second)

    def soon(self) -> common_pb2.RetryWindow:
        """After work was done, or after a held check-in."""
        return common_pb2.RetryWindow(earliest_ms=0, latest_ms=self.spread_ms())

    def idle(self) -> common_pb2.RetryWindow:
        """There is no work."""
        settings = self._settings
        return common_pb2.RetryWindow(
            earliest_ms=settings.retry_earliest_ms, latest_ms=settings.retry_latest_ms + self.spread_ms()
        )

    def after(self, refused: RefusalError) -> common_pb2.RetryWindow:
        """By the reason: at once where the device can go on, later where nothing changes soon."""
        if refused.retry is not None:
            return common_pb2.RetryWindow(earliest_ms=refused.retry[0], latest_ms=refused.retry[1])
        if refused.reason in _GO_ON:
            return self.soon()
        idle = self.idle()
        times = _PATIENCE.get(refused.reason, 1)
        return common_pb2.RetryWindow(earliest_ms=idle.earliest_ms * times, latest_ms=idle.latest_ms * times)


#: The device drops this update or sends the right chunk; there may be other work already.
_GO_ON = frozenset(
    {
        common_pb2.REFUSAL_REASON_TOO_LATE,
        common_pb2.REFUSAL_REASON_STALE,
        common_pb2.REFUSAL_REASON_NOT_NEEDED,
        common_pb2.REFUSAL_REASON_LEASE_EXPIRED,
        common_pb2.REFUSAL_REASON_BAD_CHUNK,
        common_pb2.REFUSAL_REASON_ALREADY_REPORTED,
        common_pb2.REFUSAL_REASON_INVALID_UPDATE,
    }
)
#: Times the idle window: what needs a person, an update or more data does not change within seconds.
_PATIENCE = {
    common_pb2.REFUSAL_REASON_INELIGIBLE: 10,
    common_pb2.REFUSAL_REASON_UNKNOWN_DEVICE: 60,
    common_pb2.REFUSAL_REASON_BAD_TOKEN: 60,
}
