import json
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.large import restarts
from benchmarks.large.models import FILES, FIRST, VOCABULARY, make, successors, walk
from benchmarks.large.played_device import PlayedDrafter
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.blocks.weight_cache import _mapped, _write
from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.registry import load_verifier
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.brokers import require_mosquitto
from tests.support.letter_codec import LetterCodec
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


def test_played_drafts_are_right_as_often_as_they_are_to_be() -> None:
    right, prompt = np.array([True, False] * 20), [FIRST + 5, FIRST + 6]
    drafter = PlayedDrafter(Vocabulary.of([""] * VOCABULARY), LetterCodec(""), right, 0.0)
    text = walk(prompt[-1], 30)
    drafter.reset(prompt)
    for place, token in enumerate(text, start=1):
        found = drafter.next(SamplingPolicy())
        assert found.ids.tolist() == ([token] if right[place] else [token - 1])
        drafter.extend([token])
    drafter.truncate(len(prompt))
    assert drafter.next(SamplingPolicy()).ids.tolist() == [text[0] - 1]


@pytest.mark.models
@pytest.mark.broker
def test_a_soak_checks_each_output_and_samples_memory(tmp_path: Path) -> None:
    require_mosquitto()
    report = tmp_path / "report.json"
    words = ["--shape", "tiny", "--cache", str(tmp_path), "--devices", "2", "--minutes", "0.1", "--long", "300"]
    assert main(["soak", *words, "--tokens", "8", "--json", str(report)]) in {0, 1}
    found = json.loads(report.read_text())
    assert found["wrong"] == []
    assert sum(row["requests"] for row in found["rows"]) >= 2
    assert all(sample["own_mb"] > 0 for sample in found["samples"])


@pytest.mark.parametrize("kind", ["cut", "flipped", "older"])
def test_damage_is_done_to_pages_and_to_weights(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = namedtuple("room", ("total", "used", "free"))(1000, 500, 500)  # noqa: PYI024 - as shutil's
    monkeypatch.setattr("shutil.disk_usage", lambda _path: room)
    target_id = "0123456789abcdef"
    (tmp_path / "pages").write_bytes(f"pages 1 {target_id} 28 4 128 100".encode().ljust(10_000, b"\0"))
    weights = tmp_path / "weights"
    _write(weights, "ab12", {}, "")
    for path in (tmp_path / "pages", weights):
        before = path.read_bytes()
        restarts._DAMAGES[kind](path)
        assert path.read_bytes() != before
    if kind == "older":
        assert target_id.encode() not in (tmp_path / "pages").read_bytes()
        with pytest.raises(ValueError, match="has changed"):
            _mapped(os.open(weights, os.O_RDONLY), "ab12", 1, lambda _count: None)
