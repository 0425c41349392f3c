"""Configuration of EMQX 5, for fleets that outgrow one broker. Rendered from the same description.

No EMQX is at hand where this project is tested: these files are written after its documentation and have not been run.
What differs from mosquitto is said in README.md beside this module.
"""

from collections.abc import Iterator
from pathlib import Path

from broker_config.broker import CIPHERS_TLS12, CIPHERS_TLS13, Broker, Tls
from schemas.topics import Access, Role, rules_for

__all__ = ["render_emqx", "render_emqx_access"]

USERNAME = "${username}"
# What `schemas.names` does not let be a name: EMQX can refuse it outright, which mosquitto cannot.
NO_NAME = r"[^A-Za-z0-9._-]|^[^A-Za-z0-9]|[^A-Za-z0-9]$|^.{64}"


def render_emqx(broker: Broker, *, home: Path) -> str:
    """Return a part of emqx.conf.

    Args:
        broker: What to describe.
        home: The folder, absolute, where the ACL file and the certificates will lie.

    Raises:
        ValueError: It has no TLS, or no port.
    """
    if broker.tls is None or broker.port == 0:
        raise ValueError("EMQX is for production: describe tls and a port.")
    limits = f"""\
  # Of one client; it is read no further until it keeps to them.
  messages_rate = "{broker.max_device_messages_per_s}/s"
  bytes_rate = "{broker.max_device_bytes_per_s >> 10}KB/s"
  # Of the listener: connections that have not said whose they are count too.
  max_conn_rate = "{max(1, broker.max_connections // 10)}/s"
"""
    listeners = [_listener("default", broker, broker.tls, home, broker.port, broker.max_connections, limits)]
    if broker.edge_port:
        # Edges answer whole fleets: their rates have no bound.
        listeners.append(
            _listener("edges", broker, broker.tls, home, broker.edge_port, broker.max_edge_connections, "")
        )
    return f"""\
# The broker of the fleet {broker.fleet}. Generated for EMQX 5.1.1 or later; not tested with one.
listeners.tcp.default.enable = false
listeners.ws.default.enable = false
listeners.wss.default.enable = false
{"".join(listeners)}
# The name in the certificate is the user and the client id: nobody takes over another's session.
mqtt {{
  peer_cert_as_username = cn
  peer_cert_as_clientid = cn
  max_packet_size = {broker.max_packet_bytes}
  max_inflight = {broker.max_unanswered}
  max_mqueue_len = {broker.max_queued}
  max_topic_alias = {broker.max_aliases}
  max_qos_allowed = 1
  max_subscriptions = 64
}}

authorization {{
  no_match = deny
  deny_action = ignore
  cache.enable = true
  sources = [
    {{ type = file, enable = true, path = "{home / "acl.conf"}" }}
  ]
}}
"""


def _listener(name: str, broker: Broker, tls: Tls, home: Path, port: int, connections: int, limits: str) -> str:
    bind = f"{broker.host}:{port}" if broker.host is not None else f"0.0.0.0:{port}"
    ciphers = ", ".join(f'"{cipher}"' for cipher in (*CIPHERS_TLS13, *CIPHERS_TLS12))
    return f"""
listeners.ssl.{name} {{
  bind = "{bind}"
  max_connections = {connections}
{limits}\
  tcp_options.nodelay = true
  ssl_options {{
    cacertfile = "{home / tls.ca}"
    certfile = "{home / tls.certificate}"
    keyfile = "{home / tls.key}"
    verify = verify_peer
    fail_if_no_peer_cert = true
    versions = ["tlsv1.3", "tlsv1.2"]
    ciphers = [{ciphers}]
  }}
}}
"""


def render_emqx_access(broker: Broker) -> str:
    """Return acl.conf: Erlang terms, of which the first that matches decides."""
    return "\n".join(_terms(broker)) + "\n"


def _terms(broker: Broker) -> Iterator[str]:
    yield f"%% Who may publish and subscribe to what in the fleet {broker.fleet}. Generated for EMQX 5."
    escaped = NO_NAME.replace("\\", "\\\\")
    yield f'{{deny, {{username, {{re, "{escaped}"}}}}, all, ["#", "$SYS/#"]}}.'
    for name in broker.banned:
        yield f'{{deny, {{username, "{name}"}}, all, ["#", "$SYS/#"]}}.'
    for edge in broker.edges:
        yield from _rights(f'{{username, "{edge}"}}', rules_for(Role.EDGE, fleet=broker.fleet, edge=edge))
    for monitor in broker.monitors:
        rights = (*rules_for(Role.MONITOR, fleet=broker.fleet), Access("$SYS/#", write=False))
        yield from _rights(f'{{username, "{monitor}"}}', rights)
    if broker.devices is None:
        yield from _rights("all", _of_device(broker, USERNAME))
    for device in broker.devices or ():
        yield from _rights(f'{{username, "{device}"}}', _of_device(broker, device))
    yield "{deny, all}."


def _of_device(broker: Broker, name: str) -> tuple[Access, ...]:
    return rules_for(Role.DEVICE, fleet=broker.fleet, device=name, edges=broker.edges)


def _rights(who: str, rights: tuple[Access, ...]) -> Iterator[str]:
    for right in rights:
        yield f'{{allow, {who}, {_action(right)}, ["{right.filter}"]}}.'


def _action(right: Access) -> str:
    if not right.write:
        return "subscribe"
    # What is not meant to be kept cannot be left behind.
    return "publish" if right.retained else "{publish, [{retain, false}]}"
