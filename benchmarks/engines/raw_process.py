"""Raw engine in a process of its own, driven step by step."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from benchmarks.engines.timing import Step
from fleet_edge.verifiers.contract import VerifierError

__all__ = ["raw_llama"]

# What we set for our own processes: whoever runs the library alone does not.
_OURS: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@contextmanager
def raw_llama(path: Path, *, streams: int, cells: int, context: int, threads: int, flash: bool) -> Iterator[Step]:
    """Run raw llama.cpp; yield its step.

    Args:
        path: The GGUF.
        streams: Sequences that there are.
        cells: Tokens that there is room for in each.
        context: Tokens that each has.
        threads: Of a step.
        flash: Whether with flash attention.

    Raises:
        VerifierError: It has ended.
    """
    numbers = map(str, (streams, cells, context, threads, int(flash)))
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engines.raw_llama", str(path), *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in _OURS},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        commands, answers = process.stdin, process.stdout

        def answer() -> str:
            line = answers.readline()
            if not line:
                raise VerifierError(
                    f"Raw llama.cpp has ended over {path}, most likely for want of memory: measure fewer --sequences, "
                    "or a smaller --contexts."
                )
            return line

        def step(sequences: int, tokens: int) -> float:
            with suppress(BrokenPipeError):  # it has ended, which its answer tells
                print(sequences, tokens, file=commands, flush=True)
            return float(answer())

        try:
            answer()
            yield step
        finally:
            process.kill()
