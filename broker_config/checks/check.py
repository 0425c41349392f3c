"""Check of a folder of rendered broker files: each promise is tried out."""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker_config.broker import LARGEST_PACKET, Broker, BrokerError, BrokerFilesError, Tls, read_description
from broker_config.checks.access import Prober, topics_to_try
from broker_config.checks.trial import BrokerTrial, begin_trial, connect_all, refuses_old_tls
from broker_config.files import DESCRIPTION_FILE
from broker_config.mosquitto import ACCESS_FILE, CONF_FILE
from broker_config.processes import INSPECTOR, find_mosquitto
from fleet_common.checks import Check, Checklist, NotApplicable
from fleet_common.mqtt.link import Message
from fleet_common.mqtt.paho_link import PahoLink
from schemas.topics import Topic, build, wildcard

SOON: Final = timedelta(days=30)

T = TypeVar("T")


def check_certificates(tls: Tls, home: Path, *, now: datetime) -> str:
    """Check the files of a listener; relative paths are relative to `home`."""
    paths = [home / path for path in (tls.ca, tls.certificate, tls.key, tls.crl)]
    missing = [str(path) for path in paths if not path.exists()]
    if len(missing) == len(paths):
        raise NotApplicable(f"They are not on this machine ({home}); the trial created its own.")
    if missing:
        raise BrokerFilesError(f"{', '.join(missing)} is missing: put it there, or correct the paths.")
    return _valid_together(*paths, now=now)


def _load(path: Path, what: str, load: Callable[[bytes], T]) -> T:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise BrokerFilesError(f"{path} cannot be read: {error.strerror}; check who may read it.") from error
    except (ValueError, TypeError) as error:
        raise BrokerFilesError(f"{path} is no {what} in PEM: put the right file there.") from error


def _valid_together(ca: Path, certificate: Path, key: Path, crl: Path, *, now: datetime) -> str:
    own = _load(certificate, "certificate", x509.load_pem_x509_certificate)
    private = _load(key, "unencrypted private key", lambda pem: serialization.load_pem_private_key(pem, None))
    if private.public_key() != own.public_key():
        raise BrokerFilesError(
            f"The key {key} does not belong to the certificate {certificate}: put the right one there."
        )
    authority = _load(ca, "certificate", x509.load_pem_x509_certificate)
    revoked = _load(crl, "revocation list", x509.load_pem_x509_crl)
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise BrokerFilesError(f"{certificate} was not signed by {ca}: clients with that file refuse it.") from error
    signer = authority.public_key()
    if not isinstance(signer, ec.EllipticCurvePublicKey):
        raise BrokerFilesError(f"{ca} has no elliptic-curve key: the listener's ciphers need one.")
    if not revoked.is_signature_valid(signer):
        raise BrokerFilesError(f"{crl} was not signed by {ca}: the broker would refuse every client.")
    begins = {ca: authority.not_valid_before_utc, certificate: own.not_valid_before_utc}
    ends = {ca: authority.not_valid_after_utc, certificate: own.not_valid_after_utc}
    return _lifetimes(begins, ends | {crl: revoked.next_update_utc or now + SOON}, now)


def _lifetimes(begins: dict[Path, datetime], ends: dict[Path, datetime], now: datetime) -> str:
    for path, begin in begins.items():
        if now < begin:
            raise BrokerFilesError(f"{path} is valid from {begin:%Y-%m-%d %H:%M} on: set the clock, or renew it.")
    for path, end in ends.items():
        if end <= now:
            raise BrokerFilesError(f"{path} ran out on {end:%Y-%m-%d}: renew it, or the broker refuses all clients.")
    path, end = min(ends.items(), key=lambda item: item[1])
    return f"They go together; the first to end is {path}, on {end:%Y-%m-%d}."


DEVICES: Final = ("device-a", "device-b")
ROUND_TRIPS: Final = 20
# Without TCP_NODELAY on either side it is 40 and more.
MOST_MS: Final = 20.0
ANSWER_S: Final = 2.0
FIRST_S: Final = 0.2
FIRST_TRIES: Final = 10
SHOWN: Final = 3


