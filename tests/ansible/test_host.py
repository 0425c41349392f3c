"""What the role `host` closes on a machine: its rules in the kernel, and the check before they are loaded."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ansible.local_play import ROOT, play
from tests.system.test_firewall import DEVICE, EDGE, KNOCK, SERVE, Cable, addresses, laid_cable

pytestmark = pytest.mark.slow  # each starts Ansible

ROLE = ROOT / "ansible" / "roles" / "host"
DEFAULTS: dict[str, Any] = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
BROKER_PORTS = {"fleet_broker_port": 8883, "fleet_broker_edge_port": 8884}


def of_host(tasks: str) -> dict[str, Any]:
    return {"ansible.builtin.include_role": {"name": "host", "tasks_from": tasks}}


@pytest.fixture
def cable() -> Iterator[Cable]:
    if os.geteuid() != 0 or not (shutil.which("nft") and shutil.which("ip")):
        pytest.skip("needs root, nft and ip")
    with laid_cable("host") as made:
        addresses(made, "b", [EDGE])
        addresses(made, "d", [DEVICE])
        yield made


PORTS = (22, 502, 8321, 8883, 9464)

CASES: list[tuple[str, dict[str, Any], list[int]]] = [
    ("devices", {}, [22]),
    ("devices", {"device_settings": {"api_listen": "0.0.0.0:8321"}, "host_open": ["502/tcp"]}, [22, 502, 8321]),
    ("devices", {"device_settings": {"api_listen": "/run/fleet/api.sock"}, "ansible_port": 502}, [502]),
    ("edges", {"edge_settings": {"metrics": {"listen": "127.0.0.1:9464"}}}, [22]),
    ("edges", {"edge_metrics_listen": "192.0.2.2:9464"}, [22, 9464]),
    ("broker", BROKER_PORTS, [22, 8883]),
]
"""Group, variables, and ports that others reach."""


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the rules that the role writes for a machine of each case."""
    folder = tmp_path_factory.mktemp("rules")
    template = {"src": str(ROLE / "templates" / "firewall.nft.j2"), "dest": str(folder / "{{ inventory_hostname }}")}
    read = {"ansible.builtin.include_vars": str(ROLE / "vars" / "main.yml")}
    inventory = {
        group: {
            "vars": DEFAULTS,
            "hosts": {f"machine-{number}": given for number, (of, given, _) in enumerate(CASES) if of == group},
        }
        for group, *_ in CASES
    }
    passed, said = play(folder, read, {"ansible.builtin.template": template}, inventory=inventory)
    assert passed, said
    return [(folder / f"machine-{number}").read_text() for number in range(len(CASES))]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_others_reach_what_the_settings_have_listen_and_no_more(number: int, rules: list[str], cable: Cable) -> None:
    cable.on_broker("nft", "-f", "-", text=rules[number])
    assert cable.start("b", SERVE, *PORTS) == "ready\n"
    found = [port for port in PORTS if json.loads(cable.start("d", KNOCK, DEVICE, EDGE, port, 1, 0)) == ["open"]]
    assert found == CASES[number][2]
    # The machine reaches itself, and others.
    assert json.loads(cable.start("b", KNOCK, "127.0.0.1", "127.0.0.1", 502, 1, 0)) == ["open"]
    assert cable.start("d", SERVE, 1883) == "ready\n"
    assert json.loads(cable.start("b", KNOCK, EDGE, DEVICE, 1883, 1, 0)) == ["open"]


@pytest.mark.parametrize("opened", [True, False])
def test_the_firewall_is_refused_where_it_would_close_what_is_in_use(
    opened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as local:
        ports = [str(each.getsockname()[1]) for each in (listening, local)]
        # Programs of other tests begin to listen while Ansible runs.
        program = tmp_path / "bin" / "ss"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{shutil.which('ss')} \"$@\" | grep -E ':({'|'.join(ports)}) '\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        passed, said = play(tmp_path, of_host("listening.yml"), host_open=[f"{ports[0]}/tcp"] if opened else [])
    assert passed is opened, said
    if not opened:
        assert f"would close {ports[0]}/tcp, where" in said


def test_a_clock_is_set_by_one_program_alone(tmp_path: Path) -> None:
    passed, said = play(tmp_path, of_host("time.yml"), {"ansible.builtin.debug": {"var": "host_clock"}}, check=True)
    assert passed, said
    expected = "chrony" if Path("/usr/sbin/chronyd").exists() else "systemd-timesyncd"
    if not Path("/usr/sbin/ntpd").exists():
        assert f'"host_clock": "{expected}"' in said
