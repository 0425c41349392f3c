"""Blocks: tokens that a round commits with drafts verified as blocks, and with the same drafts verified token by token.

The real target and a real draft model generate in residual mode. For each draft both rules have an expectation in
closed form (docs/exactness.md), so that only the drafts are random. A round commits the accepted tokens and one more.
Takes 3 minutes.
"""

import argparse
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Final

import numpy as np

from benchmarks.capacity.serving import EngineSlot, Together, verifier_over, write_all
from benchmarks.harness import Bench, Report, add_engine, at_least, number_of, say, table
from benchmarks.raw_llama import RawPrompt
from benchmarks.recordings import policy_of
from dssd.block import reach
from dssd.distribution import TOTAL, Dist
from dssd.sampling import Proposal
from dssd.verification import Judgement
from fleet_admin.models.prompts import built_in, some
from fleet_device.drafters.model_file import GgufModel
from fleet_device.requests.chat import encode_chat
from fleet_device.requests.structured import ChatMessage
from fleet_edge.batching.judging import Case
from fleet_edge.batching.shaping import shape_rows
from fleet_edge.verifiers.contract import Logits
from schemas.policy import Mode

_LONG: Final = 6
"""Draft length from which blocks are to pay."""

_GOAL: Final = 1.04


class _Compared(Together):
    """Notes what each draft commits by either rule."""

    rounds: list[tuple[float, float]]

    def _judge(self, logits: Logits, cases: Sequence[Case], slots: Sequence[EngineSlot]) -> list[Judgement | None]:
        rows = logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()
        start = 0
        for case, slot in zip(cases, slots, strict=True):
            shaped = shape_rows(rows[start : start + case.rows], [case.policy] * case.rows, case.policy.top_k)
            start += case.rows
            self.rounds.append(committed([shaped.row(place) for place in range(len(slot.drafted))], slot.drafted))
        return super()._judge(logits, cases, slots)


def committed(rows: Sequence[Dist], drafted: Sequence[Proposal]) -> tuple[float, float]:
    """Return the expected tokens of a round token by token, and as a block; `rows` has p before each draft token."""
    tokens, counts = [each.token for each in drafted], [each.count or 1 for each in drafted]
    kept, by_token = 1.0, 1.0
    for p, token, count in zip(rows, tokens, counts, strict=True):
        kept *= min(1.0, p.probability(token) * TOTAL / count)
        by_token += kept
    heads, reached = reach(rows.__getitem__, tokens, counts)
    left, by_block = 1.0 - reached[-1], 1.0 + len(drafted) * reached[-1]
    for accepted in reversed(range(len(heads))):
        p, quantized = heads[accepted], drafted[accepted].quantized
        assert quantized is not None
        excess = np.maximum(0.0, reached[accepted] * p.probs - quantized.probabilities(p.ids)).sum()
        stops = excess / (excess + 1.0 - reached[accepted]) if excess else 0.0
        by_block += left * stops * accepted
        left *= 1.0 - stops
    return by_token, by_block


def add_options(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    parser.add_argument("--drafts", nargs="+", default=["Q4_0", "Q4_1"], help="quantizations (default: %(default)s)")
    parser.add_argument(
        "--lengths", nargs="+", type=number_of(int, 1), default=[4, 6, 8], metavar="N", help="of drafts"
    )
    parser.add_argument("--each", type=number_of(int, 1), default=4, help="prompts of each category (default: 4)")
    parser.add_argument("--tokens", type=number_of(int, 1), default=96, help="of each output (default: %(default)s)")


def run(bench: Bench) -> Report:
    options, rows = bench.options, list[dict[str, Any]]()
    threads = len(bench.cores.edge | bench.cores.others)
    target = verifier_over(bench.target(), threads=threads, batch_invariant=True, engine=bench.engine)
    codec = GgufModel(bench.target(), vocabulary_only=True)
    prompts = [
        RawPrompt(
            tuple(encode_chat(codec, [ChatMessage("user", asked.text)])),
            policy_of(number).model_copy(update={"mode": Mode.RESIDUAL}),
            options.tokens,
        )
        for number, asked in enumerate(some(built_in(), options.each))
    ]
    codec.close()
    for draft in options.drafts:
        drafting = verifier_over(bench.model(f"{draft}.gguf"), threads=threads, batch_invariant=False)
        for length in options.lengths:
            say(f"{draft}, drafts of {length}")
            both = _Compared(target, drafting, length=length)
            both.rounds = []
            write_all(both, prompts)
            rows.append({"draft": draft, "length": length, **_figures(both.rounds)})
    table(
        rows,
        {
            "draft": "s",
            "length": "d",
            "rounds": "d",
            "by_token": ".2f",
            "by_block": ".2f",
            "ratio": ".3f",
            "error": ".3f",
        },
    )
    long = [row for row in rows if row["length"] >= _LONG]
    return Report(rows, [at_least(f"{row['draft']}, drafts of {row['length']}", row["ratio"], _GOAL) for row in long])


def _figures(rounds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    by_token, by_block = (fmean(each[rule] for each in rounds) for rule in (0, 1))
    ratio = by_block / by_token
    spread = np.std([block - ratio * token for token, block in rounds])
    error = float(spread) / by_token / len(rounds) ** 0.5
    return {"rounds": len(rounds), "by_token": by_token, "by_block": by_block, "ratio": ratio, "error": error}
