"""The coordinator as a server: builds the parts, opens the socket, drains and stops. The daemon, the demo and
tests use it."""

from __future__ import annotations

import asyncio
import fcntl
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIServer

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from evensong.coordinator import files
from evensong.coordinator.admit import Pacing, Registry
from evensong.coordinator.blobs import BlobStore
from evensong.coordinator.conduct import Conductor
from evensong.coordinator.config import ConfigurationError, Settings
from evensong.coordinator.context import Context, RunBlocking
from evensong.coordinator.database import Database
from evensong.coordinator.dispatch import DeviceDispatcher
from evensong.coordinator.errors import StorageError
from evensong.coordinator.fault import Fault, no_fault
from evensong.coordinator.operator_service import OperatorService
from evensong.coordinator.operators import Operators
from evensong.coordinator.privacy.keys import NoiseKey, load_noise_key
from evensong.coordinator.secure import SecureRounds
from evensong.coordinator.spool import Spool
from evensong.coordinator.strategies import Optimizers
from evensong.coordinator.sums import Sums
from evensong.coordinator.telemetry import make_logger
from evensong.coordinator.traffic import Traffic
from evensong.v1 import device_pb2, operator_pb2, operator_pb2_grpc
from evensong.wire.clock import Clock, SystemClock
from evensong.wire.transport import DEVICE_SERVICE, Metadata

T = TypeVar("T")

DEVICE_SERVICE_NAME = DEVICE_SERVICE.strip("/")
OPERATOR_SERVICE_NAME = operator_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name


class CoordinatorCore:
    """Everything but the socket: the dispatcher for devices, the calls of operators, and the conductor in the
    background.

    The simulator runs this object with its own clock, randomness and ``run_blocking``; :class:`CoordinatorServer`
    puts gRPC around it. Raises :class:`StorageError` when the data directory, the database or its migration fails.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock,
        run_blocking: RunBlocking,
        rng: random.Random | None = None,
        signer: Ed25519PrivateKey | None = None,
        noise_key: NoiseKey | None = None,
        optimizers: Optimizers | None = None,
        fault: Fault = no_fault,
    ) -> None:
        folder = settings.data_dir
        self.context = context = Context(
            settings=settings,
            database=Database(settings.database_url or f"sqlite:///{settings.database_path}", durable=settings.durable),
            blobs=BlobStore(settings.blob_url or str(folder / "blobs"), folder / "staging", durable=settings.durable),
            spool=Spool(folder / "uploads"),
            signer=signer or load_signer(folder / "signer.key"),
            noise_key=noise_key or load_noise_key(folder / "noise.key"),
            clock=clock,
            rng=rng or random.SystemRandom(),
            run_blocking=run_blocking,
            fault=fault,
            log=make_logger(settings.log_format, settings.log_level),
        )
        context.database.migrate()
        registry, sums, traffic = Registry(), Sums(context), Traffic()
        pacing = Pacing(context, registry)
        self.secure = secure = SecureRounds(context, pacing)
        optimizers = optimizers or Optimizers()
        self.registry = registry
        self.devices = DeviceDispatcher(context, registry, pacing, sums, secure, traffic)
        self.operators = Operators(context, registry, optimizers)
        self.conductor = Conductor(context, registry, sums, secure, traffic, optimizers)
        self.conductor.recover()
        self._conducting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the conductor on the running loop."""
        self._conducting = asyncio.ensure_future(self.conductor.run())

    def drain(self) -> None:
        """No new work; held check-ins are answered."""
        self.context.draining = True
        self.context.work.beat()
        self.context.secure.beat()
        self.context.news.beat()

    async def stop(self) -> None:
        """Ends the conductor, waits for server steps, writes what was noted, closes the database."""
        if self._conducting is not None:
            self._conducting.cancel()
            await asyncio.gather(self._conducting, return_exceptions=True)
        await self.conductor.finish()
        try:
            await self.context.run_blocking(self._flush)
        except StorageError as error:
            self.context.log.error("last-seen times are lost", error=str(error))
        self.context.database.close()

    def _flush(self) -> None:
        with self.context.database.transaction() as tx:
            self.registry.flush(tx)


