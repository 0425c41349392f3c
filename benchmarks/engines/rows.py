"""Rows: how far the logits of one text move with how it is cut and with what is computed in the same step.

Each is compared with the same text alone, one token at a time: rows that are the same to the bit, the largest
difference of a logit, and the largest total variation distance. Takes 3 minutes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.steps import add_engine_options, chosen, verifier
from benchmarks.harness import Bench, Report, table
from fleet_edge.verifiers.contract import Item, Logits, Verifier

Rows = NDArray[np.float32]

PROMPT: Final = 256
WRITTEN: Final = 45
"""A multiple of the numbers of tokens below, so that no step has fewer."""

VARIANTS: Final = {
    "alone, 5 at a time": (5, 0, 0),
    "alone, all at once": (WRITTEN, 0, 0),
    "1 at a time, with 3 texts of 5": (1, 3, 5),
    "1 at a time, with 15 texts of 1": (1, 15, 1),
    "5 at a time, with 15 texts of 5": (5, 15, 5),
    "9 at a time, with 31 texts of 1": (9, 31, 1),
}
"""By name: tokens of the text in a step, other texts, and tokens of each."""

TEXTS: Final = 1 + max(others for _, others, _ in VARIANTS.values())
"""Texts that there must be room for."""

LONGEST: Final = PROMPT + WRITTEN
"""Tokens of the longest of them."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How far rows are from those of the same text alone, one token at a time.

    Attributes:
        variant: How they were computed.
        rows: How many.
        same: Of them, how many are the same to the bit.
        logit: Largest difference of a logit.
        variation: Largest total variation distance of the distributions, unshaped.
    """

    variant: str
    rows: int
    same: int
    logit: float
    variation: float


def add_options(parser: argparse.ArgumentParser) -> None:
    add_engine_options(parser)


def run(bench: Bench) -> Report:
    """Measure each engine; llama.cpp as for texts that are to repeat, and as for others."""
    rows = []
    for kind, dtype in chosen(bench.options):
        for stable in (True, False) if kind == "llama_cpp" else (False,):
            engine = verifier(bench, kind, dtype, sequences=TEXTS, context=LONGEST, batch_invariant=stable)
            here = [
                {"engine": kind, "dtype": dtype, "batch_invariant": stable, **asdict(each)} for each in spreads(engine)
            ]
            title = f"{kind}, {dtype}{', stable rows' if stable else ''}"
            table(here, {"variant": "", "same": "d", "rows": "d", "logit": ".1e", "variation": ".1e"}, title=title)
            rows += here
    return Report(rows)


def spreads(verifier: Verifier) -> list[Spread]:
    """Measure a verifier that has no sequences, and leave it so."""
    random = np.random.default_rng(0)
    size = verifier.info.vocabulary.size
    prompt = random.integers(size, size=PROMPT).tolist()
    written, alone = _write(verifier, prompt, random)
    others = [random.integers(size, size=PROMPT).tolist() for _ in range(TEXTS - 1)]
    for number, text in enumerate(others):
        verifier.open(2 + number)
        verifier.score([Item(2 + number, text, 0)])
    found = []
    for name, (tokens, more, new) in VARIANTS.items():
        rows = []
        verifier.truncate(1, PROMPT)
        for begin in range(0, len(written), tokens):
            piece = written[begin : begin + tokens]
            items = [Item(2 + number, others[number][:new], new) for number in range(more)]
            items.insert(more // 2, Item(1, piece, len(piece)))
            logits = _on_host(verifier.score(items))
            rows.append(logits[more // 2 * new :][: len(piece)])
            for number in range(more):
                verifier.truncate(2 + number, PROMPT)
        found.append(_spread(name, np.concatenate(rows), alone))
    for sequence in range(1, 2 + len(others)):
        verifier.close(sequence)
    return found


def _write(verifier: Verifier, prompt: Sequence[int], random: np.random.Generator) -> tuple[list[int], Rows]:
    """Write a text after a prompt in sequence 1, one token at a time; return it and its rows."""
    verifier.open(1)
    row = _on_host(verifier.score([Item(1, prompt, 1)]))[0]
    written, rows = [], []
    for _ in range(WRITTEN):
        token = int(random.choice(len(row), p=_distribution(row)))
        written.append(token)
        row = _on_host(verifier.score([Item(1, [token], 1)]))[0]
        rows.append(row)
    return written, np.stack(rows)


def _spread(name: str, rows: Rows, alone: Rows) -> Spread:
    return Spread(
        variant=name,
        rows=len(rows),
        same=int((rows == alone).all(axis=1).sum()),
        logit=float(np.abs(rows - alone).max()),
        variation=max(
            float(np.abs(_distribution(one) - _distribution(other)).sum() / 2)
            for one, other in zip(rows, alone, strict=True)
        ),
    )


def _distribution(row: Rows) -> NDArray[np.float64]:
    weights = np.exp(row.astype(np.float64) - row.max())
    distribution: NDArray[np.float64] = weights / weights.sum()
    return distribution


def _on_host(logits: Logits) -> Rows:
    host: Any = logits if isinstance(logits, np.ndarray) else logits.cpu().numpy()
    return np.array(host, dtype=np.float32)
