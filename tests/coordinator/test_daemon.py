"""The daemon as an operator meets it: start, services, metrics, drain, limits, and clear words when it cannot run."""

from __future__ import annotations

import asyncio
import os
import stat
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from daemon_process import Connection, Daemon
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tiny_device import TinyDevice, make_artifact, make_bundle

from evensong.coordinator.command import main
from evensong.coordinator.config import ConfigurationError, load
from evensong.coordinator.server import CoordinatorServer
from evensong.v1 import common_pb2, operator_pb2
from evensong.wire.clock import SystemClock
from evensong.wire.signing import new_request_id


def serve(tmp_path: Path, use: Any, **options: Any) -> None:
    """Runs ``use(server, connection)`` against a server in this process, on a free port."""

    async def run() -> None:
        settings = load(None, data_dir=tmp_path / "data", listen="127.0.0.1:0", log_level="error", **options)
        server = CoordinatorServer(settings)
        await server.start()
        connection = Connection(Daemon(tmp_path / "data"))
        try:
            await use(server, connection)
        finally:
            await connection.close()
            await server.stop(0)

    asyncio.run(run())


# ----------------------------------------------------------------------------------------------------------- services


def test_health_and_reflection_answer(tmp_path: Path) -> None:
    async def use(server: CoordinatorServer, connection: Connection) -> None:
        channel = await connection.channel()
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "evensong.v1.DeviceService", "evensong.v1.OperatorService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {service.name async for answer in call for service in answer.list_services_response.service}
        assert {"evensong.v1.DeviceService", "evensong.v1.OperatorService"} <= names

    serve(tmp_path, use)


def test_metrics_count_refusals_by_reason_and_tell_no_secret(tmp_path: Path) -> None:
    async def use(server: CoordinatorServer, connection: Connection) -> None:
        stranger = TinyDevice(connection, 1, SystemClock().unix_ms)
        await stranger.check_in()
        with await asyncio.to_thread(urllib.request.urlopen, f"http://{server.metrics_address}/metrics") as answer:
            text = answer.read().decode()
        assert 'evensong_refusals_total{method="CheckIn",reason="UNKNOWN_DEVICE"} 1.0' in text
        assert server.operator_token not in text

    serve(tmp_path, use, metrics_port=0)


def test_secrets_on_disk_are_for_the_owner_alone(tmp_path: Path) -> None:
    async def use(server: CoordinatorServer, connection: Connection) -> None:
        for name in ("operator.token", "signer.key"):
            assert stat.S_IMODE((tmp_path / "data" / name).stat().st_mode) == 0o600

    serve(tmp_path, use)


def test_operators_need_the_token(tmp_path: Path) -> None:
    async def use(server: CoordinatorServer, connection: Connection) -> None:
        channel = await connection.channel()
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", server.operator_token),)):
            for method in ("ListTasks", "CreateEnrolmentToken", "UploadBlob", "WatchTask"):
                call = channel.unary_unary(f"/evensong.v1.OperatorService/{method}")
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call(b"", metadata=metadata)
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED

    serve(tmp_path, use)


def test_a_task_that_cannot_work_is_refused_when_it_is_submitted(tmp_path: Path) -> None:
    artifact, layout = make_artifact({"weight": (2, 2)})
    other, other_layout = make_artifact({"weight": (3, 2)})

    async def use(server: CoordinatorServer, connection: Connection) -> None:
        stored = await connection.upload_blob(artifact)
        parameters = await connection.upload_blob(b"\0" * 10)

        async def submit(bundle: Any, initial: common_pb2.BlobRef) -> grpc.StatusCode:
            request = operator_pb2.SubmitTaskRequest(
                request_id=new_request_id(), bundle=bundle, initial_parameters=initial
            )
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await connection.operator("SubmitTask", request)
            assert error.value.details()
            code: grpc.StatusCode = error.value.code()
            return code

        invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
        assert stored.size_bytes == len(artifact)
        assert await submit(make_bundle(other, other_layout, strategy="fedavg"), parameters) is missing
        assert await submit(make_bundle(artifact, other_layout, strategy="fedavg"), parameters) is invalid
        assert await submit(make_bundle(artifact, layout, strategy="krum"), parameters) is invalid
        assert await submit(make_bundle(artifact, layout, strategy="fedavg", goal=0), parameters) is invalid
        assert await submit(make_bundle(artifact, layout, strategy="fedavg"), parameters) is invalid
        assert (await connection.operator("ListTasks", operator_pb2.ListTasksRequest())).tasks == []

    serve(tmp_path, use)


def test_a_blob_with_a_damaged_chunk_leaves_nothing_behind(tmp_path: Path) -> None:
    async def use(server: CoordinatorServer, connection: Connection) -> None:
        async def damaged() -> Any:
            yield operator_pb2.UploadBlobRequest(chunk=common_pb2.BlobChunk(data=b"abc", crc32c=1))

        with pytest.raises(grpc.aio.AioRpcError) as error:
            await connection.operator("UploadBlob", damaged())
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert not list((tmp_path / "data" / "staging").iterdir())
        assert not [path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()]

    serve(tmp_path, use)


