import hashlib
import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fleet_device.drafters.model_file import name_of_file
from tests.ansible.local_play import of_common, play
from tests.ansible.test_settings import GIVEN

MEGA = 1 << 20
pytestmark = pytest.mark.slow  # each starts Ansible


def send(folder: Path, model: dict[str, Any], part_mb: int = 1) -> tuple[bool, str]:
    return play(folder, of_common("send.yml"), common_extra="device", common_file=model, common_part_mb=part_mb)


def vouch(folder: Path, model: dict[str, Any], **given: Any) -> tuple[bool, str]:
    return play(folder, of_common("vouch.yml"), common_extra="device", common_models=[model], **given)


@pytest.fixture
def model(tmp_path: Path) -> dict[str, Any]:
    """Return a file of 2.5 MB whose checksum and names no other test uses."""
    source = tmp_path / "model.gguf"
    source.write_bytes(random.Random(str(tmp_path)).randbytes(5 * MEGA // 2))
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()
    there = tmp_path / "there" / checksum[:16] / "model.gguf"
    return {"src": str(source), "dest": str(there), "bytes": source.stat().st_size, "checksum": checksum}


def test_a_large_file_arrives_whole_and_leaves_nothing_else(tmp_path: Path, model: dict[str, Any]) -> None:
    there = Path(model["dest"])
    there.parent.mkdir(parents=True)
    passed, said = send(tmp_path, model)
    assert passed, said
    assert there.read_bytes() == Path(model["src"]).read_bytes()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == [there.parent.name]
    assert not list(Path("/tmp").glob(f"fleet-model-{model['checksum']}*"))


@pytest.mark.exhaustive
def test_parts_that_arrived_before_an_interruption_are_used(tmp_path: Path, model: dict[str, Any]) -> None:
    there = Path(model["dest"])
    (tmp_path / "there").mkdir()
    # The missing folder makes assembling fail; the parts have arrived by then.
    assert not send(tmp_path, model)[0]
    parts = tmp_path / "there" / f"incoming-{model['checksum']}"
    assert [path.stat().st_size for path in sorted(parts.iterdir())] == [MEGA, MEGA, MEGA // 2]
    (parts / "part.00001").unlink()
    there.parent.mkdir()
    passed, said = send(tmp_path, model)
    assert passed, said
    assert there.read_bytes() == Path(model["src"]).read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize("part_mb", [pytest.param(1, marks=pytest.mark.exhaustive), 32])
def test_a_file_that_is_not_what_was_meant_is_refused(tmp_path: Path, model: dict[str, Any], part_mb: int) -> None:
    Path(model["dest"]).parent.mkdir(parents=True)
    assert not send(tmp_path, {**model, "checksum": "0" * 64}, part_mb)[0]


@pytest.mark.parametrize("files", [["model.gguf"], ["config.json", "model.safetensors"]])
def test_a_target_is_sent_as_a_file_or_as_a_folder(tmp_path: Path, files: list[str]) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "other").mkdir()
    for name in files:
        (tmp_path / "target" / name).write_text("{}")
    # Inventories name paths relative to a playbook.
    target = tmp_path / "other" / ".." / "target" / ("" if len(files) > 1 else files[0])
    passed, said = play(
        tmp_path,
        {"ansible.builtin.include_role": {"name": "edge", "tasks_from": "name.yml"}},
        {"ansible.builtin.copy": {"content": "{{ [edge_model_path, edge_models] }}", "dest": str(tmp_path / "named")}},
        fleet_name="lab",
        fleet_version="0.1.0",
        fleet_ca_dir="/ca",
        fleet_broker_host="broker",
        fleet_broker_port=8883,
        fleet_target_model=str(target),
    )
    assert passed, said
    place, models = json.loads((tmp_path / "named").read_text())
    assert [each["dest"] for each in models] == ([place] if len(files) == 1 else [f"{place}/{name}" for name in files])


def test_a_draft_model_keeps_its_name_on_the_device(tmp_path: Path) -> None:
    model = tmp_path / "smollm2-135m" / "Q4_0.gguf"
    model.parent.mkdir()
    model.write_bytes(b"GGUF")
    passed, said = play(
        tmp_path,
        {"ansible.builtin.include_role": {"name": "device", "tasks_from": "name.yml"}},
        {
            "ansible.builtin.copy": {
                "content": "{{ [device_model_path, device_config] }}",
                "dest": str(tmp_path / "named"),
            }
        },
        **{name: value for name, value in GIVEN.items() if "model" not in name},
        fleet_draft_model=str(model),
    )
    assert passed, said
    path, config = json.loads((tmp_path / "named").read_text())
    assert name_of_file(Path(path)) == "smollm2-135m"
    assert tomllib.loads(config)["model"] == path


def test_a_model_that_nobody_has_vouched_for_is_not_sent(tmp_path: Path, model: dict[str, Any]) -> None:
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  other.gguf\n")
    passed, said = vouch(tmp_path, model, fleet_model_sums=str(sums))
    assert not passed
    assert f"does not have the SHA-256 of {model['src']}: the file is damaged, or another than" in said
    sums.write_text(f"{'0' * 64}  other.gguf\n{model['checksum']}  model.gguf\n")
    passed, said = vouch(tmp_path, model, fleet_model_sums=str(sums))
    assert passed, said
    assert vouch(tmp_path, model)[0]
