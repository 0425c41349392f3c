"""How llama-bench is called and read; a stand-in plays it, as a build takes half an hour."""

from pathlib import Path

import pytest

from benchmarks.engines.ik_llama import built, step_ms
from benchmarks.engines.steps import of_rival
from benchmarks.processes import BenchError


def test_steps_are_read_from_its_json_with_weights_repacked(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --help ]; then echo "-rtr, --run-time-repack <0|1>"; exit; fi\n'
        f'echo "$@" > {tmp_path}/called\n'
        'echo \'[{"n_prompt": 1, "n_gen": 0, "avg_ns": 31000000}, {"n_prompt": 5, "n_gen": 0, "avg_ns": 72500000}]\'\n'
    )
    program.chmod(0o700)
    assert step_ms(program, Path("model.gguf"), [1, 5], threads=2) == {1: 31.0, 5: 72.5}
    assert "-rtr 1 -p 1,5" in (tmp_path / "called").read_text()
    program.write_text("#!/bin/sh\necho no model >&2; exit 1\n")
    with pytest.raises(BenchError, match="no model"):
        step_ms(program, Path("model.gguf"), [1], threads=2)


def test_a_model_that_it_refuses_leaves_its_column_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\necho unknown architecture >&2; exit 1\n")
    program.chmod(0o700)
    assert of_rival(program, Path("model.gguf"), [1], threads=1) == {}
    assert "unknown architecture" in capsys.readouterr().err


def test_an_archive_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"nothing\.tar"):
        built(tmp_path / "nothing.tar", tmp_path)
