"""API errors: HTTP status and OpenAI's error object for each error."""

import math
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import JSONResponse

from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import (
    DeviceError,
    EdgeUnavailable,
    InvalidRequest,
    RequestQueueFull,
    SessionRefused,
    TextCancelled,
)
from fleet_device.requests.template import ChatError
from schemas.reasons import RefusalCode

# An edge or a broker that is away is usually back within seconds; OpenAI's clients obey this header.
_RETRY_S: Final = 2
_TOO_MANY: Final = 429

_THE_APPLICATIONS: Final[Mapping[RefusalCode, str]] = {
    RefusalCode.PROMPT_EMPTY: "prompt",
    RefusalCode.PROMPT_TOO_LONG: "prompt",
    RefusalCode.TOKEN: "prompt",
    RefusalCode.MAX_NEW_TOKENS: "max_tokens",
    RefusalCode.LOGPROBS: "logprobs",
    RefusalCode.GRAMMAR: "grammar",
}
_TOO_LONG: Final = "context_length_exceeded"  # OpenAI's code
_PASSING: Final = frozenset({RefusalCode.BUSY, RefusalCode.DRAINING})
_OF_THE_DEVICE: Final = frozenset({RefusalCode.QUOTA, RefusalCode.QUARANTINED})
_LONGEST_RETRY_S: Final = 86_400

OLLAMA: Final = "/api/"
"""Beginning of the paths of Ollama's API."""


class ApiProblem(DeviceError):  # noqa: N818 - reads as what it says
    """An error answer: the HTTP status, OpenAI's `type`, `code` and `param`, and further HTTP headers."""

    def __init__(
        self,
        status: int,
        sentence: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, path: str = "") -> JSONResponse:
        """Return the answer to a request for a path: Ollama's clients read another shape."""
        body = {"error": str(self)} if path.startswith(OLLAMA) else self.body()
        return JSONResponse(body, self.status, headers=self.headers)


def problem_of(error: Exception, *, prompt: str = "prompt", grammar: str = "grammar") -> ApiProblem:
    """Translate an error; `prompt` and `grammar` are the request's names of these fields."""
    match error:
        case ApiProblem():
            problem = error
        case SessionRefused():
            problem = _refused(error, {"prompt": prompt, "grammar": grammar})
        case RequestQueueFull():
            problem = _later(429, str(error), code="queue_full", seconds=error.retry_after_s)
        case EdgeUnavailable() | TextCancelled():
            problem = _later(503, str(error), code="cancelled" if isinstance(error, TextCancelled) else error.code)
        case InvalidRequest():
            status = 404 if error.code == "model_not_found" else 400
            problem = ApiProblem(status, str(error), code=error.code, param=error.param)
        case ChatError():
            problem = ApiProblem(400, str(error), code="chat_template", param="messages")
        case DeviceError():
            problem = ApiProblem(502, str(error), kind="api_error", code="session_failed")
        case DrafterError():
            problem = ApiProblem(502, str(error), kind="api_error", code="draft_model_failed")
        case _:
            problem = ApiProblem(500, "The device failed; its log says more.", kind="api_error", code="internal_error")
    return problem


def _refused(error: SessionRefused, fields: Mapping[str, str]) -> ApiProblem:
    """Attribute a refusal to the application, the device or the configuration, or to load that passes."""
    if error.code in _PASSING:
        seconds = _RETRY_S if error.retry_s is None else _whole(error.retry_s)
        return _later(503, str(error), code=error.code.value, seconds=seconds)
    if error.code in _THE_APPLICATIONS:
        param = _THE_APPLICATIONS[error.code]
        code = _TOO_LONG if error.code is RefusalCode.PROMPT_TOO_LONG else error.code.value
        return ApiProblem(400, str(error), code=code, param=fields.get(param, param))
    if error.code in _OF_THE_DEVICE and error.retry_s is not None:
        return _later(_TOO_MANY, str(error), code=error.code.value, seconds=_whole(error.retry_s))
    if error.code is RefusalCode.QUOTA:  # a limit that no device may exceed
        return ApiProblem(400, str(error), code=error.code.value)
    return ApiProblem(502, str(error), kind="api_error", code=error.code.value)


def _whole(seconds: float) -> int:
    return max(1, math.ceil(min(seconds, _LONGEST_RETRY_S)))


def _later(status: int, sentence: str, *, code: str, seconds: int = _RETRY_S) -> ApiProblem:
    kind = "rate_limit_error" if status == _TOO_MANY else "api_error"
    return ApiProblem(status, sentence, kind=kind, code=code, headers={"Retry-After": str(seconds)})
