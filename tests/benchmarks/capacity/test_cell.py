import os
from pathlib import Path

import pytest

from benchmarks.capacity.suite import in_process
from benchmarks.processes import BenchError, Cores
from fleet_admin.planning.service_level import Client, TimeWindow
from schemas.policy import Mode, SamplingPolicy
from tests.support.toy_pair import END_TOKENS
from tests.support.toy_transformer import ToyTransformer

pytestmark = pytest.mark.slow

POLICY = SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=5, top_p=1.0, seed=3)


def asked(path: Path, *, draft: bool) -> dict[str, object]:
    return {
        "target": str(path),
        "draft": str(path) if draft else None,
        "length": 2,
        "devices": 3,
        "threads": 1,
        "arrivals": "at-once",
        "pause_s": 0.0,
        "seed": 0,
        "timing": {"seconds": 0.3, "settle_s": 0.0, "patience_s": 5.0},
        "prompts": [{"tokens": [1, 2, 3], "policy": POLICY.model_dump(mode="json"), "most": 5}],
    }


def cores() -> Cores:
    return Cores.choose(os.sched_getaffinity(0), apart=True)


@pytest.mark.parametrize("draft", [False, True])
def test_what_needs_no_network_runs_in_a_process_on_the_edges_cores(tmp_path: Path, draft: bool) -> None:
    pytest.importorskip("llama_cpp")
    toy = ToyTransformer(size=6, seed=51, sharpness=1.8)
    path = toy.write_gguf(tmp_path / "toy.gguf", end_token=END_TOKENS[0])
    before = os.sched_getaffinity(0)
    answer = in_process(asked(path, draft=draft), cores())
    assert os.sched_getaffinity(0) == before
    clients = [Client.from_json(each) for each in answer["clients"]]
    window = TimeWindow(answer["begin"], answer["end"])
    assert len(clients) == 3
    assert all(client.tokens(window) > 0 for client in clients)
    assert all(1 <= text.tokens <= 5 for client in clients for text in client.texts if text.ended_at)


def test_a_process_that_fails_is_told_in_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(BenchError, match="has failed"):
        in_process(asked(tmp_path / "missing.gguf", draft=True), cores())
