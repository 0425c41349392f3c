"""Step times of an engine: a curve by sessions and tokens, its JSON file, and its measurement."""

import json
import math
import os
import platform
import random
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fleet_common.validation import plain_sentence
from fleet_edge.batching.judging import Case, judge_batch
from fleet_edge.verifiers.contract import CapacityExceeded, Item, Verifier
from schemas.errors import FleetError
from schemas.policy import Mode, SamplingPolicy
from schemas.printable import printable_line


class CurveError(FleetError):
    """A step-time curve cannot be read, written or used. Its text is one sentence for the user."""


Row = tuple[tuple[float, float], ...]
"""Pairs of a size (tokens or sessions) and milliseconds, both ascending."""

_MAX_MS: Final = 3_600_000.0
_SIZE: Final = 1 << 20
_LABELS: Final = ("target", "engine", "runs_on", "machine", "mode", "at")
_MAX_BALANCE: Final = 1 << 14


@dataclass(frozen=True, slots=True)
class StepCurve:
    """Duration of a step by number of sessions and new tokens of each.

    Times are interpolated over tokens, then over sessions. A larger step never takes less: a smaller measurement was
    disturbed, and the largest so far counts. Beyond the last number of tokens a row continues with its last slope;
    beyond the last number of sessions, time grows in proportion, so that nothing unmeasured looks cheap. `rows` are by
    sessions, over the new tokens of each, and include 1 session and 1 token.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rows: Mapping[int, Row]
    prefill: Row = ()
    target: str = ""
    engine: str = ""
    runs_on: str = ""
    machine: str = ""
    context: int = 0
    mode: str = ""
    at: str = ""

    def __post_init__(self) -> None:
        """Sort and check the rows; raises `CurveError`."""
        rows = {sessions: _row(self.rows[sessions]) for sessions in sorted(self.rows)}
        if 1 not in rows or min(rows) < 1:
            raise CurveError("The curve lacks a step of 1 session; measure one.")
        for sessions, row in rows.items():
            if not row or row[0][0] != 1:
                raise CurveError(f"Of {sessions} sessions there is no step of 1 token each; measure one.")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "prefill", _row(self.prefill) if self.prefill else rows[1])
        for name in _LABELS:
            object.__setattr__(self, name, printable_line(getattr(self, name)))

    @property
    def max_sessions(self) -> int:
        return max(self.rows)

    def step_ms(self, sessions: float, tokens: float, *, prefill: float = 0.0) -> float:
        """Return the milliseconds of a step; `sessions` is 0 to compute only prompts, `tokens` is a mean."""
        if sessions <= 0:
            return _at(self.prefill, prefill)
        tokens, sessions = max(1.0, tokens), max(1.0, sessions)
        times = tuple(accumulate((_at(row, tokens) for row in self.rows.values()), max))
        last = self.max_sessions
        if sessions > last:
            verified = times[-1] * sessions / last
        else:
            verified = _at(tuple(zip(map(float, self.rows), times, strict=True)), sessions)
        if prefill <= 0:
            return verified
        # A prompt added to a step costs less than alone, as the weights are read once.
        return verified + max(0.0, _at(self.prefill, prefill) - self.prefill[0][1])

    def balance(self) -> int:
        """Return the tokens of one sequence whose step takes twice as long as that of one token."""
        tokens, limit = 1, 2 * self.step_ms(1, 1)
        while tokens < _MAX_BALANCE and self.step_ms(1, tokens + 1) <= limit:
            tokens += 1
        return tokens


def _row(pairs: Sequence[tuple[float, float]]) -> Row:
    ordered = sorted(pairs)
    sizes = [size for size, _ in ordered]
    if len(set(sizes)) != len(sizes):
        raise CurveError("A step is listed twice; remove one of them.")
    for size, ms in ordered:
        if not 1 <= size <= _SIZE or not 0.0 < ms <= _MAX_MS:
            raise CurveError(
                f"A step of {ms:g} ms with {size:g} tokens is invalid: times are above 0 and below an hour."
            )
    return tuple(zip(sizes, accumulate((ms for _, ms in ordered), max), strict=True))


def _at(row: Sequence[tuple[float, float]], size: float) -> float:
    """Interpolate a row, or extrapolate its last slope; in proportion for a single value."""
    if len(row) == 1:
        ((known, ms),) = row
        return ms * max(1.0, size / known)
    place = min(max(1, bisect_right([each for each, _ in row], size)), len(row) - 1)
    (left, before), (right, after) = row[place - 1], row[place]
    return before + (after - before) * (max(size, row[0][0]) - left) / (right - left)


_MAX_BYTES: Final = 1 << 20
_FILE: Final = TypeAdapter(StepCurve)


def read_curve(path: Path) -> StepCurve:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CurveError(
            f"The curve {path} cannot be read: {error.strerror or error}; give a file written by --save-curve, "
            "or omit --curve to measure this machine."
        ) from error
    if len(data) > _MAX_BYTES:
        raise CurveError(f"The curve {path} is larger than a curve can be; give a file written by --save-curve.")
    try:
        return _FILE.validate_json(data)
    except ValidationError as error:
        raise CurveError(f"The curve {path} cannot be used: {_wrong(error)}; docs/operations.md shows one.") from error
    except CurveError as error:
        raise CurveError(f"The curve {path} cannot be used: {error}") from None


def write_curve(curve: StepCurve, path: Path) -> None:
    try:
        path.write_text(json.dumps(as_json(curve)) + "\n", encoding="utf-8")
    except OSError as error:
        raise CurveError(
            f"The curve cannot be written to {path}: {error.strerror or error}; give --save-curve a writable path."
        ) from error


def as_json(curve: StepCurve) -> dict[str, Any]:
    content: dict[str, Any] = _FILE.dump_python(curve, mode="json")
    return content


def _wrong(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "it is no JSON"
    where = ".".join(str(part) for part in first["loc"])
    return f"{where or 'it'}: {plain_sentence(first)}"


MAX_NEW: Final = 17
"""Most new tokens of a session in a step: the longest draft granted by default, and the token before it."""

_CHUNK: Final = 128
_SEED: Final = 20_261_126
_APART: Final = 2  # places between the drafts of neighbours
_COUNT: Final = 30_000  # of a draft token in 1/65,536
_REPEATS: Final = 9
_FEWEST: Final = 3
_PATIENCE: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveMeasurement:
    """Measure steps of a verifier, decisions on the drafts included; each time is a median.

    All sessions hold the same tokens and draft random ones, since times do not depend on content. `cell_s` is about the
    time for each size; no size starts after `limit_s`, except prompts and one session. Steps with more than
    `max_tokens` new tokens are left out, except those of one token a session.
    """

    sessions: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    tokens: Sequence[int] = (1, 2, 3, 5, 9, MAX_NEW)
    prefill: Sequence[int] = (16, 64, 128, 256)
    context: int = 256
    max_tokens: int = 576
    mode: Mode = Mode.RESIDUAL
    cell_s: float = 1.0
    limit_s: float = 120.0
    on_progress: Callable[[str], None] = field(default=lambda _said: None)
    clock: Callable[[], float] = time.perf_counter

    def measure(self, verifier: Verifier, *, engine: str = "") -> StepCurve:
        """Measure a verifier without open sequences; raises `CurveError` if its context is too short."""
        info = verifier.info
        room = max(MAX_NEW, *self.tokens)
        context = min(self.context, info.context - room)
        if context < 1:
            raise CurveError(
                f"A text of {info.name} may have {info.context} tokens here, too few to measure with; give a larger "
                "--context."
            )
        text = random.Random(_SEED).choices(range(info.vocabulary.size), k=context + room + _APART)  # noqa: S311 - no secret
        keys = range(-1, -1 - max(self.sessions), -1)  # no session has these
        opened = list[int]()
        until = self.clock() + self.limit_s
        try:
            verifier.open(keys[0])
            opened.append(keys[0])
            prefill = self._prompts(verifier, keys[0], text)
            there = self._fill(verifier, keys, text[:context], opened)
            rows: dict[int, tuple[tuple[float, float], ...]] = {}
            for sessions in sorted(set(self.sessions) | {1}):
                if sessions > there or (rows and self.clock() >= until):
                    break
                end = until if rows else math.inf  # the first row is always completed
                if row := self._row(verifier, keys[:sessions], text, context, until=end):
                    rows[sessions] = row
        finally:
            for key in opened:
                verifier.close(key)
        return StepCurve(
            rows=rows,
            prefill=prefill,
            target=info.name,
            engine=engine,
            runs_on=info.runs_on,
            machine=_machine(),
            context=context,
            mode=self.mode.value,
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    @property
    def _policy(self) -> SamplingPolicy:
        return SamplingPolicy(mode=self.mode, temperature=0.7, top_k=50, top_p=0.95, seed=_SEED)

    def _item(self, key: int, tokens: Sequence[int], rows: int) -> Item:
        return Item(key, tokens, rows, stable=self._policy.repeats)

    def _fill(self, verifier: Verifier, keys: Sequence[int], text: Sequence[int], opened: list[int]) -> int:
        """Fill sequences with the same tokens, as many as memory allows; return how many."""
        for begin in range(0, len(text), _CHUNK):
            verifier.score([self._item(keys[0], text[begin : begin + _CHUNK], 0)])
        for key in keys[1:]:
            try:
                verifier.fork(key, keys[0], len(text))
            except CapacityExceeded:
                break
            opened.append(key)
        return len(opened)

    def _prompts(self, verifier: Verifier, key: int, text: Sequence[int]) -> tuple[tuple[float, float], ...]:
        self.on_progress("prompts")
        return tuple(
            (float(tokens), self._ms(verifier, [self._item(key, text[:tokens], 0)], 0))
            for tokens in sorted(set(self.prefill))
            if tokens <= min(len(text), verifier.info.context)
        )

    def _row(
        self, verifier: Verifier, keys: Sequence[int], text: Sequence[int], context: int, *, until: float
    ) -> tuple[tuple[float, float], ...]:
        """Return tokens and milliseconds of steps of these sessions, as far as memory allows."""
        row = []
        for tokens in sorted(set(self.tokens) | {1}):
            if tokens > 1 and (tokens * len(keys) > self.max_tokens or self.clock() >= until):
                break
            items = [
                self._item(key, text[context + place % (_APART + 1) :][:tokens], tokens)
                for place, key in enumerate(keys)
            ]
            if not verifier.fits(items):
                break
            self.on_progress(f"steps of {len(keys)} sessions with {tokens} tokens each")
            row.append((float(tokens), self._ms(verifier, items, context)))
        return tuple(row)

    def _ms(self, verifier: Verifier, items: Sequence[Item], context: int) -> float:
        policy = self._policy
        cases = [
            Case(
                tokens=tuple(item.tokens[1:]),
                counts=(_COUNT,) * (len(item.tokens) - 1) if self.mode is Mode.RESIDUAL else None,
                policy=policy,
                base=context,
                bonus=True,
            )
            for item in items
            if item.rows
        ]
        taken: list[float] = []
        began = self.clock()
        # The first does not count: buffers grow in it.
        while len(taken) <= _FEWEST or (len(taken) <= _REPEATS and self.clock() - began < self.cell_s):
            if taken and self.clock() - began > _PATIENCE * self.cell_s:
                break
            before = self.clock()
            logits = verifier.score(items)
            if cases:
                judge_batch(logits, cases)
            taken.append(1e3 * (self.clock() - before))
            for item in items:
                verifier.truncate(item.sequence, context)
        return statistics.median(taken[1:] or taken)


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
