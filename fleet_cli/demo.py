"""Command `fleet demo`: a whole fleet on this machine, which stays up until Ctrl-C."""

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from broker_config.broker import Broker, toml_lines
from broker_config.processes import ThrowAwayBroker
from fleet_admin.advice import LARGE_CURVE, Workload, best_drafting, edge_only
from fleet_admin.models.prompts import read_prompts
from fleet_admin.models.smollm2 import DRAFTS, FAMILY, SHIPPED, TARGET, make_missing
from fleet_cli.commands import CommandError, program
from fleet_cli.demo_processes import (
    StartedProcess,
    StreamedAnswer,
    demo_broker,
    demo_dashboard,
    device_service,
    edge_process,
    free_port,
    name_of,
    stream_answer,
)
from fleet_cli.models import ModelsDir
from fleet_cli.options import end_as_interrupted, on_interrupt
from fleet_common.settings import load_settings
from fleet_device.drafters.model_file import locate_model
from fleet_device.settings import DeviceSettings
from fleet_edge.settings import AUTO, EdgeSettings
from fleet_edge.step_curve import read_curve
from schemas.policy import Mode, random_seed
from schemas.printable import json_text, printable

app = typer.Typer(pretty_exceptions_enable=False)

FLEET: Final = "demo"
EDGE: Final = "edge-1"
APPLICATION: Final = "app-1"  # the device of README's Python snippet
API_PORT: Final = 8321
TIMES: Final = 8
"""Cost of the large target of the comparison, in costs of the demo's own."""

_COMPARED_TOKENS: Final = 64
_WARM_UP: Final = 12
"""Largest number of requests after which a device is compared although its choice is not settled."""

_UNSETTLED: Final = (
    "Not settled yet: in so few requests, what the device measured varies by more than the two ways differ, as it does "
    "while other programs run. It goes on trying both, at 1.5 % of the time at most."
)
_ROUNDS: Final = 2  # of the comparison

_DRAFT_MS: Final = 15.0
_ACCEPTANCE: Final = 0.8
_ROUND_TRIP_MS: Final = 20.0
"""Draft model and network assumed with a 7B target; those of the command that `large_target_lines` names."""

_SHOWN: Final = 320  # characters of an answer that grows


def draft_model(draft: str, models: Path) -> str:
    """Return the devices' setting `model` for a quantization or another model, fetched where needed."""
    repository = os.sep in draft and ":" in draft and not Path(draft).exists()
    if not repository and (os.sep in draft or draft.endswith(".gguf")):
        if not Path(draft).expanduser().is_file():
            raise CommandError(f"--draft {draft} is no file; name a GGUF, or a quantization such as {DRAFTS[0]}.")
        return draft
    if ":" in draft:
        locate_model(draft, folder=models)  # a repository's is fetched here, once for all devices
        return draft
    there = [path.stem for path in (models / FAMILY).glob("*.gguf")]
    known = {name.lower(): name for name in (*DRAFTS, SHIPPED, *there)}
    if draft.lower() not in known:
        raise CommandError(
            f"--draft {draft} is no quantization of {FAMILY}; there are {', '.join(sorted(known.values()))}, or name a "
            "GGUF file."
        )
    name = known[draft.lower()]
    make_missing(models, [name], say=_say)
    return f"{FAMILY}:{name}"


def demo_target(models: Path, *, times: int = 1) -> str:
    """Return the path of the demo's target of `times` the cost, and make it if it is missing."""
    name = TARGET if times == 1 else f"{TARGET}-cost{times}"
    make_missing(models, [name], say=_say)
    return str(models / FAMILY / f"{name}.gguf")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _prose(console: Console, *lines: str) -> None:
    """Print lines, which a terminal wraps between words."""
    console.print(*lines, sep="\n", soft_wrap=not console.is_terminal)


