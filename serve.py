"""Serves the model over an OpenAI-compatible HTTP API, with Ray Serve behind it: `python serve.py`.

Takes requests at /v1/chat/completions, in batches where they come together, streamed or not; /v1/models, /health,
/metrics and /openapi.json besides. Listens on this machine only unless `--host` says otherwise. Where the environment
variable SMOLLM_API_KEY is set, clients must send it. SIGINT and SIGTERM end it once all it has accepted is answered.
"""

import argparse
import asyncio
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

API_KEY = "SMOLLM_API_KEY"

logger = logging.getLogger("serving")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: without the name of the command; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        default=str(Path(__file__).resolve().parent),
        help="folder or Hub repository (default: the model in this repository); its code is run",
    )
    parser.add_argument("--revision", help="revision of the Hub repository")
    parser.add_argument("--model_name", default="smollm-diffusion", help="name that requests ask for")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one and prints it (default: 8000)")
    parser.add_argument("--replicas", type=_positive, default=1, help="processes with a model each (default: 1)")
    parser.add_argument("--max_batch_size", type=_positive, default=8, help="most requests of a batch (default: 8)")
    parser.add_argument(
        "--batch_wait_ms", type=_amount, default=5.0, help="how long a request waits for others (default: 5)"
    )
    parser.add_argument(
        "--max_queued", type=_positive, default=64, help="most requests that wait or run; further ones get 429"
    )
    parser.add_argument("--request_timeout_s", type=_amount, default=60.0, help="most seconds of a request")
    parser.add_argument("--max_body_bytes", type=_positive, default=1_000_000, help="most bytes of a body")
    parser.add_argument("--max_messages", type=_positive, default=1000, help="most messages of a request")
    parser.add_argument("--max_tools", type=_positive, default=128, help="most tools of a request")
    parser.add_argument(
        "--prompt_cache_mb",
        type=int,
        default=256,
        help="megabytes of prompts that each replica keeps, so that what they share is run once; 0 keeps none",
    )
    parser.add_argument("--device", help="as torch names it (default: CUDA where there is one, else the CPU)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default: float32 on the CPU, elsewhere as stored)",
    )
    parser.add_argument(
        "--threads", type=_positive, help="threads of each replica on the CPU (default: the cores, shared out)"
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return value


async def serve_until_told(app: object, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then refuse new requests, finish the accepted ones, and return.

    Args:
        app: of `serving.app.create_app`.
        listener: the bound socket.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals to us: uvicorn would close its socket at once, and new requests would get no answer."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server, told = Server(config), asyncio.Event()

    def on_signal() -> None:
        if told.is_set():
            logger.warning("told twice: requests that still run are dropped")
            server.should_exit = server.force_exit = True
        told.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)

    async def drain() -> None:
        await told.wait()
        gate = app.state.gate  # type: ignore[attr-defined]
        logger.info("shutting down: %d requests are still answered", gate.inside)
        await gate.drain()
        server.should_exit = True

    draining = asyncio.create_task(drain())
    await server.serve(sockets=[listener])
    draining.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A listening address.

    Raises:
        SystemExit: it cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise SystemExit(f"{host}:{port} cannot be listened on ({error}): choose another --host or --port.") from None
    return listener


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def ray_environment() -> dict[str, str]:
    """What Ray reads when it is imported: it reports nothing, and its own ports are for this machine and user."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in spite of its name, what keeps all ports on the loopback
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def main() -> None:
    """Run the command."""
    given = options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if Path(given.model).exists() and not (Path(given.model) / "config.json").is_file():
        raise SystemExit(f"--model {given.model}: there is no config.json, so this is no model.")
    for name, value in ray_environment().items():
        os.environ.setdefault(name, value)
    try:
        from serving import replicas
        from serving.app import Settings, create_app
        from serving.protocol import Limits
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error.name} is not installed: pip install -e ".[serving]"') from None
    # Before the model loads, so that a port that is taken shows at once.
    listener = bind(given.host, given.port)
    host, port = listener.getsockname()[:2]
    api_key = os.environ.get(API_KEY) or None
    if not is_loopback(host):
        keeps_out = f"clients must send the key in {API_KEY}" if api_key else f"without a key: set {API_KEY}"
        logger.warning("listening on %s, so that other machines can send requests; %s", host, keeps_out)
    threads = given.threads or max(1, (os.cpu_count() or 1) // given.replicas)
    logger.info("starting %d replica(s) of %s", given.replicas, given.model)
    how = replicas.ReplicaSettings(
        model=given.model if not Path(given.model).is_dir() else str(Path(given.model).resolve()),
        revision=given.revision,
        replicas=given.replicas,
        max_batch_size=given.max_batch_size,
        batch_wait_ms=given.batch_wait_ms,
        prompt_cache_mb=given.prompt_cache_mb,
        device=given.device,
        dtype=given.dtype,
        threads=threads,
    )
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(replicas.running(how))
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
        limits = Limits(given.max_body_bytes, given.max_messages, given.max_tools)
        settings = Settings(given.model_name, limits, given.max_queued, given.request_timeout_s, api_key)
        shown = f"[{host}]" if ":" in host else host
        logger.info("ready: http://%s:%d/v1 serves %s", shown, port, given.model_name)
        asyncio.run(serve_until_told(create_app(engine, settings), listener))
    logger.info("stopped")


if __name__ == "__main__":
    main()
