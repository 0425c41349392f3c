import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet_edge.verifiers.oracle import WORDS, tiny_folder, tiny_target_gguf

ROOT = Path(__file__).resolve().parents[2]

ABSENT = """
import importlib, importlib.abc, importlib.util, pkgutil, random, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in absent else found(name)
"""

PROGRAM = """

import fleet_edge
OF_ENGINES = (
    "fleet_edge.verifiers.torch_engine.",
    "fleet_edge.verifiers.blocks.",
    "fleet_edge.verifiers.tokens",
    "fleet_edge.batching.torch_",
)
for module in pkgutil.walk_packages(fleet_edge.__path__, "fleet_edge."):
    if not module.name.startswith(OF_ENGINES):
        importlib.import_module(module.name)
from fleet_edge.settings import VERIFIERS
for function in VERIFIERS.values():  # to check the settings of an engine needs no library of it
    importlib.import_module(function.partition(":")[0])

from schemas.policy import Mode, SamplingPolicy
from tests.support.memory_fleet import Device, MemoryFleet, lossless_text, run, terms

fleet = MemoryFleet()
devices = [
    Device(fleet, f"device-{mode}", terms(number, mode=mode, max_new_tokens=20), length=3, ahead=True)
    for number, mode in enumerate(Mode)
]
run(fleet, devices, random.Random(0))
for device in devices:
    assert len(device.session.committed) == 20, device.session.committed
    if device.terms.policy.mode is Mode.COUPLED:
        assert device.session.committed == lossless_text(device.terms)
assert {device.terms.policy.top_k > 0 for device in devices} == {True}, "shaped by the law alone"
print("verified")
"""


READING = """
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.registry import read_target_tokens

for target in sys.argv[1:]:
    print(read_target_tokens(EdgeSettings(target=target)))
"""


def run_without(absent: set[str], program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"absent = {absent}\n{ABSENT}\n{program}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_edge_verifies_without_torch() -> None:
    absent = {"torch", "transformers", "accelerate", "gguf", "safetensors", "huggingface_hub"}
    assert run_without(absent, PROGRAM) == "verified\n"


@pytest.mark.slow
def test_an_edge_on_a_cpu_reads_the_tokens_of_its_target(tmp_path: Path) -> None:
    """Its self-test needs them; the extra `edge` has neither torch nor llama.cpp."""
    targets = tiny_target_gguf(tmp_path / "tiny.gguf"), tiny_folder(tmp_path / "tiny")
    absent = {"torch", "transformers", "accelerate", "llama_cpp"}
    assert run_without(absent, READING, *map(str, targets)) == f"{WORDS}\n" * 2
