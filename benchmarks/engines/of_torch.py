"""The packed verifier's target, and what bounds a step of it: its matrix products alone."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.engines.steps import Step
from fleet_edge.verifiers.packed.target import Target, load_target
from fleet_edge.verifiers.packed.verifier import PackedVerifier

__all__ = ["PackedVerifier", "finisher", "load", "products"]


def load(folder: Path, *, dtype: str, device: str, threads: int) -> Target:
    torch.set_num_threads(threads)
    return load_target(folder, dtype=dtype, device=device)


def finisher(device: torch.device) -> Callable[[object], None]:
    if device.type == "cuda":
        return lambda _logits: torch.cuda.synchronize(device)
    return lambda _logits: None


def products(model: Any, finish: Callable[[object], None]) -> Step:  # noqa: ANN401 - transformers has no types
    """Return a step of matrix products alone: as many rows by every weight of a forward pass, the head included."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    widths = {weight.shape[1] for weight in weights}

    def step(sequences: int, tokens: int) -> float:
        rows = sequences * tokens
        inputs = {width: torch.randn(rows, width, dtype=model.dtype, device=model.device) for width in widths}
        finish(None)
        before = time.perf_counter()
        with torch.inference_mode():
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)
        finish(None)
        return 1e3 * (time.perf_counter() - before)

    return step
