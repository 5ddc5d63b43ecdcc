"""Refusals in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`.

In: whatever a route of this protocol raises. Out: a JSON answer, or the error of a stream that has begun. Refuses to
know the Tinker protocol's errors, which have a shape of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from lorica.core.errors import LoricaError, did_you_mean
from lorica.engine.link import EngineError
from lorica.server.errors import ApiError, explain_validation, status_of, told_of

log = logging.getLogger("lorica.server.openai")

INVALID = "invalid_request_error"
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
BUG = "The server met an error of its own; its log says more."


class RefusedError(ApiError):
    """A refusal that names the parameter at fault."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(status, code, message)
        self.param = param


def shape(status: int, code: str | None, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an answer that refuses."""
    kind = TYPES.get(status, INVALID if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explain(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and body for an error; what nobody foresaw is logged and told without its trace."""
    if isinstance(error, EngineError):
        status = 400 if error.category == "user" else 500
        return status, shape(status, error.code, error.message)
    if isinstance(error, LoricaError):
        status = status_of(error)
        return status, shape(status, error.code, told_of(error), getattr(error, "param", None))
    if isinstance(error, HTTPException):  # FastAPI's own, of a body that it cannot read
        return error.status_code, shape(error.status_code, "http", str(error.detail))
    log.error("a request failed", exc_info=error)
    return 500, shape(500, "server", BUG)


def _explain_body(error: RequestValidationError, body: type[BaseModel] | None) -> dict[str, Any]:
    """One sentence for the first thing that did not validate."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "unsupported":
        return shape(400, "unsupported", first["ctx"]["sentence"], first["ctx"]["param"])
    if first["type"] == "extra_forbidden" and body is not None:
        known = _names(body, where)
        near = did_you_mean(where[-1], known) or f" Known are {', '.join(known)}."
        return shape(400, "unknown_parameter", f"There is no parameter {'.'.join(where)!r}.{near}", ".".join(where))
    if first["type"] == "json_invalid":
        return shape(400, "json", "The body is not JSON.")
    param = where[0] if where else None
    field = body.model_fields.get(param or "") if body is not None else None
    if field is not None and len(where) > 1 and not _models(field.annotation):
        return shape(400, "validation", f"{param} does not fit: it is {field.description}.", param)
    return shape(400, "validation", explain_validation([first]), param)


def _names(body: type[BaseModel], where: list[str]) -> list[str]:
    """What may be said where an unknown name was found."""
    if len(where) > 1:
        for inner in _models(body.model_fields[where[0]].annotation):
            return list(inner.model_fields)
    return list(body.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    parts = getattr(annotation, "__args__", (annotation,))
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


class OpenAIRoute(APIRoute):
    """A route whose every error has OpenAI's shape: of its dependencies and its body, too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        known: Any = self.body_field.field_info.annotation if self.body_field else None
        body: type[BaseModel] | None = known if isinstance(known, type) and issubclass(known, BaseModel) else None

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return JSONResponse(_explain_body(error, body), 400)
            except Exception as error:
                status, told = explain(error)
                return JSONResponse(told, status, error.headers if isinstance(error, ApiError) else None)

        return handler
