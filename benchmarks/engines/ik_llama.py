"""ik_llama.cpp as a rival: steps of one sequence by its own llama-bench, built once from a source archive.

llama-bench computes the new tokens of an empty sequence, and logits of the last one alone: less than a step of ours.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.harness import say
from benchmarks.processes import BenchError, call, venv
from benchmarks.serving import BUILD

_REPETITIONS: Final = 5


def built(archive: Path, tools: Path) -> Path:
    """Return llama-bench of a source archive (tar); it is built if it is missing."""
    if not archive.is_file():
        raise BenchError(f"There is no file {archive}; give --ik-llama a tar archive of ik_llama.cpp's source.")
    with archive.open("rb") as file:
        program = tools / f"llama-bench-{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"
    if program.exists():
        return program
    programs = venv(tools / "build", *BUILD)
    say(f"Building {program}, once: half an hour of a core or more")
    with tempfile.TemporaryDirectory(dir=tools) as folder:
        work = Path(folder)
        try:
            with tarfile.open(archive) as source:
                source.extractall(work, filter="data")
            root = next(path.parent for path in (*work.glob("CMakeLists.txt"), *work.glob("*/CMakeLists.txt")))
        except (tarfile.TarError, StopIteration):
            raise BenchError(f"{archive} is no tar archive of a source with CMakeLists.txt.") from None
        # Most of the time goes to its kernels of flash attention, without which it cannot be linked.
        flags = ["-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF",
                 "-DGGML_IQK_FA_ALL_QUANTS=OFF", f"-DCMAKE_MAKE_PROGRAM={programs}/ninja"]  # fmt: skip
        call(programs / "cmake", "-S", root, "-B", work / "build", "-G", "Ninja", *flags)
        call(programs / "cmake", "--build", work / "build", "--target", "llama-bench")
        shutil.move(work / "build" / "bin" / "llama-bench", program)
    return program


def step_ms(program: Path, model: Path, tokens: Sequence[int], *, threads: int) -> dict[int, float]:
    """Return the milliseconds of a step of one sequence with each number of new tokens."""
    usage = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    repacks = ["-rtr", "1"] if "-rtr" in usage.stdout + usage.stderr else []
    command = [program, "-m", model, "-t", threads, "-n", 0, "-fa", 0, "-r", _REPETITIONS, "-o", "json", *repacks]
    run = subprocess.run(
        [*map(str, command), "-p", ",".join(map(str, tokens))], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise BenchError(f"{program} has failed over {model}: {run.stderr.strip()[-500:]}")
    return {row["n_prompt"]: row["avg_ns"] / 1e6 for row in json.loads(run.stdout)}
