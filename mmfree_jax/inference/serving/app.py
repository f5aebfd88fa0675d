"""The paths of the server, as a Starlette application: who may ask, how much, and what is measured."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Literal

import anyio
import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mmfree_jax.config import ConfigError
from mmfree_jax.inference import engine as engines
from mmfree_jax.inference.engine import Engine
from mmfree_jax.inference.serving.answers import Answer, Choice, Piece
from mmfree_jax.inference.serving.bodies import Call, Limits, Refused, parse_call, parse_json
from mmfree_jax.inference.serving.chat import ChatTemplate
from mmfree_jax.inference.text import TextModel

Kind = Literal["completion", "chat"]
OPEN_PATHS = ("/health",)  # which need no key
DRAINING = "the server is shutting down"


class Service:
    """A model, the engine that serves it, and what the paths share.

    Attributes:
        draining: no new request is taken; those that have begun go on.
        active: requests that have begun.
        broken: what ended the engine's thread, if something did.
    """

    def __init__(
        self, model: TextModel, name: str, engine: Engine, limits: Limits, chat: ChatTemplate | None, api_key: str
    ):
        self.model, self.name, self.engine, self.limits, self.chat = model, name, engine, limits, chat
        self.api_key, self.born = api_key.encode(), int(time.time())
        self.draining, self.active = False, 0
        self.broken: Exception | None = None
        self._encoding = threading.Lock()  # tokenizers keep caches
        self.metrics = Metrics(engine)

    async def prepare(self, call: Call) -> Answer:
        """Make the choices of a call, for `generating`. Raises Refused where they cannot be served."""
        if call.model not in ("", self.name):
            message = f"there is no model {call.model!r} here, only {self.name!r}"
            raise Refused(message, "model", status=404, code="model_not_found")
        prompts = await anyio.to_thread.run_sync(self._prompts, call)
        count = self._max_tokens(call, prompts)
        self._check(prompts, count, "messages" if call.messages else "prompt")
        queue: asyncio.Queue[Piece] = asyncio.Queue()
        choices = [
            Choice(self.model, call, place * call.n + n, prompt, queue)
            for place, prompt in enumerate(prompts)
            for n in range(call.n)
        ]
        if self.engine.waiting + len(choices) > self.limits.max_queue:
            raise Refused(f"{self.engine.waiting} choices wait already: try again later", status=429, code="queue_full")
        return Answer(self.model, self.name, dataclasses.replace(call, max_tokens=count), choices, queue)

    def _prompts(self, call: Call) -> list[list[int]]:
        """The tokens of a call's prompts."""
        if call.stops and self.model.tokenizer is None:
            raise Refused("stop strings need a tokenizer, and this model's is not known", "stop")
        if call.messages and self.chat is None:
            raise Refused("this model has no chat template: use /v1/completions", "messages")
        with self._encoding:
            if self.chat is not None and call.messages:
                return [self.chat.prompt(call.messages)]
            try:
                return [self.model.encode(prompt) for prompt in call.prompts]
            except ConfigError as error:  # no tokenizer
                raise Refused(str(error), "prompt") from None

    def _max_tokens(self, call: Call, prompts: list[list[int]]) -> int:
        """The tokens to generate for a choice; where the call does not say it, as many as there is room for."""
        if call.max_tokens is not None:
            return call.max_tokens
        room = self.engine.capacity - max(map(len, prompts)) if self.engine.bounded else self.limits.max_tokens
        return max(1, min(self.limits.max_tokens, room))

    def _check(self, prompts: list[list[int]], count: int, name: str) -> None:
        for prompt in prompts:
            if len(prompt) > self.limits.max_prompt:
                raise Refused(f"a prompt has {len(prompt)} tokens; {self.limits.max_prompt} are allowed", name)
            try:
                self.engine.check(prompt, count)
            except ConfigError as error:
                raise Refused(str(error), name, code="context_length_exceeded") from None

    @contextlib.contextmanager
    def generating(self, answer: Answer):
        """Let the engine work on an answer, as long as somebody wants it."""
        call, requests = answer.call, []
        for choice in answer.choices:
            seeded = dataclasses.replace(call.sampling, seed=(call.sampling.seed + choice.index) % 2**32)
            scored, count = call.echo and call.logprobs, call.max_tokens or 0
            requests.append(engines.Request(choice.tokens_of_prompt, count, seeded, choice, call.top, scored))
        began = time.monotonic()
        try:
            for one in requests:
                self.engine.submit(one)
            yield
        finally:
            for one in requests:
                one.cancel()
            self.metrics.observe(answer, began)


