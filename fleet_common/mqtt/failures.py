"""Descriptions of failed connections, each one sentence that says what to do."""

import socket
import ssl
from collections.abc import Sequence
from typing import Final

from fleet_common.mqtt.errors import ConnectFailed, LinkFault
from fleet_common.mqtt.settings import LinkSettings

# CONNACK reasons (MQTT 5, 3.2.2.2) for which trying again is pointless, and what to do about each.
FINAL_REASONS: Final = {
    0x01: (LinkFault.UNSUITABLE, "it does not speak MQTT 5; use one that does"),
    0x82: (LinkFault.UNSUITABLE, "it reports a protocol error in our first packet; use a broker that speaks MQTT 5"),
    0x84: (LinkFault.UNSUITABLE, "it does not speak MQTT 5; use one that does"),
    0x85: (LinkFault.NOT_AUTHORIZED, "it does not accept the client id {client_id!r}; choose other names"),
    0x86: (LinkFault.NOT_AUTHORIZED, "{login}, or ask the operator to enrol this client"),
    0x87: (LinkFault.NOT_AUTHORIZED, "{login}, or ask the operator to enrol this client"),
    0x8A: (LinkFault.NOT_AUTHORIZED, "this client is banned; ask the operator"),
    0x8C: (LinkFault.NOT_AUTHORIZED, "it requires another authentication method; check its configuration"),
    0x90: (LinkFault.NOT_AUTHORIZED, "the last will's topic is not valid there; check the fleet and device names"),
    0x9A: (LinkFault.UNSUITABLE, "it does not retain messages, which the fleet needs; use a broker that does"),
    0x9B: (LinkFault.UNSUITABLE, "it does not offer QoS 1, which the fleet needs; use a broker that does"),
}
PASSING_REASONS: Final = {
    0x88: "it is unavailable for now",
    0x89: "it is busy; try again later",
    0x97: "its quota is exhausted; try again later or raise its limits",
    0x9F: "connections come too fast; try again later",
}
TAKEN_OVER: Final = 0x8E
STARTING: Final = 0x88  # "unavailable": a broker that starts or stops says so for a moment
NO_ANSWER_HINT: Final = "is it an MQTT broker that speaks MQTT 5, and is the port one for plain MQTT?"
TLS_HINT: Final = "is it a TLS port, does the broker accept our certificate, and does it accept more clients?"

# Verdict of the broker on our certificate (TLS alerts, by the end of OpenSSL's name), and what to do.
ALERTS: Final = {
    "CERTIFICATE_REVOKED": "our certificate was revoked; ask the operator to enrol this client again",
    "CERTIFICATE_EXPIRED": "our certificate has ended by the broker's clock; have it renewed, or set the clocks",
    "CERTIFICATE_REQUIRED": "it asks for a certificate; set 'certificate' and 'key' in the configuration",
    "UNKNOWN_CA": "it does not know the authority of our certificate; enrol with the authority of this fleet",
    "BAD_CERTIFICATE": "it does not accept our certificate, perhaps not valid yet by its clock; compare the clocks",
    "UNSUPPORTED_CERTIFICATE": "our certificate is not for a client; use the one that was made for this client",
    "PROTOCOL_VERSION": "it speaks no version of TLS that is still safe; it needs TLS 1.2 or later",
}
# Our verdict on the broker's certificate, by OpenSSL's number.
VERDICTS: Final = {
    9: "it is not valid yet by this machine's clock; set the clock",
    10: "it has ended; have it renewed, or set this machine's clock if that is wrong",
    26: "it is not a server's; another server may pose as the broker",
    62: "it is for another host name; use a name that is in it, or have this one added",
    64: "it is for another address; use a name that is in it, or have this one added",
}


def explain(error: Exception, settings: LinkSettings) -> ConnectFailed:  # noqa: PLR0911 - a table
    where = settings.where
    match error:
        case ConnectFailed():
            return error
        case ssl.SSLCertVerificationError():
            why = VERDICTS.get(
                error.verify_code,
                f"{error.verify_message}; check the CA file, it must be that of the broker's authority",
            )
            return ConnectFailed(
                f"The certificate of the broker at {where} is not acceptable: {why}.",
                fault=LinkFault.CERTIFICATE,
                final=True,
            )
        case ssl.SSLError():
            for alert, why in ALERTS.items():
                if str(error.reason).endswith(alert):
                    return ConnectFailed(
                        f"The broker at {where} refused us: {why}.", fault=LinkFault.CERTIFICATE, final=True
                    )
            return ConnectFailed(f"TLS with the broker at {where} failed ({reason_of(error)}): {TLS_HINT}")
        case ConnectionRefusedError():
            return ConnectFailed(
                f"No broker listens at {where}: start it, or correct host and port in the configuration."
            )
        case socket.gaierror():
            return ConnectFailed(f"The broker's host name {settings.host!r} is unknown: correct it or check DNS.")
        case TimeoutError():
            return silent(settings)
        case _:
            return ConnectFailed(f"The broker at {where} cannot be reached: {reason_of(error)}.")


def silent(settings: LinkSettings, *, closed: bool = False) -> ConnectFailed:
    """Describe a peer that accepts connections but does not answer."""
    what = "closed the connection without an answer" if closed else "did not answer in time"
    hint = NO_ANSWER_HINT if settings.tls is None else TLS_HINT
    return ConnectFailed(f"The broker at {settings.where} {what}: {hint}")


def refused(reason: int, settings: LinkSettings) -> ConnectFailed:
    fault, why = FINAL_REASONS.get(reason, (LinkFault.BUSY, PASSING_REASONS.get(reason, f"MQTT reason 0x{reason:02x}")))
    why = why.format(client_id=settings.client_id, login=_login(settings))
    return ConnectFailed(
        f"The broker at {settings.where} refused the connection: {why}.",
        fault=fault,
        final=reason in FINAL_REASONS,
        refused=reason != STARTING,
    )


def _login(settings: LinkSettings) -> str:
    if settings.username is not None:
        return f"it does not accept the user name {settings.username!r} or its password; correct them"
    if settings.tls is not None and settings.tls.certificate is not None:
        return "it does not accept the name of our certificate"
    tried = ", nor its name as one" if settings.anonymous_too else ""
    return f"it does not accept a client without a user name{tried}; set 'username' and 'password'"


def unsuitable(missing: str, settings: LinkSettings) -> ConnectFailed:
    """Describe a broker that lacks a required feature; `missing` is the middle of a sentence: "does not …"."""
    return ConnectFailed(
        f"The broker at {settings.where} {missing}, which the fleet needs; change its settings, or use another broker.",
        fault=LinkFault.UNSUITABLE,
        final=True,
    )


def lost(how: str, settings: LinkSettings) -> ConnectFailed:
    return ConnectFailed(f"The connection to the broker at {settings.where} was lost: {how}.")


def name_taken(settings: LinkSettings) -> ConnectFailed:
    """Describe a connection that ended because another client connected with our client id."""
    return ConnectFailed(
        f"Another client has connected to the broker at {settings.where} as {settings.client_id!r} and ended this "
        "client's connection; give each its own name, or end one.",
        fault=LinkFault.NAME_TAKEN,
        refused=True,
    )


def subscription_refused(filters: Sequence[str], settings: LinkSettings) -> ConnectFailed:
    return ConnectFailed(
        f"The broker at {settings.where} refuses to subscribe this client to {', '.join(filters)}: "
        "check its access rules.",
        fault=LinkFault.NOT_AUTHORIZED,
        final=True,
    )


def reason_of(error: Exception) -> str:
    """Return the system's message, without numbers and class names."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(reason) or type(error).__name__