def check_directory(directory: Path, on_check: Callable[[Check], None] = lambda _check: None) -> list[Check]:
    """Check a folder of rendered files; raise BrokerError if that is not possible."""
    broker = read_description(directory / DESCRIPTION_FILE, production=False)
    conf, access = (_read_text(directory / name) for name in (CONF_FILE, ACCESS_FILE))
    find_mosquitto()
    checks = Checklist(on_check)
    checks.run("modes", lambda: _modes(directory), needs=())
    if (tls := broker.tls) is not None:
        checks.run("certificates", lambda: check_certificates(tls, directory, now=datetime.now(UTC)), needs=())
    with tempfile.TemporaryDirectory(prefix="fleet-trial-") as folder, ExitStack() as stack:
        trials: list[BrokerTrial] = []

        def begin() -> str:
            trials.append(stack.enter_context(begin_trial(conf, access, broker, Path(folder))))
            return "mosquitto starts on the files."

        checks.run("syntax", begin, needs=())
        for trial in trials:
            _check_trial(checks, trial, broker)
    return checks.done


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BrokerError(f"There is no {path}: write the files with `fleet broker render`.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BrokerError(f"{path} cannot be read: {error}.") from error


def _modes(directory: Path) -> str:
    paths = [directory / CONF_FILE, directory / ACCESS_FILE]
    loose = [str(path) for path in paths if path.stat().st_mode & 0o007]
    if loose:
        raise BrokerFilesError(f"Other users may read {', '.join(loose)}: restrict it (chmod o-rwx).")
    return "No file is accessible to other users."


def _check_trial(checks: Checklist, trial: BrokerTrial, broker: Broker) -> None:
    users = (*DEVICES, *broker.edges, *broker.monitors, *(broker.devices or ()), *broker.banned)
    users = (*users, *filter(None, (broker.janitor, broker.home_assistant)))
    links: dict[str, PahoLink] = {}

    def connect() -> str:
        links.update(connect_all(trial, users))
        return f"{len(links)} clients are accepted, each with its own name."

    checks.run("clients", connect, needs=())
    if not links:
        return
    inspector = links.pop(INSPECTOR)
    checks.run("access", lambda: _access(Prober(broker, links, inspector, topics_to_try(broker, users))), needs=())
    if trial.authority is not None:
        checks.run("strangers", lambda: _strangers(trial), needs=())
        checks.run("protocol", lambda: _protocol(trial), needs=())
        checks.run("client id", lambda: _theft(trial, links[DEVICES[1]]), needs=())
    checks.run("packets", lambda: _packet_limit(trial, broker), needs=())
    device = broker.devices[0] if broker.devices else DEVICES[0]
    if broker.edges:
        edge = broker.edges[0]
        checks.run("round trip", lambda: _round_trip(broker, (device, links[device]), (edge, links[edge])), needs=())


def _access(prober: Prober) -> str:
    found = [*islice(prober.deviations(), SHOWN + 1)]
    if not found:
        return "Every client may do exactly what the table says."
    listed = "; ".join(str(deviation) for deviation in found[:SHOWN])
    more = ", and more" if len(found) > SHOWN else ""
    raise BrokerError(f"{listed}{more}: render {ACCESS_FILE} again.")


def _strangers(trial: BrokerTrial) -> str:
    let_in = [what for what, files in trial.bad_identities().items() if trial.refusal(files) is None]
    if let_in:
        raise BrokerError(f"A client is accepted with a certificate {', '.join(let_in)}.")
    return "No client is accepted with a certificate that is missing, foreign, revoked or expired."


def _protocol(trial: BrokerTrial) -> str:
    refused = [refuses_old_tls(trial.broker.host, port) for port in trial.ports]
    if None in refused:
        raise NotApplicable("This machine's TLS library offers no old version.")
    if all(refused):
        return "The broker refuses TLS 1.1 and older."
    raise BrokerError("The broker speaks TLS 1.1: set tls_version tlsv1.2 for each listener.")


def _theft(trial: BrokerTrial, victim: PahoLink) -> str:
    losses = victim.counters.losses
    trial.connect("thief", client_id=DEVICES[1])
    if victim.counters.losses == losses and trial.broker.await_log("as thief", patience_s=1.0):
        return "A client has the name in its certificate, whatever it claims."
    raise BrokerError("A client takes over the session of another by its client id; set use_username_as_clientid.")


def _packet_limit(trial: BrokerTrial, broker: Broker) -> str:
    limit = trial.connect("trial-packets", packet_bytes=LARGEST_PACKET).max_packet_bytes
    if limit == broker.max_packet_bytes:
        return f"The broker announces its limit of {limit} bytes."
    raise BrokerError(f"The broker takes packets of {limit} bytes, not {broker.max_packet_bytes}: set max_packet_size.")


def _round_trip(broker: Broker, drafting: tuple[str, PahoLink], verifying: tuple[str, PahoLink]) -> str:
    (device_name, device), (edge_name, edge) = drafting, verifying
    draft = build(Topic.DRAFT, fleet=broker.fleet, device=device_name, edge=edge_name)
    verdict = build(Topic.VERDICT, fleet=broker.fleet, device=device_name)
    arrived = Event()

    def answer(message: Message) -> None:
        edge.publish(verdict, message.payload, alias=True)

    edge.subscribe(wildcard(Topic.DRAFT, fleet=broker.fleet, edge=edge_name), answer)
    device.subscribe(verdict, lambda _: arrived.set())
    # The subscriptions take effect when the broker has answered them: until then a draft may not arrive.
    first = (_timed(arrived, lambda: device.publish(draft, b"echo", alias=True), FIRST_S) for _ in range(FIRST_TRIES))
    answered = any(taken_ms is not None for taken_ms in first)
    times_ms = []
    for _ in range(ROUND_TRIPS):
        taken_ms = _timed(arrived, lambda: device.publish(draft, b"echo", alias=True)) if answered else None
        if taken_ms is None:
            raise BrokerError(f"A draft of {device_name} gets no answer of {edge_name}: see the access check.")
        times_ms.append(taken_ms)
    median = statistics.median(times_ms)
    if median > MOST_MS:
        raise BrokerError(f"A draft and its answer take {median:.0f} ms at QoS 1: set_tcp_nodelay must be true.")
    return f"A draft and its answer take {median:.1f} ms at QoS 1."


def _timed(arrived: Event, send: Callable[[], None], patience_s: float = ANSWER_S) -> float | None:
    """Return the milliseconds from sending to arrival, None without an arrival."""
    arrived.clear()
    began = time.perf_counter()
    send()
    return 1000 * (time.perf_counter() - began) if arrived.wait(patience_s) else None
