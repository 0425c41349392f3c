"""Explanation of a plan: what each way of writing promises, in a sentence with figures."""

from collections.abc import Mapping

from fleet_device.pacing.contract import Plan
from fleet_device.pacing.ranking import draft_lengths
from fleet_device.pacing.throughput import Conditions

__all__ = ["explain"]


def explain(
    waiting: Conditions | None,
    drafting_ahead: Conditions | None,
    *,
    longest: int,
    streamed_s: float,
    trust: float = 1.0,
) -> str:
    """Return what was measured, and the tokens a second that follow from it.

    Args:
        waiting: The conditions while the device waits for each verdict; None if it may not, or nothing was measured.
        drafting_ahead: The conditions while it does not; None likewise.
        longest: Most tokens of a draft.
        streamed_s: Time between tokens that the edge writes by itself; 0 if it may not, or has not.
        trust: What the rates of drafting ahead are multiplied by.
    """
    parts = []
    if streamed_s:
        parts.append(f"the edge by itself {1.0 / streamed_s:.1f} tokens/s")
    if waiting is not None:
        parts.append(_promise("drafting", {n: waiting.rate(Plan(n)) for n in draft_lengths(waiting, longest)}))
    if drafting_ahead is not None and longest:
        lengths = [n for n in draft_lengths(drafting_ahead, longest) if n]
        rates = {n: trust * drafting_ahead.rate(Plan(n, ahead=True)) for n in lengths}
        parts.append(_promise("drafting ahead", rates))
    if (known := waiting or drafting_ahead) is not None:
        more_ms = (known.compute_token_s + known.beside_token_s) * 1e3
        parts.append(
            f"acceptance {known.acceptance:.2f}, {known.token_s * 1e3:.1f} ms a draft token, "
            f"{known.answer_s(0) * 1e3:.0f} ms an answer and {more_ms:.1f} ms more for each token"
        )
        if known.shared is not None:
            parts.append(f"all of it as it would be if all {known.shared.texts} texts at the edge were written so")
    sentence = "; ".join(parts) or "nothing has been measured yet"
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _promise(way: str, rates: Mapping[int, float]) -> str:
    """Say what a way of drafting promises at its best length."""
    tokens = max(rates, key=rates.__getitem__)
    return f"{way} {rates[tokens]:.1f} tokens/s with {tokens} a draft"
