"""Rotary embeddings, scaled as transformers and llama.cpp do it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.geometry import Rope


def rope(base: float, width: int, scaling: Mapping[str, Any]) -> Rope | None:
    """Return a rotary embedding over `width` numbers of a head; None if the way of scaling is not known."""
    places = np.arange(0, width, 2, dtype=np.float64)
    plain = base ** (-places / width)
    name = str(scaling.get("rope_type", scaling.get("type", "default")))
    factor = float(scaling.get("factor") or 1.0)
    original = int(scaling.get("original_max_position_embeddings") or 0)
    if name in ("default", "none", "dynamic", "linear"):
        return Rope(plain / factor if name == "linear" else plain)
    if name == "proportional":  # the last pairs are not rotated
        turned = int(float(scaling.get("partial_rotary_factor") or 1.0) * width // 2)
        return Rope(np.where(np.arange(len(plain)) < turned, plain / factor, 0.0))
    given = scaling.get("attention_factor")
    if name == "yarn":
        ramp = _yarn_ramp(base, width, original, scaling)
        mixed = plain / factor * ramp + plain * (1 - ramp)
        usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return Rope(mixed, float(given or usual))
    if name == "llama3":
        return Rope(_llama3(plain, factor, original, scaling))
    if name in ("longrope", "su") and scaling.get("short_factor") is not None:
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return Rope(plain / np.asarray(scaling["short_factor"], np.float64), float(given or usual))
    return None


def _yarn_ramp(base: float, width: int, original: int, scaling: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Return how far each pair is interpolated, 0 to 1."""

    def place(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = place(float(scaling.get("beta_fast") or 32)), place(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)


def _llama3(
    plain: npt.NDArray[np.float64], factor: float, original: int, scaling: Mapping[str, Any]
) -> npt.NDArray[np.float64]:
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = original * plain / (2 * math.pi)  # of a pair within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / factor + smooth * plain