class Metrics:
    """What Prometheus reads at /metrics."""

    def __init__(self, engine: Engine):
        self.registry = prometheus.CollectorRegistry()
        known: Any = {"registry": self.registry, "namespace": "mmfree"}
        self.requests = prometheus.Counter("requests", "requests answered", ["path", "status"], **known)
        self.prompt_tokens = prometheus.Counter("prompt_tokens", "tokens of prompts", **known)
        self.tokens = prometheus.Counter("generated_tokens", "tokens generated", **known)
        self.first = prometheus.Histogram("first_token_seconds", "from a request to its first token", **known)
        self.whole = prometheus.Histogram("request_seconds", "from a request to its last token", **known)
        prometheus.Gauge("choices_waiting", "choices without a slot", **known).set_function(lambda: engine.waiting)
        prometheus.Gauge("choices_decoding", "choices in a slot", **known).set_function(lambda: engine.decoding)
        prometheus.Gauge("slots", "choices that can decode together", **known).set(engine.slots)

    def observe(self, answer: Answer, began: float) -> None:
        """Count an answer that has ended, or is given up."""
        for choice in answer.choices:
            self.prompt_tokens.inc(len(choice.tokens_of_prompt) if choice.index % answer.call.n == 0 else 0)
            self.tokens.inc(len(choice.tokens))
            if choice.first_at:
                self.first.observe(choice.first_at - began)
        self.whole.observe(time.monotonic() - began)


def make_app(service: Service) -> Starlette:
    """Return the application that serves a model."""

    async def models(request: Request) -> Response:
        one = {"id": service.name, "object": "model", "created": service.born, "owned_by": "mmfree_jax"}
        name = request.path_params.get("name")
        if name not in (None, service.name):
            raise Refused(f"there is no model {name!r} here, only {service.name!r}", status=404, code="model_not_found")
        return JSONResponse(one if name else {"object": "list", "data": [one]})

    async def health(request: Request) -> Response:
        state = "broken" if service.broken else "draining" if service.draining else "ok"
        return JSONResponse({"status": state}, status_code=200 if state == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return Response(prometheus.generate_latest(service.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    def answering(kind: Kind):
        async def endpoint(request: Request) -> Response:
            values = parse_json(await read_body(request, service.limits.max_body))
            answer = await service.prepare(parse_call(values, kind, service.limits))
            if answer.call.stream:
                return Events(service, answer)
            with service.generating(answer):
                return JSONResponse(await while_connected(request, whole(answer)))

        return endpoint

    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/v1/completions", answering("completion"), methods=["POST"]),
        Route("/v1/chat/completions", answering("chat"), methods=["POST"]),
    ]
    handlers: Any = {
        Refused: lambda request, refused: refusal(refused),
        HTTPException: lambda request, error: refusal(Refused(str(error.detail), status=error.status_code)),
        ClientDisconnect: lambda request, error: refusal(Refused("the client has gone", status=499)),
        Exception: lambda request, error: refusal(Refused(f"the server failed: {error}", status=500)),
    }
    gate = Middleware(Gate, service=service)
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[gate])


async def whole(answer: Answer) -> dict[str, Any]:
    """Wait for an answer. Raises Refused where the engine fails: an exception that is not handled ends a connection."""
    try:
        return await answer.whole()
    except Exception as error:
        raise failure(error) from None


def failure(error: Exception) -> Refused:
    """Log what went wrong in the engine, and return what the client learns of it."""
    logging.getLogger(__name__).error("a request failed", exc_info=error)
    return Refused(f"the server failed: {error}", status=500)


class Events(StreamingResponse):
    """An answer as server-sent events. The engine works on it while the client is there."""

    def __init__(self, service: Service, answer: Answer):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)
        self.service, self.answer = service, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.service.generating(self.answer):
            await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncIterator[str]:
        event = lambda content: f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
        try:
            async for one in self.answer.stream():
                yield event(one)
        except Exception as error:  # the status is sent already
            yield event(failure(error).as_json())
        yield "data: [DONE]\n\n"


async def read_body(request: Request, most: int) -> bytes:
    """Read a JSON body of at most `most` bytes. Raises Refused for a longer one, and for another type of content."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Browsers ask before they send this type to another site, and so do not let pages of others use the server.
        raise Refused("the content type must be application/json", status=415)
    too_long = Refused(f"the body is longer than {most} bytes", status=413)
    if int(request.headers.get("content-length", "0")) > most:
        raise too_long
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_long
    return body


async def while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """Wait for some work, but not if the client goes away. Raises ClientDisconnect."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(one) for one in (work, gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def refusal(refused: Refused) -> Response:
    """Return the response to a request that is not served."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
    return JSONResponse(refused.as_json(), status_code=refused.status, headers=headers.get(refused.status))


class Gate:
    """What every request passes: the key, and whether the server takes requests at all. It counts them."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status = [500]

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        refused = self._refused(scope)
        self.service.active += 1
        try:
            await (self.app if refused is None else refusal(refused))(scope, receive, noting)
        finally:
            self.service.active -= 1
            path = scope["path"] if any(scope["path"] == route for route in PATHS) else "other"
            self.service.metrics.requests.labels(path, status[0]).inc()

    def _refused(self, scope: Scope) -> Refused | None:
        if scope["path"] in OPEN_PATHS:
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        # In constant time, so that how long a refusal takes says nothing of the key.
        if self.service.api_key and not hmac.compare_digest(given, b"Bearer " + self.service.api_key):
            return Refused("the API key is missing or wrong", status=401, code="invalid_api_key")
        if scope["path"] != "/metrics" and self.service.draining:
            return Refused(DRAINING, status=503, code="draining")
        if scope["path"].startswith("/v1") and self.service.broken:
            return Refused(f"the engine has failed: {self.service.broken}", status=503, code="broken")
        return None


PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")  # named in the metrics
