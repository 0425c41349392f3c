import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fleet_device.settings import DeviceSettings
from fleet_edge.session_log.alerts.settings import AlertSettings
from fleet_edge.settings import EdgeSettings
from tests.ansible.local_play import ROOT, play
from tests.broker_config.test_broker import systemd_complaints

pytestmark = pytest.mark.slow  # each starts Ansible
GIVEN = {
    "fleet_name": "north",
    "fleet_version": "0.1.0",
    "fleet_ca_dir": "/ca",
    "fleet_ca_passphrase": "x",
    "fleet_command": "fleet",
    "fleet_broker_host": "broker.north.example",
    "fleet_broker_port": 8883,
    "fleet_draft_model": "/m/draft.gguf",
    "fleet_target_model": "/m/target",
    "device_model_path": "/var/lib/fleet/models/0/draft.gguf",
    "edge_model_path": "/var/lib/fleet/models/0/target",
}


def rendered(kind: str, folder: Path, *, file: str = "", **settings: Any) -> dict[str, Any]:
    role = ROOT / "ansible" / "roles" / kind
    template = role / "templates" / f"{file or kind}.toml.j2"
    tasks = [
        {"ansible.builtin.include_vars": str(role / "defaults" / "main.yml")},
        {"ansible.builtin.template": {"src": str(template), "dest": str(folder / "out.toml")}},
    ]
    passed, said = play(folder, *tasks, **GIVEN, **settings)
    assert passed, said
    return tomllib.loads((folder / "out.toml").read_text())


def test_an_edges_sections_are_read(tmp_path: Path) -> None:
    settings = {
        "metrics": {"listen": "127.0.0.1:9464"},
        "quotas": {"new_tokens_per_min": 6000, "labels": {"hall_a.1": {"devices": ["press-*"], "kv_share": 0.2}}},
        "padding": 64,
    }
    read = EdgeSettings(**rendered("edge", tmp_path, edge_settings=settings))
    assert read.metrics.listen == "127.0.0.1:9464"
    assert read.quotas.labels["hall_a.1"].kv_share == 0.2
    assert (read.padding, read.broker.host) == (64, "broker.north.example")


def test_a_devices_sections_are_read(tmp_path: Path) -> None:
    settings = {"offline": "wait", "applications": {"scada": {"key_sha256": "0" * 64}}}
    found = rendered("device", tmp_path, device_settings=settings)
    assert found["applications"]["scada"] == {"key_sha256": "0" * 64}
    read = DeviceSettings(**rendered("device", tmp_path, device_settings={"offline": "wait"}))
    assert (read.offline, read.broker.port, read.update_dir) == ("wait", 8883, None)
    read = DeviceSettings(**rendered("device", tmp_path, device_update_url="https://mirror.example/updates"))
    assert read.update_dir == Path("/var/lib/fleet/updates")


@pytest.mark.exhaustive
def test_an_edges_metrics_are_served_with_the_token_that_the_role_writes(tmp_path: Path) -> None:
    none = rendered("edge", tmp_path)
    assert "metrics" not in none
    local = rendered("edge", tmp_path, edge_metrics_listen="127.0.0.1:9464")
    assert local["metrics"] == {"listen": "127.0.0.1:9464"}
    read = rendered(
        "edge",
        tmp_path,
        edge_metrics_listen="127.0.0.1:9464",
        edge_metrics_token="0123456789abcdef",
        edge_settings={"metrics": {"listen": "10.0.0.5:9464"}},
    )
    token = "/etc/fleet/credentials/metrics-token"
    assert read["metrics"] == {"listen": "10.0.0.5:9464", "token_file": token}
    assert "0123456789abcdef" not in str(read)
    assert EdgeSettings.model_validate(read).metrics.address is not None


@pytest.mark.exhaustive
def test_an_edges_alerts_are_posted_and_signed_with_the_secret_that_the_role_writes(tmp_path: Path) -> None:
    secret, given = "0123456789abcdef", {"webhook": "https://hooks.example/fleet", "broker": {"host": "north.example"}}
    assert "alerts" not in rendered("edge", tmp_path)
    edge = rendered("edge", tmp_path, edge_alerts=given, edge_alerts_secret=secret)
    assert str(EdgeSettings(**edge).alerts) == "/etc/fleet/credentials/alerts.toml"
    found = rendered("edge", tmp_path, file="alerts", edge_alerts=given, edge_alerts_secret=secret)
    assert secret not in str(found)
    read = AlertSettings(**found)
    assert (read.webhook, read.broker.host) == (given["webhook"], "north.example")
    assert str(read.webhook_secret_file) == "/etc/fleet/credentials/alerts-secret"


def test_systemd_understands_the_units_of_an_updater(tmp_path: Path) -> None:
    role, made = ROOT / "ansible" / "roles" / "device", tmp_path / "units"
    made.mkdir()
    names = [path.name for path in (role / "templates").glob("fleet-*.j2")]
    tasks = [
        {"ansible.builtin.include_vars": str(role / "defaults" / "main.yml")},
        {
            "ansible.builtin.template": {"src": f"{role}/templates/{{{{ item }}}}", "dest": f"{made}/{{{{ item }}}}"},
            "loop": names,
        },
    ]
    passed, said = play(tmp_path, *tasks, **GIVEN, device_update_url="https://mirror.example/updates")
    assert passed, said
    units = {name.removesuffix(".j2"): (made / name).read_text() for name in names}
    assert "--url https://mirror.example/updates " in units["fleet-updater.service"]
    assert "ReadWritePaths=/var/lib/fleet/device /var/lib/fleet/updates/inbox\n" in units["fleet-device.service"]
    checked = {name: re.sub(r"/opt/fleet/\w+/venv/bin/fleet\b", "/bin/true", text) for name, text in units.items()}
    assert systemd_complaints(tmp_path / "checked", checked) == []
