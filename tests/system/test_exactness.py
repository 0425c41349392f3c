from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import pytest

from benchmarks.exactness.cases import CASES, FAULTS, Variant
from benchmarks.exactness.chances import sessions_for
from benchmarks.exactness.system import EDGES, FLEET, CaseEdges, edge_arguments, prove
from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from sampling.downlink import FormName
from tests.support.brokers import require_mosquitto
from tests.support.sabotage import Sabotage
from tests.support.toy_engines import ToyEngine

SESSIONS = 500
FAULT_CHANCE = 1 - 1e-6  # that the sessions of a case find its fault, by the recorded p-values
MIN_FAULT_SESSIONS = 100  # of fewer, a statistic has no chi-square distribution, which the chance assumes
DEVICES = 8

pytestmark = pytest.mark.broker


# Each mode once, and the riskiest cases; the others are exhaustive. So are most faults, which need more sessions: they
# test the proof, and a fault of the system itself is found by its case.
IN_SMALL = {
    "residual sparse",
    "coupled",
    "residual drafted and edge-only in turns",
    "residual auto two-targets",
    "residual auto two-targets fault:targets-alike",
    "residual sparse fault:inverted",
    "residual edge-only fault:unshaped",
    "residual auto suffix",
    "residual sparse unlike",
    "residual auto llama.cpp",
    "residual auto delta",
    "residual sparse grammar",
    "residual sparse wide",
    "residual edge-only edge-draft near",
    "residual edge-only edge-draft",
    "coupled fault:nucleus-short",
    "residual auto fault:seeds-shared",
    "residual auto grammar fault:masked-half",
    "residual sparse all-controls",
    "coupled all-controls",
    "residual edge-only all-controls",
}

# Of the cases of other engines, those that are run at all: more of the same are in `benchmarks exactness system`.
OTHER_ENGINES = {
    "coupled vllm",
    "coupled 4-bit",
    "coupled delta",
    "coupled mamba",
    "residual auto mamba",
    "coupled delta fault:log-short",
    "residual auto delta fault:log-short",
    "residual auto ahead 8-bit",
    "residual auto ahead vllm",
    "residual auto greedy vllm",
    "coupled llama.cpp fault:shifted",
    "residual auto 8-bit fault:shifted",
    "coupled 4-bit fault:shifted",
    "residual auto vllm fault:tempered-twice",
    "residual auto vllm fault:cut-short",
}


def cases(chosen: Iterable[Variant]) -> list[Any]:
    """Cases of equal edges stay in one worker, which starts them once."""
    return [
        pytest.param(
            case,
            id=case.name,
            marks=[
                *([] if case.name in IN_SMALL else [pytest.mark.exhaustive]),
                *([pytest.mark.xdist_group(group(case))] if case.sabotage is Sabotage.NONE else []),
            ],
        )
        for case in sorted(chosen, key=group)
        if case.engine is ToyEngine.SCRIPTED or case.name in IN_SMALL | OTHER_ENGINES
    ]


def group(case: Variant) -> str:
    return "exactness-" + blake2b(repr(edge_arguments(case)).encode(), digest_size=4).hexdigest()


@pytest.fixture(scope="module")
def edges() -> Iterator[CaseEdges]:
    require_mosquitto()
    with MosquittoProcess(Broker(fleet=FLEET, edges=EDGES)) as broker, CaseEdges(broker.port) as edges:
        yield edges


@pytest.mark.parametrize("case", cases(CASES))
def test_texts_follow_the_target(case: Variant, edges: CaseEdges) -> None:
    # With fresh seeds each of the three tests would raise a false alarm once in 10,000 runs.
    result = prove(case, edges=edges, sessions=case.share(SESSIONS), first_seed=99, devices=DEVICES)
    assert result.passed, result


@pytest.mark.parametrize("case", cases(case for case in FAULTS if case.form is not FormName.SAMPLES))
def test_the_proof_catches_faults(case: Variant, edges: CaseEdges) -> None:
    assert case.sabotage is not Sabotage.NONE
    sessions = max(MIN_FAULT_SESSIONS, sessions_for(case, FAULT_CHANCE))
    result = prove(case, edges=edges, sessions=sessions, first_seed=99, devices=DEVICES)
    assert result.passed, result
