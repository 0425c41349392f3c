"""How a broker and its clients prove who they are."""

from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict

__all__ = ["CIPHERS_TLS12", "CIPHERS_TLS13", "Tls"]

# Ephemeral keys and authenticated encryption only. The fleet's keys are on P-256, so no RSA suite can ever be used.
CIPHERS_TLS12: Final = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
)
# ChaCha20 counts for small devices, which often lack AES instructions; the client's order decides.
CIPHERS_TLS13: Final = ("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_256_GCM_SHA384")


def _plain(path: Path) -> Path:
    if not str(path).isprintable() or '"' in str(path):
        raise ValueError(f"{str(path)!r} is not a path that a configuration file can hold")
    return path


File = Annotated[Path, AfterValidator(_plain)]


class Tls(BaseModel):
    """The PEM files of a TLS listener. Relative paths lie beside the configuration.

    Every client must show a certificate, and its common name is its user name and its client id.

    Attributes:
        ca: The fleet's own certificate authority, alone: any authority in this file can mint identities.
        certificate: The broker's certificate.
        key: Its private key.
        crl: What the authority has revoked. Read at start and at SIGHUP.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca: File = Path("ca.pem")
    certificate: File = Path("broker.pem")
    key: File = Path("broker.key")
    crl: File = Path("crl.pem")
