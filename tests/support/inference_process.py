"""Inference server process: the stand-in for vLLM over the language of the scripted edge, to be killed."""

import argparse
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleet_common.logs import Event, EventStream, read_events
from tests.support.inference_server import InferenceServer
from tests.support.scripted_language import CONTEXT, LANGUAGE
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.waiting import PATIENCE_S

_SPARE: Final = 1  # position that a server keeps for itself
_STOP_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class ServerProcess:
    process: "subprocess.Popen[str]"
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        """Kill the server, as a power failure does; its port is free afterwards."""
        self.process.kill()
        self.process.wait(PATIENCE_S)


@contextmanager
def inference_process(*, port: int = 0) -> Iterator[ServerProcess]:
    command = [sys.executable, "-m", "tests.support.inference_process", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        online = next(event for event in read_events(process.stdout) if event["event"] == Event.ONLINE)
        yield ServerProcess(process, str(online["url"]))
    finally:
        process.send_signal(signal.SIGCONT)  # where it was stopped
        process.terminate()
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            # A stopped server first computes all waiting requests.
            process.kill()
            process.communicate()


def write_tokenizer(folder: Path) -> Path:
    """Write the tokenizer files that an edge needs next to such a server, and return the folder."""
    vocabulary = {word: token for token, word in enumerate(LANGUAGE.words)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": []}))
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; writes the event `online` with the address on standard output when ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="on loopback (default: a free one)")
    parser.add_argument("--key", default="", help="that requests must have")
    arguments = parser.parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    words = LANGUAGE.words
    verifier = ScriptedVerifier(LANGUAGE, words, context=CONTEXT)
    with InferenceServer(
        verifier,
        words,
        port=arguments.port,
        key=arguments.key,
        max_model_len=CONTEXT + _SPARE,
    ) as server:
        EventStream(sys.stdout, outlives_reader=True).write(Event.ONLINE, url=server.url)
        stop.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
