"""Curve file: a step-time curve as JSON, so that one machine's can be used on another.

::

    {"format": 1,
     "target": "…", "engine": "llama.cpp", "runs_on": "…", "machine": "…", "context": 256, "mode": "residual",
     "at": "…",
     "steps": [{"sessions": 1, "tokens": 1, "ms": 13.0}, {"sessions": 1, "tokens": 5, "ms": 31.2}, …],
     "prefill": [{"tokens": 128, "ms": 390.0}, …]}

`steps` are verifications of so many sessions with so many new tokens of each: a draft and the token before it; 1 token
each is what the edge writes by itself. `prefill` are steps that compute so many tokens of a prompt alone; without it a
prompt takes what a step of one session with as many tokens does. All but `format` and `steps` may be left out.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet_common.validation import plain_sentence
from fleet_edge.step_time.curve import StepCurve
from fleet_edge.step_time.errors import CurveError
from schemas.printable import printable_line

_MOST_BYTES: Final = 1 << 20
_SIZE: Final = 1 << 20

Size = Annotated[int, Field(ge=1, le=_SIZE)]
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)]
Label = Annotated[str, Field(max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Step(_Part):
    """A step that verifies."""

    sessions: Size
    tokens: Size
    ms: Milliseconds


class _Prefill(_Part):
    """A step that computes a prompt."""

    tokens: Size
    ms: Milliseconds


class _CurveFile(_Part):
    """The file."""

    format: Literal[1]
    target: Label = ""
    engine: Label = ""
    runs_on: Label = ""
    machine: Label = ""
    context: Annotated[int, Field(ge=0, le=_SIZE)] = 0
    mode: Label = ""
    at: Label = ""
    steps: Annotated[list[_Step], Field(min_length=1, max_length=4096)]
    prefill: Annotated[list[_Prefill], Field(max_length=4096)] = []


def read_curve(path: Path) -> StepCurve:
    """Read a curve.

    Raises:
        CurveError: The file cannot be read, or holds no curve.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise CurveError(
            f"The curve {path} cannot be read: {error.strerror or error}; give a file that --save-curve has written, "
            "or leave --curve out to measure this machine."
        ) from error
    if len(data) > _MOST_BYTES:
        raise CurveError(f"The curve {path} is larger than a curve can be; give a file that --save-curve has written.")
    try:
        found = _CurveFile.model_validate_json(data)
    except ValidationError as error:
        raise CurveError(f"The curve {path} cannot be used: {_wrong(error)}; docs/operations.md shows one.") from error
    rows: dict[int, list[tuple[float, float]]] = {}
    for step in found.steps:
        rows.setdefault(step.sessions, []).append((float(step.tokens), step.ms))
    try:
        return StepCurve(
            rows={sessions: tuple(row) for sessions, row in rows.items()},
            prefill=tuple((float(each.tokens), each.ms) for each in found.prefill),
            **{
                name: printable_line(getattr(found, name))
                for name in ("target", "engine", "runs_on", "machine", "mode", "at")
            },
            context=found.context,
        )
    except CurveError as error:
        raise CurveError(f"The curve {path} cannot be used: {error}") from None


def write_curve(curve: StepCurve, path: Path) -> None:
    """Write a curve.

    Raises:
        CurveError: The file cannot be written.
    """
    try:
        path.write_text(json.dumps(as_json(curve), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CurveError(
            f"The curve cannot be written to {path}: {error.strerror or error}; give --save-curve a path that can be."
        ) from error


def as_json(curve: StepCurve) -> dict[str, Any]:
    """Return a curve as JSON values."""
    return {
        "format": 1,
        **{name: getattr(curve, name) for name in ("target", "engine", "runs_on", "machine", "context", "mode", "at")},
        "steps": [
            {"sessions": sessions, "tokens": tokens, "ms": round(ms, 3)} for sessions, tokens, ms in curve.steps()
        ],
        "prefill": [{"tokens": int(tokens), "ms": round(ms, 3)} for tokens, ms in curve.prefill],
    }


def _wrong(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "it is no JSON"
    where = ".".join(str(part) for part in first["loc"])
    return f"{where or 'it'}: {plain_sentence(first)}"
