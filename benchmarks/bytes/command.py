"""Bytes benchmark: what each system sends for a token of text, each way: payload, MQTT packets, over TLS, over TCP/IP.

Real devices, a real edge but for its models, a real mosquitto, with certificates and without. What target and draft
model say is recorded once along some texts, and served again position by position: drafts are accepted as often as the
models' own, all systems write behind the same prompts with the same seeds, and no model is needed at run time. A relay
counts what the device's connection carries, from the first draft of a text to its last verdict: packets, heads,
acknowledgements. TLS is the same once more over TLS. TCP and IP are reckoned: 52 bytes for each segment that the kernel
has counted. Full distributions up are filling of the same size, two bytes a probability.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.bytes.counting import CountingDevice, Traffic
from benchmarks.bytes.goals import goals
from benchmarks.bytes.picture import draw, figure_class
from benchmarks.bytes.pieces import send_pieces
from benchmarks.bytes.rows import Row
from benchmarks.bytes.variants import LENGTHS, Variant, variants
from benchmarks.latency.systems import CO_LOCATED
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.laws import RecordedLaws, record_laws
from benchmarks.shared.metered_edge import MeteredVerifier
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.local import LocalBroker
from broker_config.processes.runner import MosquittoProcess
from dssd.downlink import Form
from fleet_cli.broker.init import make_local_broker
from fleet_cli.prompts import built_in, some
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.scripted import ScriptedVerifier
from fleet_link.errors import LinkError
from fleet_link.settings import BrokerSettings
from schemas.errors import FleetError
from tests.support.edge_thread import NO_QUOTAS, edge_thread

__all__ = ["main"]

FLEET: Final = "bytes"
EDGE: Final = "edge-1"
DEVICE: Final = "device-1"
HANDLE: Final = 40_000
"""Of the first session: three bytes in each message, as all but one in a hundred are."""

_WARM_UP_TOKENS: Final = 8
_TIMED: Final = ("edge-streaming", "ours-ahead", "ours-auto")
"""Systems whose messages depend on how long things take."""


@dataclass(frozen=True, slots=True)
class Place:
    """A broker, and who its clients are there.

    Attributes:
        device: Settings of the device.
        edge: Of the edge.
    """

    device: BrokerSettings
    edge: BrokerSettings


@dataclass(slots=True)
class Counted:
    """What a variant has cost without TLS and with it."""

    plain: Traffic = field(default_factory=Traffic)
    tls: Traffic = field(default_factory=Traffic)


def main(argv: Sequence[str] | None = None) -> int:
    """Count everything; return 0 if the goals are reached, 1 if not, 2 on errors."""
    arguments = _read(argv)
    rows: list[Row] = []
    try:
        if arguments.picture:
            figure_class()  # or hear now that it is not installed
        with ending_cleanly():
            for draft in arguments.drafts:
                rows += _measure(arguments, draft)
    except (FleetError, BrokerError, LinkError) as error:
        print(error, file=sys.stderr)
        return 2
    reached = goals(rows)
    for goal in reached:
        print(goal.sentence)
    if arguments.json:
        found = {
            **conditions("paho-mqtt", "cbor2", broker=True),
            "seeds": {"first": 0, "texts": arguments.texts},
            "step_ms": arguments.step_ms,
            "token_ms": arguments.token_ms,
            "goals": [goal.json() for goal in reached],
            "rows": [row.json() for row in rows],
        }
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(rows, arguments.picture)
    return 0 if all(goal.reached for goal in reached) else 1


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks bytes", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"), help="for the recording")
    parser.add_argument("--drafts", nargs="+", default=["Q4_0", "Q4_1"], help="quantizations (default: %(default)s)")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="N", help="of our drafts")
    parser.add_argument("--texts", type=int, default=6, help="of each system (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--round-trip", type=float, default=20.0, metavar="MS")
    parser.add_argument("--step-ms", type=float, default=30.0, help="of the edge, where times matter")
    parser.add_argument("--token-ms", type=float, default=10.0, help="of the draft model, likewise")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw bytes by system (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if arguments.texts < 1 or arguments.tokens < 2:
        parser.error("there must be a text of two tokens at least")
    return arguments


def _measure(arguments: argparse.Namespace, draft: str) -> list[Row]:
    laws = record_laws(
        arguments.models / "target-Q8_0.gguf",
        arguments.models / f"{draft}.gguf",
        some(built_in(), -(-arguments.texts // 6)),
        tokens=arguments.tokens,
        cache=arguments.models / "recordings",
        on_progress=lambda said: print(f"{said} …", file=sys.stderr, flush=True),
    )
    counted = {variant: Counted() for variant in variants(arguments.lengths)}
    with tempfile.TemporaryDirectory(prefix="fleet-bytes-") as folder, _places(Path(folder)) as places:
        for kind, place in places.items():
            for form in (Form.AUTO, Form.DENSE):
                _count(arguments, laws, place, form, kind, counted)
    rows = [Row.of(variant, draft, arguments, each.plain, each.tls) for variant, each in counted.items()]
    heads = ("payload", "MQTT packets", "over TLS", "and TCP/IP")
    print(f"{f'draft {draft}, bytes a token':<42}" + "".join(f"{head:>22}" for head in heads) + "  accepted")
    print(f"{'':<42}" + f"{'up':>12} {'down':>9}" * len(heads))
    for row in rows:
        print(row.line)
    sys.stdout.flush()
    return rows


def _count(
    arguments: argparse.Namespace,
    laws: RecordedLaws,
    place: Place,
    form: Form,
    kind: str,
    counted: dict[Variant, Counted],
) -> None:
    """Have all variants of a form write at a place."""
    chosen = laws.laws[: arguments.texts]
    if form is Form.AUTO:
        variant = next(variant for variant in counted if variant.system == CO_LOCATED)
        traffic = send_pieces(
            place.device,
            place.edge,
            fleet=FLEET,
            names=(DEVICE, EDGE),
            laws=[(chosen[0], 0), *((law, seed) for seed, law in enumerate(chosen))],
            length=variant.length or 0,
            tokens=arguments.tokens,
            handle=HANDLE,
        )
        setattr(counted[variant], kind, traffic)
    words = laws.words
    verifier = MeteredVerifier(ScriptedVerifier(laws, words, name="recorded"))
    settings = EdgeSettings(fleet=FLEET, edge=EDGE, broker=place.edge, form=form, quotas=NO_QUOTAS)
    with edge_thread(settings, verifier, first_handle=HANDLE):
        for variant, both in counted.items():
            if variant.local or variant.form is not form:
                continue
            timed = variant.system in _TIMED
            verifier.step_s = arguments.step_ms / 1e3 if timed else 0.0
            total: Traffic = getattr(both, kind)
            with CountingDevice(
                place.device,
                FLEET,
                DEVICE,
                variant,
                words,
                token_s=arguments.token_ms / 1e3 if timed else 0.0,
                round_trip_s=arguments.round_trip / 1e3 if timed else 0.0,
            ) as device:
                began = time.monotonic()
                device.write(chosen[0].text(arguments.texts, variant.mode), tokens=_WARM_UP_TOKENS)  # sets the aliases
                for seed, law in enumerate(chosen):
                    total.add(device.write(law.text(seed, variant.mode)))
            label = f"{variant.system} {variant.mode.value} {variant.length or ''}{' at most' * variant.stops}"
            print(f"  {kind:<5} {label:<32} {time.monotonic() - began:5.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _places(folder: Path) -> Iterator[dict[str, Place]]:
    make_local_broker(folder / "broker", fleet=FLEET, edges=[EDGE], devices=[DEVICE], port=1)
    with (
        MosquittoProcess(Broker(fleet=FLEET, edges=(EDGE,))) as plain,
        LocalBroker(folder / "broker", port=0) as local,
    ):

        def with_tls(name: str) -> BrokerSettings:
            files = local.identity(name)
            return BrokerSettings(port=local.port, ca=files.ca, certificate=files.certificate, key=files.key)

        without = BrokerSettings(port=plain.port)
        yield {"plain": Place(without, without), "tls": Place(with_tls(DEVICE), with_tls(EDGE))}


if __name__ == "__main__":
    sys.exit(main())
