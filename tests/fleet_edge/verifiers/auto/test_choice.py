"""The choice of the engine: measured once, kept, told, and not changed for nothing."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.auto.candidates import Candidate
from fleet_edge.verifiers.auto.choice import choose_engine
from fleet_edge.verifiers.auto.measurement import Measurement, Report
from fleet_edge.verifiers.contract import VerifierError

FILE = "engines.json"


def measured(ms: float, *, likely: Mapping[int, float] | None = None, **more: float) -> Report:
    steps = {"1x1": ms, "4x5": ms, "16x1": ms} | more
    same = dict(likely or {5: 0.6, 7: 0.3})
    return Report(measurement=Measurement(step_ms=steps, runs_on="x", vocabulary="9 tokens", likely=[same]))


class Machine:
    """A target in both forms, a folder of cache files, and what a measurement would say."""

    def __init__(self, folder: Path) -> None:
        self.target, self.gguf, self.cache = folder / "target", folder / "target-Q8_0.gguf", folder / "cache"
        self.target.mkdir()
        (self.target / "config.json").write_text("{}")
        (self.target / "model.safetensors").write_bytes(b"")
        self.gguf.write_bytes(b"GGUF")
        self.reports = {"torch": measured(20.0), "llama.cpp": measured(10.0)}
        self.asked: list[Candidate] = []
        self.installed = {"torch", "transformers", "llama_cpp"}

    def choose(self, **settings: Any) -> tuple[str, str]:
        given = EdgeSettings.model_validate({"target": str(self.target), **settings})
        chosen = choose_engine(given, measure=self._measure, folder=self.cache, installed=self.installed.__contains__)
        assert chosen.model_copy(update={"engine": "auto", "target": given.target}) == given
        return chosen.engine, chosen.target

    def _measure(self, candidate: Candidate, _settings: EdgeSettings) -> Report:
        self.asked.append(candidate)
        return self.reports[candidate.engine]


@pytest.fixture
def machine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Machine:
    caplog.set_level(logging.INFO)
    return Machine(tmp_path)


def test_the_faster_one_is_taken_with_its_form_of_the_target(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    assert machine.choose() == ("llama.cpp", str(machine.gguf))
    assert f"Engine llama.cpp serves {machine.gguf}: a step takes 10.0 ms in it, and 20.0 ms in torch" in caplog.text
    assert "1.000" in caplog.text
    machine.reports["torch"] = measured(5.0)
    assert machine.choose(threads=3) == ("torch", str(machine.target))


def test_it_is_measured_once_and_said_again(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.choose()
    machine.reports.clear()
    caplog.clear()
    assert machine.choose() == ("llama.cpp", str(machine.gguf))
    assert "a step takes 10.0 ms in it, and 20.0 ms in torch" in caplog.text
    assert f"kept in {machine.cache / FILE}" in caplog.text
    assert len(machine.asked) == 2


@pytest.mark.parametrize("change", ["file", "settings", "version", "damage", "gone"])
def test_it_is_measured_again_when_circumstances_have_changed(
    machine: Machine, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.choose()
    settings = {}
    if change == "file":
        os.utime(machine.gguf, ns=(1, 1))
    elif change == "settings":
        settings = {"kv_bytes": 1 << 21}
    elif change == "version":
        monkeypatch.setattr("fleet_edge.verifiers.auto.choice.version", lambda _package: "99")
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


def test_a_change_is_not_made_for_a_few_per_cent_and_never_in_silence(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.choose()
    machine.reports["torch"] = measured(9.5)
    assert machine.choose(threads=1)[0] == "llama.cpp"
    assert "Until now" not in caplog.text
    machine.reports["torch"] = measured(5.0)
    assert machine.choose(threads=2)[0] == "torch"
    assert f"Until now it was llama.cpp on {machine.gguf}: a text in coupled mode" in caplog.text


@pytest.mark.parametrize(("named", "usual"), [("target", "torch"), ("gguf", "llama.cpp")])
def test_at_first_the_form_that_the_setting_names_stays_if_the_other_is_hardly_faster(
    machine: Machine, named: str, usual: str
) -> None:
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
    assert report.measurement is not None
    del report.measurement.step_ms["16x1"]
    machine.reports["llama.cpp"] = report
    (machine.cache / FILE).unlink()
    assert machine.choose()[0] == "torch"


def test_where_there_is_no_choice_nothing_is_measured_and_the_reason_is_told(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.installed = {"llama_cpp"}
    assert machine.choose() == ("llama.cpp", str(machine.gguf))
    assert "installed" in caplog.text
    assert machine.asked == []
    assert not machine.cache.exists()


@pytest.mark.parametrize("lasting", [True, False])
def test_one_that_cannot_serve_the_target_is_out_for_as_long_as_that_holds(
    machine: Machine, caplog: pytest.LogCaptureFixture, *, lasting: bool
) -> None:
    machine.reports["llama.cpp"] = Report(sentence="It is of the recurrent kind.", lasting=lasting)
    for _ in range(2):
        assert machine.choose() == ("torch", str(machine.target))
    assert f"llama.cpp cannot serve {machine.gguf}: It is of the recurrent kind." in caplog.text
    assert len(machine.asked) == (2 if lasting else 4)


def test_if_none_can_serve_it_the_reasons_of_both_are_told(machine: Machine) -> None:
    machine.reports = {name: Report(sentence=f"{name} says no.") for name in machine.reports}
    with pytest.raises(VerifierError, match=r"llama\.cpp"):
        machine.choose()


def test_another_model_of_a_like_name_is_not_taken_for_the_target(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.reports["llama.cpp"] = measured(1.0, likely={5: 0.1, 8: 0.8})
    assert machine.choose() == ("torch", str(machine.target))
    assert "is another one" in caplog.text


def test_a_cache_that_cannot_be_written_is_told_and_stops_nobody(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.cache.write_text("a file where the folder should be")
    assert machine.choose()[0] == "llama.cpp"
    assert "anew" in caplog.text
