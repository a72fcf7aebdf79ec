"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from partita.errors import PartitaError


class ApiError(Exception):
    """An error that the client receives.

    Attributes:
        status: The HTTP status.
        message: One message for the client.
        param: The field of the body that is wrong.
        code: OpenAI's short name of the error.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer with this error."""
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse(self.body, self.status, headers)


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """The error to send for `error`: Partita's own are about the request; of others the client learns only the kind."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PartitaError):
        return ApiError(400, str(error), param=param)
    return ApiError(500, f"the server failed with {type(error).__name__}; its log says where.")
