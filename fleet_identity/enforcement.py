"""Enforces a revocation at the broker, and proves it.

First the list, then the sessions: whoever is thrown out before the list is in force comes straight back. That it is in
force is not assumed from a signal that was sent; it is shown by a certificate that only this list revokes. After that,
each revoked name's session is ended by a takeover, and the broker's answer to it proves that no older one is left.
"""

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fleet_identity.broker_access import BrokerAccess
from fleet_identity.certificates import Credential, Revocation
from fleet_identity.errors import CutOffFailed
from fleet_identity.tls_probe import CertificateAnswer, TlsEndpoint, probe_certificate

__all__ = ["RevocationProof", "enforce_revocation"]

CUT_OFF_S: Final = 10.0
PAUSE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class RevocationProof:
    """What was proven.

    Attributes:
        ended: Names whose sessions are over.
        in_force_s: Seconds until the broker went by the new list.
        done_s: Seconds until the last session was over.
    """

    ended: tuple[str, ...]
    in_force_s: float
    done_s: float


def enforce_revocation(
    revocation: Revocation,
    access: BrokerAccess,
    *,
    timeout_s: float = CUT_OFF_S,
    clock: Callable[[], float] = time.monotonic,
) -> RevocationProof | None:
    """Install the list, tell the broker, end the sessions; return None if no broker is known.

    Args:
        revocation: From `Authority.revoke`.
        access: How to reach the broker.
        timeout_s: Longest for all of it.
        clock: Monotonic seconds.

    Raises:
        CutOffFailed: It is not proven that the revoked are out; saying `fleet broker revoke` again is safe.
        IdentityError: The list cannot be written where the broker reads it.
    """
    access.install(revocation.revocation_list)
    told = access.reload()
    if access.host is None:
        return None
    attempt = _Attempt(TlsEndpoint(access.host, access.port), revocation.authority, clock, clock() + timeout_s)
    began = clock()
    hint = "look at the broker's log" if told else "bring the list to the broker, reload it, and say the command again"
    attempt.insist(revocation.canary, CertificateAnswer.REVOKED, otherwise=f"does not go by the new list: {hint}")
    in_force_s = clock() - began
    for kicker in revocation.kickers.values():
        attempt.insist(
            kicker,
            CertificateAnswer.ACCEPTED,
            otherwise=f"does not let us end the session of {kicker.name!r}: look at its log, or restart it",
        )
    return RevocationProof(tuple(revocation.kickers), in_force_s, clock() - began)


@dataclass(frozen=True, slots=True)
class _Attempt:
    door: TlsEndpoint
    authority: bytes
    clock: Callable[[], float]
    deadline: float

    def insist(self, credential: Credential, wanted: CertificateAnswer, *, otherwise: str) -> None:
        """Show a certificate until the broker answers as it should."""
        trouble = ""
        while (left_s := self.deadline - self.clock()) > 0:
            try:
                # Of a refusal we want the reason, which may come late; a yes needs no such wait.
                patient = wanted is CertificateAnswer.REVOKED
                answer = probe_certificate(
                    self.door, credential, authority=self.authority, timeout_s=left_s, await_alert=patient
                )
            except ssl.SSLCertVerificationError as error:
                raise CutOffFailed(
                    f"The list is written, but what answers at {self.door} is not the fleet's broker "
                    f"({error.verify_message}): correct --host."
                ) from error
            except OSError as error:
                trouble = f" ({getattr(error, 'reason', None) or error.strerror or error})"
            else:
                if answer is wanted:
                    return
                trouble = ""
            time.sleep(PAUSE_S)
        raise CutOffFailed(f"The list is written, but the broker at {self.door}{trouble} {otherwise}.")
