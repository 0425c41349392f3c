"""TLS handshakes as an attacker would make them: with an old protocol, or with a certificate that is no good.

Our own link is made to get through and refuses what cannot work before it tries; here the broker has to be the one who
refuses, and its reason counts.
"""

import contextlib
import socket
import ssl
import struct
import warnings
from typing import Final

from fleet_common.mqtt.settings import TlsSettings

TIMEOUT_S: Final = 5.0
ALERT_S: Final = 0.3  # TLS 1.3 lets a client finish before the broker has judged its certificate
OURS: Final = ("NO_PROTOCOLS_AVAILABLE", "NO_CIPHERS_AVAILABLE")
CONNACK: Final = 0x20
NO_ANSWER: Final = "NO_ANSWER"


def refusal(host: str, port: int, tls: TlsSettings) -> str | None:
    """Show a certificate, or none, and say that we are `somebody`; return why we are refused, or None if we are not.

    The reason is what TLS says (`CERTIFICATE_EXPIRED` and the like are a part of it), or `NO_ANSWER`.

    Raises:
        OSError: Nothing listens there, or a file cannot be read.
    """
    context = ssl.create_default_context(cafile=str(tls.ca))
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    with socket.create_connection((host, port), timeout=TIMEOUT_S) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=host) as stream:
                return _introduce(stream)
        except ssl.SSLError as error:
            return error.reason or NO_ANSWER
        except ConnectionError:
            return NO_ANSWER


def refuses_old_tls(host: str, port: int) -> bool | None:
    """Whether a listener refuses TLS 1.1 and older; None if this machine's library will not even ask.

    Raises:
        OSError: Nothing listens there.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: what counts is how far it gets
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that it is deprecated is why we ask
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((host, port), timeout=TIMEOUT_S) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=host):
                return False
        except ssl.SSLError as error:
            return None if error.reason in OURS else True
        except ConnectionError:
            return True


def _introduce(stream: ssl.SSLSocket) -> str | None:
    # What is sent to a peer that has hung up makes the network forget the alert that says why.
    stream.settimeout(ALERT_S)
    with contextlib.suppress(TimeoutError):
        stream.recv(1)  # a broker does not speak first: this is an alert, or the end
        return NO_ANSWER
    stream.settimeout(TIMEOUT_S)
    name = b"somebody"
    body = b"\x00\x04MQTT\x05\x02" + struct.pack("!HBH", 10, 0, len(name)) + name  # MQTT 5, 3.1
    stream.sendall(bytes([0x10, len(body)]) + body)
    answer = stream.recv(4)
    return None if len(answer) == 4 and answer[0] == CONNACK and answer[3] == 0 else NO_ANSWER  # noqa: PLR2004
