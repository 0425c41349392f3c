"""The chance that a number of sessions shows a planted mistake."""

import json

import numpy as np
import pytest

from benchmarks.exactness import chances
from benchmarks.exactness.cases import FAULTS, LONG, Variant
from benchmarks.exactness.chances import FOUND, chance, noncentral, sessions_for
from benchmarks.exactness.evidence import Evidence
from benchmarks.exactness.power import MISTAKES, Simulation
from benchmarks.exactness.system import CaseResult
from sampling.downlink import FormName
from schemas.policy import Mode
from tests.support.sabotage import Sabotage
from tests.support.statistics import ALARM
from tests.support.toy_engines import ToyEngine
from tests.support.toy_pair import Languages

SCRIPTED = [case for case in FAULTS if case.engine is ToyEngine.SCRIPTED]
WEAK = Variant(Mode.RESIDUAL, FormName.AUTO, 8, languages=Languages.NEAR, tokens=LONG, sabotage=Sabotage.ACCEPTANCE_LOW)


def result(case: Variant, sessions: int, *, found: bool) -> CaseResult:
    evidence = Evidence(0.5, ALARM / 2 if found else 0.5, 0.5)
    return CaseResult(case, first_seed=1, sessions=sessions, evidence=evidence, acceptance=0.5, wall_s=1.0)


def test_every_mistake_is_recorded() -> None:
    rows = {row["case"] for row in json.loads(chances.RECORDED.read_text(encoding="utf-8"))["rows"]}
    assert rows == {case.name for case in FAULTS}


@pytest.mark.parametrize("case", SCRIPTED, ids=lambda case: case.name)
def test_the_sessions_of_a_whole_run_find_every_mistake(case: Variant) -> None:
    assert chance(case, case.share(20_000)) >= FOUND
    assert sessions_for(case) <= case.share(20_000)


def test_a_mistake_is_missed_only_where_the_sessions_suffice() -> None:
    assert result(WEAK, 20, found=False).passed is None
    assert result(WEAK, 20, found=True).passed is True
    assert result(WEAK, 20_000, found=False).passed is False
    right = Variant(Mode.RESIDUAL, FormName.AUTO, 2)
    assert result(right, 20, found=True).passed is False
    assert result(right, 20, found=False).passed is True


def test_a_mistake_without_a_record_is_excused_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chances, "_recorded", dict)
    assert result(WEAK, 1, found=False).passed is False


@pytest.mark.parametrize(("sessions", "least", "most"), [(20, 0.0, 0.1), (100, 0.3, 0.8), (200, 0.85, 1.0)])
def test_the_chance_is_the_share_of_simulated_runs_that_find_it(sessions: int, least: float, most: float) -> None:
    """Of 60 runs; the p-value of one long run foretells the share within 0.3, four of its standard deviations."""
    simulation, random = Simulation(WEAK), np.random.default_rng(6)
    mistake = MISTAKES["acceptance 2 % low"]
    _, p = simulation.p_values(1_500, mistake, random)
    foretold = noncentral(p, 5, 1_500, 5, sessions)
    share = np.mean([simulation.p_values(sessions, mistake, random)[1] < ALARM for _ in range(60)])
    assert least <= foretold <= most
    assert abs(share - foretold) < 0.3
