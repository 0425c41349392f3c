import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper import command
from benchmarks.paper.comparison import bytes_lines, places_of, read_rows, speed_lines
from benchmarks.paper.mistakes import WAYS, Way, Writer, hold
from schemas.errors import FleetError
from schemas.policy import Mode, SamplingPolicy
from tests.support.toy_pair import PROMPT

TEXTS = 3000
"""Seeds are fixed; had they been drawn afresh, a right way would fail once in 10,000 runs."""


@pytest.mark.parametrize("name", list(WAYS))
def test_each_mistake_is_found_and_ours_is_not(name: str) -> None:
    verdict = hold(name, texts=TEXTS, first_seed=5)
    assert verdict.as_it_should_be, verdict


def test_without_a_cache_the_target_computes_the_whole_text_for_each_draft() -> None:
    policy = SamplingPolicy(mode=Mode.RESIDUAL, temperature=0.8, top_k=0, top_p=1.0, seed=3)
    with_cache, without = Writer(Way("")), Writer(Way("", cache=False))
    for writer in (with_cache, without):
        writer.write(policy, length=96, ends=())
        assert writer.written == 96
    # A token for each token of the text, the prompt, and what is rejected or drawn behind an accepted draft again.
    assert 95 + len(PROMPT) <= with_cache.computed < 96 * 3
    assert without.computed > 10 * with_cache.computed


def timed(system: str, tokens_per_s: float, *, rtt_ms: float = 50.0, mbit_s: float = 1.0) -> dict[str, Any]:
    return {
        "system": system, "draft": "Q4_0", "cost": 1, "rtt_ms": rtt_ms, "mbit_s": mbit_s, "tokens_per_s": tokens_per_s
    }  # fmt: skip


def counted(system: str, up: float, down: float, *, length: int | None = 4) -> dict[str, Any]:
    return {
        "system": system, "draft": "Q4_0", "draft_length": length, "stops": False, "mbit_s": None,
        "tokens_per_s": None, "uplink_bytes_per_token": up, "downlink_bytes_per_token": down,
    }  # fmt: skip


SPEEDS = [timed("dsd", 1.5), timed("dssd-dense", 6.0), timed("ours-residual", 18.0)]
SIZES = [
    counted("dsd", 150_000.0, 20.0),
    counted("dssd-dense", 15.0, 70_000.0),
    counted("ours-residual", 15.0, 20.0),
    counted("ours-residual", 99.0, 99.0, length=8),
]


def test_ours_is_set_beside_what_was_published() -> None:
    (place,) = places_of([*SPEEDS, *SIZES])
    assert (place.ratio("ours-residual", "dsd"), place.ratio("ours-residual", "dssd-dense")) == (12.0, 3.0)
    assert place.ratio("ours-auto", "dsd") is None
    speeds = list(speed_lines([place]))
    assert speeds[1].split()[-2:] == ["12.0", "3.0"]
    sizes = [line for line in bytes_lines(SIZES) if "ours-residual" in line]
    assert [line.split()[-2:] for line in sizes] == [["10,000.0", "3,500.0"]]


def test_one_command_makes_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latency, sizes, report = tmp_path / "latency.json", tmp_path / "bytes.json", tmp_path / "paper.json"
    latency.write_text(json.dumps({"commit": "abc", "rows": SPEEDS}))
    sizes.write_text(json.dumps({"commit": "def", "rows": SIZES}))
    arguments = ["--latency", str(latency), "--bytes", str(sizes), "--texts", "1500", "--json", str(report)]
    assert command.main(arguments) == 0
    found = json.loads(report.read_text())
    assert found["sources"]["latency"]["commit"] == "abc"
    assert {each["name"]: each["p"] >= 1e-4 for each in found["law"]} == {name: way.exact for name, way in WAYS.items()}
    assert len(found["rows"]) == len(SPEEDS) + len(SIZES)
    assert "NO" in capsys.readouterr().out


def test_what_is_not_a_result_is_refused_in_a_sentence(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(FleetError, match="python -m benchmarks latency"):
        read_rows(other)
    with pytest.raises(FleetError, match="cannot be read"):
        read_rows(tmp_path / "none.json")
