"""Options of the scheduler that no setting has, for tests that need small steps or a clock that stands still."""

from collections.abc import Mapping
from typing import Any, Final

from fleet_edge.batching.batch_builder import Budget
from fleet_edge.orchestrator import Orchestrator

TUNING: Final = frozenset({"piece_s", "gather_share", "step_tokens", "prefill_chunk"})
"""Names that `tune` takes; holding a step (`gather_share`) needs a clock that runs."""


def without_tuning(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in TUNING}


def tune(edge: Orchestrator, options: Mapping[str, Any]) -> None:
    edge.piece_s = options.get("piece_s", edge.piece_s)
    scheduler = edge.scheduler
    scheduler._delay.share = options.get("gather_share", scheduler._delay.share)
    usual = scheduler._budget
    scheduler._budget = Budget(
        tokens=options.get("step_tokens", usual.tokens), prefill_chunk=options.get("prefill_chunk", usual.prefill_chunk)
    )
