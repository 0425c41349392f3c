"""`fleet demo`: a broker, an edge and some devices on this machine, from prompts to a table."""

import queue
import tempfile
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleet_cli.commands import program
from fleet_cli.demo.brokers import Place, demo_broker
from fleet_cli.demo.chat import run_chat
from fleet_cli.demo.dashboard import run_dashboard
from fleet_cli.demo.options import check_report_file, check_settings, draft_model, target_model
from fleet_cli.demo.processes import Child, DeviceEvent, device_process, edge_process
from fleet_cli.demo.prompts import read_prompts
from fleet_cli.demo.report import Report, device_row
from fleet_cli.demo.watch import Watch
from fleet_cli.errors import CommandError
from fleet_cli.models.folder import ModelsDir
from fleet_common.logs import Event
from schemas.policy import Mode, random_seed
from schemas.printable import json_text, printable

app = typer.Typer(pretty_exceptions_enable=False)

FLEET = "demo"
EDGE = "edge-1"


def _check_draft_length(value: str) -> str:
    """Refuse a bad one before the models are loaded."""
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each text.")] = 96,
    draft_length: Annotated[str, typer.Option(callback=_check_draft_length, help="Tokens in a draft, or auto.")] = "4",
    ahead: Annotated[bool | None, typer.Option(help="Draft ahead of the verdict, or never do.")] = None,
    stream: Annotated[bool | None, typer.Option(help="The edge writes by itself, or never does.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the first device; the next have the next ones.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 keeps all.")] = 0.95,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompts as they are.")] = False,
    broker: Annotated[str, typer.Option(help="auto, embedded, mosquitto, or HOST:PORT.")] = "auto",
    tls: Annotated[bool, typer.Option("--tls", help="Mutual TLS, with an identity for each device.")] = False,
    db: Annotated[str, typer.Option(envvar="FLEET_DB", help="SQLAlchemy URL.")] = "sqlite:///fleet.sqlite3",
    engine: Annotated[
        str | None,
        typer.Option(help="Of the target model: auto, llama.cpp or torch; left out, torch if it is there."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the target model: auto, float32 or bfloat16.")] = "auto",
    show_text: Annotated[bool, typer.Option("--show-text", help="Stream the texts.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk with the large model as device-1, in place of the devices' texts.")
    ] = False,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Serve the dashboard after the table; the devices go on writing.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report as JSON; - for standard output.")
    ] = None,
) -> None:
    """Run a whole fleet on this machine and show what it did. Ctrl-C stops all of it."""
    console = Console(stderr=json_file is not None and str(json_file) == "-")
    texts = read_prompts(prompts)
    check_report_file(json_file)
    if chat and (raw or json_file is not None):
        raise CommandError(
            "With --chat there is neither a report nor a prompt to continue; leave --json and --raw out."
        )
    # Measuring which engine is faster takes longer than the demo.
    engine = engine or (("torch" if find_spec("torch") else "llama.cpp") if target is None else "auto")
    target = target_model(target, models_dir, engine=engine)
    model = draft_model(draft, models_dir)
    check_settings(
        device={"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens},
        edge={"engine": engine, "dtype": dtype, "db": db},
    )
    first_seed = random_seed() if seed is None else seed
    with ExitStack() as stack:
        names = [f"device-{number + 1}" for number in range(devices)]
        place = stack.enter_context(demo_broker(broker, tls=tls, fleet=FLEET, edge=EDGE, devices=names))
        console.print(f"Broker: {place.name}", markup=False, highlight=False)
        spool = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-spool-"))
        console.print(f"Loading the target model {target} …", markup=False, highlight=False)
        serve = [
            "--fleet", FLEET, "--edge", EDGE, *place.arguments(EDGE),
            "--target", target, "--engine", engine, "--dtype", dtype, "--db", db, "--spool", spool,
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
        started = time.monotonic()
        events: queue.SimpleQueue[DeviceEvent] = queue.SimpleQueue()
        raw_flag = ["--raw"] if raw else []
        children = {}
        with Watch(console, max_new_tokens, show_text) as watch:
            for number, name in enumerate(names):
                prompt, seed_flag = texts[number % len(texts)], ["--seed", str(first_seed + number)]
                watch.add(name, prompt)
                arguments = [*shared, *raw_flag, *place.arguments(name), *seed_flag, "--", prompt]
                children[name] = stack.enter_context(device_process(name, arguments, events))
            results = _follow(children, events, watch, edge=edge.child, place=place)
        wall_s = time.monotonic() - started
        report = Report(
            place.name,
            mode.value,
            model,
            edge.online["target"],
            wall_s,
            [device_row(result) for result in results.values()],
        )
        _show(report, console, json_file, results if show_text else {})
        again = f"{program()} demo --chat" + ("" if models_dir == Path("models") else f" --models-dir {models_dir}")
        console.print(
            f"See the sessions: {program()} admin sessions --db {db}", markup=False, highlight=False, soft_wrap=True
        )
        console.print(f"Talk with the large model: {again}", markup=False, highlight=False, soft_wrap=True)
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


def _follow(
    children: dict[str, Child], events: "queue.SimpleQueue[DeviceEvent]", watch: Watch, *, edge: Child, place: Place
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
                    f"The broker {place.name} ended while devices were writing; run the demo again."
                ) from None
            if edge.process.poll() is not None:
                edge.end()  # all that it said is read
                raise CommandError(f"The edge ended while devices were writing: {edge.cause}") from None
            continue
        watch.event(event.device, event.fields)
        if event.fields is None:
            running.discard(event.device)
        elif event.fields["event"] == Event.END:
            results[event.device] = event.fields
    return results


def _show(report: Report, console: Console, json_file: Path | None, results: dict[str, dict[str, Any]]) -> None:
    for name, result in results.items():
        console.rule(name, align="left")
        console.print(printable(result["text"]), markup=False, highlight=False)
    lines = report.lines(console.width if console.is_terminal else None)
    console.print("\n".join(["", *lines, ""]), markup=False, highlight=False, soft_wrap=True)
    if json_file is None:
        return
    content = json_text(report.json(), indent=2)
    if str(json_file) == "-":
        print(content)
        return
    try:
        json_file.write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"The report cannot be written to {json_file}: {error.strerror}.") from error
