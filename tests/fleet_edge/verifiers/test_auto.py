import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.auto import (
    LONG,
    SHAPES,
    Candidate,
    EngineMeasurement,
    EngineReport,
    choose_engine,
    find_candidates,
    gguf_beside,
    measure,
    measure_apart,
)
from fleet_edge.verifiers.contract import UnsupportedModel, VerifierError
from fleet_edge.verifiers.registry import check_verifier
from fleet_edge.verifiers.scripted import ScriptedVerifier
from tests.fleet_edge.verifiers.oracle import CONTEXT, VOCABULARY, WORDS, tiny_folder, tiny_target_gguf
from tests.support.markov import MarkovScript

LLAMA = {"llama_cpp"}
TORCH = {"torch", "transformers"}
BOTH = LLAMA | TORCH


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that an NVIDIA driver would make here."""
    monkeypatch.setattr("fleet_edge.verifiers.auto.NVIDIA_DRIVER", tmp_path / "nvidiactl")
    return tmp_path / "nvidiactl"


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({}))
    (path / "model.safetensors").write_bytes(b"")
    return path


def gguf(path: Path, *, size: int = 100) -> Path:
    path.write_bytes(b"GGUF" + bytes(size))
    return path


def found(target: Path, installed: set[str], **settings: str) -> tuple[list[Candidate], str]:
    given = EdgeSettings.model_validate({"target": str(target), **settings})
    candidates = find_candidates(given, installed=installed.__contains__)
    return list(candidates.found), "; ".join(candidates.reasons)


def test_a_folder_with_its_gguf_beside_it_can_be_served_by_both(tmp_path: Path) -> None:
    target, file = folder(tmp_path / "target"), gguf(tmp_path / "target-Q8_0.gguf")
    assert found(target, BOTH) == ([Candidate("torch", str(target)), Candidate("llama.cpp", str(file))], "")


def test_a_gguf_can_be_served_by_both_as_it_is(tmp_path: Path) -> None:
    folder(tmp_path / "target")
    file = str(gguf(tmp_path / "target-Q8_0.gguf"))
    assert found(Path(file), BOTH) == ([Candidate("torch", file), Candidate("llama.cpp", file)], "")


def test_what_is_not_installed_is_out_and_said(tmp_path: Path) -> None:
    target, file = folder(tmp_path / "target"), str(gguf(tmp_path / "target-Q8_0.gguf"))
    assert found(target, TORCH) == ([Candidate("torch", str(target))], "llama.cpp is not installed")
    assert found(target, {"torch", "llama_cpp"})[1] == "torch is not installed", "it needs transformers too"
    assert found(target, LLAMA) == ([Candidate("llama.cpp", file)], "torch is not installed")


def test_a_folder_alone_is_torch_s(tmp_path: Path) -> None:
    target = folder(tmp_path / "target")
    (only,), reason = found(target, BOTH)
    assert only == Candidate("torch", str(target))
    assert reason == f"llama.cpp takes a GGUF, and there is none next to {target}"


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, "int8"),
        ({"torch_device": "cpu"}, "int8"),
        ({"torch_device": "cuda"}, "auto"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_torch_is_int8_on_a_cpu_by_default(tmp_path: Path, settings: dict[str, str], dtype: str, driver: Path) -> None:
    target = folder(tmp_path / "target")
    assert found(target, {*TORCH, "numba"}, **settings)[0] == [Candidate("torch", str(target), dtype)]
    assert found(target, TORCH, **settings)[0][0].dtype == settings.get("dtype", "auto"), "it needs numba"
    driver.touch()
    in_int8 = settings in ({"torch_device": "cpu"}, {"dtype": "int8"})
    assert (found(target, {*TORCH, "numba"}, **settings)[0][0].dtype == "int8") is in_int8


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"torch_device": "cpu"}])
def test_a_setting_of_torch_asks_for_torch(tmp_path: Path, settings: dict[str, str]) -> None:
    target = folder(tmp_path / "target")
    gguf(tmp_path / "target-Q8_0.gguf")
    ((only,), reason), ((name, value),) = found(target, BOTH, **settings), settings.items()
    assert (only.engine, reason) == ("torch", f"{name} = {value} is a setting of torch")
    assert found(target, LLAMA, **settings)[0][0].engine == "llama.cpp"


def test_names_tell_which_file_is_of_which_folder(tmp_path: Path) -> None:
    plain, deep = folder(tmp_path / "target"), folder(tmp_path / "target-cost4")
    other = folder(tmp_path / "qwen2.5-7b-instruct")
    small, large = gguf(tmp_path / "target-Q4_K_M.gguf", size=10), gguf(tmp_path / "target-Q8_0.gguf", size=20)
    deepened = gguf(tmp_path / "target-Q8_0-cost4.gguf", size=40)
    dotted = gguf(tmp_path / "qwen2.5-7b-instruct.IQ4_NL.gguf")
    gguf(tmp_path / "Q4_0.gguf")
    assert gguf_beside(plain) == large
    assert gguf_beside(deep) == deepened
    assert gguf_beside(other) == dotted
    large.write_bytes(b"no GGUF, and larger" * 9)
    assert gguf_beside(plain) == small
    for file in (small, large, deepened):
        file.unlink()
    assert gguf_beside(plain) is None
    assert gguf_beside(gguf(tmp_path / "target.gguf")) is None, "it is no folder"
    assert gguf_beside(plain) == tmp_path / "target.gguf"


def test_where_nothing_fits_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    target = folder(tmp_path / "target")
    with pytest.raises(VerifierError, match=r"Neither torch nor llama\.cpp is installed.*pip install"):
        found(target, set())
    with pytest.raises(VerifierError, match=r"llama\.cpp alone is installed.*name a \.gguf file.*pip install"):
        found(target, LLAMA)


def test_a_target_that_is_not_there_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(VerifierError, match="There is no folder or file nowhere"):
        check_verifier(EdgeSettings(target="nowhere"))
    damaged = tmp_path / "a.gguf"
    damaged.write_bytes(b"GGML")
    with pytest.raises(UnsupportedModel, match="is not a GGUF"):
        check_verifier(EdgeSettings(target=str(damaged)))


SHORT = [f"{count}x{tokens}" for count, tokens in SHAPES]


def scripted(*, budget: int, context: int = CONTEXT) -> ScriptedVerifier:
    script = MarkovScript(size=VOCABULARY, seed=3, period=5)
    return ScriptedVerifier(script, WORDS, context=context, budget_tokens=budget)


@pytest.mark.parametrize(("context", "long"), [(CONTEXT, []), (1100, [f"{LONG[0]}x{LONG[1]}@1024"])])
def test_all_shapes_are_measured_and_nothing_is_left(context: int, long: list[str]) -> None:
    verifier = scripted(budget=1 << 20, context=context)
    before = verifier.capacity()
    found = measure(verifier, itertools.count().__next__)
    assert list(found.step_ms) == [*SHORT, *long]
    assert all(len(row) == VOCABULARY and abs(sum(row.values()) - 1) < 1e-6 for row in found.likely)
    assert verifier.capacity() == before


def test_shapes_that_there_is_no_memory_for_are_left_out() -> None:
    verifier = scripted(budget=CONTEXT)
    assert set(measure(verifier, itertools.count().__next__).step_ms) == {"1x1", "1x5"}
    assert verifier.capacity() == CONTEXT


@pytest.mark.slow
def test_real_engines_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    folder, file = tiny_folder(tmp_path / "tiny"), tiny_target_gguf(tmp_path / "tiny.gguf")
    settings = EdgeSettings(target=str(folder), threads=1, kv_bytes=1 << 24)
    for candidate in (
        Candidate("torch", str(folder), "int8"),
        Candidate("torch", str(folder), "float32"),
        Candidate("llama.cpp", str(file)),
    ):
        report = measure_apart(candidate, settings)
        assert report.measurement is not None, report.sentence
        assert list(report.measurement.step_ms) == SHORT
        assert report.measurement.vocabulary.startswith(f"{VOCABULARY} tokens")


@pytest.mark.slow
def test_what_an_engine_says_of_its_refusal_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    report = measure_apart(Candidate("llama.cpp", str(file)), EdgeSettings(target=str(file)))
    assert report.measurement is None
    assert "llama.cpp cannot load" in report.sentence


# Its standard input is open and empty as long as the edge waits.
WAITING = """
import os
os.set_blocking(0, False)
try:
    os.read(0, 1)
