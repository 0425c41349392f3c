"""Janitor: clears what devices leave at the broker on topics where nothing is meant to be kept.

mosquitto keeps a retained message wherever its publisher may write, and knows no rule against it. The janitor is a
client on the broker's own machine, started by systemd now and then: it reads what is kept, no more, and takes it away.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from broker_config.broker import Broker
from schemas.topics import TREE, Access, Role, Rule, wildcard

JANITOR_UNIT: Final = "systemd/fleet-broker-janitor.service"
TIMER_UNIT: Final = "systemd/fleet-broker-janitor.timer"
PROGRAM: Final = "/usr/bin/mosquitto_sub"
FILES: Final = {"--cafile": "ca.pem", "--cert": "janitor.pem", "--key": "janitor.key"}
_LASTS_S: Final = 5  # at most; it ends by itself when the first message comes that was not kept
_EVERY: Final = "10min"


def janitor_rights(broker: Broker) -> tuple[Access, ...]:
    """Return what the janitor may do: read and clear what devices write and nobody is to keep."""
    filters = [topic_filter for rule in TREE if _unkept(rule) for topic_filter in _filters(rule, broker)]
    return tuple(Access(each, write=write) for each in filters for write in (True, False))


def janitor_command(broker: Broker, *, folder: str, program: str = PROGRAM) -> list[str]:
    """Return the command that clears once.

    Args:
        broker: The description; its port must be chosen.
        folder: With `ca.pem`, `janitor.pem` and `janitor.key`.
        program: mosquitto_sub.
    """
    where = [program, "-V", "5", "-q", "0", "-h", broker.public_name, "-p", str(broker.edge_port or broker.port)]
    credentials = [word for flag, name in FILES.items() for word in (flag, f"{folder}/{name}")]
    topics = [word for access in janitor_rights(broker) if access.write for word in ("-t", access.filter)]
    return [*where, *credentials, "--retained-only", "--remove-retained", "-W", str(_LASTS_S), "-F", "%t", *topics]


def render_janitor_unit(broker: Broker, *, home: Path) -> str:
    """Return the systemd service that clears once; `render_timer` says when.

    Args:
        broker: The description.
        home: The folder of the broker's files, where the janitor's lie too.
    """
    # systemd reads a percent sign as its own.
    command = " ".join(word.replace("%", "%%") for word in janitor_command(broker, folder=str(home)))
    return f"""\
# Clears what devices leave at the broker of the fleet {broker.fleet}. Generated; goes to /etc/systemd/system/.
[Unit]
Description=Clears what devices leave at the fleet's broker
After=mosquitto.service

[Service]
Type=oneshot
ExecStart={command}
# Its time was up: nothing came that was not kept.
SuccessExitStatus=27
# A line for each topic that was cleared, in the journal.
StandardOutput=journal
User=mosquitto
Group=mosquitto
ProtectSystem=strict
ProtectHome=true
PrivateDevices=true
NoNewPrivileges=true
CapabilityBoundingSet=
RestrictAddressFamilies=AF_INET AF_INET6
MemoryMax=64M
"""


def render_timer(broker: Broker) -> str:
    """Return the systemd timer of the janitor."""
    return f"""\
# When the janitor of the broker of the fleet {broker.fleet} works. Generated; goes to /etc/systemd/system/.
[Timer]
OnBootSec={_EVERY}
OnUnitInactiveSec={_EVERY}

[Install]
WantedBy=timers.target
"""


def _unkept(rule: Rule) -> bool:
    return rule.writers == {Role.DEVICE} and not rule.retained


def _filters(rule: Rule, broker: Broker) -> Iterator[str]:
    edges = broker.edges if "{edge}" in rule.template else ("",)
    yield from (wildcard(rule.topic, fleet=broker.fleet, edge=edge) for edge in edges)
