"""Long prompts at once, and an edge that is killed, with a target of a real size (seconds).

Devices send unlike prompts at once, without a draft model or, with `--acceptance`, with played drafts as in
`serving`; each reports how long its first token took, and how often the edge has said how far it is. Then all ask
again, the edge is killed (SIGKILL) in the middle of their outputs, and started again at once. Outputs must be those
of an undisturbed run; the time to the next token is that of the start, if nothing but a page is computed again. With
`--damage` it is killed once more for each kind, and what it has kept is damaged before the next start: files of pages
and of packed weights that a power cut has cut off, with flipped bits, or of an older model. The target has random
weights in the shape of Qwen2.5, as in `large`. At 7b with the defaults it takes four minutes, of which the first
start packs the weights; a kind of damage takes two more.
"""

import argparse
import contextlib
import os
import random
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from benchmarks.harness import Bench, SuiteReport, at_most, number_of, say, table
from benchmarks.large.models import FIRST, add_model, made
from benchmarks.large.played_device import load_played
from fleet_device import Device
from fleet_edge.settings import EdgeSettings, KeptIn
from fleet_edge.verifiers.blocks_engine import kept_pages_path, kept_weights_path
from tests.support.processes import Program

_NEXT_S: Final = 7.0
_WARM_S: Final = 5.0
_UNDER_WAY_S: Final = 0.3
_PIECES: Final = 4  # of each output, after which the edge is killed
_START_S: Final = 900.0
_VOCABULARY: Final = 40_000  # of prompts


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--devices", type=number_of(int, 1), default=4, help="(default: %(default)s)")
    parser.add_argument("--prompt", type=number_of(int, 1), default=1000, help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 16), default=48, help="of an output (default: %(default)s)")
    parser.add_argument("--acceptance", type=float, metavar="A", help="play drafts, of which this share is right")
    parser.add_argument("--token-ms", type=float, default=15.0, help="of a played draft token (default: %(default)s)")
    parser.add_argument("--damage", choices=_DAMAGES, nargs="+", default=[], metavar="KIND", help=", ".join(_DAMAGES))


@dataclass(slots=True)
class _Output:
    """An output with the times of its pieces (monotonic seconds), and messages of progress."""

    began: float
    tokens: tuple[int, ...] = ()
    times: list[float] = field(default_factory=list)
    progress: list[str] = field(default_factory=list)

    def after(self, moment: float) -> float:
        """Return the seconds from a moment to the next piece that was not under way then."""
        return next(at for at in self.times if at > moment + _UNDER_WAY_S) - moment


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    bench.share_cores()
    target = made(bench)
    if options.damage:  # files that no other edge uses
        os.environ["CACHE_DIRECTORY"] = str(bench.new_folder())
    kept = kept_pages_path(EdgeSettings(fleet=bench.fleet, kv_kept=KeptIn.MEMORY))
    with bench.broker() as broker, contextlib.ExitStack() as stack:
        if kept is not None:
            kept.unlink(missing_ok=True)  # or a second run would find the prompts of the first
            stack.callback(kept.unlink, missing_ok=True)
        start = _starter(bench, broker.port, target)
        edge, _ = start()

        def end() -> None:
            edge.end()

        stack.callback(end)
        time.sleep(_keeping_s(target))  # the packed weights are written meanwhile
        edge.end()
        edge, warm_s = start()
        devices = [stack.enter_context(_device(bench, broker.port, target, n)) for n in range(options.devices)]
        say(f"{options.devices} prompts of {options.prompt} tokens at once")
        first = _ask_all(devices, options, lambda _outputs: None)
        wanted = _ask_all(devices, options, lambda _outputs: None)
        killed_at, damage, rows = 0.0, "", list[dict[str, Any]]()

        def kill(outputs: Sequence[_Output]) -> None:
            nonlocal edge, killed_at
            while any(len(each.times) < _PIECES for each in outputs):
                time.sleep(0.02)
            edge.kill()
            killed_at = time.monotonic()
            say(f"The edge is killed, and started again {damage}".rstrip())
            if damage:
                _damage(damage, kept, kept_weights_path(target))
            edge, _ = start()

        for damage in ("", *options.damage):
            if damage:
                time.sleep(_keeping_s(target))
            again = _ask_all(devices, options, kill)
            rows += [
                {
                    "damage": damage,
                    "device": number,
                    "first_token_s": one.times[0] - one.began,
                    "progress": len(one.progress),
                    "next_token_s": after.after(killed_at),
                    "same": after.tokens == undisturbed.tokens,
                }
                for number, (one, undisturbed, after) in enumerate(zip(first, wanted, again, strict=True))
            ]
    table(
        rows,
        {"damage": "", "device": "d", "first_token_s": ".1f", "progress": "d", "next_token_s": ".1f", "same": ""},
        title=f"{options.shape} {options.file}, {options.devices} prompts of {options.prompt} tokens",
    )
    print(f"Start from kept weights: {warm_s:.1f} s.")
    wrong = [
        f"The output of device {row['device']} is another one after the restart." for row in rows if not row["same"]
    ]
    next_s = max(float(row["next_token_s"]) for row in rows if not row["damage"])
    goals = [
        at_most("start from kept weights, s", warm_s, _WARM_S),
        at_most("next token after a kill, s", next_s, _NEXT_S),
    ]
    return SuiteReport(rows, goals, wrong=wrong, more={"warm_s": warm_s})


