"""One device of the demo, as a process of its own: joins, trains when asked, personalises, and says what its models
answered.

    python -m evensong.simulations.demo.device_process FOLDER --coordinator HOST:PORT --last-version N --seed N

FOLDER holds this device's examples (``shard.npz``: train_x, train_y, test_x, test_y) and its enrolment token
(``token``). What the device remembers goes to ``FOLDER/state``, its account to ``FOLDER/account.json``.
It ends when it serves version N.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from evensong.client import AlwaysReady, Device, Idle, Limits, Outcome
from evensong.client.grpc_transport import GrpcTransport
from evensong.simulations.counting import CountingTransport
from evensong.simulations.witness import Account, Witness
from evensong.wire.errors import EvensongError

HOLD_MS = 1_000  # a check-in is held no longer, so that the end of the task is noticed soon


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="device_process", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--last-version", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(argv)
    account = asyncio.run(take_part(options.folder, options.coordinator, options.last_version, options.seed))
    write_account(options.folder, account)
    return 0


async def take_part(folder: Path, coordinator: str, last_version: int, seed: int) -> Account:
    """The whole life of a device in the demo, through the public SDK."""
    with np.load(folder / "shard.npz") as file:
        shard = {name: file[name] for name in ("train_x", "train_y", "test_x", "test_y")}
    transport = CountingTransport(GrpcTransport(coordinator))
    witness = Witness(lambda: device.predict(shard["test_x"]))
    device = Device(
        folder / "state",
        coordinator=coordinator,
        token=(folder / "token").read_text().strip(),
        transport=transport,
        conditions=AlwaysReady(),
        callbacks=[witness],
        limits=Limits(hold_ms=HOLD_MS),
        seed=seed,
    )
    try:
        device.examples.add_many(shard["train_x"], shard["train_y"])
        device.examples.add_many(shard["test_x"], shard["test_y"], split="test")

        def finished(outcome: Outcome) -> bool:
            # A quiet moment after the last version arrived: by then the device has personalised it.
            return isinstance(outcome, Idle) and last_version in witness.answers

        await device.run_async(finished)
        return Account(
            federated=witness.answers[last_version],
            personalised=witness.ask(),
            bytes_up=transport.bytes_up,
            bytes_down=transport.bytes_down,
        )
    finally:
        await device.close_async()


def write_account(folder: Path, account: Account) -> None:
    """Whole or not at all."""
    temporary = folder / "account.json.new"
    temporary.write_text(json.dumps(asdict(account)))
    temporary.rename(folder / "account.json")


def read_account(folder: Path) -> Account:
    """What a device process that ended well has written."""
    return Account(**json.loads((folder / "account.json").read_text()))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except EvensongError as error:
        sys.exit(f"{type(error).__name__}: {error}")
