"""Trial of a model file in a process of its own, because some damaged files make llama.cpp end its process.

llama.cpp asserts much of what a file says. So a file is first loaded, and a token computed, in a process with limits. A
passed trial is recorded with the file's size and time and llama.cpp's version, so that later starts skip it.
"""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

from fleet_common.host import limit_memory, private_folder, python_path, state_folder, write_atomically
from fleet_common.llama import GGUF_MAGIC, GgufFile, LlamaError, library, native_reason
from schemas.errors import FleetError

_PROGRAM: Final = "fleet_common.llama_trial"
_CPU_S: Final = 60
_BYTES_A_CPU_S: Final = 20_000_000
"""Processor time beyond that: a slow processor takes a tenth of this time for a token."""

_WAIT_FACTOR: Final = 10
"""Time-out as a multiple of the processor time: a busy machine or a slow disk is not the file's fault."""

_MEMORY_BYTES: Final = 1 << 30
"""Memory beyond the size of the file, for the vocabulary and buffers. Weights are mapped, and do not count."""

_REFUSED: Final = 3
_CONTEXT: Final = 64
_TEXT: Final = "A text, 1 é."


def require_trial(path: Path, *, error: type[FleetError]) -> None:
    """Try a model file that has not passed a trial; raise `error` if llama.cpp crashes or cannot load it.

    A file that is missing or no GGUF is left to `GgufFile`.
    """
    try:
        version = library().__version__
    except LlamaError as missing:
        raise error(str(missing)) from None
    try:
        with path.open("rb") as file:
            begin, its = file.read(len(GGUF_MAGIC)), os.fstat(file.fileno())
    except OSError:
        return
    if begin != GGUF_MAGIC:
        return
    identity = f"{its.st_size} {its.st_mtime_ns} {version}".encode()
    record = _record_of(path)
    with suppress(OSError):
        if record is not None and record.read_bytes() == identity:
            return
    reason = _failure(path, its.st_size)
    if reason is not None:
        raise error(reason)
    if record is not None:
        with suppress(OSError):  # the next start tries again
            write_atomically(record, identity)


def _record_of(path: Path) -> Path | None:
    states = state_folder()
    folder = states and private_folder(states / "trials")
    return folder and folder / sha256(os.fsencode(path.resolve())).hexdigest()[:16]


def _failure(path: Path, size: int) -> str | None:
    """Run the trial in a child; return what is wrong with the file, None if it has passed."""
    cpu_s = _CPU_S + size // _BYTES_A_CPU_S
    hidden = {"CUDA_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""}  # a GPU's memory may be in use
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", _PROGRAM, str(path.absolute()), str(cpu_s), str(size + _MEMORY_BYTES)],
            # Otherwise an assertion starts a debugger, where there is one.
            env=os.environ | hidden | {"PYTHONPATH": python_path(), "GGML_NO_BACKTRACE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=cpu_s * _WAIT_FACTOR,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _crashed(path, f"no end after {cpu_s * _WAIT_FACTOR} s")
    except OSError as error:
        return f"A trial run with {path} cannot be started: {error.strerror or error}; try again."
    if done.returncode == _REFUSED:
        return done.stdout.decode("utf-8", "replace")
    if done.returncode == -signal.SIGXCPU:
        return _crashed(path, f"more than {cpu_s} s of processor time")
    if done.returncode < 0:
        return _crashed(path, signal.Signals(-done.returncode).name)
    return None if done.returncode == 0 else _crashed(path, f"exit status {done.returncode}")


def _crashed(path: Path, what: str) -> str:
    return f"llama.cpp failed in a trial run with {path} ({what}); fetch the file again, or choose another model."


def main(arguments: Sequence[str]) -> int:
    """Try the file that the arguments name, with limits of processor seconds and of bytes."""
    path, cpu_s, memory = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    library()
    limit_memory(memory)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    try:
        _try(path)
    except FleetError as error:
        sys.stdout.write(str(error))
        return _REFUSED
    return 0


def _try(path: Path) -> None:
    file = GgufFile(path, vocabulary_only=True)
    file.encode(_TEXT)
    for token in range(file.vocabulary.size):
        file.piece(token)
    file.close()
    native = library()
    parameters = native.llama_model_default_params()
    parameters.use_extra_bufts = False  # no repacked copy of the weights
    parameters.n_gpu_layers = 0
    native_reason()
    model = native.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise LlamaError(f"llama.cpp cannot load {path}: {native_reason()}; fetch it again, or choose another.")
    if native.llama_model_has_encoder(model):
        return  # refused by the caller, with a better reason
    sizes = native.llama_context_default_params()
    sizes.n_ctx = sizes.n_batch = sizes.n_ubatch = _CONTEXT
    sizes.n_threads = sizes.n_threads_batch = 1
    sizes.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_DISABLED
    sizes.swa_full = True
    context = native.llama_init_from_model(model, sizes)
    if not context:
        raise LlamaError(f"llama.cpp cannot compute {path}: {native_reason()}; choose another model.")
    native.llama_decode(context, native.llama_batch_get_one((native.llama_token * 1)(0), 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
