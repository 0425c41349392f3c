"""Report on conversations: a table for people, and what was missed."""

import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

from benchmarks.conversation.counted import BLOCK, MOST_SLOWER, Shared, Turn, beyond_new, first_ratio

__all__ = ["first_ratios", "missed_goals", "show"]

_NAMES: Final = ("engine", "conversation", "alone")


def show(turns: Sequence[Turn], shared: Sequence[Shared]) -> None:
    """Print what one engine has computed."""
    for alone, title in ((True, ""), (False, "conversations that take turns at one device")):
        _show_turns([turn for turn in turns if turn.alone is alone], title)
    for each in shared:
        print(
            f"{each.devices} devices began with {each.common} tokens in common and {each.own} of their own: the edge "
            f"computed {each.computed} ({each.allowed} allowed) and took over {each.reused}"
        )
    sys.stdout.flush()


def _show_turns(turns: Sequence[Turn], title: str) -> None:
    if turns:
        print(
            f"{title}\n"
            f"{turns[0].engine:<10} {'prompt':>7} {'new':>5} {'edge':>9} {'edge':>7} {'device':>9} {'device':>7} "
            f"{'most beyond':>12} {'first token':>12}\n"
            f"{'turn':<10} {'tokens':>7} {'':>5} {'computed':>9} {'cached':>7} {'computed':>9} {'cached':>7} "
            f"{'new, tokens':>12} {'ms':>12}"
        )
    for number in sorted({turn.device.turn for turn in turns}):
        rows = [turn.row() for turn in turns if turn.device.turn == number]
        middle = {name: median(row[name] for row in rows) for name in rows[0] if name not in _NAMES}
        most = beyond_new(turn for turn in turns if turn.device.turn == number)
        print(
            f"{number:<10} {middle['prompt_tokens']:>7.0f} {middle['new_tokens']:>5.0f} "
            f"{middle['edge_computed_tokens']:>9.0f} {middle['edge_cached_tokens']:>7.0f} "
            f"{middle['device_computed_tokens']:>9.0f} {middle['device_cached_tokens']:>7.0f} {most:>12} "
            f"{middle['first_token_ms']:>12.0f}"
        )


def missed_goals(turns: Sequence[Turn], shared: Sequence[Shared]) -> list[str]:
    """Return a sentence for each goal that was missed."""
    missed = []
    for engine, own in _by_engine(turns).items():
        if (most := beyond_new(own)) > BLOCK:
            missed.append(f"MISSED with {engine}: a turn computed {most} tokens beside its new ones, {BLOCK} allowed")
        if (ratio := first_ratio(own)) is not None and ratio > MOST_SLOWER:
            missed.append(
                f"MISSED with {engine}: the last turn's first token took {ratio:.2f} times as long as the second's, "
                f"{MOST_SLOWER} allowed"
            )
    missed += [
        f"MISSED with {each.engine}: {each.computed} tokens computed of prompts that begin alike, {each.allowed} "
        "allowed"
        for each in shared
        if each.computed > each.allowed
    ]
    return missed


def first_ratios(turns: Sequence[Turn]) -> dict[str, float | None]:
    """Return `first_ratio` by engine."""
    return {engine: first_ratio(own) for engine, own in _by_engine(turns).items()}


def _by_engine(turns: Sequence[Turn]) -> Mapping[str, list[Turn]]:
    engines = dict.fromkeys(turn.engine for turn in turns)
    return {engine: [turn for turn in turns if turn.engine == engine] for engine in engines}
