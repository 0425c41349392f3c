"""Vocabulary: what a large vocabulary costs next to the models (milliseconds for a row at the edge, for a draft token).

At the edge: shaping and deciding on drafts of four that are accepted whole, one bonus token included, by row; the form
of p at a rejection; the log-probabilities of a token. On the device: shaping, quantizing and drawing. Logits are
random: falling with the logarithm of the rank, as those of models do, or normal, which is flatter than those of any
trained model. Both ends run on one core. Coupled mode without top_k and top_p has no goal: it needs the noise of all
tokens. Takes half a minute.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Bench, SuiteReport, at_most, number_of, table
from fleet_edge.batching.judging import Case, judge_batch
from sampling.distribution import Dist, shape
from sampling.downlink import choose_form
from sampling.drawing import propose
from sampling.verification import logprobs_of_token
from schemas.policy import Mode, SamplingPolicy

_DRAFT: Final = 4
_SESSIONS: Final = 4
_BYTES: Final = 1 << 16
_LOGPROBS: Final = 5
_ROW_MS, _TOKEN_MS = 0.5, 1.0
_WITHOUT_GOAL: Final = "unbounded, coupled"
_PLAIN: Final = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1}

POLICIES: Final = MappingProxyType(
    {
        "greedy": SamplingPolicy(temperature=0.0, seed=1),
        "default": SamplingPolicy(seed=1),
        "default, coupled": SamplingPolicy(mode=Mode.COUPLED, seed=1),
        "top_p alone": SamplingPolicy(top_k=0, seed=1),
        "unbounded": SamplingPolicy(**_PLAIN),
        _WITHOUT_GOAL: SamplingPolicy(mode=Mode.COUPLED, **_PLAIN),
    }
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=number_of(int, 100), default=152_064, help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=number_of(int, 1), default=15, help="(default: %(default)s)")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    os.sched_setaffinity(0, {max(bench.cores.edge)})
    random, rows = np.random.default_rng(0), list[dict[str, Any]]()
    shown = (_SESSIONS * (_DRAFT + 1), options.size)
    ranks = np.stack([random.permutation(options.size) for _ in range(shown[0])])
    kinds = {
        "falling": (-2.0 * np.log1p(ranks) + random.standard_normal(shown)).astype(np.float32),
        "normal": (2.5 * random.standard_normal(shown)).astype(np.float32),
    }
    for kind, logits in kinds.items():
        for name, policy in POLICIES.items():
            rows.append({"logits": kind, "policy": name, **_times(logits, policy, options.repeats)})
    columns = {"logits": "", "policy": "", "support": "d"}
    table(rows, columns | dict.fromkeys(("row_ms", "token_ms", "form_ms", "logprobs_ms"), ".2f"))
    goals = []
    for row in rows:
        if row["logits"] == "falling" and row["policy"] != _WITHOUT_GOAL:
            goals.append(at_most(f"edge, ms a row, {row['policy']}", row["row_ms"], _ROW_MS))
            goals.append(at_most(f"device, ms a token, {row['policy']}", row["token_ms"], _TOKEN_MS))
    return SuiteReport(rows, goals)


def _times(logits: NDArray[np.float32], policy: SamplingPolicy, repeats: int) -> dict[str, Any]:
    counts = None if policy.mode is Mode.COUPLED else (1,) * _DRAFT  # as improbable as can be: all are accepted
    cases = []
    for first in range(0, len(logits), _DRAFT + 1):
        dists = [shape(row, policy) for row in logits[first : first + _DRAFT]]
        tokens = tuple(_accepted(dist, policy, place) for place, dist in enumerate(dists))
        cases.append(Case(tokens, counts, policy, base=0, bonus=True))
    decided = judge_batch(logits, cases)
    assert all(each is not None and each.accepted == _DRAFT for each in decided)
    whole = shape(logits[0], policy)
    size = logits.shape[1]
    form = {"policy": policy, "position": 0, "vocabulary_size": size, "max_bytes": _BYTES}
    return {
        "support": len(whole),
        "row_ms": _ms(lambda _: judge_batch(logits, cases), repeats) / len(logits),
        "token_ms": _ms(lambda n: propose(shape(logits[n % len(logits)], policy), policy=policy, position=n), repeats),
        "form_ms": None if policy.repeats else _ms(lambda _: choose_form(whole, **form), repeats),
        "logprobs_ms": _ms(lambda n: logprobs_of_token(logits[n % len(logits)], n, most=_LOGPROBS), repeats),
    }


def _accepted(dist: Dist, policy: SamplingPolicy, position: int) -> int:
    likeliest = int(dist.ids[np.argmax(dist.probs)])
    return propose(dist, policy=policy, position=position).token if policy.repeats else likeliest


def _ms(call: Callable[[int], object], repeats: int) -> float:
    """Return the median time of a call, which gets its number; the first does not count."""
    taken = []
    for number in range(repeats + 1):
        before = time.perf_counter()
        call(number)
        taken.append(time.perf_counter() - before)
    return 1e3 * statistics.median(taken[1:])