def _damage(damage: str, *paths: Path | None) -> None:
    for path in paths:
        if path is not None and path.exists():  # weights are not kept where the disk is nearly full
            _DAMAGES[damage](path)


def _starter(bench: Bench, port: int, target: Path) -> Callable[[], tuple[Program, float]]:
    """Return a function that starts the one edge, and returns it and the seconds until it is online."""
    folder = bench.new_folder()
    words = ["edge", "run", "--events", "--fleet", bench.fleet, "--port", str(port), "--target", str(target)]
    words += ["--db", f"sqlite:///{folder}/log.sqlite3", "--spool", f"{folder}/spool"]
    kept = {"FLEET_EDGE_KV_KEPT": "memory"}

    def start() -> tuple[Program, float]:
        began = time.monotonic()
        edge = Program("fleet_cli.main", words, cores=bench.cores.edge, log=folder / "edge", environment=kept)
        edge.wait_for('"online"', timeout_s=_START_S)
        return edge, time.monotonic() - began

    return start


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def _flip(path: Path) -> None:
    draw = random.Random(path.stat().st_size)
    with path.open("r+b") as file:
        for place in (draw.randrange(path.stat().st_size) for _ in range(_FLIPPED)):
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 16]))


def _make_older(path: Path) -> None:
    """Give a file another identity: pages have it in their first bytes, weights in an index at the end."""
    with path.open("r+b") as file:
        head = file.read(_HEAD)
        if head.startswith(b"pages"):
            file.seek(0)
            file.write(re.sub(rb"[0-9a-f]{16}", b"0" * 16, head, count=1))
            return
        file.seek(-_TRAILER.size, os.SEEK_END)
        magic, length, _ = _TRAILER.unpack(file.read())
        file.seek(-_TRAILER.size - length, os.SEEK_END)
        index = re.sub(rb'("identity": )"[0-9a-f]*"', rb'\1"0"', file.read(length))
        file.seek(-_TRAILER.size - length, os.SEEK_END)
        file.write(index + _TRAILER.pack(magic, len(index), sha256(index).digest()))
        file.truncate()


_FLIPPED: Final = 1_000
_TRAILER: Final = struct.Struct("<8sQ32s")  # of packed weights: magic, bytes of the index, its SHA-256
_HEAD: Final = 256
_DAMAGES: Final = {"cut": _cut, "flipped": _flip, "older": _make_older}


def _keeping_s(target: Path) -> float:
    """Return a time in which a slow disk takes the packed weights."""
    return 5.0 + target.stat().st_size / 100e6


@contextlib.contextmanager
def _device(bench: Bench, port: int, target: Path, number: int) -> Iterator[Device]:
    options = bench.options
    settings: dict[str, Any] = {"fleet": bench.fleet, "broker": {"host": "127.0.0.1", "port": port}}
    if options.acceptance is None:
        settings["drafter"] = "none"
    play = partial(load_played, acceptance=options.acceptance, token_ms=options.token_ms)
    with contextlib.ExitStack() as stack:
        if options.acceptance is not None:
            stack.enter_context(patch("fleet_device.device.load_drafter", play))
        yield stack.enter_context(Device.from_config(device=f"device-{number}", model=str(target), **settings))


def _ask_all(
    devices: Sequence[Device], options: argparse.Namespace, meanwhile: Callable[[Sequence[_Output]], None]
) -> list[_Output]:
    outputs = [_Output(time.monotonic()) for _ in devices]

    def ask(number: int) -> None:
        draw, output = random.Random(number), outputs[number]
        prompt = [draw.randrange(FIRST, _VOCABULARY) for _ in range(options.prompt)]
        stream = devices[number].stream(prompt, max_new_tokens=options.tokens, temperature=0.0)
        stream.on_wait = output.progress.append
        for piece in stream:
            output.times += [time.monotonic()] if piece else []
        output.tokens = stream.result().tokens

    with ThreadPoolExecutor(len(devices)) as pool:
        asked = [pool.submit(ask, number) for number in range(len(devices))]
        meanwhile(outputs)
        for each in asked:
            each.result()
    return outputs
