import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.__main__ import main
from benchmarks.engines.steps import by_turns, raw_llama
from benchmarks.engines.vocabulary import POLICIES
from benchmarks.processes import BenchError
from tests.fleet_edge.verifiers.oracle import tiny_target_gguf
from tests.support.tiny_gguf import overwrite, tiny_gguf


def test_all_are_measured_by_turns_the_first_does_not_count_and_the_fastest_raw_one_does() -> None:
    said: list[str] = []
    ours, raw, slow = iter([900.0, 3.0, 1.0, 8.0]), iter([900.0, 2.0, 2.0, 4.0]), iter([5.0] * 4)

    def step(name: str, source: Iterator[float]) -> float:
        said.append(name)
        return next(source)

    ways = [lambda _b, _t: step("slow", slow), lambda _b, _t: step("raw", raw)]
    cell = by_turns(lambda _b, _t: step("ours", ours), ways, sequences=4, tokens=5, seconds=1.0, fewest=3)
    assert said == ["ours", "slow", "raw"] * 4
    assert (cell.ms, cell.raw_ms, cell.ratio, cell.way, cell.turns) == (3.0, 2.0, 1.5, 1, 3)


def test_raw_llama_cpp_that_aborts_ends_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    debugger = tmp_path / "bin" / "gdb"  # llama.cpp starts one, whose output would pass for an answer
    debugger.parent.mkdir()
    debugger.write_text("#!/bin/sh\necho a backtrace\necho of two lines\n")
    debugger.chmod(0o755)
    monkeypatch.setenv("PATH", f"{debugger.parent}{os.pathsep}{os.environ['PATH']}")
    path = overwrite(
        tiny_gguf(tmp_path / "tiny.gguf"), "llama.attention.layer_norm_rms_epsilon", struct.pack("<f", -1.0)
    )
    with (
        pytest.raises(BenchError),
        raw_llama(path, streams=1, cells=256, context=8, threads=1, flash=False) as step,
    ):
        step(1, 1)


def test_raw_llama_cpp_that_is_killed_between_two_steps_ends_in_a_sentence(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    with raw_llama(path, streams=1, cells=256, context=8, threads=1, flash=False) as step:
        step(1, 1)
        (process,) = (each for each in psutil.Process().children() if str(path) in each.cmdline())
        process.kill()
        process.wait()
        with pytest.raises(BenchError):
            step(1, 1)


def test_a_vocabulary_is_measured_at_both_ends_under_every_policy(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    main(["engines", "vocabulary", "--size", "500", "--repeats", "1", "--json", str(report)])
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) == 2 * len(POLICIES)
    assert all(row["row_ms"] > 0 and row["token_ms"] > 0 and row["logprobs_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_every_engine_has_its_rows_beside_the_raw_engine(tmp_path: Path) -> None:
    for name in ("target-Q8_0.gguf", "Q4_0.gguf"):
        tiny_target_gguf(tmp_path / name)
    engines = ["--engines", "llama_cpp:Q8_0", "llama_cpp:Q4_0", "blocks:Q8_0"]
    sizes = ["--sequences", "1", "3", "--tokens", "1", "4", "--contexts", "40"]
    report = tmp_path / "report.json"
    options = [
        "--models",
        str(tmp_path),
        *engines,
        *sizes,
        "--seconds",
        "0.01",
        "--threads",
        "1",
        "--json",
        str(report),
    ]
    assert main(["engines", "steps", *options]) in {0, 1}
    found = json.loads(report.read_text())
    assert {"commit", "versions", "machine", "at"} <= set(found)
    kinds = {f"{row['engine']}:{row['dtype']}" for row in found["rows"]}
    assert kinds == set(engines[1:])
    assert len(found["rows"]) == 4 * len(kinds)
    for row in found["rows"]:
        assert row["ms"] > 0
        assert row["raw_ms"] > 0
        assert row["ratio"] == row["ms"] / row["raw_ms"]


def test_models_that_are_not_there_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engines", "steps", "--models", str(tmp_path), "--engines", "llama_cpp:Q8_0", "--quick"]) == 2
    assert "target-Q8_0.gguf" in capsys.readouterr().err
