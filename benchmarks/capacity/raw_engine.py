"""Raw engine: llama.cpp alone with its own samplers, a stream for each client, as a server over it would run it."""

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llama_cpp

from benchmarks.capacity.serving import CHUNK, STEP, Prompt, Written


@dataclass(slots=True)
class _Slot:
    prompt: Prompt
    sampler: Any
    computed: int = 0
    latest: int | None = None
    written: int = 0


class RawEngine:
    """An `Engine`: one token of each text in a step, and a piece of the prompts that wait.

    Args:
        path: The GGUF.
        slots: Most texts at once.
        cells: Tokens that there is room for in each.
        threads: Of a step.
        flash: Whether with flash attention, which takes longer on a CPU.
    """

    def __init__(self, path: Path, *, slots: int, cells: int, threads: int, flash: bool = False) -> None:
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = slots * cells, slots
        parameters.n_batch = parameters.n_ubatch = STEP
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified = False
        parameters.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context: Any = llama_cpp.llama_init_from_model(self._model, parameters)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch: Any = llama_cpp.llama_batch_init(STEP, 0, 1)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._slots: dict[int, _Slot] = {}

    def begin(self, slot: int, prompt: Prompt) -> None:
        """Begin a text in a slot that has none."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        self._slots[slot] = _Slot(prompt, _sampler(prompt))

    def step(self) -> Mapping[int, Written]:
        """Compute once for all slots; return what each got, those that got nothing left out."""
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
        self._decode(entries)
        return {number: self._take(number, place) for place, (number, _, _, wanted) in enumerate(entries) if wanted}

    def close(self) -> None:
        for slot in self._slots.values():
            llama_cpp.llama_sampler_free(slot.sampler)
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _take(self, number: int, place: int) -> Written:
        slot = self._slots[number]
        slot.latest = llama_cpp.llama_sampler_sample(slot.sampler, self._context, place)
        slot.written += 1
        ended = slot.written >= slot.prompt.most or llama_cpp.llama_vocab_is_eog(self._vocabulary, slot.latest)
        if ended:
            llama_cpp.llama_sampler_free(slot.sampler)
            del self._slots[number]
        return Written((slot.latest,), ended)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for place, (slot, token, position, wanted) in enumerate(entries):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, slot
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama.cpp cannot decode the batch")


def _sampler(prompt: Prompt) -> Any:  # noqa: ANN401 - a pointer
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


def _say_nothing(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    pass


_quiet: Final = llama_cpp.llama_log_callback(_say_nothing)
