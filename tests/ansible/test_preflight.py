"""Ansible really runs the preflight tasks, on this machine; they change nothing."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ansible.local_play import of_common, play

pytestmark = pytest.mark.slow  # each starts Ansible

TAG = f"{platform.machine()}-cp{sys.version_info.major}{sys.version_info.minor}"
FACTS = {"glibc": "2.17", "features": [], "bytes": 1000, "installed_bytes": 2000}


class Look:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.bundle(FACTS)

    def bundle(self, facts: dict[str, Any]) -> None:
        bundles = self._folder / "bundles" / TAG
        bundles.mkdir(parents=True, exist_ok=True)
        (bundles / "dssd-fleet-9.9.9-device.tar").touch()
        (bundles / "dssd-fleet-9.9.9-device.json").write_text(json.dumps(facts))

    def __call__(self, **changes: Any) -> tuple[bool, str]:
        given = {
            "common_extra": "device",
            "common_version": "9.9.9",
            "common_bundles": str(self._folder / "bundles"),
            "common_python": sys.executable,
            "common_free_mb": 0,
            **changes,
        }
        return play(self._folder, of_common("preflight.yml"), **given)


@pytest.fixture
def look(tmp_path: Path) -> Look:
    return Look(tmp_path)


def a_model(size: int) -> list[dict[str, Any]]:
    return [{"src": "/x/model.gguf", "dest": "/var/lib/fleet/models/0/model.gguf", "bytes": size, "checksum": "0"}]


def test_a_machine_that_has_all_passes(look: Look) -> None:
    passed, said = look(common_models=a_model(1000), common_memory_bytes=1000, common_memory_max="80%")
    assert passed, said


def test_a_python_that_has_no_bundle_is_named_with_what_to_do(look: Look) -> None:
    passed, said = look(common_version="9.9.8")
    assert not passed
    assert "localhost" in said
    assert f"{TAG}/dssd-fleet-9.9.8-device.tar and .json are missing; make them on a machine like it with" in said


def test_a_processor_that_the_bundle_was_not_compiled_for_is_refused(look: Look) -> None:
    look.bundle({**FACTS, "features": ["sse9", "avx1024"]})
    passed, said = look()
    assert not passed
    assert "processor" in said
    assert "avx1024" in said
    assert "GGML_NATIVE=OFF" in said


def test_an_older_c_library_is_refused(look: Look) -> None:
    look.bundle({**FACTS, "glibc": "9.1"})
    passed, said = look()
    assert not passed
    assert "llama.cpp" in said


def test_the_weights_are_counted_against_the_disk(look: Look) -> None:
    terabytes = 400_000_000_000_000
    passed, said = look(common_models=a_model(terabytes))
    assert not passed
    # Twice the size, because it is assembled from parts.
    assert "the model 800000000, and 0 are to stay free; make room there." in said


def test_a_model_that_is_there_takes_no_room(look: Look, tmp_path: Path) -> None:
    there = tmp_path / "model.gguf"
    there.write_bytes(b"x" * 10)
    model = [{**a_model(10)[0], "dest": str(there)}]
    passed, said = look(common_models=model, common_free_mb=0)
    assert passed
    assert "localhost" in said


@pytest.mark.parametrize("limit", ["", "80%", "2G", "infinity"])
def test_the_weights_are_counted_against_the_memory(look: Look, limit: str) -> None:
    passed, said = look(common_memory_bytes=400_000_000_000_000, common_memory_max=limit)
    assert not passed
    assert "400000000" in said


def test_the_weights_are_counted_against_the_services_own_limit(look: Look) -> None:
    assert look(common_memory_bytes=50_000_000, common_memory_max="64M")[0]
    passed, said = look(common_memory_bytes=80_000_000, common_memory_max="64M")
    assert not passed
    assert "has 67 MB of memory for the service, which takes 80 MB" in said


def test_an_edge_that_is_to_have_a_gpu_needs_one_with_room(look: Look) -> None:
    passed, said = look(common_gpu_bytes=400_000_000_000_000)
    assert not passed
    assert "400000000" in said
