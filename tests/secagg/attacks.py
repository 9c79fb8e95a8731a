"""What attacks on secure sums have in common: cohorts at a stage, true answers to change, and how a device leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cohort import Cohort

from evensong.secagg import DeviceMachine, DeviceState, SecureError, ServerStage, bitmap
from evensong.secagg.transcript import advertise_bytes
from evensong.v1 import secagg_pb2

COUNT = 10  # a complete graph: one member may be corrupted, 6 shares open a secret, 6 members are a quorum


def vectors(count: int = COUNT, lanes: int = 5) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(count).integers(0, 2**64, (count, lanes), dtype=np.uint64)


def at(stage: ServerStage, count: int = COUNT, **settings: Any) -> Cohort:
    """A cohort before ``stage``."""
    cohort = Cohort(vectors(count), **settings)
    cohort.play_until(stage)
    return cohort


def answer(cohort: Cohort, index: int, stage: ServerStage) -> Any:
    """A copy of what the honest coordinator says to a device after ``stage``."""
    return copy.deepcopy(cohort.server.answer(cohort.ids[index], stage))


def place(cohort: Cohort, index: int) -> int:
    """Of a device in the roster."""
    return cohort.server.members.index(cohort.ids[index])


def bits_without(cohort: Cohort, bits: bytes, *gone: int) -> bytes:
    """A bitmap of the cohort less some devices."""
    chosen = bitmap.decode(bits, len(cohort.devices), "bits")
    for index in gone:
        chosen &= ~(1 << place(cohort, index))
    return bitmap.encode(chosen, len(cohort.devices))


def advertised_by(cohort: Cohort, index: int, **changes: bytes) -> secagg_pb2.SecureAdvertise:
    """What a member that is corrupted advertises: other fields, and its true signature on them."""
    member = copy.deepcopy(cohort.sent[index, ServerStage.ADVERTISE])
    for name, value in changes.items():
        setattr(member, name, value)
    signed = advertise_bytes(cohort.session.context, member.channel_key, member.mask_key, member.nonce)
    member.signature = cohort.identities[index].sign(signed)
    return member


def assert_leaves(device: DeviceMachine, call: Callable[[], object], why: str) -> None:
    """The call is refused for that reason, and the device has left the cohort and forgotten all secrets."""
    with pytest.raises(SecureError, match=why):
        call()
    secrets = device._secrets
    assert device.state is DeviceState.ABORTED
    assert (secrets.channel, secrets.mask, secrets.seed, secrets.held) == (None, None, b"", {})
