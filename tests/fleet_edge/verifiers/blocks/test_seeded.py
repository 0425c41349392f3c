"""Requests with seeds, alone and among others, on small models with states and with experts."""

import random
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.prefix_cache import PrefixCache
from sampling.distribution import shape
from sampling.drawing import coupled_token
from schemas.policy import Mode, SamplingPolicy
from tests.fleet_edge.verifiers.blocks.test_architectures import save_model, verifier_of
from tests.fleet_edge.verifiers.oracle import VOCABULARY

REQUESTS, OTHERS, LENGTH = 100, 16, 12


@dataclass(slots=True)
class Request:
    seed: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    rows: list[NDArray[np.float32]] = field(default_factory=list)

    def take(self, rows: NDArray[np.float32], draft: list[int]) -> int:
        """Draw a token from each row, as long as it is that of the draft; return how many of the draft were right."""
        policy = SamplingPolicy(mode=Mode.COUPLED, temperature=1.0, top_k=0, top_p=1.0, seed=self.seed)
        for place, row in enumerate(rows):
            token = coupled_token(shape(row, policy), self.seed, len(self.prompt) + len(self.tokens))
            self.tokens.append(token)
            self.rows.append(row.copy())
            if place == len(draft) or token != draft[place]:
                break
        return place

    @property
    def known(self) -> list[int]:
        return [*self.prompt, *self.tokens]


def _requests() -> list[Request]:
    draw = random.Random(11)
    begins = [draw.choices(range(VOCABULARY), k=90) for _ in range(4)]
    return [
        Request(
            seed, draw.choice(begins)[: draw.randrange(91)] + draw.choices(range(VOCABULARY), k=draw.randrange(1, 60))
        )
        for seed in range(REQUESTS)
    ]


@pytest.mark.parametrize("name", ["qwen35", "qwen35moe", "qwen3moe", "granite-h", "nemotron-h-moe"])
def test_requests_with_seeds_are_the_same_bits_alone_and_among_others(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    alone, keys = _requests(), count()
    cache = PrefixCache(verifier_of(tmp_path, states=24, pages=400))
    for request in alone:
        key = next(keys)
        cache.open(key)
        while len(request.tokens) < LENGTH:
            new = request.known[cache.computed(key) :]
            request.take(np.array(cache.score([Item(key, new, 1)])), [])
        cache.close(key)
    assert len({tuple(request.tokens) for request in alone}) > REQUESTS // 2

    draw, waiting, running = random.Random(12), _requests(), dict[int, Request]()
    while waiting or running:
        while waiting and len(running) <= OTHERS:
            key, request = next(keys), waiting.pop(0)
            running[key] = request
            cache.open(key)
            cache.expect(key, request.prompt)
            cache.reuse(key)
        items, drafts = list[Item](), dict[int, list[int]]()
        for key, request in running.items():
            new = request.known[cache.computed(key) :]
            if len(new) > 40:
                items.append(Item(key, new[:40], 0))
                continue
            right = alone[request.seed].tokens[len(request.tokens) :][: draw.randrange(5)]
            drafts[key] = right + draw.choices(range(VOCABULARY), k=draw.randrange(3))
            items.append(Item(key, new + drafts[key], 1 + len(drafts[key])))
        assert cache.fits(items)
        found, begin = np.array(cache.score(items)), 0
        for item in items:
            if item.sequence not in drafts:
                continue
            request, draft = running[item.sequence], drafts[item.sequence]
            right = request.take(found[begin : begin + item.rows], draft)
            begin += item.rows
            cache.truncate(item.sequence, cache.computed(item.sequence) - len(draft) + right)
            if len(request.tokens) >= LENGTH:
                assert request.tokens[:LENGTH] == alone[request.seed].tokens
                assert np.array_equal(request.rows[:LENGTH], alone[request.seed].rows)
                cache.close(item.sequence)
                del running[item.sequence]
