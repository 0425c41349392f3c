"""Certificates that exist to end the sessions of a revoked one.

A broker looks at a certificate once, when a client connects: one that is revoked while connected stays connected. What
ends its session, without a plugin and without touching anybody else's, is the protocol's own rule that of two clients
with one client id the older goes. The broker takes the client id from the certificate, so whoever holds a certificate
of that name can end the session: the authority makes one, valid for an hour, its key never on a disk in the clear.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["TAKEOVER_LIFETIME", "Credential", "Revocation"]

TAKEOVER_LIFETIME: Final = timedelta(hours=1)  # the broker's clock may be ahead by nearly that


@dataclass(frozen=True, slots=True)
class Credential:
    """A certificate and its key, in memory.

    Attributes:
        name: Whom it names.
        certificate: In PEM.
        key: Private.
    """

    name: str
    certificate: bytes
    key: ec.EllipticCurvePrivateKey = field(repr=False)


@dataclass(frozen=True, slots=True)
class Revocation:
    """What it takes to make a revocation felt.

    Attributes:
        serials: The certificates revoked, in hexadecimal.
        revocation_list: The new list, in PEM.
        authority: The authority's certificate, in PEM.
        canary: A certificate that this list revokes: a broker that refuses it goes by this list or a later one.
        kickers: For every revoked client a certificate that is *not* revoked.
    """

    serials: tuple[str, ...]
    revocation_list: bytes
    authority: bytes
    canary: Credential
    kickers: Mapping[str, Credential]
