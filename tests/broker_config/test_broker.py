import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from broker_config.broker import Broker
from broker_config.files import render_drop_in, render_firewall_unit
from broker_config.mosquitto import (
    MosquittoVersion,
    render_conf,
    render_janitor_unit,
    render_timer,
)
from tests.support.waiting import PATIENCE_S

HOME = Path("/etc/mosquitto/fleet")


@pytest.mark.parametrize(
    "wrong",
    [
        {"fleet": "a/b"},
        {"fleet": "a\nuser root"},
        {"edges": ("edge#",)},
        {"edges": ("_edge",)},
        {"edges": ("a", "a")},
        {"edges": ("a",), "monitors": ("a",)},
        {"edges": ("a",), "devices": ("a",)},
        {"port": 65_536},
        {"port": 1883, "edge_port": 1883},
        {"edge_networks": ["10.0.0.0/40"]},
        {"edge_networks": ["10.0.0.1 } }\nflush ruleset"]},
        {"host": "broker.example"},
        {"max_packet_bytes": 20},
        {"max_queued": 0},
        {"max_queued": 512, "max_unanswered": 256},
        {"unknown": 1},
        {"user": "root\nlistener 1"},
        {"storage": "/var\nuser root"},
        {"tls": {"ca": "a\nallow_anonymous true"}},
    ],
)
def test_invalid_broker_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Broker.model_validate(wrong)


@pytest.mark.parametrize("host", [None, "0.0.0.0", "192.168.1.1", "::"])
def test_without_certificates_it_listens_on_loopback_only(host: str | None) -> None:
    with pytest.raises(ValidationError):
        Broker(host=host)
    assert Broker.production(host=host).host == host


def lines_of(broker: Broker, version: MosquittoVersion = MosquittoVersion.V2_0) -> list[str]:
    return render_conf(broker, home=HOME, version=version).splitlines()


def test_the_configuration_has_what_the_link_depends_on() -> None:
    lines = lines_of(Broker(port=1883, max_packet_bytes=4096, user="nobody"))
    for needed in (
        "listener 1883 127.0.0.1",
        "set_tcp_nodelay true",
        "max_packet_size 4096",
        f"acl_file {HOME}/access.acl",
        "user nobody",
        "upgrade_outgoing_qos true",
    ):
        assert needed in lines
    assert "max_queued_messages 0" not in lines


def listeners(broker: Broker) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in lines_of(broker):
        if line.startswith("listener "):
            found[line] = []
        elif found and line and not line.startswith("#"):
            next(reversed(found.values())).append(line)
    return found


def test_edges_have_a_port_of_their_own_with_the_same_certificates_and_limits_of_its_own() -> None:
    broker = Broker.production(max_connections=500, max_edge_connections=20, max_aliases=3000, max_device_aliases=8)
    devices, edges = listeners(broker).items()
    assert (devices[0], edges[0]) == ("listener 8883", "listener 8884")
    assert [*devices[1][:2], *edges[1][:2]] == [
        "max_connections 500", "max_topic_alias 8", "max_connections 20", "max_topic_alias 3000",
    ]  # fmt: skip
    assert devices[1][2:] == edges[1][2:]
    assert "require_certificate true" in edges[1]
    assert (broker.port_of("edge-1"), broker.port_of("monitor"), broker.port_of("device-1")) == (8884, 8884, 8883)


def test_without_such_a_port_all_use_the_same() -> None:
    broker = Broker.production(edge_port=0, max_aliases=3000)
    ((where, lines),) = listeners(broker).items()
    assert where == "listener 8883"
    assert "max_topic_alias 3000" in lines
    assert broker.port_of("edge-1") == 8883


def test_an_option_that_a_version_deprecates_is_not_written_for_it() -> None:
    broker = Broker.production(acl_plugin="/usr/lib/mosquitto_acl_file.so")
    old, new = lines_of(broker), lines_of(broker, MosquittoVersion.V2_1)
    assert "per_listener_settings false" in old
    assert f"acl_file {HOME}/access.acl" in old
    assert not any(line.startswith(("per_listener_settings", "acl_file ")) for line in new)
    assert new.index("global_plugin /usr/lib/mosquitto_acl_file.so") + 1 == new.index(
        f"plugin_opt_acl_file {HOME}/access.acl"
    )


@pytest.mark.parametrize("home", [Path("relative"), Path("/a\nuser root")])
def test_a_path_that_the_file_cannot_hold_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="path"):
        render_conf(Broker(port=1883), home=home)


def test_the_service_has_descriptors_for_all_connections_and_can_write_its_storage_only() -> None:
    drop_in = render_drop_in(Broker.production(max_connections=50_000), home=HOME).splitlines()
    limit = int(next(line for line in drop_in if line.startswith("LimitNOFILE=")).partition("=")[2])
    assert limit > 50_000
    assert "ReadWritePaths=/var/lib/mosquitto" in drop_in
    assert "ProtectSystem=strict" in drop_in
    assert drop_in.index("ExecStart=") < drop_in.index(f"ExecStart=/usr/sbin/mosquitto -c {HOME}/mosquitto.conf")


def systemd_complaints(folder: Path, units: dict[str, str]) -> list[str]:
    """Return what systemd says of these files; their programs are replaced by one that every machine has."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for name, text in units.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(re.sub(r"/usr/s?bin/(nft|mosquitto_sub|mosquitto)\b", "/bin/true", text))
    files = [str(path) for path in sorted(folder.iterdir()) if path.is_file()]
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if any(Path(name).name in line for name in units)]


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    broker = Broker.production(public_name="broker.example", fleet="plant")
    units = {
        "fleet-broker-firewall.service": render_firewall_unit(broker, home=HOME),
        "fleet-broker-janitor.service": render_janitor_unit(broker, home=HOME),
        "fleet-broker-janitor.timer": render_timer(broker),
        # Debian's unit, shortened.
        "mosquitto.service": "[Service]\nType=notify\nExecStart=/bin/true\n",
        "mosquitto.service.d/fleet.conf": render_drop_in(broker, home=HOME),
    }
    assert systemd_complaints(tmp_path, units) == []
