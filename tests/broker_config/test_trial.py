from pathlib import Path

from broker_config.broker import Broker
from broker_config.processes.trial import TrialFiles, trial_lines
from broker_config.rendering.mosquitto_conf import render_conf
from broker_config.rendering.version import MosquittoVersion

HOME = Path("/etc/mosquitto/fleet")
FOLDER = Path("/tmp/trial")


def tried(broker: Broker, version: MosquittoVersion = MosquittoVersion.V2_0) -> list[str]:
    conf = render_conf(broker, home=HOME, version=version)
    return [*trial_lines(TrialFiles(conf, "", FOLDER), directory=FOLDER, ports=(4711, 4712))]


def test_a_trial_changes_nothing_but_what_belongs_to_the_production_machine() -> None:
    broker = Broker.production(pid_file="/run/m.pid")
    rendered = render_conf(broker, home=HOME).splitlines()
    lines = tried(broker)
    gone = {line.split()[0] for line in rendered if line not in lines}
    files = {"acl_file", "cafile", "certfile", "keyfile", "crlfile"}
    machine = {"listener", "user", "pid_file", "persistence", "persistence_location", "log_dest"}
    assert gone == files | machine
    assert [line for line in lines if line.startswith("listener ")] == [
        "listener 4711 127.0.0.1",
        "listener 4712 127.0.0.1",
    ]
    assert not any(str(HOME) in line for line in lines)


def test_the_plugins_file_is_moved_too() -> None:
    lines = tried(Broker.production(acl_plugin="/usr/lib/acl.so"), MosquittoVersion.V2_1)
    assert f"plugin_opt_acl_file {FOLDER}/access.acl" in lines


def test_a_trial_reports_to_nobody() -> None:
    broker = Broker.production(head_office={"host": "office.example", "site": "north"})
    assert {"connection", "address", "bridge_cafile", "topic"}.isdisjoint(
        line.split()[0] for line in tried(broker) if line
    )