except BlockingIOError:
    os._exit(4)
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed, most likely since the machine has too little memory"),
        ("import os; os.abort()", "was ended by SIGABRT without an answer"),
        ("print('nonsense')", "ended with exit code 0 without an answer"),
        (WAITING, "ended with exit code 4 without an answer"),
        ("import time; time.sleep(600)", "took longer than 1 s"),
    ],
)
def test_a_silent_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str) -> None:
    (tmp_path / "goes_wrong.py").write_text(program)
    monkeypatch.syspath_prepend(str(tmp_path))
    longest_s = 1.0 if "sleep" in program else 60.0
    report = measure_apart(Candidate("torch", "x"), EdgeSettings(), longest_s=longest_s, program="goes_wrong")
    assert said in report.sentence
    assert not report.lasting


def test_it_ends_with_whoever_has_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waits.py").write_text(
        "import sys, threading\n"
        "from fleet_edge.verifiers import auto\n"
        "auto.load_verifier = lambda settings: threading.Event().wait()\n"
        "raise SystemExit(auto.main(sys.argv[1:]))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(place or str(Path.cwd()) for place in sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "waits", "{}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        process.stdin.close()
        assert process.wait(60) == 1


FILE = "engines.json"


def measured(ms: float, *, likely: Mapping[int, float] | None = None, **more: float) -> EngineReport:
    steps = dict.fromkeys(SHORT, ms) | more
    same = dict(likely or {5: 0.6, 7: 0.3})
    return EngineReport(measurement=EngineMeasurement(step_ms=steps, runs_on="x", vocabulary="9 tokens", likely=[same]))


