"""Uniformity of the p-values of many runs of `exactness system --history FILE` (Kolmogorov-Smirnov p-values).

A test of one run misses a mistake whose p-values are merely too small. While outputs follow the target, p-values of
runs with different seeds are uniform. Each kind of test is compared on its own, over all cases and per case.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from scipy import stats

from benchmarks.harness import Bench, SuiteReport, table
from benchmarks.processes import BenchError
from tests.support.statistics import ALARM

_FEWEST: Final = 5
"""Runs of a case from which it is compared on its own."""

_ALL: Final = "all cases"


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add cases of a run to a file, one JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def uniformity(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Test p-values by kind, of all cases and of each; a repetition with the same seeds counts once."""
    distinct = {(row["case"], row["first_seed"]): row for row in rows}
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (case, _), row in distinct.items():
        for kind, value in row["p_values"].items():
            if value is not None:
                values[kind, _ALL].append(value)
                values[kind, case].append(value)
    return [
        {"test": kind, "case": case, "values": len(found), "least": min(found), "p": _uniform(found)}
        for (kind, case), found in sorted(values.items())
        if case == _ALL or len(found) >= _FEWEST
    ]


def _uniform(values: list[float]) -> float:
    return float(stats.kstest(values, "uniform").pvalue)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)


def run(bench: Bench) -> SuiteReport:
    path: Path = bench.options.file
    try:
        rows = uniformity(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, KeyError) as error:
        message = f"{path} is no history ({error}): name a file that `exactness system --history` has written."
        raise BenchError(message) from error
    # Each of the comparisons may raise a false alarm.
    alarm = ALARM / max(1, len(rows))
    shown = [row for row in rows if row["case"] == _ALL or row["p"] < alarm]
    table(
        shown, {"test": "", "case": "", "values": "d", "least": ".3g", "p": ".3g"}, title=f"p below {alarm:.2g} rejects"
    )
    wrong = [f"{row['case']}, {row['test']}: the p-values are NOT uniform." for row in rows if row["p"] < alarm]
    return SuiteReport(rows, wrong=wrong)
