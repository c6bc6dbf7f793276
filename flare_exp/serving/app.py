"""Answer requests over HTTP with the model of a finished run."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from flare_exp.data.rows import Row
from flare_exp.experiment.predicting import LoadedRun, Result
from flare_exp.experiment.translating import UnknownText
from flare_exp.serving.batching import Batcher, TooBusy
from flare_exp.serving.prediction import said
from flare_exp.serving.requests import Limits, Refused, read_body, rows_of

log = logging.getLogger(__name__)
Follow = Callable[[Request], Awaitable[Response]]
# the page loads nothing from elsewhere, and no other page may show it
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Access:
    """Decide who may ask.

    Attributes:
        token: what a client must send as `Authorization: Bearer <token>`; None: everybody may ask.
        hosts: names that a client may call the server by, against pages that rebind a name of
            theirs to this address; empty: any name.
    """

    token: str | None = None
    hosts: tuple[str, ...] = ()

    def check_host(self, request: Request) -> None:
        """Check the name by which a request calls the server.

        Raises:
            Refused: it is another one.
        """
        try:
            known = not self.hosts or request.url.hostname in self.hosts
        except ValueError:
            known = False
        if not known:
            raise Refused(421, f"call this server by one of {', '.join(self.hosts)}")

    def check_token(self, request: Request) -> None:
        """Check the token of a request.

        Raises:
            Refused: there is none, or it is wrong.
        """
        given = request.headers.get("authorization", "")
        wanted = f"Bearer {self.token}"
        if self.token and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise Refused(401, "send the server's token: Authorization: Bearer <token>")


class Metrics:
    """Count what is answered, in the form of Prometheus."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "flare_requests", "Requests by status code", ["status"], registry=own
        )
        self.texts = Counter("flare_texts", "Texts that were predicted", registry=own)
        self.seconds = Histogram("flare_request_seconds", "Seconds of a request", registry=own)
        self.batch = Histogram(
            "flare_batch_texts", "Texts of a batch", buckets=BUCKETS, registry=own
        )
        self.waiting = Gauge("flare_waiting_texts", "Texts that wait for the model", registry=own)

    def batch_seen(self, count: int) -> None:
        """Count a batch of so many texts."""
        self.texts.inc(count)
        self.batch.observe(count)


