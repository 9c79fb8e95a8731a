"""A version as a difference: fetched where the parent is there, judged by the signed hash, and never the only way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scripted import Coordinator, FakeClock, device_for, step_until

from evensong.client import Aborted, Trained
from evensong.v1 import device_pb2, task_pb2
from evensong.wire.chunks import sha256
from evensong.wire.download import download_words, encode_download
from evensong.wire.signing import sign_blob
from evensong.wire.tensors import encode_tensors

TRAIN = device_pb2.WORK_TRAIN


class Publisher(Coordinator):
    """Publishes versions of ``bits`` bits a value against the one before."""

    bits = 4

    def follow(self, number: int, change: Callable[[bytes], bytes] = lambda blob: blob, **altered: object) -> None:
        """The next version. ``change`` is what happens to the difference before it is signed."""
        parent, manifest = self.values, task_pb2.VersionManifest.FromString(self.version.payload)
        before = manifest.parameters.sha256
        rng = np.random.default_rng(number)
        target = {
            name: values + rng.standard_normal(values.shape).astype(np.float32) for name, values in parent.items()
        }
        self.values, blob = encode_download(parent, target, self.layout, self.bits, download_words(bytes(32), number))
        self.difference = change(blob)
        manifest = task_pb2.VersionManifest(
            task_id="task-1",
            bundle_sha256=sha256(self.bundle.payload),
            number=number,
            parent=number - 1,
            parameters=self._store(encode_tensors(self.values, self.layout)),
            delta=self._store(self.difference),
            parent_parameters_sha256=before,
        )
        for name, value in altered.items():
            setattr(manifest, name, value)
        self.version = sign_blob("version", manifest.SerializeToString(), self.signer)

    def downloads(self) -> list[bytes]:
        """Addresses of what was fetched so far, in order."""
        return self.fetched

    async def stream(self, method, body, metadata):
        self.fetched = [*getattr(self, "fetched", []), device_pb2.DownloadRequest.FromString(body).sha256]
        async for part in super().stream(method, body, metadata):
            yield part

    @property
    def whole(self) -> bytes:
        return task_pb2.VersionManifest.FromString(self.version.payload).parameters.sha256


def publisher(bits: int = 4) -> Publisher:
    made = Publisher(FakeClock(), plan=lambda bundle: setattr(bundle.update, "download_bits", bits))
    made.bits = bits
    return made


def test_a_device_that_has_the_parent_fetches_the_difference() -> None:
    coordinator = publisher()
    with device_for(coordinator) as device:
        coordinator.give = [TRAIN]
        step_until(device, Trained)
        for number in (1, 2, 3):
            coordinator.follow(number)
            coordinator.give = [TRAIN]
            step_until(device, Trained)
            assert coordinator.downloads()[-1] == sha256(coordinator.difference)
            assert coordinator.whole not in coordinator.downloads()
            assert device._context.cache.get(coordinator.whole) == coordinator.blobs[coordinator.whole]


def test_a_device_without_the_parent_fetches_the_whole() -> None:
    coordinator = publisher()
    coordinator.follow(1)
    with device_for(coordinator) as device:
        coordinator.give = [TRAIN]
        step_until(device, Trained)
    assert coordinator.whole in coordinator.downloads()
    assert sha256(coordinator.difference) not in coordinator.downloads()


def other_bytes(blob: bytes) -> bytes:
    return blob[:-1] + bytes([blob[-1] ^ 1])


@pytest.mark.parametrize("change", [other_bytes, lambda blob: blob[:-9], lambda blob: b"junk"])
def test_a_difference_that_does_not_lead_to_the_version_is_no_reason_to_fail(change) -> None:
    coordinator = publisher()
    with device_for(coordinator) as device:
        coordinator.give = [TRAIN]
        step_until(device, Trained)
        coordinator.follow(1, change)
        coordinator.give = [TRAIN]
        step_until(device, Trained)
    assert coordinator.downloads()[-2:] == [sha256(coordinator.difference), coordinator.whole]


def test_a_difference_from_another_parent_is_no_reason_to_fail() -> None:
    """It is well formed, and leads to other parameters than the signed ones."""
    coordinator = publisher()
    with device_for(coordinator) as device:
        coordinator.give = [TRAIN]
        step_until(device, Trained)
        first = task_pb2.VersionManifest.FromString(coordinator.version.payload).parameters.sha256
        coordinator.follow(1)
        coordinator.follow(2, parent_parameters_sha256=first)
        coordinator.give = [TRAIN]
        step_until(device, Trained)
    assert coordinator.downloads()[-2:] == [sha256(coordinator.difference), coordinator.whole]


def test_a_difference_and_a_whole_that_both_fail_are_not_trusted() -> None:
    coordinator = publisher()
    with device_for(coordinator) as device:
        coordinator.give = [TRAIN]
        step_until(device, Trained)
        coordinator.follow(1, other_bytes)
        coordinator.blobs[coordinator.whole] = other_bytes(coordinator.blobs[coordinator.whole])
        coordinator.give = [TRAIN]
        step_until(device, Aborted)
    assert [reason for reason, _ in coordinator.aborts] == [device_pb2.ABORT_REASON_UNTRUSTED]


@pytest.mark.parametrize("altered", [{"parent_parameters_sha256": b"short"}, {"parent_parameters_sha256": b""}])
def test_a_malformed_manifest_is_not_trusted(altered) -> None:
    coordinator = publisher()
    coordinator.follow(1, **altered)
    coordinator.serve = False
    with device_for(coordinator) as device:
        coordinator.give = [TRAIN]
        step_until(device, Aborted)
    assert [reason for reason, _ in coordinator.aborts] == [device_pb2.ABORT_REASON_UNTRUSTED]
