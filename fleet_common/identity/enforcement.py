"""Enforce a change of access at the broker, and prove it.

First the list, then the sessions: a client that is disconnected before the list is in force reconnects at once. A
certificate that only the new list revokes proves that the list is in force. Then a takeover ends the session of each
name, and the broker's answer proves that no older session is left.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fleet_common.identity.certificates import AccessAction, AccessChange, Credential, key_pem
from fleet_common.identity.files import PUBLIC, SECRET, CutOffFailed, read_bounded, write_atomically

ALERT_S = 1.0  # TLS 1.3 lets a client finish before the server has judged its certificate
KEEPALIVE_S = 10
CONNACK, SUCCESS = 0x20, 0
_REVOKED = "CERTIFICATE_REVOKED"


class CertificateAnswer(Enum):
    ACCEPTED = auto()
    REVOKED = auto()


@dataclass(frozen=True, slots=True)
class TlsEndpoint:
    """Address of a broker's TLS listener; `host` is as in its certificate."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def probe_certificate(
    door: TlsEndpoint, credential: Credential, *, authority: bytes, timeout_s: float, await_alert: bool = True
) -> CertificateAnswer:
    """Connect with a credential and disconnect at once; OSError means that the broker gave no answer.

    `PahoLink` is built to get through; this function exists to learn exactly how the broker answers. The broker ends an
    older session of the same name before it answers. With `await_alert`, wait for a TLS alert before sending: a packet
    sent too early may make the network lose the alert.
    """
    try:
        with _connected(door, credential, authority, timeout_s) as stream:
            if await_alert:
                hear_out(stream, min(ALERT_S, timeout_s))
            stream.settimeout(timeout_s)
            stream.sendall(connect_packet(credential.name))
            answer = stream.recv(4)
            if len(answer) < 4 or answer[0] != CONNACK or answer[3] != SUCCESS:  # noqa: PLR2004 - of a CONNACK
                raise ConnectionError("the broker accepted the certificate but not the client")
            with contextlib.suppress(OSError):
                stream.sendall(b"\xe0\x00")  # DISCONNECT
            return CertificateAnswer.ACCEPTED
    except ssl.SSLError as error:
        if _REVOKED in str(error.reason):
            return CertificateAnswer.REVOKED
        raise


@contextlib.contextmanager
def _connected(
    door: TlsEndpoint, credential: Credential, authority: bytes, timeout_s: float
) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cadata=authority.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # The ssl module reads files only: the key is encrypted with a passphrase that never leaves this function.
    passphrase = secrets.token_bytes(32).hex().encode()
    with tempfile.TemporaryDirectory(prefix="fleet-takeover-") as folder:
        pair = Path(folder) / "pair.pem"
        write_atomically(pair, credential.certificate + key_pem(credential.key, passphrase), mode=SECRET)
        context.load_cert_chain(pair, password=passphrase)
    with (
        socket.create_connection((door.host, door.port), timeout=timeout_s) as sock,
        context.wrap_socket(sock, server_hostname=door.host) as stream,
    ):
        yield stream


def hear_out(stream: ssl.SSLSocket, seconds: float) -> None:
    """Wait for a TLS alert, which raises ssl.SSLError, or the end, which raises ConnectionError."""
    stream.settimeout(seconds)
    with contextlib.suppress(TimeoutError):
        if not stream.recv(1):
            raise ConnectionError("the broker closed the connection")


def connect_packet(client_id: str) -> bytes:
    """Return an MQTT 5 CONNECT with a clean start and nothing else (section 3.1)."""
    name = client_id.encode()
    body = b"\x00\x04MQTT\x05\x02" + struct.pack("!HB", KEEPALIVE_S, 0) + struct.pack("!H", len(name)) + name
    return bytes([0x10, len(body)]) + body


PROGRAM: Final = "mosquitto"
RELOAD_S: Final = 10.0
INSTALLER_S: Final = 30.0

_PROC: Final = Path("/proc")
_UNIT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._-]{0,250}")


class BrokerAccess(BaseModel):
    """How to reach and reload the broker; stored next to the authority, so that `revoke` needs only a name.

    Attributes:
        host: Address that clients connect to, as in the broker's certificate; without it no broker is notified.
        crl: File that the broker reads the revocation list from; by default the authority's own file.
        pid_file: PID file of a broker on this machine, which is reloaded by a signal.
        unit: Or the systemd unit to reload.
        installer: Or a program for a broker on another machine: it gets the list's path, copies that there and reloads.
            Without any of these, the operator copies the list and reloads the broker.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    port: Annotated[int, Field(ge=1, le=65_535)] = 8883
    crl: Path | None = None
    pid_file: Path | None = None
    unit: str | None = None
    installer: Path | None = None

    @field_validator("crl", "pid_file", "installer")
    @classmethod
    def _from_anywhere(cls, path: Path | None) -> Path | None:
        return None if path is None else path.absolute()  # the next command may be said in another folder

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(each is not None for each in (self.pid_file, self.unit, self.installer)) > 1:
            raise ValueError("give a pid file, a unit or an installer, not both")
        if self.unit is not None and not _UNIT.fullmatch(self.unit):
            raise ValueError("that cannot be the name of a unit")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the settings; a missing file means that no broker is known."""
        if not path.exists():
            return cls()
        try:
            return cls.model_validate_json(read_bounded(path, "The file"))
        except ValidationError as error:
            raise CutOffFailed(
                f"The file {path} is damaged: remove it, and give `fleet broker revoke` its --host and the rest again."
            ) from error

    def save(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json(indent=2).encode() + b"\n", mode=PUBLIC)

    def install(self, revocation_list: bytes) -> None:
        """Copy a revocation list to where the broker reads it; raise IdentityError."""
        if self.crl is not None:
            write_atomically(self.crl, revocation_list, mode=PUBLIC)
        if self.installer is not None:
            with tempfile.NamedTemporaryFile(prefix="fleet-crl-", suffix=".pem") as file:
                file.write(revocation_list)
                file.flush()
                _run([str(self.installer), file.name], INSTALLER_S, shown=str(self.installer))

    def reload(self) -> bool:
        """Reload the broker; return whether a way to do so is configured. Raise CutOffFailed."""
        if self.pid_file is not None:
            _signal(self.pid_file)
        elif self.unit is not None:
            _reload_unit(self.unit)
        else:
            return self.installer is not None  # which has reloaded it
        return True


