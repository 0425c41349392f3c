"""The benchmark runs, and says what it says it does."""

import json
from pathlib import Path

import pytest

from fleet_bench.verifier_step import main
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
    assert all(step["best_ms"] <= step["step_ms"] and step["bound_best_ms"] > 0 for step in written["steps"])
    assert written["generation"]["token_ms"] > 0
    assert "one stream" in capsys.readouterr().out


def test_a_target_that_is_not_there_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", "/no/such/folder"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
