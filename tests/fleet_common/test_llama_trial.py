import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fleet_common import llama_trial
from fleet_common.llama import LlamaError
from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.model_file import load_drafter
from fleet_device.settings import DeviceSettings
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.llama_cpp import verifier
from tests.support.tiny_gguf import overwrite, tiny_delta_gguf, tiny_gguf


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that are started."""
    started = list[Any]()
    run = subprocess.run

    def recorded(arguments: Any, **options: Any) -> Any:
        started.append(arguments)
        return run(arguments, **options)

    monkeypatch.setattr(subprocess, "run", recorded)
    return started


CRASHES = [
    ("llama.block_count", 0),
    ("llama.attention.layer_norm_rms_epsilon", struct.pack("<f", -1.0)),
    ("qwen35.full_attention_interval", 0),
    ("qwen35.ssm.inner_size", 65),
    ("qwen35.ssm.inner_size", (1 << 32) - 1),
]
"""Numbers with which llama.cpp 0.3.36 crashes when the file is loaded or a token computed, or takes 32 GB."""


@pytest.mark.parametrize(("key", "value"), CRASHES)
def test_a_file_that_crashes_llama_cpp_does_not_end_a_device_or_an_edge(
    key: str, value: bytes | int, tmp_path: Path
) -> None:
    path = (tiny_gguf if key.startswith("llama.") else tiny_delta_gguf)(tmp_path / "tiny.gguf")
    overwrite(path, key, value)
    with pytest.raises(DrafterError):
        load_drafter(DeviceSettings(model=str(path)))
    with pytest.raises(VerifierError):
        verifier.load(EdgeSettings(target=str(path), engine="llama.cpp"))


STAND_IN = """
import os, sys
from fleet_common import llama_trial

def fail(path):
    kept = []
    while True:
        {}

llama_trial._try = fail
sys.exit(llama_trial.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("os.abort()", "SIGABRT"),
        ("pass", "1 s of processor time"),
        ("kept.append(bytearray(1 << 24))", "exit status 1"),
    ],
    ids=["crash", "endless", "memory"],
)
def test_a_trial_has_limits_and_its_crash_is_an_error(
    statement: str, what: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stand_in.py").write_text(STAND_IN.format(statement))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(llama_trial, "_PROGRAM", "stand_in")
    monkeypatch.setattr(llama_trial, "_CPU_S", 1 if statement == "pass" else 60)
    monkeypatch.setattr(llama_trial, "_MEMORY_BYTES", 1 << 26)
    for _ in range(2):  # a failure is not remembered as passed
        with pytest.raises(LlamaError, match=what):
            llama_trial.require_trial(path, error=LlamaError)


def test_a_passed_trial_is_not_repeated_until_the_file_changes(path: Path, children: list[Any]) -> None:
    for _ in range(3):
        llama_trial.require_trial(path, error=LlamaError)
    assert len(children) == 1
    os.utime(path, ns=(0, 0))
    llama_trial.require_trial(path, error=LlamaError)
    assert len(children) == 2
    overwrite(path, *CRASHES[0])
    with pytest.raises(LlamaError):
        llama_trial.require_trial(path, error=LlamaError)


def test_a_file_that_llama_cpp_refuses_is_refused_with_its_reason(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "odd.gguf", architecture="nonsense")
    with pytest.raises(LlamaError, match="nonsense"):
        llama_trial.require_trial(path, error=LlamaError)


def test_nothing_is_tried_where_there_is_no_gguf(tmp_path: Path, children: list[Any]) -> None:
    llama_trial.require_trial(tmp_path / "missing.gguf", error=LlamaError)
    (tmp_path / "text.gguf").write_text("text")
    llama_trial.require_trial(tmp_path / "text.gguf", error=LlamaError)
    assert not children


def test_a_trial_without_a_folder_to_record_it_is_repeated(path: Path, children: list[Any], state: Path) -> None:
    state.write_text("no folder")
    for _ in range(2):
        llama_trial.require_trial(path, error=LlamaError)
    assert len(children) == 2
