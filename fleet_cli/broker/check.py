"""`fleet broker check`: proves rendered files on a throw-away broker of their own."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Annotated, Final

import typer

from broker_config.broker import LARGEST_PACKET, Broker, BrokerFailed, read_description
from broker_config.files import DESCRIPTION_FILE
from broker_config.mosquitto import ACCESS_FILE, CONF_FILE
from fleet_cli.broker.certificate_check import check_certificates
from fleet_cli.broker.findings import Finding, Result
from fleet_cli.broker.handshake import refuses_old_tls
from fleet_cli.broker.probe import Prober, topics_to_try
from fleet_cli.broker.trial_session import Trial, begin_trial, connect_all
from fleet_cli.errors import CommandError, ExitCode
from fleet_cli.tables import cell, print_json
from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.link import Message
from fleet_common.mqtt.paho_link import PahoLink
from schemas.topics import Topic, build, wildcard

DEVICES: Final = ("device-a", "device-b")
ROUND_TRIPS: Final = 20
# Without TCP_NODELAY on either side it is 40 and more.
MOST_MS: Final = 20.0
ANSWER_S: Final = 2.0
FIRST_S: Final = 0.2
FIRST_TRIES: Final = 10
SHOWN: Final = 3


def register(app: typer.Typer) -> None:
    app.command("check")(check_command)


def check_command(
    directory: Annotated[Path, typer.Argument(help="What `fleet broker render` or `init` has written.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Start a broker on the files, with certificates of its own, and prove what they promise; exit code 1 if not."""
    found = []
    for finding in check_directory(directory):
        found.append(finding)
        if not as_json:
            typer.echo(f"{finding.result:8}{finding.check:14}{cell(finding.sentence)}")
    if as_json:
        print_json({"checks": [asdict(finding) for finding in found]})
    if any(finding.result is Result.FAILED for finding in found):
        raise typer.Exit(ExitCode.CHECK_FAILED)


def check_directory(directory: Path) -> Iterator[Finding]:
    """Yield the findings on a folder of rendered files.

    Raises:
        CommandError: It has no such files.
        BrokerError: They cannot be read, or mosquitto is not installed.
    """
    broker = read_description(directory / DESCRIPTION_FILE, production=False)
    conf, access = (_read(directory / name) for name in (CONF_FILE, ACCESS_FILE))
    yield _modes(directory)
    if broker.tls is not None:
        yield from check_certificates(broker.tls, directory, now=datetime.now(UTC))
    with tempfile.TemporaryDirectory(prefix="fleet-trial-") as folder:
        try:
            with begin_trial(conf, access, broker, Path(folder)) as trial:
                yield Finding("syntax", Result.OK, "mosquitto starts on the files.")
                yield from _on_trial(trial, broker)
        except LinkError as error:
            yield Finding("clients", Result.FAILED, f"{error}")
        except BrokerFailed as error:
            yield Finding("syntax", Result.FAILED, f"{error}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CommandError(f"There is no {path}: write the files with `fleet broker render`.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} cannot be read: {error}.") from error


def _modes(directory: Path) -> Finding:
    paths = [directory / CONF_FILE, directory / ACCESS_FILE]
    loose = [str(path) for path in paths if path.stat().st_mode & 0o007]
    if loose:
        sentence = f"Others may read {', '.join(loose)}: take that away (chmod o-rwx)."
        return Finding("modes", Result.FAILED, sentence)
    return Finding("modes", Result.OK, "No file is open to others.")


def _on_trial(trial: Trial, broker: Broker) -> Iterator[Finding]:
    users = (*DEVICES, *broker.edges, *broker.monitors, *(broker.devices or ()), *broker.banned)
    users = (*users, broker.janitor) if broker.janitor is not None else users
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


def _access(prober: Prober) -> Finding:
    found = [*islice(prober.deviations(), SHOWN + 1)]
    if not found:
        return Finding("access", Result.OK, "Everyone gets through what the table says, and nothing else.")
    listed = "; ".join(str(deviation) for deviation in found[:SHOWN])
    more = ", and more" if len(found) > SHOWN else ""
    return Finding("access", Result.FAILED, f"{listed}{more}: render {ACCESS_FILE} anew.")


