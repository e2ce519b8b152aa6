"""A classifier behind HTTP, in this process: MLflow's scoring protocol, with the requests of one moment in one pass."""

import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from jobs.batching import MOST_WAITING, Batcher, Overloaded
from jobs.scoring import scorer
from jobs.scoring_protocol import EXAMPLE, JSON, Refused, texts_of
from jobs.use import classifier, predictions
from pipeline.errors import EnvironmentProblem

TOO_LARGE = "REQUEST_TOO_LARGE"
GRACE_SECONDS = 30
"""How long requests in flight may take after SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a classifier is served."""

    host: str = "127.0.0.1"
    port: int = 5001
    max_batch: int = 64
    max_wait_ms: float = 1.0
    max_body_mib: int = 16
    precision: str = "fp32"


def serve(model: str, options: ServeOptions, say: Callable[[str], None]) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what is in flight. Raises UsageError, EnvironmentProblem."""
    loaded = classifier(model)
    score = scorer(loaded, options.precision)
    score(["the first pass takes longest"])
    batcher = Batcher(score, options.max_batch, options.max_wait_ms / 1000)
    app = create_app(batcher, loaded.labels, options.max_body_mib << 20, multi_label=loaded.multi_label)
    with _bound(options.host, options.port) as listening:
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        curl = f"curl {url}/invocations -H 'Content-Type: {JSON}' -d '{EXAMPLE}'"
        config = uvicorn.Config(
            app, lifespan="on", log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
        )
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn stops in order, then raises the signal once more
            signal.signal(number, lambda *_: None)
        _Server(config, lambda: say(f"{model} is ready at {url}  Try: {curl}")).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named as TCP, or asyncio leaves Nagle's algorithm on, which holds back the end of an answer for 40 ms
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise EnvironmentProblem(
            f"{host}:{port}: cannot listen there: {reason}. Give another --port or --host"
        ) from error
    return listening


def create_app(batcher: Batcher, labels: Sequence[str], max_body_bytes: int, *, multi_label: bool = False) -> FastAPI:
    """The endpoints of MLflow's scoring server: /ping, /health, /version and /invocations."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        async with batcher.running():
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    async def ping() -> Response:
        return Response("\n", media_type=JSON)

    async def mlflow_version() -> Response:
        return Response(version("mlflow"), media_type=JSON)

    async def invocations(request: Request) -> JSONResponse:
        texts = texts_of(await _body(request, max_body_bytes), request.headers.get("content-type", JSON))
        if len(texts) > MOST_WAITING:
            message = f"{len(texts):,} texts: a request may hold {MOST_WAITING:,}. Send fewer"
            raise Refused(message, 413, TOO_LARGE)
        table = await batcher.answer(texts) if texts else np.zeros((0, len(labels)), np.float32)
        return JSONResponse({"predictions": predictions(labels, table, multi_label=multi_label)})

    app.get("/ping")(ping)
    app.get("/health")(ping)
    app.get("/version")(mlflow_version)
    app.post("/invocations")(invocations)
    app.exception_handler(Refused)(_refuse)
    app.exception_handler(Overloaded)(_turn_away)
    app.exception_handler(ClientDisconnect)(_forget)
    app.exception_handler(Exception)(_admit)
    return app


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises Refused as soon as it is known to be too large."""
    too_large = Refused(f"the body is larger than {limit >> 20} MiB. Send fewer texts", 413, TOO_LARGE)
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused), "registered for Refused"
    del request
    return JSONResponse({"error_code": error.code, "message": str(error)}, error.status)


async def _turn_away(request: Request, error: Exception) -> JSONResponse:
    del request, error
    message = "too many texts are waiting. Try again in a while"
    return JSONResponse({"error_code": "TEMPORARILY_UNAVAILABLE", "message": message}, 503, {"Retry-After": "1"})


async def _forget(request: Request, error: Exception) -> Response:
    """The client left in the middle of its request; nobody reads this."""
    del request, error
    return Response(status_code=400)


async def _admit(request: Request, error: Exception) -> JSONResponse:
    """What is wrong stands in the log of the server, not in its answers."""
    del request, error
    return JSONResponse({"error_code": "INTERNAL_ERROR", "message": "the server failed; its log says how"}, 500)
