import json
import re
from pathlib import Path

import pytest

from benchmarks.exactness.cases import CASES, FAULTS
from tests.protocol_model.planted import Planted

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/measurements.md")}
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
each_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


@each_page
def test_the_cases_and_mistakes_of_the_exactness_proof_are_counted(page: str) -> None:
    [(cases, mistakes)] = re.findall(r"(\d+) cases(?:,| and) (\d+) mistakes", page)
    assert (int(cases), int(mistakes)) == (len(CASES), len(FAULTS))


def test_the_planted_faults_of_the_protocol_are_counted() -> None:
    [(found, planted)] = re.findall(r"(\d+) of (\d+) planted faults", PAGES["docs/measurements.md"])
    assert int(found) == int(planted) == len(Planted)


def test_the_cost_of_batch_invariant_is_that_of_the_recorded_run() -> None:
    page = PAGES["docs/measurements.md"]
    rows = json.loads((ROOT / "benchmarks" / "results" / "capacity.json").read_text(encoding="utf-8"))["rows"]
    pace = {(row["system"], row["devices"]): row["tokens_per_s"] for row in rows}
    left = [pace["edge-only", n] / pace["edge-only-residual", n] for n in (1, 16)]
    [(one, sixteen)] = re.findall(r"(0\.\d+) of the tokens/s remain with one device, (0\.\d+) with sixteen", page)
    assert [float(one), float(sixteen)] == [pytest.approx(share, abs=0.005) for share in left]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_recorded_result_is_of_a_commit(path: Path) -> None:
    [commit] = re.findall(r'"commit": "(.*?)"', path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{12}", commit), "not a working copy with changes"
