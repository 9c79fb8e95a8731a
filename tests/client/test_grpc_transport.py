"""gRPC on loopback: every call ends, whatever the other side does."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from evensong.client import GrpcTransport, Tls
from evensong.wire.errors import UnreachableError
from evensong.wire.transport import DEVICE_SERVICE

ECHO, SILENT, STREAM, STALL = (DEVICE_SERVICE + name for name in ("Echo", "Silent", "Stream", "Stall"))


class Handlers(grpc.GenericRpcHandler):
    """Echo answers, Silent never does, Stream sends three parts, Stall stops after the first."""

    def service(self, details):
        async def echo(body: bytes, call) -> bytes:
            return body + dict(call.invocation_metadata())["evensong-signature-bin"]

        async def silent(body: bytes, call) -> bytes:
            await asyncio.Event().wait()
            return b""

        async def stream(body: bytes, call) -> AsyncIterator[bytes]:
            for part in (b"a", b"b", b"c"):
                yield part

        async def stall(body: bytes, call) -> AsyncIterator[bytes]:
            yield b"a"
            await asyncio.Event().wait()

        return {
            ECHO: grpc.unary_unary_rpc_method_handler(echo),
            SILENT: grpc.unary_unary_rpc_method_handler(silent),
            STREAM: grpc.unary_stream_rpc_method_handler(stream),
            STALL: grpc.unary_stream_rpc_method_handler(stall),
        }.get(details.method)


def with_server(scenario: Callable[[str], Awaitable[None]], credentials: grpc.ServerCredentials | None = None) -> None:
    async def run() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Handlers(),))
        if credentials:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        else:
            port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            await scenario(f"127.0.0.1:{port}")
        finally:
            await server.stop(0)

    asyncio.run(run())


METADATA = [("evensong-device", "abc"), ("evensong-signature-bin", b"\x00\xff")]


async def parts(transport: GrpcTransport, method: str) -> list[bytes]:
    return [part async for part in transport.stream(method, b"", METADATA)]


def test_bytes_and_metadata_go_through_as_they_are() -> None:
    async def scenario(address: str) -> None:
        transport = GrpcTransport(address)
        assert await transport.call(ECHO, b"body", METADATA) == b"body\x00\xff"
        assert await parts(transport, STREAM) == [b"a", b"b", b"c"]
        await transport.close()

    with_server(scenario)


def test_silence_ends_at_the_deadline() -> None:
    async def scenario(address: str) -> None:
        transport = GrpcTransport(address, deadline_s=0.2)
        with pytest.raises(UnreachableError, match="DEADLINE_EXCEEDED"):
            await transport.call(SILENT, b"", METADATA)
        with pytest.raises(UnreachableError, match="stopped in the middle"):
            await parts(transport, STALL)
        assert await parts(transport, STREAM) == [b"a", b"b", b"c"]
        await transport.close()

    with_server(scenario)


def test_nobody_there_and_unknown_methods_are_unreachable() -> None:
    async def scenario(address: str) -> None:
        nobody, somebody = GrpcTransport("127.0.0.1:1", deadline_s=2), GrpcTransport(address)
        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
            await nobody.call(ECHO, b"", METADATA)
        with pytest.raises(UnreachableError):
            await parts(nobody, STREAM)
        with pytest.raises(UnreachableError, match="UNIMPLEMENTED"):
            await somebody.call(DEVICE_SERVICE + "NoSuchMethod", b"", METADATA)
        await nobody.close()
        await somebody.close()

    with_server(scenario)


def test_tls_trusts_the_named_authority_only() -> None:
    key, certificate = self_signed()
    _, other = self_signed()

    async def scenario(address: str) -> None:
        trusting = GrpcTransport(address, tls=Tls(certificate))
        assert await trusting.call(ECHO, b"x", METADATA) == b"x\x00\xff"
        for transport in (GrpcTransport(address, tls=Tls(other), deadline_s=2), GrpcTransport(address, deadline_s=2)):
            with pytest.raises(UnreachableError):
                await transport.call(ECHO, b"x", METADATA)
            await transport.close()
        await trusting.close()

    with_server(scenario, grpc.ssl_server_credentials([(key, certificate)]))


def self_signed() -> tuple[bytes, bytes]:
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)
