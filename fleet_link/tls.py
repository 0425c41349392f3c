"""TLS for a link."""

import ssl

from fleet_link.errors import ConnectFailed
from fleet_link.failures import reason_of
from fleet_link.settings import LinkSettings

__all__ = ["tls_context"]


class _TidySocket(ssl.SSLSocket):
    """A socket that closes itself when its handshake fails; paho would leave it to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def tls_context(settings: LinkSettings) -> ssl.SSLContext | None:
    """Return the context for the connection, None for plain TCP.

    Raises:
        ConnectFailed: A file is missing or not what it should be.
    """
    tls = settings.tls
    if tls is None:
        return None
    try:
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.sslsocket_class = _TidySocket
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.certificate is not None:
            context.load_cert_chain(str(tls.certificate), str(tls.key) if tls.key is not None else None)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = ", ".join(str(path) for path in (tls.ca, tls.certificate, tls.key) if path is not None)
        raise ConnectFailed(
            f"The TLS files ({files}) cannot be used: {reason_of(error)}; check that they exist, are "
            "readable PEM, and that the key belongs to the certificate.",
            final=True,
        ) from error
    return context
