"""Machines: devices up to which drafts pay, by machine and target (computed from two times of a step).

A step of a target reads its weights once, and computes each row: it takes the greater of the two times. By the formulas
of `fleet edge advise`, with devices that generate all the time, an acceptance of 0.8 and 20 ms of round trip: the most
devices at which drafting makes at least 1.1 times the tokens/s of edge-only decoding. Takes seconds.
"""

import argparse
from dataclasses import dataclass
from typing import Final

from benchmarks.harness import Bench, SuiteReport, table
from fleet_admin.advice import Workload, best_drafting, edge_only
from fleet_edge.step_curve import StepCurve

_ACCEPTANCE: Final = 0.8
_ROUND_TRIP_S: Final = 0.02
_GAIN: Final = 1.1
_DRAFT_MS: Final = (5, 15, 40)
_DEVICES: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_BATCHES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_TOKENS: Final = (1, 2, 3, 4, 5, 7, 9, 13, 17)
_PROMPTS: Final = (16, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    read_ms: float
    """Time to read all weights once."""
    row_ms: float
    """Time to compute a row."""

    def curve(self) -> StepCurve:
        def step(rows: int) -> float:
            return max(self.read_ms, rows * self.row_ms)

        return StepCurve(
            rows={batch: tuple((float(each), step(batch * each)) for each in _TOKENS) for batch in _BATCHES},
            prefill=tuple((float(each), step(each)) for each in _PROMPTS),
        )


MACHINES: Final = (
    Machine("two cores with AVX-512 VNNI, 7B", 75, 9),
    Machine("sixteen cores, 300 GB/s, 7B", 15, 1.2),
    Machine("the same, 70B", 150, 12),
    Machine("two cores with eight times the arithmetic, 7B", 75, 1.2),
    Machine("GPU of 1 TB/s, 7B in bfloat16", 15, 0.1),
    Machine("the same, 70B", 40, 0.7),
    Machine("GPU of 2 TB/s, 70B in 8 bits", 36, 0.35),
)


def add_options(_parser: argparse.ArgumentParser) -> None:
    pass


def run(_bench: Bench) -> SuiteReport:
    rows = []
    for machine in MACHINES:
        curve = machine.curve()
        row: dict[str, object] = {
            "machine_and_target": machine.name,
            "step_ms": machine.read_ms,
            "balance": machine.read_ms / machine.row_ms,
        }
        for draft_ms in _DRAFT_MS:
            work = Workload(curve=curve, draft_s=draft_ms / 1e3, acceptance=_ACCEPTANCE, round_trip_s=_ROUND_TRIP_S)
            row[f"drafts_{draft_ms}_ms"] = max_devices(work)
        rows.append(row)
    columns = {"machine_and_target": "", "step_ms": ".0f", "balance": ".0f"}
    table(rows, columns | {f"drafts_{each}_ms": "d" for each in _DRAFT_MS})
    return SuiteReport(rows)


def max_devices(work: Workload) -> int | None:
    """Return the most devices of `_DEVICES` for which drafts pay, or None."""

    def gain(devices: int) -> float:
        return best_drafting(work, devices).tokens_per_s / edge_only(work, devices).tokens_per_s

    return max((each for each in _DEVICES if gain(each) >= _GAIN), default=None)
