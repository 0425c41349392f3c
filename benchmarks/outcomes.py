"""Reckons what it would bring to draft ahead for several outcomes of a verdict, beside the plans that a device has.

While a verdict is under way a device could draft behind each of the outcomes that are likely: all stands and the edge's
token is the draft model's own, or token j falls and the target's own is the draft model's second choice under the same
noise (coupled mode; in residual mode nobody knows it before p has come). Where the outcome is among them, the next
draft is there at once (Saguaro, arXiv 2603.03251).

This is a bound from above: the branches cost nothing but the time that the verdict takes, the device is at rest
meanwhile, and nothing is lost by changing from one to another.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fleet_device.pacing.contract import Plan
from fleet_device.pacing.throughput import Conditions

__all__ = ["Outlook", "main", "reckon"]

_LONGEST: Final = 12
_WINDOW: Final = 4
_RTTS_MS: Final = (0.0, 20.0, 50.0, 100.0, 200.0)

SECOND: Final = 0.43
"""How often the target's own token is the draft model's second choice where the first falls: Q4_0, 731 rejections."""

_DRAFTS: Final = {"Q4_0": 0.72, "Q4_1": 0.96}
_TOKEN_S: Final = 0.013
_STEPS_S: Final = {
    "this CPU": (0.013, 0.0045),
    "this CPU, target cost 8": (0.104, 0.036),
    "a GPU, small target": (0.020, 0.0003),
    "a GPU, large target": (0.100, 0.0005),
}
"""Seconds of a step, and for each token more."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Tokens a second, each with its best draft length.

    Attributes:
        streaming: The edge writes by itself.
        drafting: The better one of waiting for each verdict, and drafting ahead.
        outcomes: Waiting, with drafts made for as many outcomes as there is time for.
        likely: How often the outcome is among them.
    """

    streaming: float
    drafting: float
    outcomes: float
    likely: float

    @property
    def gain(self) -> float:
        """What several outcomes would bring beside the best of the plans that there are."""
        return self.outcomes / max(self.streaming, self.drafting)


def reckon(conditions: Conditions, *, second: float) -> Outlook:
    """Return what each way promises.

    Args:
        conditions: Of the device.
        second: Chance that the target's own token is the draft model's second choice where the first has fallen.
    """
    lengths = range(1, _LONGEST + 1)
    drafting = max(conditions.rate(Plan(tokens, ahead=ahead)) for tokens in lengths for ahead in (False, True))
    outcomes, likely = max(_with_outcomes(conditions, tokens, second) for tokens in lengths)
    return Outlook(1.0 / conditions.compute_s, drafting, outcomes, likely)


def _with_outcomes(conditions: Conditions, tokens: int, second: float) -> tuple[float, float]:
    a, answer_s = conditions.acceptance, conditions.answer_s(tokens)
    branches = int(answer_s / ((tokens + 1) * conditions.token_s))  # each reads a token and drafts as many again
    likely = sum(sorted(_chances(a, tokens, second), reverse=True)[:branches])
    draft_s = (tokens + a**tokens) * conditions.token_s
    committed = (1.0 - a ** (tokens + 1)) / (1.0 - a)
    return committed / (answer_s + (1.0 - likely) * draft_s), likely


def _chances(a: float, tokens: int, second: float) -> Iterator[float]:
    yield a ** (tokens + 1)
    for place in range(tokens):
        yield a**place * (1.0 - a) * second


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    argparse.ArgumentParser(prog="python -m benchmarks.outcomes", description=__doc__).parse_args(argv)
    print("edge, draft, RTT: tokens/s streaming, drafting, several outcomes; gain; how often among them")
    for edge, (step_s, more_s) in _STEPS_S.items():
        for draft, acceptance in _DRAFTS.items():
            for rtt_ms in _RTTS_MS:
                conditions = Conditions(
                    acceptance=acceptance,
                    token_s=_TOKEN_S,
                    beside_s=max(1e-3, rtt_ms * 1e-3),
                    compute_s=step_s,
                    compute_token_s=more_s,
                    window=_WINDOW,
                )
                found = reckon(conditions, second=SECOND)
                print(
                    f"{edge}, {draft}, {rtt_ms:.0f} ms: {found.streaming:.1f}, {found.drafting:.1f}, "
                    f"{found.outcomes:.1f}; {found.gain:.2f}; {found.likely:.2f}"
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
