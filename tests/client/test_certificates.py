"""What lets a device into secure sums: its certificate, from the coordinator or an authority that is kept offline."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from lying_coordinator import DAY_MS, SecureCoordinator
from scripted import FakeClock, device_for

from evensong.client import Aborted, Device, EnrolmentError, Trained, command, device_command
from evensong.client.callbacks import StepDone
from evensong.secagg import certificates
from evensong.v1 import device_pb2
from evensong.wire.signing import public_key_of

pytestmark = pytest.mark.secagg

TRAIN = device_pb2.WORK_TRAIN
AUTHORITY = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
KEY = public_key_of(AUTHORITY)


def certify(device: Device, coordinator: SecureCoordinator, *, days: int = 30, population: str = "default") -> bytes:
    not_after = coordinator.clock.now + days * DAY_MS
    return certificates.issue(AUTHORITY, device.public_key, population, not_after, bytes(16))


def kept(device: Device) -> bytes | None:
    return device._state.fact("certificate")


def test_an_expired_certificate_opens_no_secure_sum(tmp_path: Path) -> None:
    coordinator, told = SecureCoordinator(FakeClock(), certificate_days=2), []
    with device_for(coordinator, tmp_path, callbacks=[told.append]) as device:
        device.step()
        coordinator.clock.now += 3 * DAY_MS
        coordinator.give, coordinator.calls = [TRAIN], []
        outcome = device.step()
        assert isinstance(outcome, Aborted) and outcome.reason == "UNFIT" and "certificate" in outcome.message
        assert "Secure" not in coordinator.calls
        assert not any(isinstance(event, StepDone) for event in told)  # nothing was trained in vain


def test_a_certificate_is_renewed_at_a_check_in(tmp_path: Path) -> None:
    coordinator = SecureCoordinator(FakeClock(), certificate_days=2)
    with device_for(coordinator, tmp_path) as device:
        device.step()
        old = kept(device)
        coordinator.clock.now += 3 * DAY_MS
        coordinator.give, coordinator.renew = [TRAIN], True
        assert isinstance(device.step(), Trained)
        new = kept(device)
        assert new != old and new is not None
        [told] = [
            device_pb2.CheckInRequest.FromString(body).certificate_expires_unix_ms
            for name, body in coordinator.requests[-20:]
            if name == "CheckIn"
        ][-1:]
        assert told == certificates.expires_unix_ms(old or b"")
        coordinator.certificate_days = 1  # one that ends earlier is no renewal
        device.step()
        assert kept(device) == new
    with device_for(coordinator, tmp_path) as device:
        assert kept(device) == new


@pytest.mark.parametrize("certificate", [b"short", bytes(88), b"\xff" * 88], ids=["short", "expired", "forged"])
def test_a_certificate_that_does_not_hold_is_ignored(
    certificate: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    coordinator = SecureCoordinator(FakeClock(), give=[TRAIN])

    def tamper(method: str, response: object) -> None:
        if isinstance(response, device_pb2.CheckInResponse):
            response.certificate = certificate

    coordinator.tamper = tamper
    with device_for(coordinator, tmp_path) as device:
        assert isinstance(device.step(), Trained)
        assert kept(device) != certificate
    assert ("does not hold" in caplog.text) == (certificate != bytes(88))


def test_a_coordinator_cannot_name_an_authority(tmp_path: Path) -> None:
    """It would certify whomever it likes: only the device's owner tells the device whom to believe."""
    coordinator = SecureCoordinator(FakeClock(), authority=AUTHORITY)
    with (
        device_for(coordinator, tmp_path) as device,
        pytest.raises(EnrolmentError, match="another enrolment authority"),
    ):
        device.step()
    with (
        device_for(coordinator, tmp_path, authority=public_key_of(coordinator.signer)) as device,
        pytest.raises(EnrolmentError, match="another enrolment authority"),
    ):
        device.step()
    assert "CheckIn" not in coordinator.calls


