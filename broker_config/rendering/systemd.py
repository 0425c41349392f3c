"""Drop-in for Debian's mosquitto.service: our configuration, enough descriptors, and little else allowed."""

from pathlib import Path

from broker_config.broker import Broker
from broker_config.rendering.mosquitto_conf import CONF_FILE

DROP_IN_FILE = "systemd/mosquitto.service.d/fleet.conf"
SPARE_DESCRIPTORS = 256  # listeners, logs, the persistence file while it is written anew
FEWEST_DESCRIPTORS = 1024
PROGRAM = "/usr/sbin/mosquitto"


def render_drop_in(broker: Broker, *, home: Path) -> str:
    """Return the drop-in.

    mosquitto never is root under it, so the files in `home` must be readable for the user mosquitto.

    Args:
        broker: What runs.
        home: The folder of its configuration.
    """
    connections = broker.max_connections + (broker.max_edge_connections if broker.edge_port else 0)
    descriptors = max(FEWEST_DESCRIPTORS, connections + SPARE_DESCRIPTORS)
    writable = f"ReadWritePaths={home / broker.storage}\n" if broker.storage is not None else ""
    return f"""\
# The broker of the fleet {broker.fleet}. Generated; goes to /etc/systemd/system/mosquitto.service.d/fleet.conf
[Service]
# Empty lines take back what the package's unit says: its own configuration file is not read at all.
ExecStartPre=
ExecStart=
ExecStart={PROGRAM} -c {home / CONF_FILE}
User=mosquitto
Group=mosquitto
UMask=0027
LimitNOFILE={descriptors}
Restart=on-failure
RestartSec=2
{writable}ProtectSystem=strict
ProtectHome=true
PrivateTmp=true
PrivateDevices=true
ProtectClock=true
ProtectHostname=true
ProtectKernelLogs=true
ProtectKernelModules=true
ProtectKernelTunables=true
ProtectControlGroups=true
ProtectProc=invisible
ProcSubset=pid
NoNewPrivileges=true
CapabilityBoundingSet=
AmbientCapabilities=
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=true
RestrictRealtime=true
RestrictSUIDSGID=true
LockPersonality=true
MemoryDenyWriteExecute=true
RemoveIPC=true
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
"""
