import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.exactness.cases import CASES, FAULTS
from tests.protocol_model.planted import Planted

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/measurements.md")}
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
each_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def rows_of(name: str) -> list[dict[str, Any]]:
    return list(json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"])


@each_page
def test_the_cases_and_mistakes_of_the_exactness_proof_are_counted(page: str) -> None:
    [(cases, mistakes)] = re.findall(r"(\d+) cases(?:,| and) (\d+) mistakes", page)
    assert (int(cases), int(mistakes)) == (len(CASES), len(FAULTS))


def test_the_planted_faults_of_the_protocol_are_counted() -> None:
    [(found, planted)] = re.findall(r"(\d+) of (\d+) planted faults", PAGES["docs/measurements.md"])
    assert int(found) == int(planted) == len(Planted)


def test_the_cost_of_batch_invariant_is_that_of_the_recorded_run() -> None:
    page = PAGES["docs/measurements.md"]
    pace = {(row["system"], row["devices"]): row["tokens_per_s"] for row in rows_of("capacity")}
    left = [pace["edge-only", n] / pace["edge-only-residual", n] for n in (1, 16)]
    [(one, sixteen)] = re.findall(r"(0\.\d+) of the tokens/s remain with one device, (0\.\d+) with sixteen", page)
    assert [float(one), float(sixteen)] == [pytest.approx(share, abs=0.005) for share in left]


def test_the_gain_over_llama_cpp_with_a_draft_model_is_that_of_the_recorded_run() -> None:
    rows = [each for each in rows_of("large") if each["acceptance"] == 0.8]
    pace = {(each["system"], each["devices"], each["token_ms"]): each["tokens_per_s"] for each in rows}
    gains = [pace["auto", n, 15] / pace["llama-server with a draft model", n, None] for n in (1, 2, 4, 8)]
    [stated] = re.findall(r"with its own draft model: ([\d., ]+)\.$", PAGES["docs/measurements.md"], flags=re.MULTILINE)
    assert stated == ", ".join(f"{gain:.2f}" for gain in gains)


@pytest.mark.parametrize("name", ["capacity-blocks", "capacity-cost8"])
def test_the_gains_of_chosen_plans_are_those_of_the_recorded_runs(name: str) -> None:
    pace = {(each["system"], each["devices"], each["draft"]): each["tokens_per_s"] for each in rows_of(name)}
    devices = sorted({n for _, n, _ in pace})
    for draft in ("Q4_0", "Q4_1"):
        gains = [pace["ours-auto", n, draft] / pace["edge-only", n, ""] for n in devices]
        assert ", ".join(f"{gain:.2f}" for gain in gains) in PAGES["docs/measurements.md"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_recorded_result_is_of_a_commit(path: Path) -> None:
    [commit] = re.findall(r'"commit": "(.*?)"', path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{12}", commit), "not a working copy with changes"
