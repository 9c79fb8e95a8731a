"""The handle against a real coordinator on a socket: a task from submission to rollback, and errors by their types."""

from __future__ import annotations

import datetime
import ipaddress
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from served_coordinator import ServedCoordinator, trainable_artifact

from evensong.coordinator.credentials import AccessError, Tls, find_token, is_loopback
from evensong.coordinator.handle import Coordinator, NotFoundError, RejectedError, TaskHandle
from evensong.coordinator.task import Strategy, Task
from evensong.coordinator.views import EventKind, TaskEvent, TaskState
from evensong.wire import UnreachableError, UpdateCodec

ROUNDS, DEVICES = 2, 3


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedCoordinator]:
    coordinator = ServedCoordinator(tmp_path / "data")
    yield coordinator
    coordinator.stop()


@pytest.fixture
def handle(served: ServedCoordinator) -> Iterator[Coordinator]:
    with Coordinator.connect(served.address, served.token) as coordinator:
        yield coordinator


def make_task(strategy: str | Strategy = "plain", rounds: int = ROUNDS) -> Task:
    return Task(
        "toy",
        trainable_artifact(),
        rounds=rounds,
        goal=DEVICES,
        strategy=strategy,
        secure=None,
        update=UpdateCodec(None),
        evaluate_every=1,
    )


class Watcher:
    """Follows a task in a thread."""

    def __init__(self, task: TaskHandle) -> None:
        self.events: list[TaskEvent] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._watch, args=(task,), daemon=True)
        self._thread.start()

    def _watch(self, task: TaskHandle) -> None:
        try:
            for event in task.watch():
                self.events.append(event)
        except BaseException as error:
            self.error = error

    def join(self) -> list[TaskEvent]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self.error is None
        return self.events


def work_until_done(served: ServedCoordinator, task: TaskHandle) -> None:
    while task.status().state == TaskState.RUNNING:
        served.contribute()


def test_a_task_from_submission_to_rollback(served: ServedCoordinator, handle: Coordinator) -> None:
    served.enrol(str(handle.create_token(uses=DEVICES)), DEVICES)
    task = handle.submit(make_task())
    watcher = Watcher(task)
    work_until_done(served, task)
    events = watcher.join()

    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    kinds = [event.kind for event in events]
    assert (kinds[0], kinds[-1]) == (EventKind.TASK_STARTED, EventKind.TASK_ENDED)
    assert kinds.count(EventKind.VERSION_COMMITTED) == kinds.count(EventKind.VERSION_EVALUATED) == ROUNDS
    committed = [event for event in events if event.kind == EventKind.VERSION_COMMITTED]
    assert [event.version for event in committed] == [1, 2]
    assert all(event.reports == DEVICES and event.bytes_up > 0 for event in committed)
    metrics = committed[0].metrics
    assert metrics is not None
    assert (metrics.examples, metrics.loss, metrics.accuracy) == (30, 0.5, 0.7)

    status = task.status()
    assert (status.state, status.version, status.name, status.rounds) == (TaskState.COMPLETE, 2, "toy", ROUNDS)
    assert [listed.task_id for listed in handle.tasks()] == [task.task_id]
    assert handle.download_artifact(task.task_id) == trainable_artifact()

    versions = task.versions()
    assert [(version.number, version.parent, version.serving) for version in versions] == [
        (0, 0, False),
        (1, 0, False),
        (2, 1, True),
    ]
    assert versions[2].total_weight == 10.0 * DEVICES
    assert versions[2].evaluation is not None and versions[2].evaluation.accuracy == 0.75
    first, last = task.download(0), task.download()
    np.testing.assert_array_equal(first["body.weight"], [[0, 2, 4], [1, 3, 5]])
    assert not np.array_equal(first["body.weight"], last["body.weight"])
    assert all((last[name] == values).all() for name, values in task.download(2).items())

    assert task.rollback() == 1
    assert [version.serving for version in task.versions()] == [False, True, False]
    task.promote(0)
    with pytest.raises(RejectedError, match="nothing to roll back"):
        task.rollback()

    assert [event.sequence for event in task.watch(after=3)] == list(range(4, len(events) + 3))


def test_flower_steps_on_the_real_path(served: ServedCoordinator, handle: Coordinator) -> None:
    """The first step of FedAdam has the size of eta in every coordinate that moved."""
    served.enrol(str(handle.create_token(uses=DEVICES)), DEVICES)
    task = handle.submit(make_task(Strategy("fedadam", eta=0.01, beta_1=0.9, beta_2=0.99, tau=1e-9), rounds=1))
    work_until_done(served, task)
    moved = np.concatenate(
        [np.abs(task.download(1)[name] - values).ravel() for name, values in task.download(0).items()]
    )
    # round 1 of Flower corrects the bias as if two rounds had passed: m = 0.1 d, v = 0.01 d^2
    expected = 0.01 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2) * 0.1 / np.sqrt(0.01)
    np.testing.assert_allclose(moved, expected, rtol=1e-4)


