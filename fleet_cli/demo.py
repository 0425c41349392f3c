"""Command `fleet demo`: a whole fleet on this machine."""

import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleet_admin.models.prepare import SMOLLM2
from fleet_admin.models.prompts import read_prompts
from fleet_cli.commands import program
from fleet_cli.demo_processes import (
    ChildProcess,
    DemoBroker,
    DeviceEvent,
    demo_broker,
    device_process,
    edge_process,
    run_dashboard,
)
from fleet_cli.errors import CommandError
from fleet_cli.models import ModelsDir
from fleet_cli.options import end_as_interrupted, on_interrupt
from fleet_cli.tables import Column, table_lines
from fleet_common.logs import Event
from fleet_common.settings import load_settings
from fleet_device.drafters.model_file import locate_model
from fleet_device.settings import DeviceSettings
from fleet_edge.settings import AUTO, EdgeSettings
from schemas.policy import Mode, random_seed
from schemas.printable import json_text, printable


def draft_model(draft: str, models: Path) -> str:
    """Return the devices' setting `model` for a quantization or another model, fetched where needed."""
    repository = os.sep in draft and ":" in draft and not Path(draft).exists()
    if not repository and (os.sep in draft or draft.endswith(".gguf")):
        if not Path(draft).expanduser().is_file():
            raise CommandError(
                f"--draft {draft} is no file; name a GGUF, or a quantization such as {SMOLLM2.drafts[0]}."
            )
        return draft
    if ":" in draft:
        locate_model(draft, folder=models)  # a repository's is fetched here, once for all devices
        return draft
    prepared = [path.stem for path in (models / SMOLLM2.name).glob("*.gguf")]
    known = {name.lower(): name for name in (*SMOLLM2.drafts, SMOLLM2.shipped, *prepared)}
    if draft.lower() not in known:
        raise CommandError(
            f"--draft {draft} is no quantization of {SMOLLM2.name}; there are {', '.join(sorted(known.values()))}, or "
            "name a GGUF file."
        )
    model = f"{SMOLLM2.name}:{known[draft.lower()]}"
    locate_model(model, folder=models)
    return model


def target_model(target: str | None, models: Path) -> str:
    """Return the edge's setting `target`; raises `CommandError` if it is the demo's own and is missing."""
    if target is not None:
        return target
    path = models / SMOLLM2.name / "target-Q8_0.gguf"  # every engine takes it, and making it takes two seconds
    if not path.exists():
        elsewhere = "" if models == Path("models") else f" --models-dir {models}"
        raise CommandError(
            f"The demo's models are not in {models.absolute()}; make them with `{program()} models prepare "
            f"--only {SMOLLM2.drafts[0]} --only {path.stem}{elsewhere}`, or name their folder with --models-dir."
        )
    return str(path)


def engine_flags(engine: str | None, dtype: str, target: str, *, measured: bool) -> list[str]:
    """Return the edge's flags for engine and number format.

    Unless it is `measured` which engine is the fastest, which takes longer than the demo, an engine that is left out
    is the first that could serve the target: torch, on a CPU in int8, or llama.cpp.
    """
    if engine is None and not measured:
        from fleet_edge.verifiers.auto import find_candidates

        first = find_candidates(EdgeSettings.model_validate({"target": target, "dtype": dtype})).found[0]
        engine, dtype = first.engine, first.dtype
    return ["--engine", engine or AUTO, "--dtype", dtype]


