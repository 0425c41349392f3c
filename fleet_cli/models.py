"""Command group `fleet models`: check and try pairs of models."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from fleet_cli.commands import CommandError, ExitCode, program
from fleet_cli.options import AsJson, end_as_interrupted
from fleet_cli.tables import print_json
from fleet_common.host import available_memory

if TYPE_CHECKING:
    from fleet_admin.models.acceptance import MeasuredPair
    from fleet_admin.models.pair import CheckedPair
    from fleet_admin.models.prompts import Prompt

ModelsDir = Annotated[
    Path,
    # The variable is that of the device's setting `models_dir`.
    typer.Option(
        "--models-dir",
        envvar="FLEET_DEVICE_MODELS_DIR",
        help="Folder of the models named as NAME:QUANTIZATION.",
    ),
]


_MEGA = 1_000_000

app = typer.Typer(name="models", help="Check and try pairs of models.", no_args_is_help=True)

_MODELS = Path("models")
_VOCABULARY = Path("target.vocabulary.gguf")


@app.command("vocabulary")
def vocabulary_command(
    target: Annotated[Path, typer.Argument(help="A GGUF of the target model, in any quantization.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = _VOCABULARY,
    as_json: AsJson = False,
) -> None:
    """Write the target's vocabulary to a file, for devices with another vocabulary (`target_vocabulary`)."""
    from fleet_admin.models.facts import write_vocabulary

    vocabulary = write_vocabulary(target.expanduser(), out.expanduser())
    size = out.expanduser().stat().st_size
    if as_json:
        found = {"file": str(out.absolute()), "bytes": size, "tokens": vocabulary.size}
        print_json({**found, "fingerprint": vocabulary.fingerprint.hex()})
    else:
        print(
            f"{out}: {vocabulary}, {size / _MEGA:.1f} MB. Copy it to the devices, and name it there as "
            "target_vocabulary."
        )


_Draft = Annotated[str, typer.Argument(help="The draft model: a GGUF, owner/name:file.gguf, or NAME:QUANTIZATION.")]
_Target = Annotated[
    str,
    typer.Argument(help="The large model: a GGUF, a folder, owner/name, or owner/name:file.gguf."),
]
_TargetVocabulary = Annotated[
    Path | None,
    typer.Option(
        help="A GGUF of the target, if the target is a folder and its vocabulary differs from the draft model's."
    ),
]
_Dtype = Annotated[str, typer.Option(help="Precision of the target: auto, float32 or bfloat16.")]