def test_messages_beyond_the_limit_are_refused_by_the_socket(tmp_path: Path) -> None:
    async def use(server: CoordinatorServer, connection: Connection) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await connection.call("/evensong.v1.DeviceService/UploadChunk", bytes(5 << 20), ())
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    serve(tmp_path, use)


# -------------------------------------------------------------------------------------------------------------- drain


def test_sigterm_answers_held_check_ins_and_ends_with_code_zero(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "data")

    async def run() -> None:
        daemon.start()
        connection = Connection(daemon)
        device = TinyDevice(connection, 1, SystemClock().unix_ms)
        assert not (await device.enrol(await connection.token(1))).HasField("refusal")
        held = asyncio.create_task(device.check_in(wait_ms=60_000))
        while "evensong_held_check_ins 1.0" not in await metrics(daemon):
            await asyncio.sleep(0.01)
        daemon.terminate()
        answer = await held
        assert not answer.HasField("assignment")
        assert answer.refusal.reason == common_pb2.REFUSAL_REASON_UNAVAILABLE
        assert answer.retry.latest_ms > 0
        await connection.close()

    try:
        daemon._options = ("--metrics-port", "0")
        asyncio.run(run())
        assert daemon.join() == 0
        assert not (tmp_path / "data" / "address").exists()
        log = daemon.log.read_text()
        assert "listens on 127.0.0.1:" in log and "operator.token" in log and "stopped" in log
        assert daemon.operator_token() not in log
    finally:
        daemon.close()


async def metrics(daemon: Daemon) -> str:
    await daemon.address()
    url = next((word for word in daemon.log.read_text().split() if word.endswith("/metrics")), None)
    if url is None:
        return ""

    def read() -> str:
        with urllib.request.urlopen(url) as answer:
            text: str = answer.read().decode()
            return text

    return await asyncio.to_thread(read)


# ------------------------------------------------------------------------------------------------------ configuration


def test_options_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text('listen = "127.0.0.1:1"\nthreads = 2\nlease_ms = 7\n')
    monkeypatch.setenv("EVENSONG_COORDINATOR_THREADS", "3")
    monkeypatch.setenv("EVENSONG_COORDINATOR_LEASE_MS", "8")
    settings = load(file, lease_ms=9, data_dir=None)
    assert (settings.listen, settings.threads, settings.lease_ms) == ("127.0.0.1:1", 3, 9)


def test_the_default_needs_no_file_and_lives_under_xdg_data_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = load()
    assert settings.listen == "127.0.0.1:8470"
    assert settings.data_dir == tmp_path / "evensong" / "coordinator"


@pytest.mark.parametrize(
    "text", ['listen = "nowhere"', "thread = 3", "threads = 0", "listen = ", 'tls_key = "key.pem"', "durable = 7"]
)
def test_a_wrong_configuration_is_named(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text(text + "\n")
    with pytest.raises(ConfigurationError):
        load(file)
    assert main(["config", "--config", str(file)]) == 2
    assert capsys.readouterr().err.startswith("evensong coordinator: ")


def test_the_command_tells_the_token_once_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "--data-dir", str(tmp_path)]) == 2
    assert "serve" in capsys.readouterr().err
    (tmp_path / "operator.token").write_text("secret-of-the-operator\n")
    assert main(["token", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "secret-of-the-operator\n"


# ------------------------------------------------------------------------------------------------------- cannot start


@pytest.mark.parametrize("trouble", ["damaged", "locked", "port", "readonly"])
def test_what_keeps_it_from_starting_is_one_clear_line(
    tmp_path: Path, trouble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    listen, code = "127.0.0.1:0", 3

    async def use(server: CoordinatorServer, connection: Connection) -> None:
        if trouble == "locked":
            assert await asyncio.to_thread(main, ["token", "--data-dir", str(data)]) == 0
            process = Daemon(data)
            process._options = ("--log-level", "error")
            process.start()
            assert process.join() == 3
            assert "another coordinator" in process.log.read_text()
        if trouble == "port":
            other = Daemon(tmp_path / "other", "--listen", server.address)
            other.start()
            assert other.join() == 2
            assert "the socket cannot be opened" in other.log.read_text()

    if trouble in ("locked", "port"):
        serve(tmp_path, use)
        return
    data.mkdir()
    if trouble == "damaged":
        (data / "coordinator.sqlite3").write_bytes(b"SQLite format 3\0" + os.urandom(8192))
    else:
        (data / "uploads").write_text("a file where a folder should be")
    daemon = Daemon(data, "--listen", listen)
    daemon.start()
    try:
        assert daemon.join() == code
        lines = [line for line in daemon.log.read_text().splitlines() if line.startswith("evensong coordinator: ")]
        assert len(lines) == 1
        assert "Traceback" not in daemon.log.read_text()
    finally:
        daemon.close()