def _signal(pid_file: Path) -> None:
    try:
        pid = int(pid_file.read_text(encoding="ascii").strip())
        # A stale PID file may name another process by now, and the signal would end it.
        ours = not _PROC.is_dir() or (_PROC / str(pid) / "comm").read_text(encoding="utf-8").strip() == PROGRAM
        found = pid > 1 and ours
        if found:
            os.kill(pid, signal.SIGHUP)
    except (ProcessLookupError, FileNotFoundError, ValueError):
        found = False
    except OSError as error:
        raise CutOffFailed(
            f"The broker of {pid_file} cannot be notified: {error.strerror}; do it as root or as the broker's own user."
        ) from error
    if not found:
        raise CutOffFailed(f"No {PROGRAM} runs by the pid file {pid_file}: start it, or correct --pid-file.")


def _reload_unit(unit: str) -> None:
    program = shutil.which("systemctl")
    if program is None:
        raise CutOffFailed(f"There is no systemctl here to reload {unit}: use --pid-file.")
    _run([program, "reload", "--", unit], RELOAD_S, shown=f"systemctl reload {unit}")


def _run(command: list[str], timeout_s: float, *, shown: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise CutOffFailed(f"`{shown}` does not end: check the broker.") from error
    except OSError as error:
        raise CutOffFailed(f"`{shown}` cannot be run: {error.strerror}.") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise CutOffFailed(f"`{shown}` failed ({said or done.returncode}): check the broker.")


CUT_OFF_S: Final = 10.0
PAUSE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class AccessProof:
    """Proof that a change is in force: the names whose sessions have ended, and the seconds that it took."""

    ended: tuple[str, ...]
    in_force_s: float
    done_s: float

    def sentence(self, action: AccessAction) -> str:
        match action:
            case AccessAction.DISCONNECT:
                return f"The broker has ended the session ({self.done_s:.1f} s); a new one may begin."
            case AccessAction.UNSUSPEND:
                return f"The broker uses the list without the suspension ({self.in_force_s:.1f} s)."
            case _:
                refused = f"The broker refuses the certificates ({self.in_force_s:.1f} s)"
                return f"{refused}, and no session is left ({self.done_s:.1f} s)." if self.ended else f"{refused}."


def enforce_change(change: AccessChange, access: BrokerAccess, *, timeout_s: float = CUT_OFF_S) -> AccessProof | None:
    """Install the list, reload the broker and end the sessions; return None if no broker is known.

    Raise CutOffFailed if enforcement is not proven; repeating the action is safe.
    """
    notified = False
    if change.revocation_list is not None:
        access.install(change.revocation_list)
        notified = access.reload()
    if access.host is None:
        return None
    began = time.monotonic()
    insist = partial(_insist, TlsEndpoint(access.host, access.port), change.authority, began + timeout_s)
    if change.canary is not None:
        hint = "look at the broker's log" if notified else "copy the list to the broker, reload it, and repeat this"
        insist(change.canary, CertificateAnswer.REVOKED, f"does not use the new list: {hint}")
    in_force_s = time.monotonic() - began
    for kicker in change.kickers.values():
        otherwise = f"does not let us end the session of {kicker.name!r}: look at its log, or restart it"
        insist(kicker, CertificateAnswer.ACCEPTED, otherwise)
    return AccessProof(tuple(change.kickers), in_force_s, time.monotonic() - began)


def _insist(
    door: TlsEndpoint,
    authority: bytes,
    deadline: float,
    credential: Credential,
    wanted: CertificateAnswer,
    otherwise: str,
) -> None:
    """Present a certificate until the broker answers as expected."""
    trouble = ""
    # The reason of a refusal may arrive late; an acceptance needs no such wait.
    patient = wanted is CertificateAnswer.REVOKED
    while (left_s := deadline - time.monotonic()) > 0:
        try:
            answer = probe_certificate(door, credential, authority=authority, timeout_s=left_s, await_alert=patient)
        except ssl.SSLCertVerificationError as error:
            raise CutOffFailed(
                f"What answers at {door} is not the fleet's broker ({error.verify_message}): correct --host."
            ) from error
        except OSError as error:
            trouble = f" ({getattr(error, 'reason', None) or error.strerror or error})"
        else:
            if answer is wanted:
                return
            trouble = ""
        time.sleep(PAUSE_S)
    raise CutOffFailed(f"The broker at {door}{trouble} {otherwise}.")