@dataclass(frozen=True, slots=True)
class PlanFigures:
    tokens_per_s: float
    bytes_per_token: float  # payload, both ways

    @classmethod
    def of(cls, answers: Sequence[StreamedAnswer]) -> "PlanFigures":
        tokens, seconds = sum(each.tokens for each in answers), sum(each.seconds for each in answers)
        sent = sum(each.summary["uplink_bytes"] + each.summary["downlink_bytes"] for each in answers)
        return cls(round(tokens / seconds, 1) if seconds else 0.0, round(sent / max(1, tokens), 1))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One device with one target, by the way in which it generates."""

    target: str
    edge_only: PlanFigures
    drafting: PlanFigures
    chosen: PlanFigures
    plan: str  # the choice
    reason: str
    settled: bool


@dataclass(frozen=True, slots=True)
class InterruptedAnswer:
    """An answer during which the edge was killed."""

    tokens: int
    killed_after: int  # tokens
    away_s: float
    identical: bool  # to the answer without the interruption


@dataclass(frozen=True, slots=True)
class ComputedRates:
    """Tokens/s of one device with a 7B target, computed from measured step times."""

    target: str
    machine: str
    edge_only: float
    drafting: float


def large_target() -> ComputedRates:
    curve = read_curve(LARGE_CURVE)
    workload = Workload(curve=curve, draft_s=_DRAFT_MS / 1e3, acceptance=_ACCEPTANCE, round_trip_s=_ROUND_TRIP_MS / 1e3)
    rates = (edge_only(workload, 1), best_drafting(workload, 1))
    return ComputedRates(curve.target, curve.machine, *(round(rate.tokens_per_s, 1) for rate in rates))


def large_target_lines(found: ComputedRates) -> Sequence[str]:
    assumed = f"--acceptance {_ACCEPTANCE:g} --token-ms {_DRAFT_MS:g} --round-trip {_ROUND_TRIP_MS:g}"
    rates = (
        f"Computed, not measured: with {found.target} on {found.machine}, the edge alone gives one device "
        f"{found.edge_only:.1f} tokens/s, and drafting {found.drafting:.1f}, if a draft token takes {_DRAFT_MS:g} ms "
        f"and {_ACCEPTANCE:.0%} are accepted."
    )
    return (rates, f'To measure it here: make bench ARGS="large --devices 1 {assumed}"')


@dataclass(slots=True)
class DemoReport:
    broker: str
    target: str
    draft: str
    devices: list[dict[str, Any]] = field(default_factory=list)
    interruption: InterruptedAnswer | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    computed: ComputedRates = field(default_factory=large_target)


def plan_of(summary: Mapping[str, Any]) -> str:
    """Return how a device has chosen to generate."""
    return str(summary["plan"] or "edge-only")


def answer_row(device: str, answer: StreamedAnswer) -> dict[str, Any]:
    """Return the figures of one device's answer; bytes are payload."""
    summary, tokens = answer.summary, max(1, answer.tokens)
    return {
        "device": device,
        "session": summary["session"],
        "seed": summary["seed"],
        "tokens": answer.tokens,
        "tokens_per_s": round(answer.tokens_per_s, 1),
        "plan": plan_of(summary),
        "acceptance": summary["acceptance"],
        "uplink_bytes_per_token": round(summary["uplink_bytes"] / tokens, 1),
        "downlink_bytes_per_token": round(summary["downlink_bytes"] / tokens, 1),
        "finish": answer.finish,
        "text": answer.text,
    }


@dataclass(slots=True)
class _Fleet:
    """A broker, an edge and devices; all end with `stack`."""

    console: Console
    stack: ExitStack
    broker: ThrowAwayBroker
    edge_arguments: Sequence[str]
    device_arguments: Sequence[str]
    raw: bool = False
    """Continue prompts as they are, without a chat template."""
    edge: StartedProcess = field(init=False)
    ports: dict[str, int] = field(default_factory=dict)

    def start_edge(self) -> None:
        self.edge = self.stack.enter_context(edge_process(self.edge_arguments))

    def add_device(self, name: str, *arguments: str, port: int = 0) -> None:
        listen = free_port(port) if port else 0
        state = self.stack.enter_context(tempfile.TemporaryDirectory(prefix=f"fleet-{name}-"))
        own = ["--api-listen", f"127.0.0.1:{listen}", "--state-dir", state]
        started = self.stack.enter_context(device_service(name, [*self.device_arguments, *own, *arguments]))
        self.ports[name] = int(started.online["api"].rpartition(":")[2])

    def kill_edge(self) -> None:
        self.edge.child.process.kill()
        self.edge.child.end()

    def check(self) -> None:
        """Raise `CommandError` if the broker or the edge has ended."""
        if not self.broker.running:
            raise CommandError(f"The broker {name_of(self.broker)} has ended; run the demo again.")
        if self.edge.child.process.poll() is not None:
            self.edge.child.end()
            raise CommandError(f"The edge has ended: {self.edge.child.cause}")

    def stream(self, device: str, prompt: str, **options: object) -> Iterator[StreamedAnswer]:
        """Yield a device's growing answer."""
        return stream_answer(self.ports[device], prompt, raw=self.raw, **options)

    def ask(self, device: str, prompt: str, **options: object) -> StreamedAnswer:
        """Return a device's whole answer."""
        *_, answer = self.stream(device, prompt, **options)
        return answer


