"""app: the HTTP endpoint, in OpenAI's form; vLLM's form for loading and unloading adapters."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from launcher.serving.guard import Guard, Rules
from launcher.serving.journal import NOTE, Counts, Journal
from launcher.serving.problems import ApiError
from launcher.serving.requests import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest, refused
from launcher.serving.service import Service
from launcher.serving.stream import Answer, Asked, Stream, whole


def make_app(service: Service, rules: Rules) -> Journal:
    """The application, behind its guard, every request on the record."""
    counts = Counts()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_reading(app, service, counts)
    _add_answering(app, service)
    _add_adapters(app, service)
    return Journal(Guard(app, rules), counts)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> Response:
        problem = refused(error.errors())
        return JSONResponse(problem.body(), problem.status)

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> Response:
        problem = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(problem.body(), problem.status, error.headers)

    @app.exception_handler(Exception)
    async def ours(_request: Request, error: Exception) -> Response:
        problem = ApiError(500, f"the server failed: {type(error).__name__}")
        return JSONResponse(problem.body(), problem.status)


def _add_reading(app: FastAPI, service: Service, counts: Counts) -> None:
    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, Any]:
        if not service.engine.alive:
            raise ApiError(503, "the model's thread has ended")
        return {"status": "ok", **service.engine.load()}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(counts.text(service.engine.load()), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.names.listed()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return service.names.told(service.names.find(name))


def _add_answering(app: FastAPI, service: Service) -> None:
    # Long texts take a while to become tokens; meanwhile others are answered.
    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        note = _noted(request, asked)
        return await _answer(request, asked, await asyncio.to_thread(service.chat, asked, Answer(), note))

    @app.post("/v1/completions")
    async def completion(asked: CompletionRequest, request: Request) -> Response:
        note = _noted(request, asked)
        return await _answer(request, asked, await asyncio.to_thread(service.completion, asked, Answer(), note))

    def _noted(request: Request, asked: ChatRequest | CompletionRequest) -> dict[str, Any]:
        note: dict[str, Any] = request.scope[NOTE]
        note["model"] = asked.model
        return note

    async def _answer(request: Request, asked: ChatRequest | CompletionRequest, found: Asked) -> Response:
        service.engine.submit(*found.rows)
        if asked.stream:
            return Stream(found, with_usage=asked.wants_usage)
        return JSONResponse(await whole(request, found))


def _add_adapters(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(asked: LoadRequest, request: Request) -> Response:
        request.scope[NOTE]["model"] = asked.lora_name
        entry = await service.load(asked)
        return PlainTextResponse(f"Success: LoRA adapter '{entry.name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(asked: UnloadRequest, request: Request) -> Response:
        request.scope[NOTE]["model"] = asked.lora_name
        service.unload(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