def _strangers(trial: Trial) -> Finding:
    let_in = [what for what, files in trial.bad_identities().items() if trial.refusal(files) is None]
    if let_in:
        return Finding("strangers", Result.FAILED, f"A client is let in with a certificate {', '.join(let_in)}.")
    sentence = "Nobody is let in with a certificate that is missing, foreign, revoked or outside its time."
    return Finding("strangers", Result.OK, sentence)


def _protocol(trial: Trial) -> Finding:
    assert trial.authority is not None
    refused = [refuses_old_tls(trial.broker.host, port) for port in trial.ports]
    if None in refused:
        return Finding("protocol", Result.SKIPPED, "This machine's TLS cannot even ask for an old version.")
    if all(refused):
        return Finding("protocol", Result.OK, "The broker refuses TLS 1.1 and older.")
    return Finding("protocol", Result.FAILED, "The broker speaks TLS 1.1: set tls_version tlsv1.2 for each listener.")


def _theft(trial: Trial, victim: PahoLink) -> Finding:
    losses = victim.counters.losses
    trial.connect("thief", client_id=DEVICES[1])
    if victim.counters.losses == losses and trial.broker.await_log("as thief", patience_s=1.0):
        return Finding("client id", Result.OK, "A client goes by the name in its certificate, whatever it claims.")
    return Finding("client id", Result.FAILED, "A client takes over the session of another by its client id.")


def _packet_limit(trial: Trial, broker: Broker) -> Finding:
    limit = trial.connect("trial-packets", packet_bytes=LARGEST_PACKET).max_packet_bytes
    if limit == broker.max_packet_bytes:
        return Finding("packets", Result.OK, f"The broker announces its limit of {limit} bytes.")
    sentence = f"The broker takes packets of {limit} bytes, not {broker.max_packet_bytes}: set max_packet_size."
    return Finding("packets", Result.FAILED, sentence)


def _round_trip(broker: Broker, drafting: tuple[str, PahoLink], verifying: tuple[str, PahoLink]) -> Finding:
    (device_name, device), (edge_name, edge) = drafting, verifying
    draft = build(Topic.DRAFT, fleet=broker.fleet, device=device_name, edge=edge_name)
    verdict = build(Topic.VERDICT, fleet=broker.fleet, device=device_name)
    arrived = Event()

    def answer(message: Message) -> None:
        edge.publish(verdict, message.payload, alias=True)

    edge.subscribe(wildcard(Topic.DRAFT, fleet=broker.fleet, edge=edge_name), answer)
    device.subscribe(verdict, lambda _: arrived.set())
    # The subscriptions take effect when the broker has answered them: until then a draft may find nobody.
    first = (_timed(arrived, lambda: device.publish(draft, b"echo", alias=True), FIRST_S) for _ in range(FIRST_TRIES))
    answered = any(taken_ms is not None for taken_ms in first)
    times_ms = []
    for _ in range(ROUND_TRIPS):
        taken_ms = _timed(arrived, lambda: device.publish(draft, b"echo", alias=True)) if answered else None
        if taken_ms is None:
            sentence = f"A draft of {device_name} gets no answer of {edge_name}: see what the check of access says."
            return Finding("round trip", Result.FAILED, sentence)
        times_ms.append(taken_ms)
    median = statistics.median(times_ms)
    if median <= MOST_MS:
        return Finding("round trip", Result.OK, f"A draft and its answer take {median:.1f} ms at QoS 1.")
    sentence = f"A draft and its answer take {median:.0f} ms at QoS 1: set_tcp_nodelay must be true."
    return Finding("round trip", Result.FAILED, sentence)


def _timed(arrived: Event, send: Callable[[], None], patience_s: float = ANSWER_S) -> float | None:
    """Return the milliseconds from sending to arrival; None if nothing arrives."""
    arrived.clear()
    began = time.perf_counter()
    send()
    return 1000 * (time.perf_counter() - began) if arrived.wait(patience_s) else None