def stream_all(fleet: _Fleet, prompts: Mapping[str, str], **options: object) -> dict[str, StreamedAnswer]:
    """Show the answers of several devices while they grow; return them."""
    news: queue.SimpleQueue[tuple[str, StreamedAnswer | BaseException | None]] = queue.SimpleQueue()

    def follow(device: str, prompt: str) -> None:
        try:
            for answer in fleet.stream(device, prompt, **options):
                news.put((device, answer))
            news.put((device, None))
        except BaseException as error:  # noqa: BLE001 - raised again on the demo's thread
            news.put((device, error))

    answers = dict.fromkeys(prompts, StreamedAnswer())
    for device, prompt in prompts.items():
        threading.Thread(target=follow, args=(device, prompt), daemon=True).start()
    running = set(prompts)
    with _live(fleet.console) as show:
        while running:
            try:
                device, new = news.get(timeout=1.0)
            except queue.Empty:
                fleet.check()
                continue
            if new is None:
                running.discard(device)
            elif isinstance(new, StreamedAnswer):
                answers[device] = new
                show(Group(*(_panel(name, prompts[name], answer) for name, answer in answers.items())))
            else:
                raise new
    for name, answer in answers.items():
        fleet.console.print(_panel(name, prompts[name], answer, whole=True))
    return answers


@contextmanager
def _live(console: Console) -> Iterator[Callable[[RenderableType], None]]:
    """Yield what redraws a terminal; elsewhere it does nothing."""
    if not console.is_terminal:
        yield lambda _shown: None
        return
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        yield live.update


def _panel(device: str, prompt: str, answer: StreamedAnswer, *, whole: bool = False) -> Panel:
    text = printable(answer.text if whole else answer.text[-_SHOWN:])
    title = Text(f"{device}: {printable(prompt)}", overflow="ellipsis", no_wrap=True)
    return Panel(Text(text), title=title, title_align="left", subtitle=f"{answer.tokens_per_s:.1f} tokens/s")


def device_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("device", "tokens", "tokens/s", "plan", "acceptance", "bytes up, a token", "down, a token")
    for row in rows:
        acceptance = "-" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
        figures = (row["uplink_bytes_per_token"], row["downlink_bytes_per_token"])
        table.add_row(
            row["device"], str(row["tokens"]), f"{row['tokens_per_s']:.1f}", row["plan"] or "-", acceptance,
            *(f"{figure:.1f}" for figure in figures),
        )  # fmt: skip
    return table


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    table = _table("tokens/s of one device", "edge-only", "drafting", "chosen by the device", "its choice")
    for each in comparisons:
        ways = (each.edge_only, each.drafting, each.chosen)
        choice = each.plan if each.settled else f"{each.plan}, not settled yet"
        table.add_row(each.target, *(f"{way.tokens_per_s:.1f}" for way in ways), choice)
        table.add_row("  bytes a token", *(f"{way.bytes_per_token:.1f}" for way in ways), style="dim")
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        words = number == 0 or heading in ("plan", "its choice")
        table.add_column(heading, justify="left" if words else "right", no_wrap=number == 0)
    return table


def interrupt(fleet: _Fleet, device: str, prompt: str, max_tokens: int) -> InterruptedAnswer:
    """Kill the edge with SIGKILL in the middle of an answer and start it again; the answer continues.

    The mode is coupled, in which an output repeats with its seed.
    """
    options = {"mode": Mode.COUPLED.value, "seed": random_seed() >> 12, "max_tokens": max_tokens}
    fleet.console.print("One answer without a disturbance, and once more while the edge is killed (SIGKILL) …")
    undisturbed = fleet.ask(device, prompt, **options)
    killed_after, away_s, answer = 0, 0.0, StreamedAnswer()
    for answer in fleet.stream(device, prompt, **options):
        if not killed_after and answer.tokens >= undisturbed.tokens // 2:
            killed_after, started = answer.tokens, time.monotonic()
            fleet.kill_edge()
            fleet.start_edge()
            away_s = time.monotonic() - started
    return InterruptedAnswer(answer.tokens, killed_after, away_s, answer.text == undisturbed.text)


def interruption_line(found: InterruptedAnswer) -> str:
    same = (
        "identical to the undisturbed one"
        if found.identical
        else "with other words: this engine does not repeat bit for bit (docs/engines.md)"
    )
    return (
        f"The edge was killed after {found.killed_after} of {found.tokens} tokens and was back after "
        f"{found.away_s:.1f} s. The answer continued, {same}."
    )


