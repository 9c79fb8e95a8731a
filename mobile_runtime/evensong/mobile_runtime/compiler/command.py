"""Turn a PyTorch model into an artifact that devices predict and train with."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import numpy as np
import torch
import typer
from torch import nn

from evensong.mobile_runtime.compiler.calibrate import PostTrainingInt8
from evensong.mobile_runtime.compiler.compile import CompiledArtifact, compile
from evensong.mobile_runtime.compiler.int8_training import Int8Training
from evensong.mobile_runtime.compiler.lora import LoRA
from evensong.mobile_runtime.compiler.optimizer import SGD, Adam, Optimizer
from evensong.mobile_runtime.errors import CompileError
from evensong.mobile_runtime.quantization_report import quantization_report

FAILED = 1

app = typer.Typer(add_completion=False)

_HELP = """Compiles a PyTorch model into one artifact file, which a device runs without PyTorch.

SOURCE names a function that returns the model: my_package.models:build, or a file: model.py:build. The function takes
nothing and returns a torch.nn.Module, or the module and its example inputs.

\b
  evensong compile model.py:build --input 1x28x28 --show-memory
  evensong compile model.py:build --input 9x128 --trainable 'head.*' --int8 calibration.npz
  evensong compile model.py:build --input 1x28x28 --trainable none --int8 calibration.npz --report
  evensong compile model.py:build --input 1x28x28 --int8-training calibration.npz
  evensong compile evensong.mobile_runtime.compiler.zoo:har_cnn --input 9x128 --memory-budget 512K

