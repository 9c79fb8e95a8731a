"""The private key is made once, readable by its owner alone, and enrolment happens once."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from scripted import Coordinator, FakeClock, device_for, lose, refusal

from evensong.client import Device, EnrolmentError, IdentityError, Postponed, StateError
from evensong.client.identity import open_identity
from evensong.client.randomness import Randomness
from evensong.v1 import common_pb2, device_pb2


def test_the_key_is_made_at_first_use_with_mode_0600_and_stays(tmp_path: Path) -> None:
    first = open_identity(tmp_path, Randomness())
    path = tmp_path / "identity.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size == 32
    assert open_identity(tmp_path, Randomness()).device_id == first.device_id
    assert open_identity(None, Randomness()).device_id != first.device_id


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_key_that_others_may_touch_is_refused_with_the_way_out(tmp_path: Path, mode: int) -> None:
    open_identity(tmp_path, Randomness())
    (tmp_path / "identity.key").chmod(mode)
    with pytest.raises(IdentityError, match=rf"mode {mode:04o}.*chmod 600"):
        Device(tmp_path)
    (tmp_path / "identity.key").chmod(0o600)
    Device(tmp_path).close()  # and the failed attempt holds no lock


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_key_is_refused_and_not_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="not a key"):
        open_identity(tmp_path, Randomness())
    assert path.read_bytes() == content


def test_an_interrupted_creation_leaves_no_half_key(tmp_path: Path) -> None:
    (tmp_path / "identity.new").write_bytes(b"half")
    assert open_identity(tmp_path, Randomness()).device_id
    assert not (tmp_path / "identity.new").exists()


def test_a_lost_answer_does_not_use_up_a_second_token(tmp_path: Path) -> None:
    coordinator = Coordinator(FakeClock())
    coordinator.after = lose({2})
    with device_for(coordinator, tmp_path) as device:
        assert isinstance(device.step(), Postponed)
    with device_for(coordinator, tmp_path) as device:
        device.enrol()
        device.enrol()
        assert device.is_enrolled
    bodies = [body for name, body in coordinator.requests if name == "Enrol"]
    assert len(bodies) == 2 and bodies[0] == bodies[1]


def test_a_coordinator_with_another_signer_than_the_tokens_is_not_believed() -> None:
    coordinator = Coordinator(FakeClock())

    def tamper(method: str, response) -> None:
        if method == "Enrol":
            response.signer_public_key = bytes(32)

    coordinator.tamper = tamper
    with device_for(coordinator) as device:
        with pytest.raises(EnrolmentError, match="signer"):
            device.enrol()
        assert not device.is_enrolled


def test_an_answer_for_another_device_is_not_believed() -> None:
    coordinator = Coordinator(FakeClock())

    def tamper(method: str, response) -> None:
        if method == "Enrol":
            response.device_id = "f" * 32

    coordinator.tamper = tamper
    with device_for(coordinator) as device, pytest.raises(EnrolmentError, match="somebody else"):
        device.enrol()


def test_a_refused_token_can_be_replaced(tmp_path: Path) -> None:
    coordinator = Coordinator(FakeClock())
    coordinator.tamper = lambda method, response: response.refusal.CopyFrom(
        refusal(common_pb2.REFUSAL_REASON_BAD_TOKEN, "used up")
    )
    with device_for(coordinator, tmp_path) as device, pytest.raises(EnrolmentError, match=r"BAD_TOKEN.*used up"):
        device.enrol()
    coordinator.tamper = lambda method, response: None
    with device_for(coordinator, tmp_path) as device:
        device.enrol()
    first, second = (device_pb2.EnrolRequest.FromString(b) for name, b in coordinator.requests if name == "Enrol")
    assert first.request_id != second.request_id


def test_a_coordinator_that_cannot_enrol_now_is_asked_again(tmp_path: Path) -> None:
    coordinator = Coordinator(FakeClock())
    coordinator.tamper = lambda method, response: response.refusal.CopyFrom(
        refusal(common_pb2.REFUSAL_REASON_UNAVAILABLE, "draining")
    )
    with device_for(coordinator, tmp_path) as device:
        assert isinstance(device.step(), Postponed) and not device.is_enrolled
        coordinator.tamper = lambda method, response: None
        device.enrol()
    first, second = (body for name, body in coordinator.requests if name == "Enrol")
    assert first == second


@pytest.mark.parametrize("token", [None, "", "evt1", "evt1.a.b", "evt2.a.b.c", "x" * 10_000])
def test_no_token_and_what_is_not_one(token: str | None) -> None:
    coordinator = Coordinator(FakeClock())
    device = device_for(coordinator)
    device._token = token
    with device, pytest.raises(EnrolmentError, match="token"):
        device.enrol()
    assert not coordinator.calls


def test_address_and_population_are_remembered_and_a_population_is_for_life(tmp_path: Path) -> None:
    with device_for(Coordinator(FakeClock()), tmp_path) as device:
        device.enrol()
    with Device(tmp_path) as device:
        assert (device.coordinator, device.population) == ("in-memory", "default")
    with pytest.raises(StateError, match="population"):
        Device(tmp_path, population="another")


def test_a_lost_key_makes_another_device(tmp_path: Path) -> None:
    coordinator = Coordinator(FakeClock())
    with device_for(coordinator, tmp_path) as device:
        device.enrol()
    (tmp_path / "identity.key").unlink()
    with device_for(coordinator, tmp_path) as device:
        assert not device.is_enrolled
        device.enrol()
        assert device.is_enrolled
    assert len(coordinator.devices) == 2
