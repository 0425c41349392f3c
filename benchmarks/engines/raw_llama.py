"""Raw llama.cpp: the library itself on the same batch; a program of its own, with nothing of ours in it.

Usage: python -m benchmarks.engines.raw_llama GGUF STREAMS CELLS CONTEXT THREADS FLASH

FLASH is 1 with flash attention, which is the library's default, and 0 without.

It fills STREAMS sequences with CONTEXT tokens, and says `ready`. Then for each line `B T` of its input it computes T
more tokens of the first B sequences in one call, and writes the milliseconds that it took.
"""

import ctypes
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp

BATCH = 512


class RawLlama:
    """One context with a stream for each sequence, all filled with the same text."""

    def __init__(self, path: str, *, streams: int, cells: int, context: int, threads: int, flash: bool) -> None:
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = streams * cells, streams
        parameters.n_batch = max(BATCH, streams * (cells - context))
        parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = False
        parameters.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._native: Any = llama_cpp.llama_init_from_model(self._model, parameters)
        self._memory = llama_cpp.llama_get_memory(self._native)
        self._batch: Any = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)
        self._size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context = context
        for begin in range(0, context, BATCH):
            end = min(begin + BATCH, context)
            self._fill([(0, position) for position in range(begin, end)], wanted=False)
            self._decode()
        for stream in range(1, streams):
            llama_cpp.llama_memory_seq_cp(self._memory, 0, stream, -1, -1)
        self.step(1, 1)  # llama.cpp copies at the next call

    def step(self, sequences: int, tokens: int) -> float:
        """Compute a step, and forget it; return the milliseconds that it took."""
        positions = range(self._context, self._context + tokens)
        self._fill([(stream, position) for stream in range(sequences) for position in positions], wanted=True)
        before = time.perf_counter()
        self._decode()
        llama_cpp.llama_get_logits(self._native)
        taken = time.perf_counter() - before
        for stream in range(sequences):
            llama_cpp.llama_memory_seq_rm(self._memory, stream, self._context, -1)
        return 1e3 * taken

    def _fill(self, entries: Sequence[tuple[int, int]], *, wanted: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for place, (stream, position) in enumerate(entries):
            batch.token[place], batch.pos[place] = (stream * 7919 + position * 104_729) % self._size, position
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, stream, wanted

    def _decode(self) -> None:
        if llama_cpp.llama_decode(self._native, self._batch) != 0:
            raise RuntimeError("llama.cpp cannot decode the batch")


def _say_nothing(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    pass


_quiet = llama_cpp.llama_log_callback(_say_nothing)


def main(arguments: Sequence[str]) -> None:
    path, *numbers = arguments
    streams, cells, context, threads, flash = map(int, numbers)
    engine = RawLlama(path, streams=streams, cells=cells, context=context, threads=threads, flash=bool(flash))
    print("ready", flush=True)
    for line in sys.stdin:
        sequences, tokens = map(int, line.split())
        print(engine.step(sequences, tokens), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