def compare(fleet: _Fleet, name: str, prompt: str, *, choosing: str, drafting: str) -> Comparison:
    """Compare edge-only decoding, drafting, and what the device `choosing` chooses once it knows both.

    `drafting` is a new device, which may do nothing else.
    """
    fleet.add_device(drafting, "--no-edge-only")
    options = {"max_tokens": _COMPARED_TOKENS, "seed": 1}
    for _ in range(_WARM_UP):
        if fleet.ask(choosing, prompt, **options).summary["plan_settled"]:
            break
    fleet.ask(drafting, prompt, **options)  # it computes the prompt
    ways: dict[str, list[StreamedAnswer]] = {"edge-only": [], "drafting": [], "chosen": []}
    for _ in range(_ROUNDS):  # in turn: other programs slow down all of them
        ways["edge-only"].append(fleet.ask(choosing, prompt, edge_only=True, **options))
        ways["drafting"].append(fleet.ask(drafting, prompt, **options))
        ways["chosen"].append(fleet.ask(choosing, prompt, **options))
    last = ways["chosen"][-1].summary
    edge_only, drafts, chosen = map(PlanFigures.of, ways.values())
    return Comparison(name, edge_only, drafts, chosen, plan_of(last), last["plan_reason"], last["plan_settled"])


def write_device_file(path: Path, fleet: _Fleet, model: str, models: Path) -> None:
    """Write the settings of README's Python snippet; leave a file that the demo has not written."""
    broker = {"host": fleet.broker.host, "port": fleet.broker.port}
    values = {"fleet": FLEET, "device": APPLICATION, "model": model, "models_dir": str(models.absolute())}
    if path.exists() and not path.read_text(encoding="utf-8").startswith(_MARK):
        fleet.console.print(f"{path} is left as it is; remove it to have the demo write one.")
        return
    path.write_text("\n".join([_MARK, *toml_lines({**values, "broker": broker})]) + "\n", encoding="utf-8")
    fleet.stack.callback(path.unlink, missing_ok=True)


_MARK: Final = "# Written by `fleet demo`, and removed when it ends."


def stay(fleet: _Fleet, db: str, dashboard: str) -> None:
    """Say what can be done with the fleet, and wait for Ctrl-C."""
    api = f"http://127.0.0.1:{next(iter(fleet.ports.values()))}"
    # No line is longer than 80 characters, so that no terminal breaks a command.
    said = f"""
The fleet stays up until Ctrl-C. A chat in the browser: {api}/
In another terminal:
  curl -s {api}/v1/chat/completions \\
      -H 'Content-Type: application/json' -d '{{"model": "fleet", "max_tokens": 60,
      "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'
  {program()} admin sessions --db {db}
Python: Device.from_config("device.toml"), in this folder.
OpenAI clients: {api}/v1
Dashboard: {dashboard}"""
    with suppress(KeyboardInterrupt):  # the usual end, which is no error of `make demo`
        fleet.console.print(said, soft_wrap=True)
        while True:
            fleet.check()
            time.sleep(1.0)
    fleet.console.print("The fleet ends.")


def run_chat(device: str, arguments: Sequence[str]) -> int:
    """Run `fleet device chat` and return its exit code. Only the chat handles Ctrl-C, which stops an answer there."""
    # The demo's device serves no applications, so a used port does not matter.
    command = ["device", "chat", "--device", device, "--api-listen", "", *arguments]
    with on_interrupt(signal.SIG_IGN):
        return subprocess.run([sys.executable, "-m", "fleet_cli.main", *command], check=False).returncode


def _check_settings(*, max_new_tokens: int, edge: Mapping[str, object]) -> None:
    from fleet_edge.session_log import parse_url

    load_settings(DeviceSettings, config=None, flags={"max_new_tokens": max_new_tokens})
    parse_url(load_settings(EdgeSettings, config=None, flags=edge).db)