def test_a_device_of_an_offline_authority(tmp_path: Path) -> None:
    coordinator = SecureCoordinator(FakeClock(), give=[TRAIN], authority=AUTHORITY)
    with device_for(coordinator, tmp_path, authority=KEY) as device:  # enrolled first, certified later
        outcome = device.step()
        assert isinstance(outcome, Aborted) and outcome.reason == "UNFIT" and "no valid certificate" in outcome.message
        first = certify(device, coordinator, days=2)
    coordinator.give = [TRAIN]
    with device_for(coordinator, tmp_path, authority=KEY, certificate=first) as device:
        assert isinstance(device.step(), Trained)
        second = certify(device, coordinator, days=9)
    coordinator.clock.now += 3 * DAY_MS
    with device_for(coordinator, tmp_path, certificate=second) as device:
        device.step()
        assert kept(device) == second
    with device_for(coordinator, tmp_path, certificate=first) as device:  # an old script with an old file
        device.step()
        assert kept(device) == second


@pytest.mark.parametrize("wrong", ["signer", "population", "device", "expired", "malformed"])
def test_a_certificate_that_is_not_this_devices_uses_up_no_token(wrong: str, tmp_path: Path) -> None:
    coordinator = SecureCoordinator(FakeClock(), authority=AUTHORITY)
    with device_for(coordinator, tmp_path) as device:
        good = certify(device, coordinator)
        bad = {
            "signer": good[:24] + bytes(64),
            "population": certify(device, coordinator, population="elsewhere"),
            "device": coordinator.certificate(KEY),
            "expired": certify(device, coordinator, days=-1),
            "malformed": good[:-1],
        }[wrong]
    with (
        device_for(coordinator, tmp_path, authority=KEY, certificate=bad) as device,
        pytest.raises(EnrolmentError, match="certificate does not hold"),
    ):
        device.step()
    assert not coordinator.calls
    with device_for(coordinator, tmp_path, authority=KEY, certificate=good) as device:
        device.step()
        assert device.is_enrolled and kept(device) == good


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> SecureCoordinator:
    """A coordinator that every device of the command line reaches."""
    coordinator = SecureCoordinator(FakeClock(), authority=AUTHORITY)

    def opened(*arguments: object, **options: object) -> Device:
        return Device(*arguments, **options, transport=coordinator, clock=coordinator.clock)  # type: ignore[arg-type]

    monkeypatch.setattr("evensong.client.device.Device", opened)
    return coordinator


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert device_command.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.strip()


def test_enrolling_with_an_authority_of_the_fleets_own(
    connected: SecureCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, file = tmp_path / "state", tmp_path / "certificate"
    key = printed(capsys, "key", "--state", state)
    assert printed(capsys, "key", "--state", state) == key and len(bytes.fromhex(key)) == 32
    not_after = connected.clock.now + 30 * DAY_MS
    certificate = certificates.issue(AUTHORITY, bytes.fromhex(key), "default", not_after, bytes(16))
    file.write_text(certificate.hex() + "\n")
    enrol = ["enrol", "--state", state, "--coordinator", "here:1", "--token", connected.token]
    told = ["--authority", KEY.hex(), "--certificate", file]
    assert len(printed(capsys, *enrol, *told)) == 32
    with device_for(connected, state) as device:
        assert device.is_enrolled and kept(device) == certificate
    later = certificates.issue(AUTHORITY, bytes.fromhex(key), "default", not_after + DAY_MS, bytes(16))
    file.write_text(later.hex())
    printed(capsys, *enrol, *told)  # again, with a new certificate
    with device_for(connected, state) as device:
        assert kept(device) == later
    assert connected.calls == ["Enrol"]


def test_what_is_wrong_with_a_certificate_file_is_said(
    connected: SecureCoordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "certificate"
    enrol = ["device", "enrol", "--state", str(tmp_path / "state"), "--coordinator", "h:1", "--token", connected.token]
    for content, message in ((None, "cannot be read"), (b"\xff\xfe", "176 hex digits"), (b"ab" * 3, "malformed")):
        if content is not None:
            file.write_bytes(content)
        assert command.main([*enrol, "--authority", KEY.hex(), "--certificate", str(file)]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for key in ("", "zz" * 32, "ab" * 31):
        with pytest.raises(SystemExit) as exit_:
            command.main([*enrol, "--authority", key])
        assert exit_.value.code == 2 and "64 hex digits" in capsys.readouterr().err
    assert not connected.calls