def test_a_watch_survives_a_restart_of_the_coordinator(served: ServedCoordinator, handle: Coordinator) -> None:
    served.enrol(str(handle.create_token(uses=DEVICES)), DEVICES)
    task = handle.submit(make_task())
    watcher = Watcher(task)
    assert served.contribute() == DEVICES
    served.stop()
    served.start()
    work_until_done(served, task)
    events = watcher.join()
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[-1].kind == EventKind.TASK_ENDED


def test_stopping_ends_a_watch(handle: Coordinator) -> None:
    task = handle.submit(make_task())
    watcher = Watcher(task)
    task.stop()
    assert watcher.join()[-1].kind == EventKind.TASK_ENDED
    assert task.wait().state == TaskState.STOPPED


def test_leaving_a_watch_early_is_fine(handle: Coordinator) -> None:
    task = handle.submit(make_task())
    for event in task.watch():
        assert event.kind == EventKind.TASK_STARTED
        break
    assert task.status().state == TaskState.RUNNING


def test_devices_are_listed_and_revoked(served: ServedCoordinator, handle: Coordinator) -> None:
    served.enrol(str(handle.create_token("phones", uses=2)), 2, "phones")
    assert {device.device_id for device in handle.devices()} == {device.device_id for device in served.devices}
    revoked = served.devices[0].device_id
    handle.revoke(revoked)
    states = {device.device_id: (device.revoked, device.population) for device in handle.devices()}
    assert states == {revoked: (True, "phones"), served.devices[1].device_id: (False, "phones")}
    with pytest.raises(NotFoundError, match="no such device"):
        handle.revoke("0" * 32)


def test_errors_say_what_to_do(handle: Coordinator) -> None:
    with pytest.raises(NotFoundError, match="no such task"):
        handle.task("nothing")
    with pytest.raises(NotFoundError):
        next(handle.watch("nothing"))
    task = handle.submit(make_task())
    with pytest.raises(NotFoundError, match="no such version"):
        task.download(7)
    with pytest.raises(NotFoundError, match="no version 7"):
        task.promote(7)
    with pytest.raises(RejectedError, match="no such strategy"):
        handle.submit(make_task("unheard-of"))
    with pytest.raises(RejectedError, match="every single reply"):
        handle.submit(make_task("krum"))
    with pytest.raises(RejectedError, match="uses"):
        handle.create_token(uses=0)


def test_a_wrong_token_is_refused(served: ServedCoordinator) -> None:
    with pytest.raises(AccessError, match="refused the token"):
        Coordinator.connect(served.address, "wrong-token-wrong-token")


def test_nobody_there_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evensong.coordinator.handle._PAUSES", (0.0,))
    with pytest.raises(UnreachableError, match="serve"):
        Coordinator.connect("127.0.0.1:1", "token", timeout=5)


def test_the_token_is_found_where_it_should_be(
    served: ServedCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVENSONG_OPERATOR_TOKEN", raising=False)
    monkeypatch.setenv("EVENSONG_COORDINATOR_DATA_DIR", str(served.folder))
    Coordinator.connect(served.address).close()
    Coordinator.connect(served.address, served.folder / "operator.token").close()
    monkeypatch.setenv("EVENSONG_COORDINATOR_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(AccessError, match="cannot be read"):
        Coordinator.connect(served.address)
    monkeypatch.setenv("EVENSONG_OPERATOR_TOKEN", served.token)
    Coordinator.connect(served.address).close()


def test_the_local_token_is_never_sent_to_another_machine(
    served: ServedCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVENSONG_OPERATOR_TOKEN", raising=False)
    monkeypatch.setenv("EVENSONG_COORDINATOR_DATA_DIR", str(served.folder))
    assert find_token(None, served.address) == served.token
    with pytest.raises(AccessError, match="no operator token"):
        find_token(None, "coordinator.example:8470")
    assert find_token(" text\n", "coordinator.example:8470") == "text"


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/run/evensong.sock", True),
        ("192.168.0.1:1", False),
        ("127.example.com:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_loopback_is_told_from_the_rest(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Certificate and key for 127.0.0.1, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "evensong test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = folder / "certificate.pem", folder / "key.pem"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_path, key_path


def test_tls_and_mutual_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evensong.coordinator.handle._PAUSES", (0.0,))
    certificate, key = self_signed(tmp_path)
    served = ServedCoordinator(tmp_path / "data", tls_certificate=certificate, tls_key=key, tls_client_ca=certificate)
    try:
        with Coordinator.connect(served.address, served.token, Tls(certificate, certificate, key)) as coordinator:
            assert coordinator.tasks() == []
        for unfit in (None, Tls(ca=certificate)):  # plain; and a client without a certificate
            with pytest.raises(UnreachableError, match="TLS"):
                Coordinator.connect(served.address, served.token, unfit, timeout=5)
    finally:
        served.stop()


def test_an_unreadable_certificate_is_told(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="TLS file"):
        Coordinator.connect("127.0.0.1:1", "token", Tls(ca=tmp_path / "missing.pem"))
