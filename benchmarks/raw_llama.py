"""llama.cpp itself: one step of a batch in a program of its own, and texts with its own samplers.

Usage: python -m benchmarks.raw_llama GGUF STREAMS CELLS CONTEXT THREADS FLASH

FLASH is 1 with flash attention, which is the library's default, and 0 without.

It fills STREAMS sequences with CONTEXT tokens, and says `ready`. Then for each line `B T` of its input it computes T
more tokens of the first B sequences in one call, and writes the milliseconds that it took.
"""

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llama_cpp

from fleet_common.llama import library
from schemas.policy import SamplingPolicy

STEP: Final = 512
CHUNK: Final = 128
"""Most new tokens of a step, and most prompt tokens of a step that also decodes, as in an edge's settings."""


@dataclass(frozen=True, slots=True)
class RawPrompt:
    tokens: tuple[int, ...]
    policy: SamplingPolicy
    most: int


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step returned to one client."""

    new: tuple[int, ...]
    ended: bool


class _Context:
    """A model with a stream for each sequence."""

    def __init__(
        self, path: str | Path, *, streams: int, cells: int, threads: int, flash: bool, most: int = STEP
    ) -> None:
        library()  # with its log, so that llama.cpp prints nothing
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = streams * cells, streams
        parameters.n_batch, parameters.n_ubatch = most, STEP
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = False
        parameters.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._native: Any = llama_cpp.llama_init_from_model(self._model, parameters)
        self._memory = llama_cpp.llama_get_memory(self._native)
        self._batch: Any = llama_cpp.llama_batch_init(most, 0, 1)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def _fill(self, entries: Iterable[tuple[int, int, int, bool]]) -> None:
        """Fill the batch: sequence, token, position, and whether logits are wanted."""
        batch, place = self._batch, 0
        for sequence, token, position, wanted in entries:
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            place += 1
        batch.n_tokens = place

    def _decode(self) -> None:
        if llama_cpp.llama_decode(self._native, self._batch) != 0:
            raise RuntimeError("llama.cpp cannot decode the batch")


class RawLlama(_Context):
    """Steps of sequences that are all filled with the same tokens."""

    def __init__(self, path: str, *, streams: int, cells: int, context: int, threads: int, flash: bool) -> None:
        most = max(STEP, streams * min(STEP, cells - context))
        super().__init__(path, streams=streams, cells=cells, threads=threads, flash=flash, most=most)
        self._size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._lengths, self._is_hybrid = [context] * streams, llama_cpp.llama_model_is_hybrid(self._model)
        for begin in range(0, context, STEP):
            self._fill(self._entry(0, at, wanted=False) for at in range(begin, min(begin + STEP, context)))
            self._decode()
        for stream in range(1, streams):
            llama_cpp.llama_memory_seq_cp(self._memory, 0, stream, -1, -1)
        self.step(1, 1)  # llama.cpp copies at the next call

    def step(self, sequences: int, tokens: int) -> float:
        """Compute a step; return its milliseconds. It is rolled back, except in a hybrid, whose sequences grow."""
        lengths = self._lengths[:sequences]
        self._fill(
            self._entry(stream, at, wanted=True)
            for stream, length in enumerate(lengths)
            for at in range(length, length + tokens)
        )
        before = time.perf_counter()
        self._decode()
        llama_cpp.llama_get_logits(self._native)
        taken = time.perf_counter() - before
        for stream, length in enumerate(lengths):
            if self._is_hybrid:
                self._lengths[stream] += tokens
            else:
                llama_cpp.llama_memory_seq_rm(self._memory, stream, length, -1)
        return 1e3 * taken

    def _entry(self, stream: int, position: int, *, wanted: bool) -> tuple[int, int, int, bool]:
        return stream, (stream * 7919 + position * 104_729) % self._size, position, wanted


@dataclass(slots=True)
class _Slot:
    prompt: RawPrompt
    sampler: Any
    computed: int = 0
    latest: int | None = None
    written: int = 0


class RawEngine(_Context):
    """One token of each request in a step, and a piece of the waiting prompts."""

    def __init__(self, path: Path, *, slots: int, cells: int, threads: int, flash: bool = False) -> None:
        super().__init__(path, streams=slots, cells=cells, threads=threads, flash=flash)
        self._slots: dict[int, _Slot] = {}

    def begin(self, slot: int, prompt: RawPrompt) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        self._slots[slot] = _Slot(prompt, _sampler(prompt))

    def step(self) -> Mapping[int, StepOutput]:
        entries: list[tuple[int, int, int, bool]] = []  # slot, token, position, whether its row is wanted
        for number, slot in self._slots.items():
            if slot.latest is not None:
                entries.append((number, slot.latest, slot.computed, True))
                slot.computed += 1
        room = min(CHUNK if entries else STEP, STEP - len(entries))
        for number, slot in self._slots.items():
            if slot.latest is None and room > 0:
                tokens = slot.prompt.tokens
                end = min(len(tokens), slot.computed + room)
                entries += [(number, tokens[at], at, at == len(tokens) - 1) for at in range(slot.computed, end)]
                room -= end - slot.computed
                slot.computed = end
        self._fill(entries)
        self._decode()
        return {number: self._take(number, place) for place, (number, _, _, wanted) in enumerate(entries) if wanted}

    def close(self) -> None:
        for slot in self._slots.values():
            llama_cpp.llama_sampler_free(slot.sampler)
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._native)
        llama_cpp.llama_model_free(self._model)

    def _take(self, number: int, place: int) -> StepOutput:
        slot = self._slots[number]
        slot.latest = llama_cpp.llama_sampler_sample(slot.sampler, self._native, place)
        slot.written += 1
        ended = slot.written >= slot.prompt.most or llama_cpp.llama_vocab_is_eog(self._vocabulary, slot.latest)
        if ended:
            llama_cpp.llama_sampler_free(slot.sampler)
            del self._slots[number]
        return StepOutput((slot.latest,), ended)


def _sampler(prompt: RawPrompt) -> Any:  # noqa: ANN401 - a pointer
    policy = prompt.policy
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for part in (
        llama_cpp.llama_sampler_init_top_k(policy.top_k),
        llama_cpp.llama_sampler_init_top_p(policy.top_p, 1),
        llama_cpp.llama_sampler_init_temp(policy.temperature),
        llama_cpp.llama_sampler_init_dist(policy.seed),
    ):
        llama_cpp.llama_sampler_chain_add(chain, part)
    return chain


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