@app.command("check")
def check_command(
    draft: _Draft,
    target: _Target,
    models_dir: ModelsDir = _MODELS,
    target_vocabulary: _TargetVocabulary = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load both models and measure the acceptance.")] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to measure with: one per line, or a .toml file with a list for each category."),
    ] = None,
    each: Annotated[
        int, typer.Option(min=1, help="Number of built-in prompts of each of the six categories, at most 10.")
    ] = 2,
    tokens: Annotated[int, typer.Option(min=2, max=4096, help="Maximum tokens of each output.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="Sampling temperature; 0 is greedy.")] = 0.7,
    engine: Annotated[str, typer.Option(help="Engine of the target: auto, blocks, torch or llama.cpp.")] = "auto",
    dtype: _Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Check whether a draft model and a target fit, and how much memory they need. Only --measure loads weights."""
    from fleet_cli.models_report import as_json as to_json, measured_json, show, show_measured

    chosen = _prompts(prompts, each)
    pair = _checked(draft, target, models_dir, target_vocabulary)
    if not as_json:
        show(pair)
    measured = None
    if measure and not pair.refused:
        how = {"prompts": chosen, "tokens": tokens, "temperature": temperature, "engine": engine, "dtype": dtype}
        measured = _measured(pair, target_vocabulary, **how)
    if as_json:
        print_json(to_json(pair, measured))
    elif measured is not None:
        show_measured(measured_json(measured))
    if pair.refused:
        raise typer.Exit(ExitCode.CHECK_FAILED)


@app.command("try")
def try_command(
    draft: _Draft,
    target: _Target,
    models_dir: ModelsDir = _MODELS,
    target_vocabulary: _TargetVocabulary = None,
    each: Annotated[int, typer.Option(min=1, help="Number of prompts of each of the six categories, at most 10.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, max=4096, help="Maximum tokens of each output.")] = 64,
    engine: Annotated[str, typer.Option(help="Engine of the target: auto, blocks, torch or llama.cpp.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Fetch a pair of models, check it, and measure on this machine what the README claims.

    Acceptance by category of prompts, times of a step, and tokens/s and bytes per token of a device, an edge and a
    broker on this machine. Both models are loaded several times: it takes minutes.
    """
    from fleet_admin.models.facts import ModelFormat
    from fleet_cli.models_report import show, show_claims, show_measured

    end_as_interrupted()
    pair = _checked(draft, target, models_dir, target_vocabulary)
    if not as_json:
        show(pair)
    if pair.refused:
        raise typer.Exit(ExitCode.CHECK_FAILED)
    _require_memory(pair)
    draft, target = pair.draft.source, pair.target.source
    how = ["--engine", engine, "--json"]
    words = ["--target-vocabulary", str(target_vocabulary)] if target_vocabulary is not None else []
    check = ["models", "check", draft, target, *words, "--measure", "--each", str(each), "--tokens", str(tokens)]
    found = {"measured": _report_of(*check, *how)["measured"]}
    if not as_json:
        show_measured(found["measured"])
    environment = {}
    if pair.draft.vocabulary != pair.target.vocabulary:
        environment["FLEET_DEVICE_TARGET_VOCABULARY"] = str((target_vocabulary or Path(target)).absolute())
    chats = pair.draft if pair.draft.vocabulary == pair.target.vocabulary else pair.target
    raw = [] if chats.chat is not None else ["--raw"]
    with tempfile.TemporaryDirectory(prefix="fleet-try-") as folder:
        # The demo takes a file without a folder for the name of a quantization.
        models = ["--draft", str(Path(draft).absolute()), "--target", target, *raw]
        demo = ["demo", "--once", "--devices", "1", *models, "--db", f"sqlite:///{folder}/fleet.sqlite3"]
        found["demo"] = _report_of(*demo, *how, "-", environment=environment)
    chosen = found["measured"]["steps"]["runs_on"].partition(",")[0]
    other = _OTHER.get(chosen, "") if engine == "auto" and pair.target.form is ModelFormat.GGUF else ""
    if other and find_spec(_PACKAGES[other]):
        short = ["--measure", "--each", "1", "--tokens", "2", "--engine", other, "--json"]
        found["other"] = _report_of("models", "check", draft, target, *words, *short)["measured"]
    if as_json:
        print_json(found)
        return
    show_claims(found)
    if "other" in found:
        print(rule_sentence(found["measured"]["steps"], found["other"]["steps"], chosen=chosen, other=other))


_OTHER: Final = {"blocks": "llama.cpp", "llama.cpp": "blocks"}
"""Engine that may be faster than the one that the rule of `auto` chooses for a GGUF on a CPU."""

_PACKAGES: Final = {"blocks": "numba", "llama.cpp": "llama_cpp"}


def rule_sentence(chosen_steps: Mapping[str, Any], other_steps: Mapping[str, Any], *, chosen: str, other: str) -> str:
    """Say whether the engine that `auto` chooses is the faster one here, by steps of one and of five tokens."""
    times = [(chosen_steps[step], other_steps[step]) for step in ("1x1_ms", "1x5_ms")]
    steps = " and ".join(f"{ours:.1f} against {theirs:.1f} ms" for ours, theirs in times)
    ratio = math.prod(theirs / ours for ours, theirs in times) ** (1 / len(times))
    verdict = (
        f"auto is right with {chosen}"
        if ratio >= 1
        else f'auto is wrong here: set engine = "{other}", which is {1 / ratio:.1f} times as fast'
    )
    return f"Steps of one and five tokens take {steps} in {chosen} and {other}: {verdict}."


def _report_of(*words: str, environment: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Run a command of this program in its own process, so that its memory is free afterwards; return its JSON."""
    command = [sys.executable, "-m", "fleet_cli.main", *words]
    environ = {**os.environ, **environment}
    # A session of its own: it gets an interrupt once, from here, and stops the processes that it has started.
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, start_new_session=True) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if process.returncode:
        raise CommandError(f"`{program()} {words[0]}` did not finish, for the reason above.")
    found: dict[str, Any] = json.loads(output)
    return found


def _require_memory(pair: "CheckedPair") -> None:
    from fleet_admin.models.pair import device_need, edge_needs

    free = available_memory()
    edge = min(edge_needs(pair.target), key=lambda need: need.weight_bytes)
    needed = sum(need.weight_bytes + need.kv_bytes for need in (device_need(pair.draft), edge))
    if free is not None and needed > free:
        raise CommandError(
            f"The pair takes {needed / _MEGA:,.0f} MB of memory ({edge.engine}, {edge.number_format}), and "
            f"{free / _MEGA:,.0f} MB are free; take a smaller quantization of the target, or a larger machine."
        )


def _checked(draft: str, target: str, models_dir: Path, target_vocabulary: Path | None) -> "CheckedPair":
    from fleet_admin.models.pair import check_pair

    try:
        return check_pair(draft, target, models_dir=models_dir, target_vocabulary=target_vocabulary)
    except ModuleNotFoundError as error:
        extra = "edge" if error.name == "gguf" else "edge-torch"
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra '{extra}', and with 'device' too "
            "where the vocabularies differ."
        ) from error


def _prompts(file: Path | None, each: int) -> "Sequence[Prompt]":
    from fleet_admin.models.prompts import built_in, read_prompts_by_category, some

    return some(built_in(), each) if file is None else read_prompts_by_category(file.expanduser())


def _measured(pair: "CheckedPair", target_vocabulary: Path | None, **how: Any) -> "MeasuredPair":  # noqa: ANN401
    """Measure a pair, and show the progress; `how` are fields of `AcceptanceMeasurement`."""
    from fleet_admin.models.acceptance import AcceptanceMeasurement, measure

    with Console(stderr=True).status("Loading the target …") as status:
        asked = AcceptanceMeasurement(**how, on_progress=lambda done: status.update(f"{done} …"))
        return measure(pair, asked, target_vocabulary=target_vocabulary)
