"""Run this machine as a device: enrol, check in and train, personalise, predict; manage its local examples."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evensong.client.errors import ClientError, StateError
from evensong.client.examples import ExampleStore, Split

DEFAULT_STATE = Path.home() / ".local" / "share" / "evensong" / "device"


def main(argv: Sequence[str] | None = None) -> int:
    """``evensong device ...``; 0 done, 1 failed."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evensong device", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    enrol = _verb(verbs, "enrol", _enrol, "register with a coordinator, once")
    enrol.add_argument("--coordinator", metavar="HOST:PORT", required=True)
    enrol.add_argument("--token", required=True, help="from `evensong devices token`; - reads it from standard input")
    enrol.add_argument("--population", help="the group of devices to belong to (default: default)")
    _authority(enrol)
    _tls(enrol)

    _verb(verbs, "key", _key, "print this device's public key, for its enrolment authority; makes it if there is none")

    run = _verb(verbs, "run", _run, "check in, train and upload until it is stopped")
    run.add_argument("--coordinator", metavar="HOST:PORT", help="where it is now; default: where it was")
    run.add_argument("--token", help="enrols first, if that was not done")
    run.add_argument("--population")
    _authority(run)
    run.add_argument(
        "--always", action="store_true", help="do not ask for power, free network, idle processor and memory"
    )
    run.add_argument("--memory", type=int, default=256, metavar="MIB", help="for training at most (default: 256)")
    run.add_argument("--once", action="store_true", help="one check-in and its work, then end")
    run.add_argument("--json", action="store_true", help="one JSON object a line for each event and outcome")
    _tls(run)

    _verb(verbs, "status", _status, "who this device is and what it holds, as JSON")

    personalize = _verb(verbs, "personalize", _personalize, "adapt the served model to the local examples")
    personalize.add_argument("--epochs", type=int, help="default: as the task says")
    personalize.add_argument("--learning-rate", type=float, help="default: as the task says")
    personalize.add_argument(
        "--trainable", action="append", metavar="PATTERN", help="tensors to adapt; may be repeated"
    )
    personalize.add_argument("--task", help="id or name, where several are served")

    evaluate = _verb(verbs, "evaluate", _evaluate, "loss and accuracy on the local test examples, as JSON")
    evaluate.add_argument("--task", help="id or name, where several are served")

    predict = _verb(verbs, "predict", _predict, "outputs of the served model for a .npy or .npz file")
    predict.add_argument("inputs", type=Path, metavar="FILE", help=".npy [n, ...], or .npz with x (or x0, x1, ...)")
    predict.add_argument(
        "--output", type=Path, metavar="FILE", help="write a .npy; default: the largest output's index"
    )
    predict.add_argument("--task", help="id or name, where several are served")

    examples = verbs.add_parser("examples", help="the local examples: add, count, clear")
    parts = examples.add_subparsers(required=True, metavar="VERB")
    add = _verb(parts, "add", _examples_add, "add the examples of an .npz file with x (or x0, x1, ...) and y")
    add.add_argument("file", type=Path, metavar="FILE")
    add.add_argument("--split", choices=("train", "test"), default="train")
    _verb(parts, "count", _examples_count, "how many there are, as JSON")
    _verb(parts, "clear", _examples_clear, "forget all of them")

    reset = _verb(verbs, "reset", _reset, "forget identity, models and work; a new enrolment is needed")
    reset.add_argument("--yes", action="store_true", help="do not ask")
    reset.add_argument("--examples", action="store_true", help="forget the local examples too")
    return parser


# --------------------------------------------------------------------------------------------------------------- verbs


def _enrol(arguments: argparse.Namespace) -> int:
    token = sys.stdin.readline().strip() if arguments.token == "-" else arguments.token
    with _device(arguments, token=token) as device:
        device.enrol()
        print(device.device_id)
    return 0


def _key(arguments: argparse.Namespace) -> int:
    with _device(arguments) as device:
        print(device.public_key.hex())
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from evensong.client.conditions import AlwaysReady, LinuxConditions
    from evensong.client.outcomes import Outcome

    def show(item: object) -> None:
        print(_line(item, as_json=arguments.json), flush=True)

    def seen(outcome: Outcome) -> bool:
        show(outcome)
        return bool(arguments.once)

    terminated = _interrupt_on_sigterm()
    try:
        with _device(
            arguments,
            token=arguments.token,
            conditions=AlwaysReady() if arguments.always else LinuxConditions(),
            memory_bytes=arguments.memory << 20,
            callbacks=[show] if arguments.json else [],
        ) as device:
            device.run(until=seen)
    except KeyboardInterrupt:
        if not terminated.is_set():
            raise
    return 0


def _status(arguments: argparse.Namespace) -> int:
    with _device(arguments) as device:
        print(json.dumps(device.status(), indent=2))
    return 0


def _personalize(arguments: argparse.Namespace) -> int:
    with _device(arguments) as device:
        training = device.personalize(
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            trainable=arguments.trainable,
            task=arguments.task,
        )
        print(json.dumps(asdict(training) | {"loss": training.loss}))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    with _device(arguments) as device:
        result = device.evaluate(task=arguments.task)
        print(json.dumps(asdict(result) | {"accuracy": result.accuracy}))
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    import numpy as np

    inputs, _ = _read_arrays(arguments.inputs, with_target=False)
    with _device(arguments) as device:
        outputs = device.predict(*inputs, task=arguments.task)
    if arguments.output is None:
        print("\n".join(str(index) for index in outputs.reshape(len(outputs), -1).argmax(axis=1)))
    else:
        np.save(arguments.output, outputs)
    return 0


