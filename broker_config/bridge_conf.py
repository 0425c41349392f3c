"""The part of mosquitto's configuration that reports to the head office."""

from collections.abc import Iterator
from pathlib import Path

from broker_config.broker import Broker
from broker_config.head_office import REPORTED, HeadOffice
from schemas.topics import TREE, wildcard

__all__ = ["bridge_lines"]


def bridge_lines(broker: Broker, office: HeadOffice, *, home: Path) -> Iterator[str]:
    """Yield the lines of the connection: everything goes out and nothing comes in.

    Topics keep their names, so a fleet's name is unique among the sites of a head office.
    """
    where = f"[{office.host}]" if ":" in office.host else office.host
    yield ""
    yield "connection head-office"
    yield f"address {where}:{office.port}"
    yield f"remote_clientid {office.site}"
    yield f"remote_username {office.site}"
    yield f"bridge_cafile {home / office.ca}"
    yield f"bridge_certfile {home / office.certificate}"
    yield f"bridge_keyfile {home / office.key}"
    yield "bridge_tls_version tlsv1.2"
    yield "bridge_protocol_version mqttv50"
    # A message that was queued while the line was down still goes up; the head office needs no session of ours.
    yield "cleansession true"
    yield "local_cleansession false"
    yield "try_private true"
    yield "# The head office's rules let this site write what is below and nothing else."
    yield "notifications_local_only true"
    yield "bridge_attempt_unsubscribe false"
    yield f"bridge_max_packet_size {broker.max_packet_bytes}"
    yield "restart_timeout 5 60"
    qos = {rule.topic: rule.qos for rule in TREE}
    for topic in REPORTED:
        yield f"topic {wildcard(topic, fleet=broker.fleet)} out {qos[topic]}"
