from pathlib import Path

import pytest
from pydantic import ValidationError

from broker_config.access import render_access
from broker_config.broker import Broker
from broker_config.mosquitto_conf import render_conf
from broker_config.rumqttd_conf import render_rumqttd
from schemas.topics import TREE, Role, rules_for

ACCESS = Path("/run/fleet/access.acl")


@pytest.mark.parametrize(
    "wrong",
    [
        {"fleet": "a/b"},
        {"fleet": "a\nuser root"},
        {"edges": ("edge#",)},
        {"edges": ("_edge",)},
        {"edges": ("a", "a")},
        {"edges": ("a",), "monitors": ("a",)},
        {"port": 65_536},
        {"max_packet_bytes": 20},
        {"max_queued": 0},
        {"unknown": 1},
    ],
)
def test_a_broker_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Broker.model_validate(wrong)


def test_the_configuration_has_what_the_link_depends_on() -> None:
    lines = render_conf(Broker(port=1883, max_packet_bytes=4096), access_file=ACCESS, user="nobody").splitlines()
    for needed in (
        "listener 1883 127.0.0.1",
        "set_tcp_nodelay true",
        "max_packet_size 4096",
        f"acl_file {ACCESS}",
        "user nobody",
    ):
        assert needed in lines
    assert "max_queued_messages 0" not in lines


@pytest.mark.parametrize("path", [Path("relative.acl"), Path("/a\nuser root")])
def test_a_path_that_the_file_cannot_hold_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="path"):
        render_conf(Broker(port=1883), access_file=path)


def test_the_port_must_be_chosen() -> None:
    with pytest.raises(ValueError, match="port"):
        render_conf(Broker(), access_file=ACCESS)
    with pytest.raises(ValueError, match="port"):
        render_rumqttd(Broker())


def test_every_right_of_the_topic_tree_is_rendered_and_no_other() -> None:
    broker = Broker(fleet="home", edges=("e1", "e2"), monitors=("desk",))
    sections: dict[str, set[str]] = {}
    user = ""
    for line in render_access(broker).splitlines():
        keyword, _, rest = line.partition(" ")
        if keyword == "user":
            user = rest
        elif keyword == "topic":
            sections.setdefault(user, set()).add(rest)
        elif keyword == "pattern":
            sections.setdefault("%u", set()).add(rest)
    for name, role in (("e1", Role.EDGE), ("e2", Role.EDGE), ("desk", Role.MONITOR), ("%u", Role.DEVICE)):
        device = "%u" if role is Role.DEVICE else "+"
        rights = rules_for(role, fleet="home", device=device, edge=name if role is Role.EDGE else "+")
        assert sections.pop(name) == {f"{'write' if right.write else 'read'} {right.filter}" for right in rights}
    assert sections == {}
    assert len(render_access(broker).splitlines()) > len(TREE)
