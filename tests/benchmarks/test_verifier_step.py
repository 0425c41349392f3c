import json
import time
from pathlib import Path

import pytest

from benchmarks.verifier_step import WARM_UP, Step, _interleaved, main
from tests.fleet_edge.verifiers.oracle import VOCABULARY, tiny_model


def test_a_small_run_writes_every_size_and_the_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, figures = tmp_path / "tiny", tmp_path / "figures.json"
    tiny_model("llama").save_pretrained(folder)
    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    arguments = ["--target", str(folder), "--sequences", "1", "3", "--tokens", "2", "--context", "20"]
    assert main([*arguments, "--dtype", "float32", "--repeats", "2", "--json", str(figures)]) == 0
    written = json.loads(figures.read_text())
    assert [(step["sequences"], step["new_tokens"]) for step in written["steps"]] == [(1, 2), (3, 2)]
    # A step has all the matrix products of its bound in it, and more.
    assert all(step["best_ms"] > step["bound_best_ms"] for step in written["steps"])
    assert all(step["over_bound"] == step["best_ms"] / step["bound_best_ms"] for step in written["steps"])
    assert written["generation"]["token_ms"] > 0
    assert "one stream" in capsys.readouterr().out


def test_functions_take_turns_and_warm_up_turns_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, turns = [0.0], list[str]()
    monkeypatch.setattr(time, "perf_counter", lambda: now_s[0])

    def taking(name: str, milliseconds: list[float]) -> None:
        now_s[0] += milliseconds[turns.count(name)] / 1e3
        turns.append(name)

    cold = [1000.0] * WARM_UP
    step, bound = [*cold, 8.0, 4.0, 6.0], [*cold, 2.0, 3.0, 1.0]
    times = _interleaved([lambda: taking("step", step), lambda: taking("bound", bound)], repeats=3)
    assert turns == ["step", "bound"] * (WARM_UP + 3)
    assert times == [pytest.approx([8.0, 4.0, 6.0]), pytest.approx([2.0, 3.0, 1.0])]


def test_the_ratio_is_of_the_minima_and_the_rate_of_the_median() -> None:
    step = Step(sequences=4, new_tokens=5, context=256, step_ms=10.0, best_ms=6.0, bound_ms=5.0, bound_best_ms=4.0)
    assert step.over_bound == 1.5
    assert step.tokens_per_s == 2000.0


def test_a_target_that_is_not_there_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", "/no/such/folder"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