class CoordinatorServer:
    """A coordinator on a gRPC socket. ``address`` and ``operator_token`` are known after :meth:`start`."""

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock | None = None,
        optimizers: Optimizers | None = None,
        fault: Fault = no_fault,
    ) -> None:
        self.settings = settings
        self._clock = clock or SystemClock()
        self._optimizers = optimizers
        self._fault = fault
        self.address = ""
        self.operator_token = ""
        self.metrics_address = ""

    async def start(self) -> None:
        """Opens the data directory and the socket. Raises StorageError or ConfigurationError and leaves no lock."""
        settings = self.settings
        self._lock = _lock_data_dir(settings.data_dir)
        try:
            self.operator_token = load_operator_token(settings.operator_token_file)
            self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="evensong")
            self.core = CoordinatorCore(
                settings,
                clock=self._clock,
                run_blocking=self._run_blocking,
                optimizers=self._optimizers,
                fault=self._fault,
            )
            self._server = self._build_server()
            self.address = f"{settings.listen.rpartition(':')[0]}:{self._bind()}"
            self._metrics = self._serve_metrics()
        except BaseException:
            self._lock.close()
            raise
        self.core.start()
        await self._server.start()
        for service in ("", DEVICE_SERVICE_NAME, OPERATOR_SERVICE_NAME):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        fresh = settings.data_dir / ".address"
        fresh.write_text(self.address + "\n")
        fresh.replace(settings.data_dir / "address")  # whoever waits for the file finds it whole

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drains: no new leases, held check-ins are answered, running calls finish (within the grace), then all
        closes."""
        await self._health.enter_graceful_shutdown()
        self.core.drain()
        await self._server.stop(self.settings.drain_ms / 1000 if grace_seconds is None else grace_seconds)
        await self.core.stop()
        self._pool.shutdown(wait=True)
        if self._metrics is not None:
            self._metrics.shutdown()
            self._metrics.server_close()
        (self.settings.data_dir / "address").unlink(missing_ok=True)
        self._lock.close()

    def _run_blocking(self, function: Callable[..., T], /, *arguments: Any) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _build_server(self) -> grpc.aio.Server:
        limit = self.settings.max_message_bytes
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),
            ]
        )
        server.add_generic_rpc_handlers((device_handlers(self.core.devices),))
        operators = OperatorService(self.core.context, self.core.operators, self.operator_token)
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(operators, server)  # type: ignore[no-untyped-call]
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self.settings.reflection:
            names = (DEVICE_SERVICE_NAME, OPERATOR_SERVICE_NAME, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def _bind(self) -> int:
        settings = self.settings
        try:
            if settings.tls_certificate is None or settings.tls_key is None:
                return self._server.add_insecure_port(settings.listen)
            certificate, key = settings.tls_certificate.read_bytes(), settings.tls_key.read_bytes()
            client_ca = settings.tls_client_ca.read_bytes() if settings.tls_client_ca is not None else None
            credentials = grpc.ssl_server_credentials(
                [(key, certificate)], root_certificates=client_ca, require_client_auth=client_ca is not None
            )
            return self._server.add_secure_port(settings.listen, credentials)
        except (OSError, RuntimeError) as error:
            raise ConfigurationError("the socket cannot be opened", got=f"{settings.listen}: {error}") from None

    def _serve_metrics(self) -> WSGIServer | None:
        if self.settings.metrics_port is None:
            return None
        registry = self.core.context.telemetry.registry
        try:
            server, _ = start_http_server(self.settings.metrics_port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise ConfigurationError("the metrics port cannot be opened", got=error) from None
        self.metrics_address = f"127.0.0.1:{server.server_port}"
        return server


def device_handlers(dispatcher: DeviceDispatcher) -> grpc.GenericRpcHandler[bytes, bytes]:
    """DeviceService over raw bytes: the signature covers the bytes as they came."""

    def unary(method: str) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def answer(body: bytes, call: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return await dispatcher.call(method, body, _metadata(call))

        return grpc.unary_unary_rpc_method_handler(answer)

    def streamed(method: str) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def answer(body: bytes, call: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
            async for part in dispatcher.stream(method, body, _metadata(call)):
                yield part

        return grpc.unary_stream_rpc_method_handler(answer)

    service = device_pb2.DESCRIPTOR.services_by_name["DeviceService"]
    handlers: Mapping[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        method.name: (streamed if method.server_streaming else unary)(DEVICE_SERVICE + method.name)
        for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, dict(handlers))


def _metadata(call: grpc.aio.ServicerContext[bytes, bytes]) -> Metadata:
    return tuple((str(key), value) for key, value in call.invocation_metadata() or ())


# ------------------------------------------------------------------------------------------------- the data directory


def _lock_data_dir(folder: Path) -> Any:
    """One coordinator a data directory: two would not know of each other's rounds."""
    with files.typed_errors("opening the data directory"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise StorageError(
                "another coordinator uses this data directory", got=folder, fix="Stop it, or choose another --data-dir."
            ) from None
    return lock


def load_signer(path: Path) -> Ed25519PrivateKey:
    """The key that signs bundles and versions, made at the first start (32 raw bytes, mode 0600)."""
    with files.typed_errors("reading the signer's key"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            files.write_private(path, Ed25519PrivateKey.generate().private_bytes_raw())
        try:
            return Ed25519PrivateKey.from_private_bytes(path.read_bytes())
        except ValueError:
            raise StorageError("the signer's key is damaged", got=path, fix="Restore it from a backup.") from None


def load_operator_token(path: Path) -> str:
    """The bearer token of operators, made at the first start (mode 0600)."""
    with files.typed_errors("reading the operator's token"):
        if not path.exists():
            files.write_private(path, (secrets.token_urlsafe(32) + "\n").encode())
        token = path.read_text().strip()
    if len(token) < 16:
        raise StorageError("the operator's token is too short", got=path, fix="Delete the file to get a new one.")
    return token
