"""What a measurement leaves behind, and what becomes of one that goes wrong."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.auto.candidates import Candidate
from fleet_edge.verifiers.auto.choice import measure_apart
from fleet_edge.verifiers.auto.measurement import SHAPES, measure
from fleet_edge.verifiers.scripted import ScriptedVerifier
from tests.fleet_edge.verifiers.oracle import CONTEXT, VOCABULARY, WORDS, tiny_folder, tiny_target_gguf
from tests.support.markov import MarkovScript


def scripted(*, budget: int) -> ScriptedVerifier:
    script = MarkovScript(size=VOCABULARY, seed=3, period=5)
    return ScriptedVerifier(script, WORDS, context=CONTEXT, budget_tokens=budget)


def test_all_shapes_are_measured_and_nothing_is_left() -> None:
    verifier = scripted(budget=1 << 20)
    before = verifier.capacity()
    found = measure(verifier, itertools.count().__next__)
    assert set(found.step_ms) == {f"{count}x{tokens}" for count, tokens in SHAPES}
    assert all(len(row) == VOCABULARY and abs(sum(row.values()) - 1) < 1e-6 for row in found.likely)
    assert verifier.capacity() == before


def test_shapes_that_there_is_no_memory_for_are_left_out() -> None:
    verifier = scripted(budget=CONTEXT)
    assert set(measure(verifier, itertools.count().__next__).step_ms) == {"1x1"}
    assert verifier.capacity() == CONTEXT


@pytest.mark.slow
def test_real_engines_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    folder, file = tiny_folder(tmp_path / "tiny"), tiny_target_gguf(tmp_path / "tiny.gguf")
    settings = EdgeSettings(target=str(folder), dtype="float32", threads=1, kv_bytes=1 << 24)
    for candidate in (Candidate("torch", str(folder)), Candidate("llama.cpp", str(file))):
        report = measure_apart(candidate, settings)
        assert report.measurement is not None, report.sentence
        assert set(report.measurement.step_ms) == {"1x1", "4x5", "16x1"}
        assert report.measurement.vocabulary.startswith(f"{VOCABULARY} tokens")


@pytest.mark.slow
def test_what_an_engine_says_of_its_refusal_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    report = measure_apart(Candidate("llama.cpp", str(file)), EdgeSettings(target=str(file)))
    assert report.measurement is None
    assert "llama.cpp" in report.sentence


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed, most likely since the machine has too little memory"),
        ("import os; os.abort()", "was ended by SIGABRT without an answer"),
        ("print('nonsense')", "ended with exit code 0 without an answer"),
        ("import time; time.sleep(600)", "took longer than 1 s"),
    ],
)
def test_a_process_that_does_not_answer_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    (tmp_path / "goes_wrong.py").write_text(program)
    monkeypatch.syspath_prepend(str(tmp_path))
    longest_s = 1.0 if "sleep" in program else 60.0
    report = measure_apart(Candidate("torch", "x"), EdgeSettings(), longest_s=longest_s, program="goes_wrong")
    assert said in report.sentence
    assert not report.lasting


def test_it_ends_with_whoever_has_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waits.py").write_text(
        "import sys, threading\n"
        "from fleet_edge.verifiers.auto import measurement\n"
        "measurement.load_verifier = lambda settings: threading.Event().wait()\n"
        "raise SystemExit(measurement.main(sys.argv[1:]))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(place or str(Path.cwd()) for place in sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "waits", "{}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 1
