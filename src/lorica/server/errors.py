"""What a client is told when something is wrong: a status, a code, one sentence and perhaps a hint.

In: exceptions. Out: typed JSON, `{"detail", "error", "code", "hint"}`; the SDK shows `detail`. A bug is logged with its
trace and told as one sentence without it. Refuses to know routes.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lorica.core.errors import LoricaError, MissingError, StorageError

log = logging.getLogger("lorica.server")


class ApiError(LoricaError):
    """A refusal with an HTTP status. `headers` may ask the client to wait."""

    def __init__(
        self, status: int, code: str, message: str, *, hint: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.headers = headers


def not_found(what: str, name: str) -> ApiError:
    """The answer for what does not exist and for what belongs to somebody else: the same."""
    return ApiError(404, "missing", f"There is no {what} {name!r}.")


def busy(message: str, *, seconds: float = 1.0, code: str = "rate_limit") -> ApiError:
    """Too much at once: the SDK waits and sends the same request again."""
    return ApiError(429, code, message, headers={"retry-after-ms": str(int(1000 * seconds))})


def status_of(error: LoricaError) -> int:
    """The HTTP status that an error is answered with."""
    if isinstance(error, ApiError):
        return error.status
    return 404 if isinstance(error, MissingError) else 503 if isinstance(error, StorageError) else 400


def told_of(error: LoricaError) -> str:
    """What a client hears of an error, in one text: never the server's paths."""
    if isinstance(error, StorageError):
        return error.public
    return f"{error.message} {error.hint}" if error.hint else error.message


def body(code: str, message: str, hint: str | None = None) -> dict[str, Any]:
    return {"detail": message, "error": message, "code": code, "hint": hint}


def explain_validation(errors: Any) -> str:
    """One sentence for the first thing that did not validate."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    given = first.get("input")
    shown = "" if isinstance(given, dict | list) or first["type"] == "missing" else f" (given: {str(given)[:80]!r})"
    return f"{where or 'The body'}: {first['msg'].rstrip('.')}{shown}."


def install(app: FastAPI) -> None:
    """Register the handlers."""

    @app.exception_handler(LoricaError)
    async def _lorica(request: Request, error: LoricaError) -> JSONResponse:
        status = status_of(error)
        if isinstance(error, StorageError):
            log.error("storage: %s", error.message)
        headers = error.headers if isinstance(error, ApiError) else None
        message = error.public if isinstance(error, StorageError) else error.message
        return JSONResponse(body(error.code, message, error.hint), status, headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [{"loc": e["loc"], "msg": e["msg"], "type": e["type"]} for e in error.errors()]
        told = body("validation", explain_validation(error.errors()))
        return JSONResponse({**told, "problems": jsonable_encoder(problems)}, 422)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(body("http", str(error.detail)), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(body("server", "The server met an error of its own; its log says more."), 500)
