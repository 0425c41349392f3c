"""Measurement of a step-time curve: steps of an edge's own verifier, decisions on the drafts included.

All sessions hold the same text and are sampled from as the demo does, with random tokens for drafts: what a step takes
does not depend on what is said. Each step's time is the median of some.
"""

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fleet_edge.batching.judging import Case, judge_batch
from fleet_edge.step_time.curve import StepCurve
from fleet_edge.step_time.errors import CurveError
from fleet_edge.verifiers.contract import CapacityExceeded, Item, Verifier
from schemas.policy import Mode, SamplingPolicy

MOST_NEW: Final = 17
"""Most new tokens of a session in a step: the longest draft that an edge grants by default, and the token before it."""

_CHUNK: Final = 128
_SEED: Final = 20_261_126
_APART: Final = 2  # places between the drafts of neighbours
_COUNT: Final = 30_000  # of a draft token in 1/65,536
_REPEATS: Final = 9
_FEWEST: Final = 3
_PATIENCE: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveMeasurement:
    """What is measured.

    Attributes:
        sessions: Numbers of sessions, as far as there is memory for them.
        tokens: New tokens of each.
        prefill: Tokens of a prompt that a step computes alone.
        context: Tokens that each session holds.
        most_tokens: Steps of more new tokens than these are left out, but for those of one token a session.
        mode: Of verification. Texts that are to repeat, those of coupled mode, may cost more (`batch_invariant`).
        cell_s: Seconds for each size of step, about.
        limit_s: Seconds after which no further size is begun, but for those of prompts and of one session.
        on_progress: Told of what is measured, as a clause.
        clock: Monotonic seconds.
    """

    sessions: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    tokens: Sequence[int] = (1, 2, 3, 5, 9, MOST_NEW)
    prefill: Sequence[int] = (16, 64, 128, 256)
    context: int = 256
    most_tokens: int = 576
    mode: Mode = Mode.RESIDUAL
    cell_s: float = 1.0
    limit_s: float = 120.0
    on_progress: Callable[[str], None] = field(default=lambda _said: None)
    clock: Callable[[], float] = time.perf_counter

    def measure(self, verifier: Verifier, *, engine: str = "") -> StepCurve:
        """Measure a verifier without sequences, and leave it so.

        Args:
            verifier: The target model.
            engine: Its name, for the reader.

        Raises:
            CurveError: The model's context is too short.
            VerifierError: A step failed.
        """
        info = verifier.info
        room = max(MOST_NEW, *self.tokens)
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
                end = until if rows else math.inf  # without the first row nothing is known of drafts
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
        """Have sequences hold a text, as many as there is memory for; return how many."""
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
        """Return tokens and milliseconds of steps that compute a prompt alone; those that fit."""
        self.on_progress("prompts")
        return tuple(
            (float(tokens), self._ms(verifier, [self._item(key, text[:tokens], 0)], 0))
            for tokens in sorted(set(self.prefill))
            if tokens <= min(len(text), verifier.info.context)
        )

    def _row(
        self, verifier: Verifier, keys: Sequence[int], text: Sequence[int], context: int, *, until: float
    ) -> tuple[tuple[float, float], ...]:
        """Return tokens and milliseconds of the steps of so many sessions; what there is no memory for is left out."""
        row = []
        for tokens in sorted(set(self.tokens) | {1}):
            if tokens > 1 and (tokens * len(keys) > self.most_tokens or self.clock() >= until):
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
    """Return processor and usable cores, for the reader."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