class Machine:
    def __init__(self, folder: Path) -> None:
        self.target, self.gguf, self.cache = folder / "target", folder / "target-Q8_0.gguf", folder / "cache"
        self.target.mkdir()
        (self.target / "config.json").write_text("{}")
        (self.target / "model.safetensors").write_bytes(b"")
        self.gguf.write_bytes(b"GGUF")
        self.reports = {"torch": measured(20.0), "llama.cpp": measured(10.0)}
        self.asked: list[Candidate] = []
        self.installed = BOTH
        self.dtype = ""  # the last choice's

    def choose(self, **settings: Any) -> tuple[str, str]:
        given = EdgeSettings.model_validate({"target": str(self.target), **settings})
        chosen = choose_engine(given, measure=self._measure, folder=self.cache, installed=self.installed.__contains__)
        update = {"engine": "auto", "target": given.target, "dtype": given.dtype}
        assert chosen.model_copy(update=update) == given
        self.dtype = chosen.dtype
        return chosen.engine, chosen.target

    def _measure(self, candidate: Candidate, _settings: EdgeSettings) -> EngineReport:
        self.asked.append(candidate)
        return self.reports[str(candidate)]


@pytest.fixture
def machine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Machine:
    caplog.set_level(logging.INFO)
    return Machine(tmp_path)


