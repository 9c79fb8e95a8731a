"""A real coordinator on a loopback socket in a thread of its own, with devices that report random updates."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tiny_device import TinyDevice, plain_average

from evensong.coordinator.config import Settings
from evensong.coordinator.server import CoordinatorServer
from evensong.v1 import device_pb2, task_pb2
from evensong.wire.artifact import encode_artifact
from evensong.wire.codecs import UpdateCodec
from evensong.wire.program import Artifact, DType, Program, Variable, VariableFlag
from evensong.wire.tensors import layout_from_proto

T = TypeVar("T")


def trainable_artifact() -> bytes:
    """Four variables, one of them an integer and one transposed in the engine; the program ``train`` does nothing."""
    body = np.arange(6, dtype="<f4").reshape(3, 2)  # engine layout; the author's shape is (2, 3)
    state = bytearray(4 * 64)
    state[0:24] = body.tobytes()
    state[64:76] = np.array([1, 2, 3], "<f4").tobytes()
    state[128:136] = np.array([-1, 0.5], "<f4").tobytes()
    variables = (
        Variable("body.weight", DType.F32, (3, 2), (1, 0), 0, VariableFlag.TRAINABLE),
        Variable("body.mean", DType.F32, (3,), (0,), 64, VariableFlag.BUFFER),
        Variable("head.bias", DType.F32, (2,), (0,), 128, VariableFlag.TRAINABLE),
        Variable("body.count", DType.I32, (1,), (0,), 192, VariableFlag.BUFFER),
    )
    train = Program("train", 8, 640, 64, (), (), (), ())
    return encode_artifact(Artifact({}, variables, (train,), b"", bytes(state), 128))


class ServedCoordinator:
    """Stopped and started again on the same folder and port."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self._settings = settings
        self.address = "127.0.0.1:0"
        self.devices: list[TinyDevice] = []
        self.start()

    def start(self) -> None:
        options = {"durable": False, "log_level": "error", "threads": 2, **self._settings}
        settings = Settings(data_dir=self.folder, listen=self.address, **options)
        self.server = CoordinatorServer(settings, optimizers=plain_average())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self.server.start())
        self.address, self.token = self.server.address, self.server.operator_token
        for device in self.devices:
            device.dispatcher = self.server.core.devices

    def stop(self) -> None:
        self.run(self.server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def enrol(self, token: str, count: int, population: str = "default") -> None:
        for _ in range(count):
            device = TinyDevice(self.server.core.devices, len(self.devices), lambda: time.time_ns() // 1_000_000)
            assert not self.run(device.enrol(token, population)).HasField("refusal")
            self.devices.append(device)

    def contribute(self) -> int:
        """Every device asks for work once and does it; how many had some."""
        return sum(self.run(self._work(device)) for device in self.devices)

    async def _work(self, device: TinyDevice) -> bool:
        answer = await device.check_in(population="default", wait_ms=10_000)
        if not answer.HasField("assignment"):
            return False
        assignment = answer.assignment
        if assignment.work == device_pb2.WORK_EVALUATE:
            await device.report(assignment.lease)
            return True
        bundle = task_pb2.TaskBundle.FromString(assignment.bundle.payload)
        update = device.make_update(layout_from_proto(bundle.layout), UpdateCodec.from_plan(bundle.update))
        upload_id = await device.upload(assignment.lease, update)
        weight = 1.0 if bundle.update.weighting == task_pb2.WEIGHTING_UNIFORM else 10.0
        return not (await device.commit(upload_id, assignment.lease, weight=weight)).HasField("refusal")