def check_report_file(path: Path | None) -> None:
    """Check before the demo that its report can be written."""
    if path is None or str(path) == "-":
        return
    folder = path.parent
    if path.is_dir():
        raise CommandError(f"--json {path} is a folder; name a file.")
    if not folder.is_dir():
        raise CommandError(f"--json {path} cannot be written, since there is no folder {folder}; make it first.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"--json {path} cannot be written; name a file where you may write.")


def check_settings(*, device: Mapping[str, object], edge: Mapping[str, object]) -> None:
    from fleet_edge.store.engine import parse_url

    load_settings(DeviceSettings, config=None, flags=device)
    parse_url(load_settings(EdgeSettings, config=None, flags=edge).db)


_FLOAT32 = 4
_TOKEN_ID = 2


def device_row(result: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the report.

    `dsd_uplink_bytes_per_token` is computed: plain distributed speculative decoding would send, for each drafted token,
    the token's id and a float32 probability for every token of the vocabulary.
    """
    tokens = max(1, result["tokens"])
    return {
        "device": result["device"],
        "session": result["session"],
        "seed": result["seed"],
        "prompt_tokens": result["prompt_tokens"],
        "tokens": result["tokens"],
        "tokens_per_s": round(result["tokens_per_s"], 2),
        "acceptance": None if result["acceptance"] is None else round(result["acceptance"], 4),
        "rounds": result["rounds"],
        "mean_batch": None if result["mean_batch"] is None else round(result["mean_batch"], 2),
        "uplink_bytes": result["uplink_bytes"],
        "downlink_bytes": result["downlink_bytes"],
        "uplink_bytes_per_token": round(result["uplink_bytes"] / tokens, 1),
        "downlink_bytes_per_token": round(result["downlink_bytes"] / tokens, 1),
        "dsd_uplink_bytes_per_token": round(
            result["drafted"] * (_FLOAT32 * result["vocabulary"] + _TOKEN_ID) / tokens, 1
        ),
        "finish": result["finish"],
        "text": result["text"],
    }


@dataclass(frozen=True, slots=True)
class DemoReport:
    broker: str
    mode: str
    draft: str
    target: str
    wall_s: float  # from the devices' start to the last one's end
    devices: Sequence[dict[str, Any]]  # rows of `device_row`
    # of one device alone, with the first prompt; None where that did not finish
    drafting_tokens_per_s: float | None = None
    edge_only_tokens_per_s: float | None = None

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"wall_s": round(self.wall_s, 3)}

    def lines(self, width: int | None) -> list[str]:
        tokens = sum(row["tokens"] for row in self.devices)
        drafting, edge_only = self.drafting_tokens_per_s, self.edge_only_tokens_per_s
        return [
            f"{self.mode} mode, draft {self.draft}, target {self.target}, over {self.broker}",
            *table_lines(_COLUMNS, self.devices, width=width),
            f"{tokens} tokens in {self.wall_s:.1f} s. Bytes are payload.",
            "* computed: what shipping the draft model's full distributions up would have cost.",
            *([_gain(drafting, edge_only)] if drafting and edge_only else []),
        ]


def _gain(drafting: float, edge_only: float) -> str:
    rates = f"{drafting:.1f} tokens/s with drafts, {edge_only:.1f} without"
    if drafting > edge_only:
        return f"Drafting was {drafting / edge_only:.2f} times as fast as the edge alone: {rates} (one device)."
    return (
        f"On this machine the edge alone is faster for one device: {rates}; drafting pays with a larger target or more "
        "devices."
    )


_COLUMNS: Final[list[Column[dict[str, Any]]]] = [
    Column("device", lambda row: row["device"], rank=0),
    Column("tokens", lambda row: row["tokens"], "count", rank=0),
    Column("tokens/s", lambda row: row["tokens_per_s"], "figure"),
    Column("acceptance", lambda row: row["acceptance"], "percent"),
    Column("rounds", lambda row: row["rounds"], "count", rank=2),
    Column("mean batch", lambda row: row["mean_batch"], "figure"),
    Column("up per token", lambda row: row["uplink_bytes_per_token"], "bytes"),
    Column("down per token", lambda row: row["downlink_bytes_per_token"], "bytes"),
    Column("DSD up per token*", lambda row: row["dsd_uplink_bytes_per_token"], "bytes"),
    Column("end", lambda row: row["finish"], "state"),
]


_TAIL_CHARACTERS = 320
_BAR_WIDTH = 16


@dataclass(slots=True)
class _Seen:
    prompt: str
    tokens: int = 0
    text: str = ""
    started: float | None = None
    state: str = "starting"

    @property
    def tokens_per_s(self) -> float:
        elapsed = time.monotonic() - self.started if self.started else 0.0
        return self.tokens / elapsed if elapsed > 0 else 0.0


@dataclass(slots=True)
class DemoProgress:
    """Live progress on a terminal, plain lines elsewhere; a context manager."""

    console: Console
    max_new_tokens: int
    show_text: bool
    _devices: dict[str, _Seen] = field(default_factory=dict)
    _live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(self._draw(), console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, device: str, prompt: str) -> None:
        self._devices[device] = _Seen(prompt)

    def event(self, device: str, fields: dict[str, Any] | None) -> None:
        seen = self._devices[device]
        before = seen.state
        match fields:
            case {"event": Event.START}:
                seen.started, seen.state = time.monotonic(), "generating"
            case {"event": Event.TOKENS, "number": number, "text": text}:
                seen.tokens += number
                seen.text += text
            case {"event": Event.END, "finish": finish}:
                seen.state = finish
            case None if seen.state in ("starting", "generating"):
                seen.state = "failed"
        if self._live is not None:
            self._live.update(self._draw())
        elif seen.state != before:
            self.console.print(f"{device}: {seen.state}, {seen.tokens} tokens")

    def _draw(self) -> RenderableType:
        # The prompt gets the rest of the terminal's width.
        table = Table(box=None, pad_edge=False, expand=True)
        for heading in ("device", "", "tokens", "tokens/s", ""):
            table.add_column(heading, justify="right" if heading.startswith("tokens") else "left", no_wrap=True)
        table.add_column("prompt", ratio=1, no_wrap=True, overflow="ellipsis")
        for device, seen in self._devices.items():
            bar = ProgressBar(total=self.max_new_tokens, completed=seen.tokens, width=_BAR_WIDTH)
            prompt = Text(seen.prompt, overflow="ellipsis", no_wrap=True, style="dim")
            table.add_row(device, bar, str(seen.tokens), f"{seen.tokens_per_s:.1f}", seen.state, prompt)
        if not self.show_text:
            return table
        panels = [
            Panel(Text(printable(seen.text[-_TAIL_CHARACTERS:])), title=device, title_align="left")
            for device, seen in self._devices.items()
        ]
        return Group(table, *panels)


def run_chat(device: str, arguments: Sequence[str]) -> int:
    """Run `fleet device chat` and return its exit code. Only the chat handles Ctrl-C, which stops an answer there."""
    # The demo's device serves no applications, so a used port does not matter.
    command = ["device", "chat", "--device", device, "--api-port", "0", *arguments]
    with on_interrupt(signal.SIG_IGN):
        return subprocess.run([sys.executable, "-m", "fleet_cli.main", *command], check=False).returncode


app = typer.Typer(pretty_exceptions_enable=False)

FLEET = "demo"
EDGE = "edge-1"


def _check_draft_length(value: str) -> str:
    """Refuse an invalid length before the models are loaded."""
    from fleet_device.settings import read_draft_length

    try:
        return str(read_draft_length(value))
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from error


@app.callback(invoke_without_command=True)
def demo_command(
    devices: Annotated[int, typer.Option(min=1, max=64, help="Number of devices.")] = 3,
    mode: Annotated[Mode, typer.Option(help="How drafts are verified.")] = Mode.RESIDUAL,
    draft: Annotated[str, typer.Option(help="Quantization of the draft model, or a GGUF.")] = "Q4_0",
    target: Annotated[str | None, typer.Option(help="Target model, if not the demo's own.")] = None,
    models_dir: ModelsDir = Path("models"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of each output.")] = 96,
    draft_length: Annotated[str, typer.Option(callback=_check_draft_length, help="Tokens in a draft, or auto.")] = "4",
    ahead: Annotated[bool | None, typer.Option(help="Always or never draft ahead of the verdict.")] = None,
    stream: Annotated[bool | None, typer.Option(help="Always or never use edge-only decoding.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the first device; each next device adds one.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Keep this number of tokens; 0 keeps all.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Keep this probability mass; 1 keeps all.")] = 0.95,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt per line.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompts as they are.")] = False,
    broker: Annotated[str, typer.Option(help="Broker: auto, embedded, mosquitto, or HOST:PORT.")] = "auto",
    tls: Annotated[bool, typer.Option("--tls", help="Mutual TLS, with an identity for each device.")] = False,
    db: Annotated[str, typer.Option(envvar="FLEET_DB", help="SQLAlchemy URL.")] = "sqlite:///fleet.sqlite3",
    engine: Annotated[
        str | None,
        typer.Option(
            help="Engine of the target model: auto, llama.cpp or torch; by default torch if installed, else llama.cpp."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the target model: auto, int8, float32 or bfloat16.")
    ] = "auto",
    show_text: Annotated[bool, typer.Option("--show-text", help="Stream the outputs.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Chat with the large model as device-1 instead.")] = False,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Serve the dashboard after the table; the devices continue.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON; - for standard output.")
    ] = None,
) -> None:
    """Run a whole fleet on this machine and show its results. Ctrl-C stops it."""
    console = Console(stderr=json_file is not None and str(json_file) == "-", markup=False, highlight=False)
    texts = read_prompts(prompts)
    check_report_file(json_file)
    if chat and (raw or json_file is not None):
        raise CommandError(
            "With --chat there is neither a report nor a prompt to continue; leave --json and --raw out."
        )
    measured = target is not None
    target = target_model(target, models_dir)
    model = draft_model(draft, models_dir)
    check_settings(
        device={"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens},
        edge={"engine": engine or AUTO, "dtype": dtype, "db": db},
    )
    engine_and_dtype = engine_flags(engine, dtype, target, measured=measured)
    first_seed = random_seed() if seed is None else seed
    end_as_interrupted()
    with ExitStack() as stack:
        names = [f"device-{number + 1}" for number in range(devices)]
        place = stack.enter_context(demo_broker(broker, tls=tls, fleet=FLEET, edge=EDGE, devices=names))
        console.print(f"Broker: {place.name}")
        console.print(f"Loading the target model {target} …")
        serve = [
            "--fleet", FLEET, "--edge", EDGE, *place.arguments(EDGE),
            "--target", target, *engine_and_dtype, "--db", db,
            "--spool", stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-spool-")),
        ]  # fmt: skip
        edge = stack.enter_context(edge_process(serve))
        shared = [
            "--fleet", FLEET, "--model", model, "--models-dir", str(models_dir), "--mode", mode.value,
            "--temperature", str(temperature), "--top-k", str(top_k), "--top-p", str(top_p),
            "--max-new-tokens", str(max_new_tokens), "--draft-length", draft_length, "--threads", "1",
            *([] if ahead is None else ["--ahead" if ahead else "--no-ahead"]),
            *([] if stream is None else ["--stream" if stream else "--no-stream"]),
        ]  # fmt: skip
        if chat:
            if code := run_chat(names[0], [*shared, *place.arguments(names[0])]):
                raise typer.Exit(code)
            return

        def generate(prompts: Mapping[str, str], *flags: str, show_text: bool = False) -> _Generated:
            """Run a device with each prompt; with further flags of `fleet device generate`."""
            events: queue.SimpleQueue[DeviceEvent] = queue.SimpleQueue()
            children = {}
            with DemoProgress(console, max_new_tokens, show_text) as watch:
                for number, (name, prompt) in enumerate(prompts.items()):
                    watch.add(name, prompt)
                    more = ["--seed", str(first_seed + number), *(["--raw"] if raw else []), *flags]
                    arguments = [*shared, *place.arguments(name), *more, "--", prompt]
                    children[name] = stack.enter_context(device_process(name, arguments, events))
                return _Generated(children, _follow(children, events, watch, edge=edge.child, place=place))

        asked = {name: texts[number % len(texts)] for number, name in enumerate(names)}
        started = time.monotonic()
        children, results = generate(asked, show_text=show_text)
        wall_s = time.monotonic() - started
        rates: list[float | None] = []
        if draft_length != "0" and len(results) == devices:
            console.print("Comparing drafts with the edge alone: the first prompt once more with each …")
            rates = [generate({names[0]: texts[0]}, flag).tokens_per_s for flag in ("--no-stream", "--stream")]
        report = DemoReport(
            place.name,
            mode.value,
            model,
            edge.online["target"],
            wall_s,
            [device_row(result) for result in results.values()],
            *rates,
        )
        again = f"{program()} demo --chat" + ("" if models_dir == Path("models") else f" --models-dir {models_dir}")
        hints = (f"See the sessions: {program()} admin sessions --db {db}", f"Talk with the large model: {again}")
        _show(report, console, json_file, results if show_text else {}, hints)
        failed = [f"{name}: {child.cause}" for name, child in children.items() if name not in results]
        if failed:
            raise CommandError(f"{len(failed)} of {devices} devices did not finish. {failed[0]}")
        if dashboard:
            run_dashboard(
                console,
                place,
                fleet=FLEET,
                db=db,
                folder=Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-demo-"))),
                devices=names,
                arguments=shared,
                prompts=texts,
                edge=edge.child,
            )


class _Generated(NamedTuple):
    children: dict[str, ChildProcess]
    results: dict[str, dict[str, Any]]  # of those that finished

    @property
    def tokens_per_s(self) -> float | None:
        return next((result["tokens_per_s"] for result in self.results.values()), None)


def _follow(
    children: dict[str, ChildProcess],
    events: "queue.SimpleQueue[DeviceEvent]",
    watch: DemoProgress,
    *,
    edge: ChildProcess,
    place: DemoBroker,
) -> dict[str, dict[str, Any]]:
    """Show the devices' events until all have ended; return their results."""
    results: dict[str, dict[str, Any]] = {}
    running = set(children)
    while running:
        try:
            event = events.get(timeout=0.5)
        except queue.Empty:
            if not place.lives():
                raise CommandError(
                    f"The broker {place.name} ended while devices were generating; run the demo again."
                ) from None
            if edge.process.poll() is not None:
                edge.end()  # all that it said is read
                raise CommandError(f"The edge ended while devices were generating: {edge.cause}") from None
            continue
        watch.event(event.device, event.fields)
        if event.fields is None:
            running.discard(event.device)
        elif event.fields["event"] == Event.END:
            results[event.device] = event.fields
    return results


def _show(
    report: DemoReport,
    console: Console,
    json_file: Path | None,
    results: dict[str, dict[str, Any]],
    hints: Sequence[str],
) -> None:
    for name, result in results.items():
        console.rule(name, align="left")
        console.print(printable(result["text"]))
    lines = report.lines(console.width if console.is_terminal else None)
    console.print("\n".join(["", *lines, ""]), soft_wrap=True)
    content = json_text(report.json(), indent=2)
    if str(json_file) == "-":
        print(content)
        return
    for line in hints:
        console.print(line, soft_wrap=True)
    if json_file is None:
        return
    try:
        json_file.write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"The report cannot be written to {json_file}: {error.strerror}.") from error