def test_the_faster_engine_is_taken(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    assert machine.choose() == ("llama.cpp", str(machine.gguf))
    assert f"Engine llama.cpp serves {machine.gguf}: a step takes 10.0 ms in it, and 20.0 ms in torch" in caplog.text
    assert "1x5 20.0 and 10.0" in caplog.text
    assert "Overlap of their distributions: 1.000." in caplog.text
    machine.reports["torch"] = measured(5.0)
    assert machine.choose(threads=3) == ("torch", str(machine.target))


def test_the_number_format_is_chosen_named_and_kept(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.installed = {*BOTH, "numba"}
    machine.reports = {"torch in int8": measured(5.0), "llama.cpp": measured(10.0)}
    for _ in range(2):
        assert machine.choose() == ("torch", str(machine.target))
        assert machine.dtype == "int8"
        assert "Engine torch in int8 serves" in caplog.text
        caplog.clear()
    assert [str(each) for each in machine.asked] == ["torch in int8", "llama.cpp"]


@pytest.mark.parametrize(("lasting", "asked"), [(True, 3), (False, 6)])
def test_where_int8_cannot_serve_the_target_torch_is_measured_without_it(
    machine: Machine, caplog: pytest.LogCaptureFixture, *, lasting: bool, asked: int
) -> None:
    machine.installed = {*BOTH, "numba"}
    machine.reports["torch in int8"] = EngineReport(sentence="It is of another kind.", lasting=lasting)
    machine.reports["torch"] = measured(5.0)
    for _ in range(2):
        assert machine.choose() == ("torch", str(machine.target))
        assert machine.dtype == "auto"
    assert "torch in int8 cannot serve" in caplog.text
    assert len(machine.asked) == asked


def test_it_is_measured_once_and_said_again(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.choose()
    machine.reports.clear()
    caplog.clear()
    assert machine.choose() == ("llama.cpp", str(machine.gguf))
    assert "a step takes 10.0 ms in it, and 20.0 ms in torch" in caplog.text
    assert f"kept in {machine.cache / FILE}" in caplog.text
    assert len(machine.asked) == 2


@pytest.mark.parametrize("change", ["file", "settings", "version", "damage", "gone"])
def test_changes_are_measured_again(machine: Machine, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.choose()
    settings = {}
    if change == "file":
        os.utime(machine.gguf, ns=(1, 1))
    elif change == "settings":
        settings = {"kv_bytes": 1 << 21}
    elif change == "version":
        monkeypatch.setattr("fleet_edge.verifiers.auto.version", lambda _package: "99")
    elif change == "damage":
        (machine.cache / FILE).write_text('{"format": 1, "choices": {"')
    else:
        kept = json.loads((machine.cache / FILE).read_text())
        kept["choices"][str(machine.target)]["target"] = "elsewhere.gguf"
        (machine.cache / FILE).write_text(json.dumps(kept))
    assert machine.choose(**settings) == ("llama.cpp", str(machine.gguf))
    assert len(machine.asked) == 4
    assert machine.choose(**settings) == ("llama.cpp", str(machine.gguf))
    assert len(machine.asked) == 4, "and the new one is kept"


def test_settings_that_cost_no_time_change_nothing(machine: Machine) -> None:
    machine.choose()
    machine.choose(max_sessions=5)
    assert len(machine.asked) == 2


def test_small_gains_change_nothing_and_changes_are_said(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.choose()
    machine.reports["torch"] = measured(9.5)
    assert machine.choose(threads=1)[0] == "llama.cpp"
    assert "Until now" not in caplog.text
    machine.reports["torch"] = measured(5.0)
    assert machine.choose(threads=2)[0] == "torch"
    assert f"Until now it was llama.cpp on {machine.gguf}: generations in coupled mode" in caplog.text


@pytest.mark.parametrize(("named", "usual"), [("target", "torch"), ("gguf", "llama.cpp")])
def test_the_form_that_is_named_stays_unless_clearly_slower(machine: Machine, named: str, usual: str) -> None:
    other = {"torch": "llama.cpp", "llama.cpp": "torch"}[usual]
    machine.reports = {usual: measured(10.0), other: measured(9.5)}
    assert machine.choose(target=str(getattr(machine, named)))[0] == usual
    machine.reports[other] = measured(8.0)
    assert machine.choose(target=str(getattr(machine, named)), threads=1)[0] == other


def test_a_busy_machine_is_told(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.0, 0.0))
    machine.choose()
    assert "The machine was busy" not in caplog.text
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 0.0, 0.0))
    machine.choose(threads=1)
    assert f"have it measured again, remove {machine.cache / FILE}" in caplog.text


def test_shapes_that_one_of_them_lacks_memory_for_do_not_count(machine: Machine) -> None:
    machine.reports["torch"] = measured(8.0, **{"16x1": 100.0})
    assert machine.choose()[0] == "llama.cpp"
    report = measured(10.0)
    del report.measurement.step_ms["16x1"]
    machine.reports["llama.cpp"] = report
    (machine.cache / FILE).unlink()
    assert machine.choose()[0] == "torch"


def test_a_single_engine_is_not_measured(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.installed = {"llama_cpp"}
    assert machine.choose() == ("llama.cpp", str(machine.gguf))
    assert "torch is not installed" in caplog.text
    assert machine.asked == []
    assert not machine.cache.exists()


@pytest.mark.parametrize("lasting", [True, False])
def test_an_unfit_engine_stays_out(machine: Machine, caplog: pytest.LogCaptureFixture, *, lasting: bool) -> None:
    machine.reports["llama.cpp"] = EngineReport(sentence="It is of the recurrent kind.", lasting=lasting)
    for _ in range(2):
        assert machine.choose() == ("torch", str(machine.target))
    assert f"llama.cpp cannot serve {machine.gguf}: It is of the recurrent kind." in caplog.text
    assert len(machine.asked) == (2 if lasting else 4)


def test_if_none_can_serve_it_the_reasons_of_both_are_told(machine: Machine) -> None:
    machine.reports = {name: EngineReport(sentence=f"{name} says no.") for name in machine.reports}
    with pytest.raises(VerifierError, match=r"torch: torch says no\. llama\.cpp: llama\.cpp says no\."):
        machine.choose()


def test_a_model_of_a_like_name_is_not_the_target(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.reports["llama.cpp"] = measured(1.0, likely={5: 0.1, 8: 0.8})
    assert machine.choose() == ("torch", str(machine.target))
    assert "is a different model" in caplog.text


def test_a_cache_that_cannot_be_written_is_reported(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.cache.write_text("a file where the folder should be")
    assert machine.choose()[0] == "llama.cpp"
    assert "cannot be saved and is measured again at the next start" in caplog.text
