"""Firewall of the broker's machine (nftables): what mosquitto cannot limit, and who may reach the edges' port.

mosquitto bounds neither a client's rate nor the connections that have not said whose they are; the kernel can, by the
address that they come from. The rules are a table of their own, which takes nothing from other tables: what it lets
pass others may still refuse.
"""

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from broker_config.broker import Broker

RULES_FILE: Final = "firewall.nft"
UNIT_FILE: Final = "systemd/fleet-broker-firewall.service"
TABLE: Final = "inet fleet_broker"
PROGRAM: Final = "/usr/sbin/nft"
_FAMILIES: Final = (("ip", "ipv4_addr", 4), ("ip6", "ipv6_addr", 6))
_ADDRESSES: Final = 65_536  # that are known at once; an address beyond them is let in without a limit
_FORGET: Final = "10m"


def render_rules(broker: Broker) -> str:
    """Return the rules, for `nft -f`: loaded again, they take the place of those that were there.

    Raises:
        ValueError: The port is 0.
    """
    if broker.port == 0:
        raise ValueError("Choose the broker's port before its firewall is written.")
    return "\n".join(_lines(broker)) + "\n"


def render_firewall_unit(broker: Broker, *, home: Path) -> str:
    """Return a systemd unit that loads the rules at boot and takes them away when it is stopped.

    Args:
        broker: What runs.
        home: The folder where the rules will lie.
    """
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
ExecStart={PROGRAM} -f {home / RULES_FILE}
ExecReload={PROGRAM} -f {home / RULES_FILE}
ExecStop={PROGRAM} delete table {TABLE}

[Install]
WantedBy=multi-user.target nftables.service
"""


def _lines(broker: Broker) -> Iterator[str]:
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
        # The reply tells an honest client at once; a connection that is dropped would keep it waiting.
        yield (
            f"    ct state new update @{family}_attempts {{ {family} saddr limit rate over {per_minute}/minute "
            f"burst {per_minute} packets }} counter reject with tcp reset"
        )
        yield (
            f"    ct state new add @{family}_connections {{ {family} saddr ct count over {at_once} }} "
            "counter reject with tcp reset"
        )
        # TCP slows down to what is let through.
        yield (
            f"    update @{family}_bytes {{ {family} saddr limit rate over {sharing * broker.max_device_bytes_per_s} "
            f"bytes/second burst {sharing * broker.max_device_burst_bytes} bytes }} counter drop"
        )
    yield "  }"
    yield "}"
