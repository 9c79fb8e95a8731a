"""Run the coordinator daemon; show its configuration or the operator's token."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import click
import typer

from evensong.coordinator import fault
from evensong.coordinator.config import ConfigurationError, Settings, load
from evensong.coordinator.errors import StorageError
from evensong.coordinator.server import CoordinatorServer

#: Exit codes, besides 0 and Typer's 2 for a wrong command line.
CONFIGURATION, STORAGE = 2, 3

app = typer.Typer(help="The daemon that hands out work and adds up what comes back.", no_args_is_help=True)

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file; the environment and options win over it.")
]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Database, blobs, keys and tokens.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code: 0 done, 2 wrong configuration or command line, 3 the storage failed."""
    try:
        result = typer.main.get_command(app).main(
            list(sys.argv[1:] if argv is None else argv), prog_name="evensong coordinator", standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except ConfigurationError as error:
        print(f"evensong coordinator: {error}", file=sys.stderr)
        return CONFIGURATION
    except StorageError as error:
        print(f"evensong coordinator: {error}", file=sys.stderr)
        return STORAGE
    except typer.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code


@app.command()
def serve(
    config: ConfigFile = None,
    data_dir: DataDir = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT of the socket; port 0 takes a free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Loopback HTTP port for Prometheus.")] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serves devices and operators until SIGTERM or SIGINT, then drains."""
    settings = load(
        config,
        data_dir=data_dir,
        listen=listen,
        metrics_port=metrics_port,
        log_format=log_format,
        log_level=log_level,
    )
    asyncio.run(_serve(settings))


@app.command(name="config")
def show_config(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Prints the settings in force, as JSON."""
    print(json.dumps(load(config, data_dir=data_dir).model_dump(mode="json"), indent=2))


@app.command()
def token(config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Prints the operator's token. The coordinator must have run once."""
    path = load(config, data_dir=data_dir).operator_token_file
    try:
        print(path.read_text().strip())
    except FileNotFoundError:
        raise ConfigurationError(
            "there is no operator token yet", got=path, fix="Start `evensong coordinator serve` once."
        ) from None
    except OSError as error:
        raise StorageError("the operator's token cannot be read", got=error) from None


async def _serve(settings: Settings) -> None:
    server = CoordinatorServer(settings, fault=fault.from_environment())
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    print(f"evensong coordinator listens on {server.address}", flush=True)
    print(f"  data directory   {settings.data_dir}")
    print(f"  operator token   {settings.operator_token_file}")
    if server.metrics_address:
        print(f"  metrics          http://{server.metrics_address}/metrics")
    if settings.tls_certificate is None and not settings.listen.startswith(("127.0.0.1:", "localhost:", "[::1]:")):
        print("  warning          no TLS on an address that other machines can reach", file=sys.stderr)
    sys.stdout.flush()
    await stop.wait()
    print("evensong coordinator drains", flush=True)
    await server.stop()
    print("evensong coordinator stopped", flush=True)


if __name__ == "__main__":
    sys.exit(main())
