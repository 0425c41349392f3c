import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fleet_edge.step_time import read_curve, write_curve
from tests.fleet_admin.planning.curves import AVX2, CHEAP_TOKENS
from tests.support.command import Run, refused

DRAFTS = ("--draft-ms", "10", "--acceptance", "0.7", "--rtt-ms", "20")


@pytest.fixture
def advise(fleet: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return partial(fleet, "edge", "advise")


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    write_curve(AVX2, tmp_path / "avx2.json")
    return tmp_path / "avx2.json"


@pytest.mark.slow
def test_where_tokens_are_dear_it_says_that_the_edge_is_to_write(advise: Run, curve: Path) -> None:
    code, out, _ = advise("--curve", curve, *DRAFTS, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["one_device"]["pays"] is False
    assert found["one_device"]["says"].startswith("Drafting does not pay here for one device")
    assert found["pays_up_to_devices"] == 0
    held = found["holds"]["streaming"]["devices"]
    # A step of 1000 / 8 ms serves about 27 sessions, without prompts.
    assert 8 <= held <= 32
    small, middle, large = found["fleets"]
    assert small["devices"] == 1000
    assert small["writing"] == 20
    for more, less in ((large, middle), (middle, small)):
        for figure in ("edges", "brokers", "messages_per_s", "bytes_per_s", "rows_per_s"):
            assert more[figure] >= less[figure]
    assert large["rows_per_s"] == pytest.approx(1000 * small["rows_per_s"])
    assert set(found["sources"]) == {"writing at once", "edges", "brokers", "messages", "bytes", "rows"}


@pytest.mark.slow
def test_where_tokens_are_cheap_it_says_how_to_draft_and_up_to_which_load(advise: Run, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    write_curve(CHEAP_TOKENS, file)
    copy = tmp_path / "copy.json"
    code, out, _ = advise(
        "--curve", file, "--save-curve", copy, *DRAFTS, "--level-tokens", "5", "--level-gap-ms", "400"
    )
    assert code == 0
    assert "Drafting pays here for one device" in out
    assert "Drafting pays with up to" in out or "Drafting pays at all of these loads" in out
    assert "What a fleet of such edges needs" in out
    assert read_curve(copy) == read_curve(file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--curve", "none.json", *DRAFTS), "The curve none.json cannot be read"),
        (("--draft-ms", "10"), "give --acceptance"),
        (("--acceptance", "0.7"), "give --draft-ms"),
        (("--draft-ms", "-1", "--acceptance", "0.5"), "--draft-ms is -1"),
        (("--draft-ms", "10", "--acceptance", "70"), "give the share of draft tokens that is accepted, from 0 to 1"),
        (("--draft-ms", "10", "--acceptance", "nan"), "from 0 to 1"),
        (("--draft-ms", "10", "--acceptance", "0.5", "--rtt-ms", "1e9"), "--rtt-ms"),
        (("--draft-ms", "10", "--pair", "none.json"), "none.json cannot be read"),
        (("--target", "nowhere", *DRAFTS), "nowhere"),
        (("--against", "none.json"), "python -m benchmarks capacity --json none.json"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(advise: Run, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(advise(*arguments))


def test_a_pair_that_was_not_measured_is_one_sentence(advise: Run, tmp_path: Path) -> None:
    for content in ("{}", '{"measured": null}', '{"measured": {"residual": {"acceptance": 7}}}', "no JSON"):
        (tmp_path / "pair.json").write_text(content)
        assert "measured" in refused(advise("--draft-ms", "10", "--pair", "pair.json"))


def rows(*changes: dict[str, Any]) -> dict[str, Any]:
    plain = {"system": "edge-streaming", "draft": "", "cost": 1, "devices": 4, "rtt_ms": 20.0, "arrivals": "at-once",
             "tokens_per_s": 100.0, "clients_at_level": 4, "acceptance": None, "draft_token_ms": None}  # fmt: skip
    return {"settings": {"seconds": 2.0, "tokens": 48, "pause_s": 1.0}, "rows": [plain | each for each in changes]}


def test_the_simulation_is_held_against_what_was_measured(advise: Run, curve: Path, tmp_path: Path) -> None:
    file = tmp_path / "capacity.json"
    file.write_text(json.dumps(rows({}, {"system": "raw-engine"}, {"cost": 8}, {"arrivals": "poisson"})))
    _, out, _ = advise("--against", file, "--curve", curve, "--json")
    at_once, poisson = json.loads(out)["rows"]
    assert (at_once["arrivals"], poisson["arrivals"]) == ("at-once", "poisson")
    right = rows({"tokens_per_s": at_once["simulated_tokens_per_s"]})
    file.write_text(json.dumps(right))
    code, out, _ = advise("--against", file, "--curve", curve)
    assert (code, "All 1 rows are within 15%" in out) == (0, True)
    right["rows"][0]["tokens_per_s"] *= 2
    file.write_text(json.dumps(right))
    code, out, _ = advise("--against", file, "--curve", curve)
    assert code == 1
    assert "1 of 1 rows are beyond 15%: edge-streaming with 4 (at-once)." in out
    assert "had much less of its cores" not in out
    right["rows"][0] |= {"edge_cpu": 0.5, "load_bound": True}
    file.write_text(json.dumps(right))
    _, out, _ = advise("--against", file, "--curve", curve)
    assert "much less of its cores than it would have used" in out
    assert "own devices were at their limit" in out


def test_a_curve_is_held_against_systems_of_its_mode(advise: Run, tmp_path: Path) -> None:
    file = tmp_path / "capacity.json"
    auto = {"system": "ours-auto", "acceptance": 0.7, "draft_token_ms": 10.0, "text_tokens": 30.4}
    file.write_text(json.dumps(rows({}, {"system": "edge-streaming-residual"}, auto)))
    for mode, systems in (("residual", ["edge-streaming-residual"]), ("coupled", ["edge-streaming", "ours-auto"])):
        write_curve(replace(AVX2, mode=mode), tmp_path / "curve.json")
        _, out, _ = advise("--against", file, "--curve", "curve.json", "--json")
        assert [row["system"] for row in json.loads(out)["rows"]] == systems


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("nonsense", "it is no JSON"),
        ("{}", "rows: it is required"),
        (json.dumps(rows({"devices": 0})), "rows.0.devices: it must be at least 1"),
        (json.dumps(rows({"cost": 8})), "no row of a system that is simulated"),
        (json.dumps(rows({"system": "raw-engine"})), "no row of a system that is simulated"),
    ],
)
def test_an_unrelated_file_is_refused(advise: Run, curve: Path, tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "other.json").write_text(content)
    assert sentence in refused(advise("--against", "other.json", "--curve", curve))
