"""app: the HTTP endpoint, in OpenAI's form; vLLM's form for loading and unloading adapters."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from launcher.serving.guard import Guard, Rules
from launcher.serving.problems import ApiError
from launcher.serving.replies import Form
from launcher.serving.requests import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest, refused
from launcher.serving.service import Service
from launcher.serving.stream import Answer, pieces, whole


def make_app(service: Service, rules: Rules) -> Guard:
    """The application, behind its guard."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_reading(app, service)
    _add_answering(app, service)
    _add_adapters(app, service)
    return Guard(app, rules)


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
        return JSONResponse(problem.body(), problem.status)


def _add_reading(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        if not service.engine.alive:
            raise ApiError(503, "the model's thread has ended")
        return {"status": "ok", **service.engine.load()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.names.listed()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.names.find(name)
        return next(one for one in service.names.listed() if one["id"] == name)


def _add_answering(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        answer = Answer()
        return await _answer(request, asked, service.chat_row(asked, answer), answer, chat=True)

    @app.post("/v1/completions")
    async def completion(asked: CompletionRequest, request: Request) -> Response:
        answer = Answer()
        return await _answer(request, asked, service.completion_row(asked, answer), answer, chat=False)

    async def _answer(request: Request, asked: Any, row: Any, answer: Answer, *, chat: bool) -> Response:
        form = Form(model=asked.model, chat=chat)
        service.engine.submit(row)
        if not asked.stream:
            return JSONResponse(await whole(request, row, answer, form))
        events = pieces(row, answer, form, with_usage=asked.wants_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _add_adapters(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(asked: LoadRequest) -> Response:
        entry = await service.load(asked)
        return PlainTextResponse(f"Success: LoRA adapter '{entry.name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(asked: UnloadRequest) -> Response:
        service.unload(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