@app.callback(invoke_without_command=True)
def demo_command(
    devices: Annotated[int, typer.Option(min=1, max=64, help="Number of devices.")] = 3,
    draft: Annotated[str, typer.Option(help="Quantization of the draft model, or a GGUF.")] = "Q4_0",
    target: Annotated[str | None, typer.Option(help="Target model, if not the demo's own.")] = None,
    engine: Annotated[str, typer.Option(help="Engine of the target model.")] = AUTO,
    models_dir: ModelsDir = Path("models"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of each answer.")] = 96,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt per line.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompts as they are.")] = False,
    broker: Annotated[str, typer.Option(help="Broker: auto, embedded or mosquitto.")] = "auto",
    db: Annotated[str, typer.Option(envvar="FLEET_DB", help="SQLAlchemy URL.")] = "sqlite:///fleet.sqlite3",
    once: Annotated[bool, typer.Option("--once", help="End after the tables instead of staying up.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Chat with the large model as device-1 instead.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON; - for standard output.")
    ] = None,
) -> None:
    """Run a whole fleet on this machine: answers, a killed edge, what drafting gains. Then it stays up for you."""
    console = Console(stderr=json_file is not None and str(json_file) == "-", markup=False, highlight=False)
    texts = read_prompts(prompts)
    if chat and (raw or json_file is not None):
        raise CommandError(
            "With --chat there is neither a report nor a prompt to continue; leave --json and --raw out."
        )
    model = draft_model(draft, models_dir)
    large = None if target is not None or chat else demo_target(models_dir, times=TIMES)
    target = demo_target(models_dir) if target is None else target
    edge_settings = {"engine": engine, "db": db, "target": target}
    _check_settings(max_new_tokens=max_new_tokens, edge=edge_settings)
    end_as_interrupted()
    names = [f"device-{number + 1}" for number in range(devices)]
    drafting = f"device-{devices + 1}"

    @contextmanager
    def fleet_of(fleet: str, target: str, *, db: str | None = None) -> Iterator[_Fleet]:
        """Run an edge; by default with a log of its own, since the names of edge and devices occur in both fleets."""
        with ExitStack() as stack:
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-edge-"))
            log = f"sqlite:///{own}/fleet.sqlite3" if db is None else db
            at = stack.enter_context(demo_broker(broker, Broker(fleet=fleet, edges=(EDGE,))))
            where = ["--host", at.host, "--port", str(at.port)]
            _prose(console, f"Broker: {name_of(at)}. Loading the target model {target} …")
            edge = ["--fleet", fleet, "--edge", EDGE, *where, "--target", target, "--engine", engine]
            edge += ["--kv-kept", "off"]  # nothing stays behind in the machine's shared memory
            device = [
                "--fleet", fleet, *where, "--model", model, "--models-dir", str(models_dir), "--offline", "wait",
                "--max-new-tokens", str(max_new_tokens),
            ]  # fmt: skip
            running = _Fleet(console, stack, at, [*edge, "--db", log, "--spool", f"{own}/spool"], device, raw)
            running.start_edge()
            yield running

    with fleet_of(FLEET, target, db=db) as fleet:
        if chat:
            if code := run_chat(names[0], fleet.device_arguments):
                raise typer.Exit(code)
            return
        _prose(console, f"Starting {devices} device{'s' * (devices > 1)} with the draft model {model} …")
        for number, name in enumerate(names):
            fleet.add_device(name, port=0 if number else API_PORT)
        report = DemoReport(name_of(fleet.broker), fleet.edge.online["target"], model)
        _answer(fleet, report, texts)
        report.interruption = interrupt(fleet, names[0], texts[0], max_new_tokens)
        _prose(console, interruption_line(report.interruption), "")
        _prose(console, "Comparing what one device gets from the edge alone, with drafts, and by its own choice …")
        report.comparisons = [compare(fleet, "this target", texts[0], choosing=names[0], drafting=drafting)]
        if large is not None:
            with fleet_of(f"{FLEET}-large", large) as other:
                other.add_device(names[0])
                name = f"a target of {TIMES} times its cost"
                report.comparisons.append(compare(other, name, texts[0], choosing=names[0], drafting=drafting))
        console.print(comparison_table(report.comparisons), "", sep="\n")
        _prose(
            console,
            *(f"With {each.target}: {each.reason}" for each in report.comparisons),
            *([] if all(each.settled for each in report.comparisons) else [_UNSETTLED]),
            *large_target_lines(report.computed),
        )
        _write(report, json_file)
        if not once:
            write_device_file(Path("device.toml"), fleet, model, models_dir)
            stay(fleet, db, fleet.stack.enter_context(demo_dashboard(fleet.broker, fleet=FLEET, db=db)))


def _answer(fleet: _Fleet, report: DemoReport, prompts: Sequence[str]) -> None:
    """Have all devices answer at once, and show time and rate."""
    asked = {name: prompts[number % len(prompts)] for number, name in enumerate(fleet.ports)}
    answers = stream_all(fleet, asked)
    report.devices = [answer_row(name, answer) for name, answer in answers.items()]
    fleet.console.print(device_table(report.devices), "", sep="\n")


def _write(report: DemoReport, file: Path | None) -> None:
    if file is None:
        return
    content = json_text(asdict(report), indent=2)
    if str(file) == "-":
        print(content)
        return
    try:
        file.write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"The report cannot be written to {file}: {error.strerror}.") from error
