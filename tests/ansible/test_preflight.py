"""Ansible really runs the preflight tasks, on this machine; they change nothing."""

import json
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.ansible.local_play import of_common, play

pytestmark = pytest.mark.slow  # each starts Ansible

TAG = f"{platform.machine()}-cp{sys.version_info.major}{sys.version_info.minor}"
FACTS = {"glibc": "2.17", "bytes": 1000, "installed_bytes": 2000}


HUGE = 400_000_000_000_000  # bytes
Preflight = Callable[..., tuple[bool, str]]


@pytest.fixture
def preflight(tmp_path: Path) -> Preflight:
    def run(bundle: Mapping[str, Any] = FACTS, **changes: Any) -> tuple[bool, str]:
        folder = tmp_path / "bundles" / TAG
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dssd-fleet-9.9.9-device.tar").touch()
        (folder / "dssd-fleet-9.9.9-device.json").write_text(json.dumps({**FACTS, **bundle}))
        given = {
            "common_extra": "device",
            "common_version": "9.9.9",
            "common_bundles": str(tmp_path / "bundles"),
            "common_python": sys.executable,
            "common_free_mb": 0,
            **changes,
        }
        return play(tmp_path, of_common("preflight.yml"), **given)

    return run


def a_model(size: int, there: str = "/var/lib/fleet/models/0/model.gguf") -> list[dict[str, Any]]:
    return [{"src": "/x/model.gguf", "dest": there, "bytes": size, "checksum": "0"}]


def test_a_machine_that_has_all_passes(preflight: Preflight) -> None:
    passed, said = preflight(common_models=a_model(1000), common_memory_bytes=1000, common_memory_max="80%")
    assert passed, said
    passed, said = preflight(common_memory_bytes=50_000_000, common_memory_max="64M")
    assert passed, said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"common_version": "9.9.8"},
            [
                f"{TAG}/dssd-fleet-9.9.8-device.tar and .json are missing; make them on a machine like it with",
                "localhost",
            ],
        ),
        pytest.param({"bundle": {"glibc": "9.1"}}, ["llama.cpp"], marks=pytest.mark.exhaustive),
        # Twice the size, because it is assembled from parts.
        ({"common_models": a_model(HUGE)}, ["the model 800000000, and 0 are to stay free; make room there."]),
        *(
            pytest.param({"common_memory_bytes": HUGE, "common_memory_max": limit}, ["400000000"], marks=marks)
            for limit, marks in (
                ("", ()),
                ("80%", pytest.mark.exhaustive),
                ("2G", pytest.mark.exhaustive),
                ("infinity", pytest.mark.exhaustive),
            )
        ),
        (
            {"common_memory_bytes": 80_000_000, "common_memory_max": "64M"},
            ["has 67 MB of memory for the service, which takes 80 MB"],
        ),
        pytest.param({"common_gpu_bytes": HUGE}, ["400000000"], marks=pytest.mark.exhaustive),
    ],
)
def test_a_machine_that_lacks_something_is_refused(
    preflight: Preflight, given: dict[str, Any], words: list[str]
) -> None:
    passed, said = preflight(**given)
    assert not passed
    assert [word for word in words if word not in said] == [], said


def test_a_model_that_is_there_takes_no_room(preflight: Preflight, tmp_path: Path) -> None:
    there = tmp_path / "model.gguf"
    there.write_bytes(b"x" * 10)
    passed, said = preflight(common_models=a_model(10, str(there)), common_free_mb=0)
    assert passed
    assert "localhost" in said
