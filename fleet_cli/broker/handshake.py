"""A TLS handshake as an old client would begin it."""

import socket
import ssl
import warnings
from typing import Final

__all__ = ["refuses_old_tls"]

TIMEOUT_S: Final = 5.0
OURS: Final = ("NO_PROTOCOLS_AVAILABLE", "NO_CIPHERS_AVAILABLE")


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
