"""Exactness proof: what devices write through a real mosquitto follows the target's law, whatever the engine."""

from typing import TYPE_CHECKING

from fleet_common.lazy import lazy_names

if TYPE_CHECKING:
    from benchmarks.exactness.cases import CASES, FAULTS, Case
    from benchmarks.exactness.laws import LENGTH, fold_ends, law
    from benchmarks.exactness.proof import FLEET, Result, prove

__all__ = ["CASES", "FAULTS", "FLEET", "LENGTH", "Case", "Result", "fold_ends", "law", "prove"]

if not TYPE_CHECKING:
    _CASES, _LAWS = "benchmarks.exactness.cases", "benchmarks.exactness.laws"
    _PROOF = "benchmarks.exactness.proof"
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "CASES": _CASES,
            "FAULTS": _CASES,
            "Case": _CASES,
            "LENGTH": _LAWS,
            "fold_ends": _LAWS,
            "law": _LAWS,
            "FLEET": _PROOF,
            "Result": _PROOF,
            "prove": _PROOF,
        },
    )