The learning rate is not compiled in: it comes with each training step.
"""

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
_DTYPES = {"float32": torch.float32, "int32": torch.int32, "int64": torch.int64, "uint8": torch.uint8}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code: 0 done, 1 the model cannot be compiled, 2 wrong use."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        result = typer.main.get_command(app).main(arguments, prog_name="evensong compile", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except CompileError as error:
        print(f"evensong compile: {error}", file=sys.stderr)
        return FAILED
    except typer.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code


@app.command(help=_HELP, no_args_is_help=True)
def run(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="module:function or file.py:function.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; NAME.evsg by default.")] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of one example: 1x28x28, 16:int64, 3x96x96:uint8; repeat for each input."),
    ] = None,
    loss: Annotated[str, typer.Option(help="cross_entropy, mse or bce.")] = "cross_entropy",
    trainable: Annotated[
        list[str] | None,
        typer.Option(
            help="Parameters or layers to train: patterns (repeatable), last-N, biases or none; all by default."
        ),
    ] = None,
    lora: Annotated[
        int | None, typer.Option(help="Train low-rank adapters of this rank on the layers that --trainable names.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Their strength times the rank; the rank by default.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, adam or adamw.")] = "sgd",
    momentum: Annotated[float, typer.Option(help="Of sgd.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Of every optimiser.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="The most examples of one training step.")] = 32,
    predict_batch: Annotated[int, typer.Option(help="The most examples of one prediction.")] = 1,
    memory_budget: Annotated[
        str | None, typer.Option(help="Bytes that training may take in all: 512K, 4M. Refused if it cannot be met.")
    ] = None,
    int8: Annotated[
        Path | None, typer.Option(help="Calibration examples (.npz or .npy): what is frozen then runs in int8.")
    ] = None,
    int8_training: Annotated[
        Path | None, typer.Option("--int8-training", help="Calibration examples: what is trainable trains in int8.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="With --int8: error and time of each layer against float32.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the model; the function's by default.")] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the classes, separated by commas.")] = None,
    show_memory: Annotated[bool, typer.Option("--show-memory", help="Print what takes the memory.")] = False,
) -> None:
    """Compiles, writes the file, prints its hash and its memory."""
    model, examples = _build(source, [_example(shape) for shape in inputs or []])
    title = name or source.rpartition(":")[2]
    calibration = None if int8 is None else _calibration(int8)
    if int8 is not None and int8_training is not None:
        raise CompileError("--int8 and --int8-training exclude each other", fix="The second does the first's work too.")
    if report and calibration is None:
        raise CompileError("--report compares int8 with float32", fix="Give calibration examples with --int8.")
    compiled = compile(
        model,
        examples,
        loss=loss,
        trainable=_trainable(trainable, lora, lora_alpha),
        quantize=_quantization(calibration, int8_training),
        optimizer=_optimizer(optimizer, momentum, weight_decay),
        batch_size=batch_size,
        predict_batch=predict_batch,
        memory_budget=None if memory_budget is None else _bytes(memory_budget),
        name=title,
        labels=labels.split(",") if labels else None,
    )
    path = compiled.save(output or Path(f"{title}.evsg"))
    _report(compiled, path, show_memory)
    if report and calibration is not None:
        exact = compile(model, examples, trainable="none", predict_batch=predict_batch)
        print(f"\n{quantization_report(exact, compiled, calibration)}")


def _quantization(calibration: list[Any] | None, int8_training: Path | None) -> PostTrainingInt8 | Int8Training | None:
    if int8_training is not None:
        return Int8Training(_calibration(int8_training))
    return None if calibration is None else PostTrainingInt8(calibration)


def _report(compiled: CompiledArtifact, path: Path, show_memory: bool) -> None:
    memory = compiled.memory()
    print(f"{path}  {len(compiled.to_bytes()):,} bytes  sha256 {compiled.hash}")
    if show_memory:
        print(f"\n{memory}\n\n{memory.explain()}")
    else:
        training = f", training {memory.training_peak:,}" if memory.training_peak else ""
        print(f"memory: inference {memory.inference_peak:,}{training} bytes (--show-memory tells what takes it)")


def _build(source: str, examples: list[torch.Tensor]) -> tuple[nn.Module, list[Any]]:
    """The model of ``source``, and its example inputs: those given win over those that it returns."""
    made = _function(source)()
    model, own = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise CompileError(f"{source} does not return a model", expected="a torch.nn.Module", got=type(model).__name__)
    if not examples and own is None:
        raise CompileError("the shape of an example is missing", fix="Give --input, such as --input 1x28x28.")
    return model, examples or (list(own) if isinstance(own, (list, tuple)) else [own])


def _function(source: str) -> Callable[[], Any]:
    place, _, name = source.rpartition(":")
    if not place or not name:
        raise CompileError("SOURCE is not a function", expected="module:function or file.py:function", got=source)
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as error:
        raise CompileError(f"{place} cannot be imported", got=error, fix="Run where Python finds it.") from error
    function: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(function):
        raise CompileError(f"{place} has no function {name!r}")
    return function


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise CompileError(f"{path} is not a Python file that can be read")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _example(text: str) -> torch.Tensor:
    sizes, _, dtype = text.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or (dtype or "float32") not in _DTYPES:
        raise CompileError(
            "--input is not a shape",
            expected="such as 1x28x28, or 16:int64 for token ids, or 256:uint8 for text",
            got=text,
        )
    return torch.zeros(1, *map(int, sizes.split("x")), dtype=_DTYPES[dtype or "float32"])


def _calibration(path: Path) -> list[Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CompileError(f"{path} holds no arrays", expected="a .npz or .npy file", got=error) from error
    return [loaded] if isinstance(loaded, np.ndarray) else [loaded[name] for name in loaded.files]


def _optimizer(kind: str, momentum: float, weight_decay: float) -> Optimizer:
    if kind == "sgd":
        return SGD(momentum=momentum, weight_decay=weight_decay)
    if kind not in ("adam", "adamw") or momentum:
        raise CompileError("unknown optimiser", expected="sgd (with --momentum), adam or adamw", got=kind)
    return Adam(weight_decay=weight_decay, decoupled=kind == "adamw")


def _trainable(names: list[str] | None, rank: int | None, alpha: float | None) -> Sequence[str] | str | LoRA | None:
    if rank is not None:
        return LoRA(rank, alpha, targets=names or ["*"])
    return names[0] if names and len(names) == 1 else names


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise CompileError("--memory-budget is not a size", expected="bytes, or such as 512K or 4M", got=text)
    return int(float(found[1]) * _UNITS[found[2].upper()])
