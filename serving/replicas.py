"""Replicas of the model on Ray Serve, and the engine that gives requests to them.

Each replica is a process with a model of its own, which Ray starts, checks and replaces. The HTTP application holds on
to each request and gives it to a further replica where one dies before the answer began, so nothing accepted is lost.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve._private import replica as internals
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig, ReplicaState

from serving.interface import Answer, ChatRequest, Event, ReplicaLostError

APPLICATION, DEPLOYMENT = "smollm", "Model"
MAX_ATTEMPTS = 4
"""Replicas that one request is given to at most: a request that itself kills replicas must not kill all of them."""

_SHARED_MEMORY = 100 << 20  # requests and events are small
_START_ATTEMPTS = 3  # Ray's parts wait 15 s for each other, which no setting changes

logger = logging.getLogger("serving")


@dataclass(frozen=True)
class ReplicaSettings:
    """How a replica runs the model.

    Args:
        model: folder or Hub repository.
        revision: of the repository.
        replicas: how many there are.
        max_batch_size: most requests of a batch.
        batch_wait_ms: how long a request waits for others to run with.
        prompt_cache_mb: most megabytes of prompts kept for later requests; 0 keeps none.
        device: as torch names it; None is CUDA where there is one, else the CPU.
        dtype: of the weights; None is float32 on the CPU, elsewhere as stored.
        threads: torch's threads on the CPU.
    """

    model: str
    revision: str | None = None
    replicas: int = 1
    max_batch_size: int = 8
    batch_wait_ms: float = 5.0
    prompt_cache_mb: int = 256
    device: str | None = None
    dtype: str | None = None
    threads: int = 1


def load_engine(settings: ReplicaSettings) -> Any:
    """Load the model into this process.

    Args:
        settings: how to run it.

    Returns:
        A `ModelEngine`.
    """
    # Only replicas need torch.
    import torch
    from filelock import FileLock
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import HF_MODULES_CACHE

    from serving.engine import ModelEngine, module_beside

    torch.set_num_threads(settings.threads)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = settings.dtype or ("float32" if device == "cpu" else "auto")
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    # The first load copies the model's code there, and a second process must not read half of it.
    with FileLock(Path(HF_MODULES_CACHE) / ".smollm_serve.lock"):
        tokenizer = AutoTokenizer.from_pretrained(settings.model, revision=settings.revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=True, dtype=dtype
        )
    model = model.to(device).eval()
    cache = None
    if settings.prompt_cache_mb:
        cache = module_beside(model, "prompt_cache").PromptCache(max_bytes=settings.prompt_cache_mb << 20)
    return ModelEngine(
        model,
        tokenizer,
        max_batch_size=settings.max_batch_size,
        batch_wait_ms=settings.batch_wait_ms,
        prompt_cache=cache,
    )


class Model:
    """One replica."""

    def __init__(self, settings: ReplicaSettings) -> None:
        _keep_to_loopback()
        self.engine = load_engine(settings)

    async def run(self, request: ChatRequest, seconds: float) -> AsyncGenerator[Event]:
        """As in `interface.Engine`."""
        events = self.engine.run(request, seconds)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    def check_health(self) -> None:
        """Ray replaces a replica whose check raises."""
        if (fault := self.engine.fault()) is not None:
            raise RuntimeError(fault)


def _keep_to_loopback() -> None:
    """Let the port that a replica opens for other deployments, which unpickles what comes, be for this machine only.

    Ray has no setting for it. It opens the port after the replica has been made; if a version does so in another way,
    the replica fails here.
    """
    original = internals.add_port_to_grpc_server
    internals.add_port_to_grpc_server = lambda server, _: original(server, "127.0.0.1:0")


class RayEngine:
    """Gives requests to the replicas.

    Args:
        handle: of their deployment.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle.options(stream=True)

    async def run(self, request: ChatRequest, seconds: float) -> AsyncGenerator[Event]:
        """As in `interface.Engine`; requests can be repeated, as long as nothing of the answer was handed on."""
        deadline = time.monotonic() + seconds
        for attempt in range(1, MAX_ATTEMPTS + 1):
            begun = False
            response = self.handle.run.remote(request, deadline - time.monotonic())
            try:
                async for event in response:  # type: ignore[union-attr]
                    begun = True
                    yield replace(event, attempts=attempt) if isinstance(event, Answer) else event
                if begun:
                    return
            except (RayActorError, ReplicaUnavailableError, TaskCancelledError) as error:
                if begun:
                    raise ReplicaLostError("The replica that wrote this answer was lost.") from error
            finally:
                response.cancel()
            await asyncio.sleep(0.1 * attempt)
        raise ReplicaLostError(f"{MAX_ATTEMPTS} replicas that had this request were lost.")

    async def ready(self) -> bool:
        """Whether Ray has a replica that runs."""
        try:
            status = await asyncio.to_thread(serve.status)
        except RayError:
            return False
        application = status.applications.get(APPLICATION)
        deployment = application.deployments.get(DEPLOYMENT) if application is not None else None
        return deployment is not None and deployment.replica_states.get(ReplicaState.RUNNING, 0) > 0


def _start_ray(cpus: int) -> None:
    """Start a cluster of our own on this machine, whatever else runs here."""
    for attempt in range(1, _START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_SHARED_MEMORY,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray raises no kind of its own for it
            if attempt == _START_ATTEMPTS:
                raise RuntimeError(f"Ray does not start: {error}") from error
            logger.warning("Ray did not start in time, as happens on a busy machine; once more")


def _reason() -> str:
    """What the replicas raised when they were made: the last line of the traceback that Ray keeps."""
    message = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].message
    lines = [line for line in message.splitlines() if re.match(r"\w[\w.]*(Error|Exception): ", line)]
    return lines[-1] if lines else message


@contextmanager
def running(settings: ReplicaSettings) -> Iterator[RayEngine]:
    """Start Ray in this process and the replicas, wait until all of them have loaded the model, and stop them at last.

    Args:
        settings: how they run.

    Yields:
        What gives requests to them.

    Raises:
        RuntimeError: a replica cannot load the model.
    """
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.WARNING)
    _start_ray(settings.replicas + 1)
    try:
        gpus = ray.cluster_resources().get("GPU", 0.0) if settings.device is None or "cuda" in settings.device else 0.0
        deployment = serve.deployment(
            name=DEPLOYMENT,
            num_replicas=settings.replicas,
            max_constructor_retry_count=2,
            # One batch runs, the next one waits at the replica; what is behind that goes to whoever has room first.
            max_ongoing_requests=2 * settings.max_batch_size,
            health_check_period_s=2,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=5,
            ray_actor_options={"num_cpus": 1, "num_gpus": min(1.0, gpus / settings.replicas)},
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )(Model)
        serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="WARNING"))
        try:
            handle = serve.run(deployment.bind(settings), name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            raise RuntimeError(f"The replicas do not start: {_reason()}") from error
        yield RayEngine(handle)
    finally:
        ray.shutdown()
