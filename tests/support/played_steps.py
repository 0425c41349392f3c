"""Played steps: a small target whose steps take as long as those of a large one, by a measured curve."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fleet_edge.step_curve import StepCurve, read_curve
from fleet_edge.verifiers.contract import Item, Logits, Verifier

CURVE: Final = "PLAYED_CURVE"
"""Environment variable with the path of the curve."""


def curve_of_environment() -> StepCurve | None:
    return read_curve(Path(os.environ[CURVE])) if CURVE in os.environ else None


def step_s(curve: StepCurve, items: Sequence[Item]) -> float:
    """Return the time of a step that verifies the rows of the items and computes their other tokens as prompts."""
    verified = [item.rows for item in items if item.rows]
    prompts = sum(len(item.tokens) - item.rows for item in items)
    mean = sum(verified) / len(verified) if verified else 0.0
    return curve.step_ms(len(verified), mean, prefill=prompts) / 1e3


def play(verifier: Verifier, curve: StepCurve | None) -> Verifier:
    """Make steps take as long as the curve says, or as long as they take if that is longer; None for no change."""
    if curve is None:
        return verifier
    score = verifier.score

    def played(items: Sequence[Item]) -> Logits:
        began = time.perf_counter()
        rows = score(items)
        time.sleep(max(0.0, step_s(curve, items) - (time.perf_counter() - began)))
        return rows

    verifier.score = played  # type: ignore[method-assign]
    return verifier