def make_app(run: LoadedRun, limits: Limits, access: Access) -> FastAPI:
    """Make the application that serves a run.

    Args:
        run: the loaded run.
        limits: limits of a request.
        access: who may ask.
    """
    metrics = Metrics()
    batcher = Batcher(
        lambda rows: predict(run, rows),
        run.run.cfg.data.batch_size,
        limits.waiting,
        metrics.batch_seen,
    )
    metrics.waiting.set_function(lambda: len(batcher.waiting))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(batcher.work())
        yield
        working.cancel()
        await asyncio.wait([working])

    app = FastAPI(title="flare_exp", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.batcher = batcher
    app.state.cut_off = 0  # requests that the end of the server has cut off
    _add_guard(app, metrics, access)
    _add_pages(app, run, metrics, access, limits)

    schema = _schema(run.task.fields, run.sources.parts)

    @app.post("/predict", openapi_extra={"requestBody": schema})
    async def answer(request: Request) -> JSONResponse:
        """Predict the label or the answer of every text."""
        access.check_token(request)
        body = await read_body(request, limits)
        rows = rows_of(body, run.task.fields, run.sources.parts, limits)
        results = await _asked(batcher, rows, limits)
        return JSONResponse({"predictions": [shown(run, result) for result in results]})

    return app


def predict(run: LoadedRun, rows: Sequence[Row]) -> list[Result]:
    """Predict a batch of rows."""
    sources = [row.source for row in rows] if run.reads_sources else None
    return list(run.stream([row.texts for row in rows], sources))


def shown(run: LoadedRun, result: Result) -> dict[str, Any]:
    """Return a result as JSON shows it."""
    found = {**said(run, result), "cut": result.cut}
    if result.english_prediction is not None:
        found["english_prediction"] = result.english_prediction
    if result.source is not None:
        several = len(result.source) > 1
        by_part = dict(zip(run.sources.parts, result.source, strict=True))
        found["source"] = by_part if several else result.source[0]
    return found


async def _asked(batcher: Batcher, rows: Sequence[Row], limits: Limits) -> list[Result]:
    """Return the results of some rows, or refuse with the reason why there are none."""
    try:
        return await asyncio.wait_for(batcher.ask(rows), limits.seconds)
    except asyncio.TimeoutError:
        raise Refused(504, f"not answered within {limits.seconds:g} seconds") from None
    except TooBusy:
        raise Refused(503, f"{limits.waiting:,} texts wait already; try again later") from None
    except UnknownText as error:
        raise Refused(422, str(error)) from None


def _refusal(error: Refused) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
    return JSONResponse({"error": error.message}, error.status, headers.get(error.status))


def _add_guard(app: FastAPI, metrics: Metrics, access: Access) -> None:
    """Count requests, and answer every error with one JSON object that shows nothing inside."""

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> JSONResponse:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    async def refuse_path(_: Request, error: HTTPException) -> JSONResponse:
        said = {404: "there is no such page", 405: "this page does not take this method"}
        message = said.get(error.status_code, "the request cannot be read")
        return JSONResponse({"error": message}, error.status_code, error.headers)

    @app.middleware("http")
    async def guard(request: Request, follow: Follow) -> Response:
        start = time.perf_counter()
        try:
            access.check_host(request)
            response = await follow(request)
        except Refused as error:
            response = _refusal(error)
        except asyncio.CancelledError:
            app.state.cut_off += 1
            response = _refusal(Refused(503, "the server ends; ask again later"))
        except Exception:
            log.exception("a request failed")
            response = _refusal(Refused(500, "an error inside the server; its log says more"))
        metrics.requests.labels(response.status_code).inc()
        if request.url.path == "/predict":
            metrics.seconds.observe(time.perf_counter() - start)
        return response


def _add_pages(
    app: FastAPI, run: LoadedRun, metrics: Metrics, access: Access, limits: Limits
) -> None:
    """Add what is read with GET."""
    cfg, page = run.run.cfg, (files(__package__) / "page.html").read_text(encoding="utf-8")
    facts = {
        "status": "ok",
        "task": run.task.name,
        "lang": cfg.task.lang,
        "model": cfg.model.name,
        "method": cfg.method.name,
        "fields": list(run.task.fields),
        "labels": list(run.task.labels),
        "reads_sources": run.reads_sources,
        "sources": list(run.sources.parts),
        "needs_token": access.token is not None,
        "limits": {"texts": limits.texts, "length": limits.length, "body": limits.body},
    }

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Say that the server answers, and what it serves."""
        return facts

    @app.get("/metrics")
    async def measured(request: Request) -> PlainTextResponse:
        """Return counts and times in the form of Prometheus."""
        access.check_token(request)
        return PlainTextResponse(generate_latest(metrics.registry))

    @app.get("/", include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})


def _schema(fields: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
    """Return the body of a request in the form of OpenAPI.

    Args:
        fields: names of a text's fields.
        sources: names of its source texts; empty: it has none.
    """

    def form_of(names: Sequence[str]) -> dict[str, Any]:
        if len(names) == 1:
            return {"type": "string"}
        each = {name: {"type": "string"} for name in names}
        return {"type": "object", "properties": each, "required": list(names)}

    properties = {"texts": {"type": "array", "items": form_of(fields), "minItems": 1}}
    if sources:
        either = {"anyOf": [form_of(sources), {"type": "null"}]}
        properties["sources"] = {"type": "array", "items": either}
    form = {"type": "object", "properties": properties, "required": ["texts"]}
    return {"required": True, "content": {"application/json": {"schema": form}}}
