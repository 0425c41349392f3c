"""Check of a folder of rendered broker files: each promise is tried out."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker_config.broker import LARGEST_PACKET, Broker, BrokerError, BrokerFailed, Tls, read_description
from broker_config.checks.access import Prober, topics_to_try
from broker_config.checks.trial import BrokerTrial, begin_trial, connect_all, refuses_old_tls
from broker_config.files import DESCRIPTION_FILE
from broker_config.mosquitto import ACCESS_FILE, CONF_FILE
from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.link import Message
from fleet_common.mqtt.paho_link import PahoLink
from schemas.topics import Topic, build, wildcard


class CheckResult(StrEnum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class BrokerFinding:
    check: str
    result: CheckResult
    sentence: str  # what was found and, where it failed, what to do


def _ok(check: str, sentence: str) -> BrokerFinding:
    return BrokerFinding(check, CheckResult.OK, sentence)


def _failed(check: str, sentence: str) -> BrokerFinding:
    return BrokerFinding(check, CheckResult.FAILED, sentence)


def _skipped(check: str, sentence: str) -> BrokerFinding:
    return BrokerFinding(check, CheckResult.SKIPPED, sentence)


SOON: Final = timedelta(days=30)
CHECK: Final = "certificates"

T = TypeVar("T")


class _Unusable(Exception):  # noqa: N818
    """A file that the broker cannot use. The message is the finding."""


def check_certificates(tls: Tls, home: Path, *, now: datetime) -> BrokerFinding:
    """Return the finding on the files of a listener; relative paths are relative to `home`."""
    paths = [home / path for path in (tls.ca, tls.certificate, tls.key, tls.crl)]
    missing = [str(path) for path in paths if not path.exists()]
    if len(missing) == len(paths):
        return _skipped(CHECK, f"They are not on this machine ({home}); the trial created its own.")
    if missing:
        return _failed(CHECK, f"{', '.join(missing)} is missing: put it there, or correct the paths.")
    try:
        return _ok(CHECK, _valid_together(*paths, now=now))
    except _Unusable as error:
        return _failed(CHECK, str(error))


def _load(path: Path, what: str, load: Callable[[bytes], T]) -> T:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise _Unusable(f"{path} cannot be read: {error.strerror}; check who may read it.") from error
    except (ValueError, TypeError) as error:
        raise _Unusable(f"{path} is no {what} in PEM: put the right file there.") from error


def _valid_together(ca: Path, certificate: Path, key: Path, crl: Path, *, now: datetime) -> str:
    own = _load(certificate, "certificate", x509.load_pem_x509_certificate)
    private = _load(key, "unencrypted private key", lambda pem: serialization.load_pem_private_key(pem, None))
    if private.public_key() != own.public_key():
        raise _Unusable(f"The key {key} does not belong to the certificate {certificate}: put the right one there.")
    authority = _load(ca, "certificate", x509.load_pem_x509_certificate)
    revoked = _load(crl, "revocation list", x509.load_pem_x509_crl)
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise _Unusable(f"{certificate} was not signed by {ca}: clients that trust that file refuse it.") from error
    signer = authority.public_key()
    if not isinstance(signer, ec.EllipticCurvePublicKey):
        raise _Unusable(f"{ca} has no elliptic-curve key: the listener's ciphers need one.")
    if not revoked.is_signature_valid(signer):
        raise _Unusable(f"{crl} was not signed by {ca}: the broker would refuse every client.")
    begins = {ca: authority.not_valid_before_utc, certificate: own.not_valid_before_utc}
    ends = {ca: authority.not_valid_after_utc, certificate: own.not_valid_after_utc}
    return _lifetimes(begins, ends | {crl: revoked.next_update_utc or now + SOON}, now)


def _lifetimes(begins: dict[Path, datetime], ends: dict[Path, datetime], now: datetime) -> str:
    for path, begin in begins.items():
        if now < begin:
            raise _Unusable(f"{path} is valid from {begin:%Y-%m-%d %H:%M} on: set this machine's clock, or renew it.")
    for path, end in ends.items():
        if end <= now:
            raise _Unusable(f"{path} ran out on {end:%Y-%m-%d}: renew it, or the broker refuses all clients.")
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


def check_directory(directory: Path) -> Iterator[BrokerFinding]:
    """Yield the findings on a folder of rendered files; raise BrokerError if it cannot be checked."""
    broker = read_description(directory / DESCRIPTION_FILE, production=False)
    conf, access = (_read_text(directory / name) for name in (CONF_FILE, ACCESS_FILE))
    yield _modes(directory)
    if broker.tls is not None:
        yield check_certificates(broker.tls, directory, now=datetime.now(UTC))
    with tempfile.TemporaryDirectory(prefix="fleet-trial-") as folder:
        try:
            with begin_trial(conf, access, broker, Path(folder)) as trial:
                yield _ok("syntax", "mosquitto starts on the files.")
                yield from _on_trial(trial, broker)
        except LinkError as error:
            yield _failed("clients", f"{error}")
        except BrokerFailed as error:
            yield _failed("syntax", f"{error}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BrokerError(f"There is no {path}: write the files with `fleet broker render`.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BrokerError(f"{path} cannot be read: {error}.") from error


def _modes(directory: Path) -> BrokerFinding:
    paths = [directory / CONF_FILE, directory / ACCESS_FILE]
    loose = [str(path) for path in paths if path.stat().st_mode & 0o007]
    if loose:
        sentence = f"Other users may read {', '.join(loose)}: restrict it (chmod o-rwx)."
        return _failed("modes", sentence)
    return _ok("modes", "No file is accessible to other users.")


def _on_trial(trial: BrokerTrial, broker: Broker) -> Iterator[BrokerFinding]:
    users = (*DEVICES, *broker.edges, *broker.monitors, *(broker.devices or ()), *broker.banned)
    users = (*users, *filter(None, (broker.janitor, broker.home_assistant)))
    links, inspector = connect_all(trial, users)
    yield _access(Prober(broker, links, inspector, topics_to_try(broker, users)))
    if trial.authority is not None:
        yield _strangers(trial)
        yield _protocol(trial)
        yield _theft(trial, links[DEVICES[1]])
    yield _packet_limit(trial, broker)
    edge = broker.edges[0] if broker.edges else None
    device = broker.devices[0] if broker.devices else DEVICES[0]
    if edge is not None and device in links:
        yield _round_trip(broker, (device, links[device]), (edge, links[edge]))


def _access(prober: Prober) -> BrokerFinding:
    found = [*islice(prober.deviations(), SHOWN + 1)]
    if not found:
        return _ok("access", "Every client may do exactly what the table says.")
    listed = "; ".join(str(deviation) for deviation in found[:SHOWN])
    more = ", and more" if len(found) > SHOWN else ""
    return _failed("access", f"{listed}{more}: render {ACCESS_FILE} again.")


def _strangers(trial: BrokerTrial) -> BrokerFinding:
    let_in = [what for what, files in trial.bad_identities().items() if trial.refusal(files) is None]
    if let_in:
        return _failed("strangers", f"A client is accepted with a certificate {', '.join(let_in)}.")
    sentence = "No client is accepted with a certificate that is missing, foreign, revoked or expired."
    return _ok("strangers", sentence)


def _protocol(trial: BrokerTrial) -> BrokerFinding:
    assert trial.authority is not None
    refused = [refuses_old_tls(trial.broker.host, port) for port in trial.ports]
    if None in refused:
        return _skipped("protocol", "This machine's TLS library offers no old version.")
    if all(refused):
        return _ok("protocol", "The broker refuses TLS 1.1 and older.")
    return _failed("protocol", "The broker speaks TLS 1.1: set tls_version tlsv1.2 for each listener.")


def _theft(trial: BrokerTrial, victim: PahoLink) -> BrokerFinding:
    losses = victim.counters.losses
    trial.connect("thief", client_id=DEVICES[1])
    if victim.counters.losses == losses and trial.broker.await_log("as thief", patience_s=1.0):
        return _ok("client id", "A client has the name in its certificate, whatever it claims.")
    return _failed("client id", "A client takes over the session of another by its client id.")


def _packet_limit(trial: BrokerTrial, broker: Broker) -> BrokerFinding:
    limit = trial.connect("trial-packets", packet_bytes=LARGEST_PACKET).max_packet_bytes
    if limit == broker.max_packet_bytes:
        return _ok("packets", f"The broker announces its limit of {limit} bytes.")
    sentence = f"The broker takes packets of {limit} bytes, not {broker.max_packet_bytes}: set max_packet_size."
    return _failed("packets", sentence)


def _round_trip(broker: Broker, drafting: tuple[str, PahoLink], verifying: tuple[str, PahoLink]) -> BrokerFinding:
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
            sentence = f"A draft of {device_name} gets no answer of {edge_name}: see the result of the access check."
            return _failed("round trip", sentence)
        times_ms.append(taken_ms)
    median = statistics.median(times_ms)
    if median <= MOST_MS:
        return _ok("round trip", f"A draft and its answer take {median:.1f} ms at QoS 1.")
    sentence = f"A draft and its answer take {median:.0f} ms at QoS 1: set_tcp_nodelay must be true."
    return _failed("round trip", sentence)


def _timed(arrived: Event, send: Callable[[], None], patience_s: float = ANSWER_S) -> float | None:
    """Return the milliseconds from sending to arrival, None without an arrival."""
    arrived.clear()
    began = time.perf_counter()
    send()
    return 1000 * (time.perf_counter() - began) if arrived.wait(patience_s) else None
