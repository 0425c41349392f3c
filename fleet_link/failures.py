"""Explains failed connections, each in one sentence that says what to do."""

import socket
import ssl
from collections.abc import Sequence
from typing import Final

from fleet_link.errors import ConnectFailed
from fleet_link.settings import LinkSettings

__all__ = ["NO_ANSWER_HINT", "explain", "refused", "sent_away", "silent", "subscription_refused"]

# CONNACK reasons (MQTT 5, 3.2.2.2) that no second attempt will change, and what to do about each.
FINAL_REASONS: Final = {
    0x01: "it does not speak MQTT 5; use one that does",
    0x82: "it calls our first packet a protocol error; use a broker that speaks MQTT 5",
    0x84: "it does not speak MQTT 5; use one that does",
    0x85: "the client id is not valid there; choose another",
    0x86: "user name or password are wrong; correct them",
    0x87: "this client is not authorized; ask the operator to enrol it",
    0x8A: "this client is banned; ask the operator",
    0x8C: "it wants another way to authenticate; check its configuration",
    0x90: "the last will's topic is not valid there; check the fleet and device names",
}
PASSING_REASONS: Final = {
    0x88: "it is unavailable for now",
    0x89: "it is busy; try again later",
    0x97: "its quota is exhausted; try again later or raise its limits",
    0x9F: "connections come too fast; try again later",
}
TAKEN_OVER: Final = 0x8E
STARTING: Final = 0x88  # "unavailable": said by a broker that starts or ends, and over as soon as that is
NO_ANSWER_HINT: Final = "is it an MQTT broker, and is the port one for plain MQTT?"
TLS_HINT: Final = "is it a TLS port, does the broker accept our certificate, and has it room for another client?"


# What the broker says of our certificate (TLS alerts, by the end of OpenSSL's name), and what to do about each.
ALERTS: Final = {
    "CERTIFICATE_REVOKED": "our certificate was revoked; ask the operator to enrol this client anew",
    "CERTIFICATE_EXPIRED": "our certificate has ended by the broker's clock; have it renewed, or set the clocks",
    "CERTIFICATE_REQUIRED": "it asks for a certificate; set 'certificate' and 'key' in the configuration",
    "UNKNOWN_CA": "it does not know the authority of our certificate; enrol with the authority of this fleet",
    "BAD_CERTIFICATE": "it does not accept our certificate, perhaps not valid yet by its clock; compare the clocks",
    "UNSUPPORTED_CERTIFICATE": "our certificate is not for a client; use the one that was made for this client",
    "PROTOCOL_VERSION": "it speaks no version of TLS that is still safe; it needs TLS 1.2 or later",
}
# What we find about the broker's certificate, by OpenSSL's number.
VERDICTS: Final = {
    9: "it is not valid yet by this machine's clock; set the clock",
    10: "it has ended; have it renewed, or set this machine's clock if that is wrong",
    26: "it is not a server's; somebody else may be playing the broker",
    62: "it is for another host name; use a name that is in it, or have this one added",
    64: "it is for another address; use a name that is in it, or have this one added",
}


def explain(error: Exception, settings: LinkSettings) -> ConnectFailed:  # noqa: PLR0911 - a table
    """Turn what the socket or TLS raised into a sentence."""
    where = settings.where
    match error:
        case ConnectFailed():
            return error
        case ssl.SSLCertVerificationError():
            why = VERDICTS.get(
                error.verify_code,
                f"{error.verify_message}; check the CA file, it must be that of the broker's authority",
            )
            return ConnectFailed(f"The certificate of the broker at {where} is not acceptable: {why}.", final=True)
        case ssl.SSLError():
            for alert, why in ALERTS.items():
                if str(error.reason).endswith(alert):
                    return ConnectFailed(f"The broker at {where} refused us: {why}.", final=True)
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
    """Describe a peer that accepted the connection, or swallowed it, but did not answer."""
    what = "closed the connection without an answer" if closed else "did not answer in time"
    hint = NO_ANSWER_HINT if settings.tls is None else TLS_HINT
    return ConnectFailed(f"The broker at {settings.where} {what}: {hint}")


def refused(reason: int, settings: LinkSettings) -> ConnectFailed:
    """Describe a CONNACK that says no."""
    why = FINAL_REASONS.get(reason) or PASSING_REASONS.get(reason) or f"MQTT reason 0x{reason:02x}"
    return ConnectFailed(
        f"The broker at {settings.where} refused the connection: {why}.",
        final=reason in FINAL_REASONS,
        refused=reason != STARTING,
    )


def sent_away(reason: int, name: str, settings: LinkSettings) -> str:
    """Say why the broker has ended a connection that stood, as the end of a sentence.

    Args:
        reason: MQTT 5 reason code of its DISCONNECT.
        name: The same in words.
        settings: Whose connection it was.
    """
    if reason == TAKEN_OVER:
        return f"another client has connected as {settings.client_id!r}; give each a name of its own, or end one"
    return f"the broker said {name.lower()}"


def subscription_refused(filters: Sequence[str], settings: LinkSettings) -> ConnectFailed:
    """Describe filters that the broker will not serve."""
    return ConnectFailed(
        f"The broker at {settings.where} refuses to subscribe this client to {', '.join(filters)}: "
        "check its access rules.",
        final=True,
    )


def reason_of(error: Exception) -> str:
    """Return what the system says went wrong, without numbers and class names."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(reason) or type(error).__name__
