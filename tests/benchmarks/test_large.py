import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.large.models import FILES, FIRST, VOCABULARY, make, successors, walk
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.registry import load_verifier
from tests.support.brokers import require_mosquitto
from tests.support.prepared_models import prepared


def test_the_walk_visits_every_ordinary_token_and_a_draft_model_follows_it_as_often_as_it_is_to() -> None:
    following = successors()
    assert np.array_equal(np.sort(following), np.arange(VOCABULARY))
    assert len(set(walk(FIRST, VOCABULARY - FIRST))) == VOCABULARY - FIRST
    draft = successors(0.8)
    assert np.array_equal(np.sort(draft), np.arange(VOCABULARY))
    assert np.mean(draft[FIRST:] == following[FIRST:]) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.models
@pytest.mark.parametrize(
    "file", [pytest.param(each, marks=[] if each == "Q4_0" else [pytest.mark.exhaustive]) for each in FILES]
)
def test_a_random_model_writes_the_known_text_in_both_engines(file: str, tmp_path: Path) -> None:
    path = make(tmp_path, "tiny", file, vocabulary=prepared("Q4_0.gguf"))
    tokens = (5_000, 6_000, 70_000, 1_200)
    for engine in ("blocks", "llama.cpp"):
        settings = {"target": str(path), "engine": engine, "threads": 1, "context": 255, "kv_bytes": 16 << 20}
        verifier = load_verifier(EdgeSettings.model_validate(settings))
        verifier.open(1)
        rows = np.asarray(verifier.score([Item(1, tokens, len(tokens), stable=False)]))
        assert rows.argmax(axis=1).tolist() == successors()[list(tokens)].tolist()


@pytest.mark.models
@pytest.mark.broker
def test_steps_that_are_played_are_measured_through_the_whole_system(tmp_path: Path) -> None:
    require_mosquitto()
    curve, report = tmp_path / "curve.json", tmp_path / "report.json"
    curve.write_text(json.dumps({"rows": {"1": [[1, 5.0], [5, 6.0]]}}))
    words = ["--curve", str(curve), "--cache", str(tmp_path), "--devices", "1", "--acceptance", "0.8"]
    words += ["--token-ms", "1", "--plans", "auto", "4", "--tokens", "12", "--rounds", "1", "--json", str(report)]
    assert main(["large", *words]) in {0, 1}
    rows = {row["system"]: row for row in json.loads(report.read_text())["rows"]}
    assert set(rows) == {"edge-only", "auto", "4"}
    assert rows["4"]["mean_draft"] > 2
    assert rows["edge-only"]["over_edge_only"] == 1.0
