"""The packed verifier and what bounds it: its matrix products alone, and on a GPU the bytes that a step reads."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.functional import linear

from benchmarks.engines.steps import Step
from fleet_edge.verifiers.contract import Verifier
from fleet_edge.verifiers.packed.attention import inspect_model
from fleet_edge.verifiers.packed.int8 import load_int8
from fleet_edge.verifiers.packed.target import Target, load_target
from fleet_edge.verifiers.packed.verifier import PackedVerifier

_KV_BYTES: Final = 64 << 30
"""Enough for any requested step; memory is allocated as sequences come."""

_COPIED: Final = 1 << 30
_COPIES: Final = 5


def load(folder: Path, *, dtype: str, device: str) -> Target:
    if dtype == "int8":
        return load_int8(folder, device=device)
    return load_target(folder, dtype=dtype, device=device)


def packed(target: Target) -> Verifier:
    return PackedVerifier(target, budget_bytes=_KV_BYTES)


def finisher(device: torch.device) -> Callable[[object], None]:
    if device.type == "cuda":
        return lambda _logits: torch.cuda.synchronize(device)
    return lambda _logits: None


def products(model: Any, *, device: torch.device) -> Step:  # noqa: ANN401 - transformers has no type information
    """Return a step of matrix products alone: as many rows by every weight of a forward pass, the head included."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    widths = {weight.shape[1] for weight in weights}
    finish = finisher(device)
    known: dict[int, dict[int, torch.Tensor]] = {}

    def step(sequences: int, tokens: int) -> float:
        rows = sequences * tokens
        if rows not in known:
            known.clear()
            known[rows] = {width: torch.randn(rows, width, dtype=model.dtype, device=device) for width in widths}
        inputs = known[rows]
        finish(None)
        before = time.perf_counter()
        with torch.inference_mode():
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)
        finish(None)
        return 1e3 * (time.perf_counter() - before)

    return step


class ReadBound:
    """The least time of a step on a GPU: all weights, keys and values are read once."""

    def __init__(self, target: Target) -> None:
        self._weights: int = sum(parameter.nbytes for parameter in target.model.parameters())
        numbers = sum(shape.numbers for shape in inspect_model(target.model))
        self._token_bytes = numbers * int(target.model.dtype.itemsize)
        self.bytes_per_s: float = _bandwidth(target.model.device)

    def ms(self, *, sequences: int, context: int) -> float:
        return 1e3 * (self._weights + sequences * context * self._token_bytes) / self.bytes_per_s


def _bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a copy within the device reads and writes."""
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    finish = finisher(device)
    best = float("inf")
    for _ in range(_COPIES):
        finish(None)
        before = time.perf_counter()
        copy.copy_(source)
        finish(None)
        best = min(best, time.perf_counter() - before)
    return 2 * _COPIED / best