def _examples_add(arguments: argparse.Namespace) -> int:
    inputs, target = _read_arrays(arguments.file, with_target=True)
    split: Split = arguments.split
    store = _examples(arguments)
    store.add_many(tuple(inputs), target, split=split)
    print(json.dumps({"train": store.count("train"), "test": store.count("test")}))
    store.close()
    return 0


def _examples_count(arguments: argparse.Namespace) -> int:
    store = _examples(arguments)
    print(json.dumps({"train": store.count("train"), "test": store.count("test")}))
    store.close()
    return 0


def _examples_clear(arguments: argparse.Namespace) -> int:
    store = _examples(arguments)
    store.clear()
    store.close()
    return 0


def _reset(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.state
    if not (folder / "state.sqlite").exists():
        raise StateError(f"{folder} is not a device's state directory", fix="Name it with --state.")
    if not arguments.yes and input(f"Forget the device in {folder}? [y/N] ").strip().lower() not in ("y", "yes"):
        return 1
    names = ["identity.key", "cache", *_database_files("state")]
    for name in names + (_database_files("examples") if arguments.examples else []):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return 0


# ------------------------------------------------------------------------------------------------------------- helpers


def _verb(verbs: Any, name: str, action: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE, metavar="DIR", help=f"default: {DEFAULT_STATE}")
    parser.set_defaults(action=action)
    return parser


def _authority(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--authority", type=_public_key, metavar="HEX", help="public key of an enrolment authority of the fleet's own"
    )
    parser.add_argument(
        "--certificate",
        type=Path,
        metavar="FILE",
        help="from `evensong devices certify`; a later one replaces it when the device is enrolled already",
    )


def _public_key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise argparse.ArgumentTypeError("expected 64 hex digits, as `evensong devices authority` prints them")
    return key


def _tls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls", action="store_true", help="encrypt; trusts the system's authorities")
    parser.add_argument("--tls-ca", type=Path, metavar="PEM", help="encrypt; trusts this authority only")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="this device's TLS key, for mutual TLS")
    parser.add_argument("--tls-certificate", type=Path, metavar="PEM", help="this device's certificate, for mutual TLS")


def _device(arguments: argparse.Namespace, **options: Any) -> Any:
    from evensong.client.device import Device

    address = getattr(arguments, "coordinator", None)
    if getattr(arguments, "tls", False) or getattr(arguments, "tls_ca", None):
        options["tls"] = _tls_options(arguments)
    options["authority"] = getattr(arguments, "authority", None)
    if getattr(arguments, "certificate", None):
        options["certificate"] = _read_certificate(arguments.certificate)
    return Device(arguments.state, coordinator=address, population=getattr(arguments, "population", None), **options)


def _read_certificate(path: Path) -> bytes:
    """As `evensong devices certify` prints it."""
    try:
        return bytes.fromhex(_read(path).decode("ascii"))
    except ValueError:
        raise ClientError(
            f"{path} is not a device's certificate",
            expected="176 hex digits, as `evensong devices certify` prints them",
        ) from None


def _tls_options(arguments: argparse.Namespace) -> Any:
    from evensong.client.grpc_transport import Tls

    def read(path: Path | None) -> bytes | None:
        return _read(path) if path else None

    return Tls(read(arguments.tls_ca), read(arguments.tls_key), read(arguments.tls_certificate))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClientError(f"{path} cannot be read", got=error.strerror) from error


def _interrupt_on_sigterm() -> threading.Event:
    """A service manager's SIGTERM ends the device as Ctrl-C does, with its state in order; the event tells which."""
    terminated = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        terminated.set()
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    return terminated


def _examples(arguments: argparse.Namespace) -> ExampleStore:
    """Without opening the device: examples may be added while it runs."""
    folder: Path = arguments.state
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return ExampleStore(folder / "examples.sqlite")


def _read_arrays(path: Path, *, with_target: bool) -> tuple[list[Any], Any]:
    """Inputs x, or x0, x1, ..., and the target y of a file that NumPy wrote; pickled objects are refused."""
    import numpy as np

    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            arrays = {"x": content}
        else:
            with content:
                arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError) as error:
        raise ClientError(
            f"{path} cannot be read", expected="a file of numpy.savez or numpy.save", got=error
        ) from error
    inputs = [arrays["x"]] if "x" in arrays else [arrays[f"x{i}"] for i in range(len(arrays)) if f"x{i}" in arrays]
    if not inputs or (with_target and "y" not in arrays):
        raise ClientError(f"{path} lacks an array", expected="x and y" if with_target else "x", got=sorted(arrays))
    return inputs, arrays.get("y")


def _line(item: object, *, as_json: bool) -> str:
    """An event or outcome for people or for programs."""
    from dataclasses import fields, is_dataclass

    values = {field.name: getattr(item, field.name) for field in fields(item)} if is_dataclass(item) else {}
    if as_json:
        return json.dumps({"event": type(item).__name__, **values}, default=str)
    shown = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
    return f"{type(item).__name__}: {shown}"


def _database_files(name: str) -> list[str]:
    return [f"{name}.sqlite", f"{name}.sqlite-wal", f"{name}.sqlite-shm"]
