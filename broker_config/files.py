"""Files of a broker's machine: mosquitto's, a firewall (nftables) and systemd units.

mosquitto limits neither a client's rate nor unidentified connections. The kernel can, by source address. The firewall
rules are in their own table, which does not affect other tables: other rules may still reject what it accepts.
"""

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from broker_config.broker import Broker, BrokerFilesError, render_description
from broker_config.mosquitto import (
    ACCESS_FILE,
    CONF_FILE,
    JANITOR_UNIT,
    TIMER_UNIT,
    MosquittoVersion,
    render_access,
    render_conf,
    render_janitor_unit,
    render_timer,
)
from fleet_common.host import write_atomically

RULES_FILE: Final = "firewall.nft"
UNIT_FILE: Final = "systemd/fleet-broker-firewall.service"
TABLE: Final = "inet fleet_broker"
NFT: Final = "/usr/sbin/nft"
_FAMILIES: Final = (("ip", "ipv4_addr", 4), ("ip6", "ipv6_addr", 6))
_ADDRESSES: Final = 65_536  # tracked at once; further addresses are not limited
_FORGET: Final = "10m"


def render_rules(broker: Broker) -> str:
    """Return the rules for `nft -f`, which replace earlier ones; raise ValueError if the port is 0."""
    if broker.port == 0:
        raise ValueError("Choose the broker's port before its firewall is written.")
    return "\n".join(_firewall_lines(broker)) + "\n"


def render_firewall_unit(broker: Broker, *, home: Path) -> str:
    """Return a systemd unit that loads the rules from the folder `home` at boot, and removes them when stopped."""
    return f"""\
# The firewall of the broker of the fleet {broker.fleet}. Generated; goes to /etc/systemd/system/.
[Unit]
Description=Limits of what one address may do at the fleet's broker
# A reload of nftables.service takes all tables away.
After=nftables.service
PartOf=nftables.service
Before=mosquitto.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={NFT} -f {home / RULES_FILE}
ExecReload={NFT} -f {home / RULES_FILE}
ExecStop={NFT} delete table {TABLE}

[Install]
WantedBy=multi-user.target nftables.service
"""


def _firewall_lines(broker: Broker) -> Iterator[str]:
    sharing = broker.devices_per_address
    yield f"# What one address may do at the broker of the fleet {broker.fleet}. Generated; load it with `nft -f`."
    yield f"table {TABLE}"
    yield f"delete table {TABLE}"
    yield f"table {TABLE} {{"
    for family, kind, version in _FAMILIES:
        if broker.edge_port and broker.edge_networks:
            networks = [each for each in map(ipaddress.ip_network, broker.edge_networks) if each.version == version]
            elements = f" elements = {{ {', '.join(map(str, networks))} }};" if networks else ""
            yield f"  set {family}_edges {{ type {kind}; flags interval; auto-merge;{elements} }}"
        yield f"  set {family}_connections {{ type {kind}; size {_ADDRESSES}; flags dynamic; }}"
        for name in ("attempts", "bytes"):
            flags = f"flags dynamic, timeout; timeout {_FORGET}"
            yield f"  set {family}_{name} {{ type {kind}; size {_ADDRESSES}; {flags}; }}"
    yield ""
    yield "  chain input {"
    yield "    type filter hook input priority filter; policy accept;"
    yield '    iifname "lo" accept'
    if broker.edge_port and broker.edge_networks:
        yield f"    tcp dport {broker.edge_port} goto edge_port"
    yield f"    tcp dport {broker.port} goto device_port"
    yield "  }"
    if broker.edge_port and broker.edge_networks:
        yield ""
        yield "  chain edge_port {"
        yield from (f"    {family} saddr @{family}_edges accept" for family, *_ in _FAMILIES)
        yield "    counter reject with tcp reset"
        yield "  }"
    yield ""
    yield "  chain device_port {"
    per_minute, at_once = sharing * broker.max_device_connections_per_minute, sharing * broker.max_device_connections
    for family, *_ in _FAMILIES:
        # A reset informs an honest client at once; a dropped packet would keep it waiting.
        yield (
            f"    ct state new update @{family}_attempts {{ {family} saddr limit rate over {per_minute}/minute "
            f"burst {per_minute} packets }} counter reject with tcp reset"
        )
        yield (
            f"    ct state new add @{family}_connections {{ {family} saddr ct count over {at_once} }} "
            "counter reject with tcp reset"
        )
        # TCP adapts to the rate.
        yield (
            f"    update @{family}_bytes {{ {family} saddr limit rate over {sharing * broker.max_device_bytes_per_s} "
            f"bytes/second burst {sharing * broker.max_device_burst_bytes} bytes }} counter drop"
        )
    yield "  }"
    yield "}"


DROP_IN_FILE = "systemd/mosquitto.service.d/fleet.conf"
SPARE_DESCRIPTORS = 256  # listeners, logs, the persistence file while it is rewritten
FEWEST_DESCRIPTORS = 1024
MOSQUITTO = "/usr/sbin/mosquitto"


def render_drop_in(broker: Broker, *, home: Path) -> str:
    """Return a drop-in for Debian's mosquitto.service: our configuration, enough descriptors, and a sandbox.

    mosquitto never runs as root with it, so the files in `home` must be readable for the user mosquitto.
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
ExecStart={MOSQUITTO} -c {home / CONF_FILE}
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


DESCRIPTION_FILE = "broker.toml"

PRIVATE = 0o640  # mosquitto warns about files that others can read
PUBLIC = 0o644


class Profile(StrEnum):
    LOOPBACK = "loopback"
    PRODUCTION = "production"


@dataclass(frozen=True, slots=True)
class RenderedFile:
    name: str
    text: str
    mode: int = PRIVATE


def render_files(
    broker: Broker, profile: Profile, *, home: Path, version: MosquittoVersion = MosquittoVersion.V2_0
) -> tuple[RenderedFile, ...]:
    """Return the files of a broker whose folder is `home` (absolute) on its machine; raise BrokerFilesError."""
    if (profile is Profile.LOOPBACK) != (broker.tls is None):
        needs = "no tls" if profile is Profile.LOOPBACK else "tls"
        raise BrokerFilesError(f"The profile {profile.value!r} needs a description with {needs}.")
    description = RenderedFile(DESCRIPTION_FILE, render_description(broker))
    try:
        conf = RenderedFile(CONF_FILE, render_conf(broker, home=home, version=version))
    except ValueError as error:
        raise BrokerFilesError(str(error)) from error
    files = [description, conf, RenderedFile(ACCESS_FILE, render_access(broker))]
    if profile is not Profile.LOOPBACK:
        files.append(RenderedFile(DROP_IN_FILE, render_drop_in(broker, home=home), PUBLIC))
        files.append(RenderedFile(RULES_FILE, render_rules(broker)))
        files.append(RenderedFile(UNIT_FILE, render_firewall_unit(broker, home=home), PUBLIC))
        if broker.janitor is not None:
            files.append(RenderedFile(JANITOR_UNIT, render_janitor_unit(broker, home=home), PUBLIC))
            files.append(RenderedFile(TIMER_UNIT, render_timer(broker), PUBLIC))
    return tuple(files)


def write_files(files: Iterable[RenderedFile], directory: Path) -> None:
    """Write files atomically, so that a broker that reloads reads the old or the new one."""
    for file in files:
        path = directory / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, file.text.encode(), mode=file.mode)
        except OSError as error:
            raise BrokerFilesError(f"{path} cannot be written: {error.strerror or error}.") from error
