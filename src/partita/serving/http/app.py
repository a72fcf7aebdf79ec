"""The routes of the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from partita.errors import PartitaError
from partita.serving.embedding import NO_TEXT
from partita.serving.http.errors import ApiError, as_api_error
from partita.serving.http.gate import Gate
from partita.serving.http.openai import tools as chat_tools
from partita.serving.http.openai.bodies import LoadBody, TokenizeBody, parse
from partita.serving.http.openai.chat import chat
from partita.serving.http.openai.completions import completions
from partita.serving.http.openai.embeddings import embeddings
from partita.serving.http.openai.responses import delete_response, response, responses
from partita.serving.http.service import Service

CONTINUE = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""The paths that continue a text."""

Handler = Callable[[Request, Service], Awaitable[Response]]
NOTHING_ELSE = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
"""The page loads nothing, neither from this server nor from others; it only asks this server's API."""


def make_app(service: Service) -> Gate:
    """The server of a model, as an ASGI application; its `service` may be replaced by that of another model."""
    table: tuple[tuple[str, str, Handler], ...] = (
        ("GET", "/", _page),
        ("GET", "/health", _health),
        ("GET", "/metrics", _metrics),
        ("GET", "/plan", _plan),
        ("GET", "/v1/models", _models),
        ("GET", "/v1/models/{model:path}", _model),
        ("GET", "/models", _library),
        ("POST", "/models/load", _load),
        ("POST", "/tokenize", _tokenize),
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/v1/completions", completions),
        ("POST", "/v1/embeddings", embeddings),
        ("POST", "/v1/responses", responses),
        ("GET", "/v1/responses/{id}", response),
        ("DELETE", "/v1/responses/{id}", delete_response),
    )

    def bound(path: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            service = gate.service
            if path in CONTINUE and service.embeddings is not None:
                raise ApiError(400, NO_TEXT, param="model")
            return await handler(request, service)

        return handle

    routes = [Route(path, bound(path, handler), methods=[method]) for method, path, handler in table]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _failure}
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    gate = Gate(app, service, {path for _, path, _ in table})
    return gate


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    text = f"{request.method} {request.url.path:.200}: {error.detail}."
    response = ApiError(error.status_code, text, code="not_found" if error.status_code == 404 else None).response()
    response.headers.update(error.headers or {})
    return response


async def _failure(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _page(request: Request, service: Service) -> Response:
    text = files("partita.serving.http").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"content-security-policy": NOTHING_ELSE})


async def _health(request: Request, service: Service) -> Response:
    why = service.closed
    return JSONResponse({"status": "unavailable", "reason": why} if why else {"status": "ok"}, 503 if why else 200)


async def _metrics(request: Request, service: Service) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _plan(request: Request, service: Service) -> Response:
    return JSONResponse(service.plan)


def _described(service: Service, name: str) -> dict[str, object]:
    return {
        "id": name, "object": "model", "created": service.created_s, "owned_by": "partita",
        "parent": service.model if name in service.adapters else None, "max_model_len": service.context,
    }  # fmt: skip


async def _models(request: Request, service: Service) -> Response:
    return JSONResponse({"object": "list", "data": [_described(service, name) for name in service.names]})


async def _model(request: Request, service: Service) -> Response:
    return JSONResponse(_described(service, service.model_of(request.path_params["model"])))


async def _library(request: Request, service: Service) -> Response:
    others = [] if service.library is None else service.library.names()
    names = sorted({service.model, *others})
    data = [
        {"id": name, "object": "model", "status": {"value": "loaded" if name == service.model else "unloaded"}}
        for name in names
    ]
    return JSONResponse({"object": "list", "data": data})


async def _load(request: Request, service: Service) -> Response:
    body, library = parse(LoadBody, await request.body()), service.library
    if library is None:
        text = "this server loads no other model: it was started without --models, or gives embeddings."
        raise ApiError(404, text, param="model")
    if body.model != service.model and body.model not in library.names():
        known = ", ".join(map(repr, library.names()))
        text = f"there is no model {body.model!r:.100} among those that can be loaded: {known}."
        raise ApiError(404, text, param="model", code="model_not_found")
    if why := service.closed:
        raise ApiError(503, f"no other model can be loaded now: {why}.", code="unavailable")
    if body.model != service.model:
        try:
            await anyio.to_thread.run_sync(library.load, body.model)
        except PartitaError as error:
            raise as_api_error(error, "model") from error
    return JSONResponse({"success": True, "model": body.model})


async def _tokenize(request: Request, service: Service) -> Response:
    body = parse(TokenizeBody, await request.body())
    service.model_of(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give one of prompt and messages.", param="prompt")
    settings = chat_tools.template_settings(body.chat_template_kwargs, service.tokenizer)
    messages = chat_tools.as_template_messages(body.messages or ())

    def encode() -> list[int]:
        if body.prompt is not None:
            return service.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        ids, _ = service.encode_messages(
            messages, tools=chat_tools.described(body.tools), settings=settings,
            add_generation_prompt=body.add_generation_prompt,
        )  # fmt: skip
        return ids

    ids = await service.encode(encode, "prompt" if body.messages is None else "messages")
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.context})
