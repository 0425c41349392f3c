"""Fleet under attack: a mosquitto with certificates, one edge, honest devices, all on loopback."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import free_address
from benchmarks.hostile.client import KnownFleet
from benchmarks.hostile.honest import Language
from benchmarks.hostile.meters import KvMeter, Throughput
from benchmarks.processes import BenchError, Cores
from broker_config.site import make_local_broker
from fleet_admin.models.prompts import PROMPTS
from tests.support.local_broker import LocalBroker
from tests.support.processes import EDGE_PROGRAM, BrokerClient, Program, edge_settings

FLEET: Final = "home"
EDGE: Final = "edge-1"
SINK: Final = "edge-sink"
_ONLINE_S: Final = 120.0
_READY_S: Final = 60.0
_KV_BYTES: Final = 2 << 30


@dataclass(slots=True)
class Running:
    place: KnownFleet
    edge: Program
    database: Path
    honest: Throughput
    mosquitto: LocalBroker
    kept_mb: Callable[[], float]


@dataclass(slots=True)
class Fleet:
    """Makes the identities once, and starts a new broker and a new edge as often as requested.

    With `json` the honest devices write short JSON texts, and the steps of a scripted target take time.
    """

    folder: Path
    target: Path | None
    vocabulary: Path | None
    honest: Sequence[str]
    hostile: Sequence[str]
    fresh: Sequence[str]
    cores: Cores
    seed: int
    tokens: int
    json: bool = False
    edge_program: str = EDGE_PROGRAM
    texts: list[list[int]] = field(default_factory=list)
    _runs: int = 0
    _language: Language | None = None
    _metrics: str = ""

    @property
    def home(self) -> Path:
        return self.folder / "broker"

    def make(self) -> None:
        devices = [*self.honest, *self.hostile, *self.fresh]
        make_local_broker(self.home, fleet=FLEET, edges=(EDGE, SINK), devices=devices, port=8883)

    def record(self) -> None:
        """Generate the honest devices' outputs once, without drafts, to replay them as drafts."""
        share = -(-len(PROMPTS) // len(self.honest))
        written: dict[int, list[int]] = {}
        with self._broker_and_edge() as (broker, edge, _), contextlib.ExitStack() as stack:
            writers = []
            for number, name in enumerate(self.honest):
                part = range(number * share, min(len(PROMPTS), (number + 1) * share))
                on_line = partial(_note_text, written, iter(part))
                writers.append(stack.enter_context(self._device(broker, name, part, on_line)))
            for writer in writers:
                writer.wait_to_end(timeout_s=600)
            assert edge.lives
        missing = [number for number in range(len(PROMPTS)) if not written.get(number)]
        if missing:
            raise BenchError(f"The honest devices did not write text {missing[0]}; see {self.folder}/*.log.")
        self.texts = [written[number] for number in range(len(PROMPTS))]

    @contextlib.contextmanager
    def running(self) -> Iterator[Running]:
        """Run a new broker, a new edge with an empty log, and the honest devices."""
        with self._broker_and_edge() as (broker, edge, database), contextlib.ExitStack() as stack:
            honest = Throughput()
            devices = []
            for number, name in enumerate(self.honest):
                turned = [*range(number, len(PROMPTS)), *range(number)]  # each begins with another prompt
                devices.append(stack.enter_context(self._device(broker, name, turned, honest.take)))
            for device in devices:
                device.wait_for("ready", timeout_s=_READY_S)
            online = json.loads(edge.wait_for('"online"', timeout_s=1.0))
            yield Running(
                place=self._place(broker, context=int(online["context"])),
                edge=edge,
                database=database,
                honest=honest,
                mosquitto=broker,
                # A scripted target has no keys and values.
                kept_mb=KvMeter(f"http://{self._metrics}/metrics", _KV_BYTES) if self.target else lambda: 0.0,
            )

    @contextlib.contextmanager
    def _broker_and_edge(self) -> Iterator[tuple[LocalBroker, Program, Path]]:
        self._runs += 1
        folder = self.folder / f"edge-{self._runs}"
        folder.mkdir()
        database = folder / "log.sqlite3"
        for kept in (self.home / "retained").glob("*"):
            kept.unlink()
        with LocalBroker(self.home, port=0) as broker, self._edge(broker, folder) as edge:
            edge.wait_for('"online"', timeout_s=_ONLINE_S)
            yield broker, edge, database

    def _edge(self, broker: LocalBroker, folder: Path) -> Program:
        settings: dict[str, object] = {"threads": len(self.cores.edge)}
        # On a fast machine the honest devices write more short texts than the default quotas allow.
        lines = ["[quotas.labels.honest]", f"devices = {json.dumps(list(self.honest))}"]
        lines += ["opens_per_min = 1e6", "new_tokens_per_min = 1e9", "prompt_s_per_min = 1e9"]
        if self.target is not None:
            self._metrics = free_address()
            settings |= {"target": str(self.target.resolve()), "kv_bytes": _KV_BYTES}
            lines += ["[metrics]", f"listen = {json.dumps(self._metrics)}"]
        config = folder / "edge.toml"
        content = edge_settings(BrokerClient.at(broker, EDGE), fleet=FLEET, folder=folder, lines=lines, **settings)
        config.write_text(content, encoding="utf-8")
        module, arguments = "tests.support.scripted_edge_process", [str(config)]
        if self.target is not None:
            module, arguments = self.edge_program, ["edge", "run", "--events", "--config", str(config)]
        elif self.json:
            arguments += ["--letters", "--step-ms", "30", "--token-ms", "2"]
        return Program(module, arguments, cores=self.cores.edge, log=folder / "edge.log")

    def _place(self, broker: LocalBroker, *, context: int) -> KnownFleet:
        if self._language is None:
            self._language = Language.load(self.vocabulary, json=self.json)
        vocabulary = self._language.vocabulary
        json_begin, json_filler = self._language.json_string()
        return KnownFleet(
            json_begin=json_begin,
            json_filler=json_filler,
            fleet=FLEET,
            edge=EDGE,
            sink=SINK,
            vocabulary_size=vocabulary.size,
            fingerprint=vocabulary.fingerprint.hex(),
            context=context,
            max_packet_bytes=broker.broker.max_packet_bytes,
            identities=tuple(BrokerClient.at(broker, name) for name in self.hostile),
        )

    def _device(
        self, broker: LocalBroker, name: str, prompts: Sequence[int], on_line: Callable[[dict[str, Any]], None]
    ) -> Program:
        """Start an honest device."""
        log = self.folder / f"honest-{self._runs}-{name}.log"
        device = Program("benchmarks.hostile.honest", cores=self.cores.others, log=log, on_line=on_line)
        task = {
            "fleet": FLEET,
            "model": None if self.vocabulary is None else str(self.vocabulary),
            "identity": asdict(BrokerClient.at(broker, name)),
            "prompts": [PROMPTS[each] for each in prompts],
            "seeds": [self.seed + each for each in prompts],
            "texts": [self.texts[each] for each in prompts] if self.texts else [],
            "tokens": self.tokens,
            "json": self.json,
        }
        device.tell(json.dumps(task))
        return device


def _note_text(written: dict[int, list[int]], remaining: Iterator[int], event: dict[str, Any]) -> None:
    if event.get("event") == "text":
        written[next(remaining)] = event["tokens"]
