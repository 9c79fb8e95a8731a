"""Everything that a coordinator sends is hostile until checked: nothing of it runs, hangs, or fills the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import START, Coordinator, FakeClock, device_for, step_until
from tiny_artifact import WEIGHT, tiny_artifact

from evensong.client import Aborted, Idle, Limits, NoModelError, Postponed, RefusedError, Trained
from evensong.client.pacing import LEAST_WAIT_S, MOST_WAIT_S, Backoff, draw_wait
from evensong.client.randomness import Randomness
from evensong.v1 import common_pb2, device_pb2, task_pb2
from evensong.wire.artifact import encode_artifact
from evensong.wire.chunks import sha256
from evensong.wire.program import Artifact
from evensong.wire.signing import sign_blob
from evensong.wire.tensors import encode_tensors

TRAIN = device_pb2.WORK_TRAIN
UNTRUSTED, UNFIT = device_pb2.ABORT_REASON_UNTRUSTED, device_pb2.ABORT_REASON_UNFIT


def aborted(coordinator: Coordinator, reason: int, **options: object) -> str:
    """The message with which the device gives the work back; nothing was sent, and nothing untrusted is served."""
    coordinator.give = [TRAIN]
    with device_for(coordinator, **options) as device:
        outcome = step_until(device, Aborted, most=3)
        assert [given for given, _ in coordinator.aborts] == [reason], outcome
        if reason == UNTRUSTED:
            with pytest.raises(NoModelError):
                device.predict(np.zeros((1, 4), np.float32))
    assert not coordinator.committed and not coordinator.uploads
    return outcome.message


# ------------------------------------------------------------------------------------------------ signatures and hashes


@given(
    blob=st.sampled_from(["bundle", "version"]),
    part=st.sampled_from(["payload", "signature", "public_key"]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
@settings(max_examples=60, deadline=None)
def test_no_bit_of_what_is_signed_can_be_changed(blob: str, part: str, place: float, bit: int) -> None:
    coordinator = Coordinator(FakeClock())
    signed = getattr(coordinator, blob)
    data = bytearray(getattr(signed, part))
    data[int(len(data) * place)] ^= 1 << bit
    setattr(signed, part, bytes(data))
    assert "does not verify" in aborted(coordinator, UNTRUSTED)


def test_another_signer_is_not_the_pinned_one() -> None:
    coordinator = Coordinator(FakeClock())
    stranger = Ed25519PrivateKey.generate()
    coordinator.bundle = sign_blob("bundle", coordinator.bundle.payload, stranger)
    coordinator.version = sign_blob("version", coordinator.version.payload, stranger)
    aborted(coordinator, UNTRUSTED)


def test_a_version_cannot_be_passed_off_as_a_bundle_nor_belong_to_another() -> None:
    coordinator = Coordinator(FakeClock())
    coordinator.bundle = sign_blob("version", coordinator.bundle.payload, coordinator.signer)
    aborted(coordinator, UNTRUSTED)

    coordinator = Coordinator(FakeClock())
    bundle = coordinator.bundle
    coordinator.plan = lambda plan: setattr(plan.local, "epochs", 3)
    coordinator.publish(0)  # genuine, but for another bundle
    coordinator.bundle = bundle
    assert "another bundle" in aborted(coordinator, UNTRUSTED)


def resign(coordinator: Coordinator, change: Callable[[task_pb2.VersionManifest], None]) -> None:
    manifest = task_pb2.VersionManifest.FromString(coordinator.version.payload)
    change(manifest)
    coordinator.version = sign_blob("version", manifest.SerializeToString(), coordinator.signer)


def test_the_version_must_be_of_the_assigned_task() -> None:
    coordinator = Coordinator(FakeClock())
    resign(coordinator, lambda manifest: setattr(manifest, "task_id", "task-2"))
    assert "another task" in aborted(coordinator, UNTRUSTED)


# --------------------------------------------------------------------------------------------------------- absurd plans


def local(**values: object) -> Callable[[task_pb2.TaskBundle], None]:
    return lambda bundle: [setattr(bundle.local, name, value) for name, value in values.items()] and None


def update(**values: object) -> Callable[[task_pb2.TaskBundle], None]:
    return lambda bundle: [setattr(bundle.update, name, value) for name, value in values.items()] and None


ABSURD = {
    "no epochs": local(epochs=0),
    "too many epochs": local(epochs=10**9),
    "rate NaN": local(learning_rate=math.nan),
    "rate infinite": local(learning_rate=math.inf),
    "rate negative": local(learning_rate=-1.0),
    "rate zero": local(learning_rate=0.0),
    "final rate NaN": local(final_learning_rate=math.nan),
    "patterns": lambda bundle: bundle.local.personal.extend(["x"] * 2000),
    "personalization epochs": lambda bundle: setattr(bundle.local.personalization, "epochs", 10**9),
    "codec": update(codec=77),
    "bits": update(codec=task_pb2.CODEC_QUANTIZED, bits=99),
    "clip NaN": update(clip_norm=math.nan),
    "clip negative": update(clip_norm=-1.0),
    "weight zero": update(max_weight=0.0),
    "weight infinite": update(max_weight=math.inf),
    "weighting": update(weighting=9),
    "population": lambda bundle: setattr(bundle, "population", "others"),
    "empty layout": lambda bundle: bundle.layout.add(),
    "artifact hash": lambda bundle: setattr(bundle.artifact, "sha256", b"short"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_plan_is_not_followed_even_if_it_is_signed(name: str) -> None:
    change = ABSURD[name]

    def plan(bundle: task_pb2.TaskBundle) -> None:
        if honest:
            return
        change(bundle)

    honest = True
    coordinator = Coordinator(FakeClock(), plan=plan)
    bundle = task_pb2.TaskBundle.FromString(coordinator.bundle.payload)
    change(bundle)
    coordinator.bundle = sign_blob("bundle", bundle.SerializeToString(), coordinator.signer)
    resign(coordinator, lambda manifest: setattr(manifest, "bundle_sha256", sha256(coordinator.bundle.payload)))
    aborted(coordinator, UNTRUSTED)


def test_more_work_than_the_device_gives_is_unfit() -> None:
    coordinator = Coordinator(FakeClock(), plan=local(epochs=10_000))
    assert "too much work" in aborted(coordinator, UNFIT, limits=Limits(training_steps=1000))
    coordinator = Coordinator(FakeClock(), plan=local(epochs=10_000, max_steps=7), give=[TRAIN])
    steps = []
    with device_for(coordinator, limits=Limits(training_steps=1000), callbacks=[steps.append]) as device:
        assert isinstance(device.step(), Trained)
    assert sum("StepDone" in str(event) for event in steps) == 7


def test_batch_memory_size_and_examples_must_fit() -> None:
    assert "batch" in aborted(Coordinator(FakeClock(), plan=local(batch_size=9)), UNFIT)
    assert "memory" in aborted(Coordinator(FakeClock()), UNFIT, memory_bytes=500)
    assert "too large" in aborted(Coordinator(FakeClock()), UNFIT, limits=Limits(blob_bytes=100))
    assert "too few" in aborted(Coordinator(FakeClock(), plan=local(min_examples=41)), UNFIT)
    assert "too few" in aborted(Coordinator(FakeClock()), UNFIT, examples=0)


def test_examples_of_another_shape_than_the_models_are_unfit() -> None:
    coordinator = Coordinator(FakeClock(), give=[TRAIN])
    with device_for(coordinator, examples=0) as device:
        device.examples.add_many(np.zeros((10, 7), np.float32), np.zeros(10, np.int64))
        assert isinstance(step_until(device, Aborted, most=3), Aborted)
    [(reason, message)] = coordinator.aborts
    assert reason == UNFIT and "shape" in message


# ------------------------------------------------------------------------------------------------------ hostile content


def serve_artifact(coordinator: Coordinator, data: bytes) -> None:
    """Signs a bundle whose artifact is ``data``, with the layout of the honest one."""
    bundle = task_pb2.TaskBundle.FromString(coordinator.bundle.payload)
    bundle.artifact.CopyFrom(coordinator._store(data))
    coordinator.bundle = sign_blob("bundle", bundle.SerializeToString(), coordinator.signer)
    resign(coordinator, lambda manifest: setattr(manifest, "bundle_sha256", sha256(coordinator.bundle.payload)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an artifact",
        tiny_artifact()[:-1],
        tiny_artifact(5, 3),  # another layout
        encode_artifact(Artifact({}, (), (), b"", b"", 0)),
    ],
    ids=["empty", "garbage", "truncated", "other layout", "nothing in it"],
)
def test_a_signed_artifact_that_is_not_what_the_layout_says(data: bytes) -> None:
    coordinator = Coordinator(FakeClock())
    serve_artifact(coordinator, data)
    aborted(coordinator, UNTRUSTED)


def test_parameters_must_be_those_of_the_layout_and_finite() -> None:
    coordinator = Coordinator(FakeClock())
    encoded = bytearray(encode_tensors(coordinator.values, coordinator.layout))
    encoded[-1] ^= 255
    resign(coordinator, lambda manifest: manifest.parameters.CopyFrom(coordinator._store(bytes(encoded))))
    aborted(coordinator, UNTRUSTED)
    coordinator = Coordinator(FakeClock())
    resign(coordinator, lambda manifest: setattr(manifest.parameters, "size_bytes", 10**7))
    assert "larger than" in aborted(coordinator, UNTRUSTED)


Change = Callable[[device_pb2.DownloadResponse], None]


def test_downloads_that_do_not_add_up() -> None:
    def wrong_total(answer: device_pb2.DownloadResponse) -> None:
        answer.total_bytes += 1

    def wrong_offset(answer: device_pb2.DownloadResponse) -> None:
        answer.chunk.offset += 1

    def endless(answer: device_pb2.DownloadResponse) -> None:
        answer.chunk.data = bytes(1 << 20)

    def empty(answer: device_pb2.DownloadResponse) -> None:
        answer.chunk.data = b""

    for change in (wrong_total, wrong_offset, endless, empty):
        coordinator = Coordinator(FakeClock())
        coordinator.tamper = lambda name, answer, change=change: change(answer) if name == "Download" else None
        aborted(coordinator, UNTRUSTED)


def test_a_chunk_damaged_on_the_way_is_fetched_again() -> None:
    coordinator = Coordinator(FakeClock(), give=[TRAIN])
    damages = iter([True, False, True])

    def damage(name: str, answer) -> None:
        if name == "Download" and next(damages, False):
            answer.chunk.crc32c ^= 1

    coordinator.tamper = damage
    with device_for(coordinator) as device:
        assert isinstance(device.step(), Postponed)
        assert isinstance(step_until(device, Trained), Trained)


def test_upload_answers_that_lie_end_in_back_off_and_not_in_a_loop() -> None:
    def too_much(name: str, answer) -> None:
        if name == "UploadChunk":
            answer.received_bytes = 10**12

    def nothing(name: str, answer) -> None:
        if name in ("UploadChunk", "BeginUpload"):
            answer.received_bytes = 0

    def endless_name(name: str, answer) -> None:
        if name == "BeginUpload":
            answer.upload_id = "x" * 100_000

    def tiny_chunks(name: str, answer) -> None:
        if name == "BeginUpload":
            answer.chunk_bytes = 1

    for lie in (too_much, nothing, endless_name):
        coordinator = Coordinator(FakeClock(), give=[TRAIN], tamper=lie)
        with device_for(coordinator) as device:
            assert isinstance(device.step(), Postponed)
            assert len(coordinator.calls) < 40
    coordinator = Coordinator(FakeClock(), give=[TRAIN], tamper=tiny_chunks)
    with device_for(coordinator) as device:
        assert isinstance(device.step(), Trained) and coordinator.calls.count("UploadChunk") < 5


@given(body=st.binary(max_size=200))
@settings(max_examples=25, deadline=None)
def test_answers_that_are_no_messages_change_nothing(body: bytes) -> None:
    coordinator = Coordinator(FakeClock())
    with device_for(coordinator, examples=3) as device:
        device.enrol()
        honest = coordinator.call

        async def garbage(method: str, request: bytes, metadata: object) -> bytes:
            return body

        coordinator.call = garbage  # type: ignore[method-assign]
        outcome = device.step()
        assert isinstance(outcome, Postponed | Idle) and LEAST_WAIT_S <= outcome.wait_s <= MOST_WAIT_S
        coordinator.call, coordinator.give = honest, [TRAIN]  # type: ignore[method-assign]
        assert isinstance(step_until(device, Trained), Trained)


# -------------------------------------------------------------------------------------------------------- time and text


@given(earliest=st.integers(0, 2**64 - 1), latest=st.integers(0, 2**64 - 1))
def test_no_retry_window_makes_a_device_spin_or_sleep_for_good(earliest: int, latest: int) -> None:
    window = common_pb2.RetryWindow(earliest_ms=earliest, latest_ms=latest)
    assert LEAST_WAIT_S <= draw_wait(window, Randomness(1)) <= MOST_WAIT_S


def test_retry_windows_are_drawn_over_their_whole_width() -> None:
    randomness, window = Randomness(1), common_pb2.RetryWindow(earliest_ms=10_000, latest_ms=20_000)
    waits = [draw_wait(window, randomness) for _ in range(500)]
    assert 10 <= min(waits) < 10.5 and 19.5 < max(waits) <= 20 and 14 < np.mean(waits) < 16


def test_back_off_doubles_with_jitter_up_to_a_quarter_of_an_hour_and_starts_again() -> None:
    backoff = Backoff(Randomness(1))
    waits = [backoff.next() for _ in range(50)]
    assert all(min(900, 2**n) / 2 <= wait <= min(900, 2**n) for n, wait in enumerate(waits))
    backoff.reset()
    assert backoff.next() <= 1


@pytest.mark.parametrize("expires", [0, START, START - 1])
def test_a_lease_that_is_over_when_it_comes_is_no_work(expires: int) -> None:
    coordinator = Coordinator(FakeClock(), give=[TRAIN])
    coordinator.lease_ms = expires - START
    with device_for(coordinator) as device:
        assert isinstance(device.step(), Idle)
    assert not coordinator.committed


def test_a_lease_for_ever_ends_after_a_day() -> None:
    coordinator = Coordinator(FakeClock(), give=[TRAIN], lease_ms=10**17)
    with device_for(coordinator, callbacks=[]) as device:
        coordinator.before = lambda moment, method: None
        device._context.state.set_work = (lambda original: lambda work: (seen.append(work), original(work)))(
            device._context.state.set_work
        )
        seen: list = []
        assert isinstance(device.step(), Trained)
    assert {work.deadline_unix_ms for work in seen} == {START + 24 * 3600 * 1000}


def test_unknown_work_is_no_work() -> None:
    coordinator = Coordinator(FakeClock(), give=[9])
    with device_for(coordinator) as device:
        assert isinstance(device.step(), Idle)


def test_refusal_texts_are_fit_for_a_terminal() -> None:
    text = "\x1b[2J\nroot# rm -rf /\x00" + "y" * 10_000
    error = RefusedError(common_pb2.Refusal(reason=999, message=text), common_pb2.RetryWindow())  # type: ignore[arg-type]
    assert error.name == "999" and error.message.isprintable() and len(str(error)) < 400


def test_the_round_number_only_chooses_between_signed_rates() -> None:
    from evensong.client.train import learning_rate_of

    plan = task_pb2.LocalPlan(learning_rate=0.1, final_learning_rate=0.02)
    rates = [learning_rate_of(plan, number, 5) for number in (0, 1, 3, 5, 10**9)]
    assert rates == pytest.approx([0.1, 0.1, 0.06, 0.02, 0.02])
    assert learning_rate_of(plan, 1, 1) == 0.1
    assert learning_rate_of(task_pb2.LocalPlan(learning_rate=0.1), 5, 5) == 0.1


def test_a_bad_version_never_replaces_the_one_that_serves() -> None:
    coordinator = Coordinator(FakeClock())
    x = np.ones((1, 4), np.float32)
    with device_for(coordinator) as device:
        device.step()
        before = device.predict(x)
        coordinator.publish(1, {WEIGHT: np.ones((3, 4), np.float32)})
        genuine, coordinator.version = coordinator.version, task_pb2.SignedBlob(payload=b"x")
        device.step()
        assert np.array_equal(device.predict(x), before)
        coordinator.version = genuine
        lost = coordinator.blobs.pop(task_pb2.VersionManifest.FromString(genuine.payload).parameters.sha256)
        with pytest.raises(KeyError):
            device.step()
        coordinator._store(lost)
        device.step()
        assert device.predict(x).tolist() == [[4, 4, 4]]


def test_a_refused_check_in_says_why_and_still_brings_the_served_model() -> None:
    coordinator = Coordinator(FakeClock())

    def refuse(name: str, answer) -> None:
        if name == "CheckIn":
            answer.refusal.reason = common_pb2.REFUSAL_REASON_INELIGIBLE
            answer.refusal.message = "training needs 100 examples"

    coordinator.tamper = refuse
    with device_for(coordinator) as device:
        outcome = device.step()
        assert isinstance(outcome, Idle)
        assert (outcome.reason, outcome.message) == ("INELIGIBLE", "training needs 100 examples")
        assert device.predict(np.zeros((2, 4), np.float32)).shape == (2, 3)
