"""The layer that proposes tokens: against a computation of its own, after cuts and forks, and in whole requests."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from fleet_edge.verifiers.blocks.gguf_weights import GgufWeights
from fleet_edge.verifiers.blocks.kv import PAGE, Pages, ProcessMemory
from fleet_edge.verifiers.blocks.model import Model, Part
from fleet_edge.verifiers.blocks.mtp import MtpVerifier
from fleet_edge.verifiers.blocks.states import Replay
from fleet_edge.verifiers.blocks.verifier import BlocksVerifier
from fleet_edge.verifiers.contract import Item, TargetInfo, UnsupportedModel
from fleet_edge.verifiers.prefix_cache import PrefixCache
from sampling.distribution import shape
from sampling.drawing import coupled_token
from schemas.policy import Mode, SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.fleet_edge.verifiers.oracle import CONTEXT, VOCABULARY, tiny_target_gguf

KINDS = ["qwen35 mtp", "qwen35 mtp of its own", "qwen35moe mtp"]
TOKENS = [(7 * index + index * index // 5) % VOCABULARY for index in range(150)]
LAYER, HEADS, DIM, ROTATED, USED = 4, 2, 32, 16, 2
Make = Callable[..., MtpVerifier]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ["qwen35", *KINDS]:
        tiny_target_gguf(folder / f"{kind}.gguf", kind=kind)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model(GgufWeights(folder / f"{KINDS[0]}.gguf", mtp=True), threads=1)


@pytest.fixture(scope="module")
def make(model: Model) -> Make:
    def made(*, states: int = 40, pages: int = 64, kind: type[BlocksVerifier] = MtpVerifier) -> BlocksVerifier:
        its = model.geometry
        info = TargetInfo(
            "tiny", Vocabulary.of([f"t{index}" for index in range(VOCABULARY)]), CONTEXT, its.end_tokens,
            batch_invariant=True,
        )  # fmt: skip
        return kind(model, info, ProcessMemory(its.pools, pages, its.states(states)))

    return made  # type: ignore[return-value]


Array = NDArray[np.float64]


def _computed(path: Path, rows: Array, tokens: Sequence[int]) -> tuple[Array, Array]:
    """Return logits and rows of the layer in float64, given the model's rows of the tokens before each."""
    found = {each.name: np.array(each.data, np.float64) for each in GGUFReader(path).tensors}

    def its(name: str) -> Array:
        return found[f"blk.{LAYER}.{name}.weight"]

    def normal(x: Array, weight: Array) -> Array:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * weight

    def turned(x: Array) -> Array:
        half = ROTATED // 2
        angles = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
        first, second, rest = x[..., :half], x[..., half:ROTATED], x[..., ROTATED:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, first * sin + second * cos, rest], -1)

    embedded = found.get(f"blk.{LAYER}.nextn.embed_tokens.weight", found["token_embd.weight"])[list(tokens)]
    both = [normal(embedded, its("nextn.enorm")), normal(rows, its("nextn.hnorm"))]
    x = np.concatenate(both, 1) @ its("nextn.eh_proj").T
    y = normal(x, its("attn_norm"))
    queries, gates = np.split((y @ its("attn_q").T).reshape(-1, HEADS, 2 * DIM), 2, axis=2)
    queries = turned(normal(queries, its("attn_q_norm")))
    keys = turned(normal((y @ its("attn_k").T)[:, None], its("attn_k_norm")))
    scores = np.einsum("ihd,jd->hij", queries, keys[:, 0]) / DIM**0.5
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    attended = np.einsum("hij,jd->ihd", shares, y @ its("attn_v").T) / (1 + np.exp(-gates))
    x = x + attended.reshape(len(x), -1) @ its("attn_output").T
    y = normal(x, its("post_attention_norm"))

    def fed(x: Array, gate: Array, up: Array, down: Array) -> Array:
        gates = x @ gate.T
        return (gates / (1 + np.exp(-gates)) * (x @ up.T)) @ down.T

    names = "ffn_gate", "ffn_up", "ffn_down"
    if f"blk.{LAYER}.ffn_gate_inp.weight" in found:
        more = fed(y, *(its(f"{name}_shexp") for name in names))
        more /= 1 + np.exp(-y @ its("ffn_gate_inp_shexp").reshape(-1, 1))
        routed, experts = np.exp(y @ its("ffn_gate_inp").T), [its(f"{name}_exps") for name in names]
        for row, shares in enumerate(routed):
            chosen = np.argsort(shares)[-USED:]
            for expert in chosen:
                share = shares[expert] / shares[chosen].sum()
                more[row] += share * fed(y[row], *(each[expert] for each in experts))
        x = x + more
    else:
        x = x + fed(y, *map(its, names))
    own_norm = found.get(f"blk.{LAYER}.nextn.shared_head_norm.weight", found["output_norm.weight"])
    head = found.get(f"blk.{LAYER}.nextn.shared_head_head.weight", found["token_embd.weight"])
    rows = normal(x, own_norm)
    return rows @ head.T, rows


@pytest.mark.parametrize("kind", KINDS)
def test_proposed_logits_are_those_of_the_layer_up_to_rounding(kind: str, folder: Path) -> None:
    path = folder / f"{kind}.gguf"
    model = Model(GgufWeights(path, mtp=True), threads=1)
    its = model.geometry
    memory, size = ProcessMemory(its.pools, 8, its.states(1)), len(TOKENS)
    pages = Pages(memory)
    pages.reserve(0, 0, size + 2)
    logits = model.forward([Part(pages.table(0), 0, TOKENS, size, Replay(settled=size))], pages, memory.states).copy()
    rows = model.hidden.astype(np.float64)
    embedding = next(each.data for each in GGUFReader(path).tensors if each.name == "token_embd.weight")
    assert np.abs(rows @ embedding.T - logits).max() < 0.05 * logits.std()

    tokens, before, found = [*TOKENS], np.concatenate([np.zeros((1, its.hidden)), rows]), list[NDArray[np.float32]]()
    for token in (5, 9):
        part = Part(pages.table(0), len(tokens), [token], 1, before=before[-1:].astype(np.float32))
        proposed, row = model.propose([part], pages)
        found.append(proposed[0].copy())
        tokens.append(token)
        wanted, wanted_rows = _computed(path, before, tokens)
        assert np.sqrt(np.square(found[-1] - wanted[-1]).mean()) < 0.03 * wanted[-1].std()
        assert np.abs(row[0] - wanted_rows[-1]).max() < 0.1 * wanted_rows[-1].std()
        before = np.concatenate([before, row])


def test_the_target_is_the_same_bits_with_the_layer_and_without(folder: Path, model: Model) -> None:
    rows = []
    for each in (model, Model(GgufWeights(folder / f"{KINDS[0]}.gguf"), threads=1)):
        its = each.geometry
        memory = ProcessMemory(its.pools, 8, its.states(1))
        pages = Pages(memory)
        pages.reserve(0, 0, len(TOKENS))
        part = Part(pages.table(0), 0, TOKENS, len(TOKENS), Replay(settled=len(TOKENS)))
        rows.append(each.forward([part], pages, memory.states).copy())
    assert np.array_equal(*rows)
    assert len(model.geometry.pools) == 1
    assert model.geometry.pools[0].layers == its.pools[0].layers + 1


class _Fresh:
    """Proposals of sequences that are computed from their beginning, in one step and alone."""

    def __init__(self, verifier: MtpVerifier) -> None:
        self._verifier = verifier

    def of(self, tokens: Sequence[int], proposed: Sequence[int]) -> NDArray[np.float32]:
        """Return the rows about what follows the last token and each proposed one."""
        self._verifier.open(0)
        self._verifier.score([Item(0, tokens[:-1], 0)])
        behind = [tokens[-1], *proposed]
        found = [self._verifier.propose({0: behind[: end + 1]})[0].copy() for end in range(len(behind))]
        self._verifier.close(0)
        return np.stack(found)


@pytest.mark.parametrize("seed", range(3))
def test_proposals_are_the_same_bits_after_cuts_and_forks_and_in_any_batch(seed: int, make: Make) -> None:
    draw, verifier, fresh = random.Random(seed), make(), _Fresh(make())
    texts, numbers, checked = dict[int, list[int]](), count(10), 0
    for _ in range(60):
        if len(texts) < 4:
            number, new = next(numbers), draw.choices(range(VOCABULARY), k=draw.randint(2, 2 * PAGE))
            verifier.open(number)
            verifier.score([Item(number, new[:-1], 0)])
            texts[number] = new
        elif draw.random() < 0.15:
            source, number = draw.choice(list(texts)), next(numbers)
            verifier.fork(number, source, len(texts[source]) - 1)
            texts[number] = [*texts[source][:-1], draw.randrange(VOCABULARY)]
        chosen = draw.sample(list(texts), draw.randint(1, len(texts)))
        behind = {each: texts[each][-1:] for each in chosen}
        lengths = {each: draw.randrange(5) for each in chosen}
        found: dict[int, list[NDArray[np.float32]]] = {each: [] for each in chosen}
        for step in range(max(lengths.values()) + 1):
            running = {each: behind[each] for each in chosen if lengths[each] >= step}
            for each, row in zip(running, verifier.propose(running), strict=True):
                found[each].append(row.copy())
                behind[each] = [*behind[each], draw.randrange(VOCABULARY)]
        for each in chosen:
            assert np.array_equal(np.stack(found[each]), fresh.of(texts[each], behind[each][1:-1]))
            checked += 1
        # As the scheduler: what was proposed is computed, and some of it stays.
        drafts = {each: behind[each][: 1 + lengths[each]] for each in chosen}
        verifier.score([Item(each, tokens, len(tokens)) for each, tokens in drafts.items()])
        for each, tokens in drafts.items():
            kept = draw.randint(1, len(tokens))
            verifier.truncate(each, verifier.computed(each) - len(tokens) + kept)
            texts[each] += [*tokens[1:kept], draw.randrange(VOCABULARY)]
            if len(texts[each]) > CONTEXT - 10:
                verifier.close(each)
                del texts[each]
    assert checked > 60


def test_pages_of_proposals_that_were_not_computed_are_free_again(make: Make) -> None:
    verifier = make(pages=6)
    verifier.open(1)
    verifier.score([Item(1, TOKENS[: PAGE - 1], 0)])
    verifier.propose({1: [5]})
    verifier.propose({1: [5, 6]})
    assert verifier._pages.used == 2
    verifier.score([Item(1, [5], 1)])
    assert verifier._pages.used == 1
    verifier.propose({1: [5]})
    verifier.close(1)
    assert verifier._pages.used == 0
    assert not verifier._rows
    assert not verifier._proposed


def test_a_proposal_leaves_what_a_fork_shares_alone(make: Make) -> None:
    verifier, fresh = make(), _Fresh(make())
    verifier.open(1)
    verifier.score([Item(1, TOKENS[:20], 1)])
    verifier.fork(2, 1, 20)
    verifier.propose({2: [3]})
    verifier.propose({2: [3, 4]})
    verifier.score([Item(1, [7, 8, 9], 1)])
    verifier.propose({2: [3]})
    assert np.array_equal(verifier.propose({1: [5]})[0], fresh.of([*TOKENS[:20], 7, 8, 9, 5], [])[0])


@dataclass(slots=True)
class _Request:
    seed: int
    prompt: list[int]
    temperature: float
    tokens: list[int] = field(default_factory=list)
    rows: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def known(self) -> list[int]:
        return [*self.prompt, *self.tokens]

    def drawn(self, row: NDArray[np.float32], behind: int = 0) -> int:
        """Return the token that follows the known ones, and some behind them."""
        policy = SamplingPolicy(mode=Mode.COUPLED, temperature=self.temperature, top_k=0, top_p=1.0, seed=self.seed)
        return coupled_token(shape(row, policy), self.seed, len(self.known) + behind)

    def take(self, rows: NDArray[np.float32], proposed: Sequence[int]) -> int:
        """Draw tokens as long as they are those that were proposed; return how many of these were right."""
        for place, row in enumerate(rows):
            self.tokens.append(self.drawn(row))
            self.rows.append(row.copy())
            if place == len(proposed) or self.tokens[-1] != proposed[place]:
                break
        return place


def _requests(temperature: float) -> list[_Request]:
    draw = random.Random(3)
    prompts = [draw.choices(range(VOCABULARY), k=draw.randint(2, 90)) for _ in range(17)]
    return [_Request(seed, prompt, temperature) for seed, prompt in enumerate(prompts)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_requests_are_the_same_bits_with_proposals_among_others_and_without_alone(
    temperature: float, make: Make
) -> None:
    alone, length = _requests(temperature), 20
    for each in alone:
        verifier = make(kind=BlocksVerifier)
        verifier.open(1)
        while len(each.tokens) < length:
            each.take(verifier.score([Item(1, each.known[verifier.computed(1) :], 1)]), [])

    requests, cache, draw, right = _requests(temperature), PrefixCache(make(pages=200)), random.Random(5), 0
    for each in requests:
        cache.open(each.seed)
        cache.score([Item(each.seed, each.prompt[:-1], 0)])
    while running := [each for each in requests if len(each.tokens) < length]:
        behind = {each.seed: each.known[-1:] for each in running}
        for place in range(draw.randrange(4)):
            for each, row in zip(running, cache.propose(behind), strict=True):
                behind[each.seed] = [*behind[each.seed], each.drawn(row, place)]
        logits = cache.score([Item(seed, tokens, len(tokens)) for seed, tokens in behind.items()]).copy()
        for each in running:
            tokens = behind[each.seed]
            right += each.take(logits[: len(tokens)], tokens[1:])
            logits = logits[len(tokens) :]
            cache.truncate(each.seed, len(each.known) - 1)
    assert right > 0
    for one, other in zip(alone, requests, strict=True):
        assert other.tokens[:length] == one.tokens
        assert np.array_equal(np.stack(other.rows[:length]), np.stack(one.rows))


def test_tokens_that_are_computed_again_keep_what_the_layer_has_of_them(make: Make) -> None:
    verifier = make()
    verifier.open(1)
    for begin in range(0, 150, 50):  # the second leaves a state behind the first page
        verifier.score([Item(1, TOKENS[begin : begin + 50], 1)])
    verifier.fork(2, 1, 90)
    assert verifier.reach(2, 90) == PAGE
    verifier.score([Item(2, [5], 1)])
    (keys,) = verifier._pages.keys
    one, other = (keys[verifier._pages.table(sequence)[1], -1] for sequence in (1, 2))
    assert np.array_equal(one[..., : 90 - PAGE], other[..., : 90 - PAGE])
    assert not np.array_equal(one[..., 90 - PAGE], other[..., 90 - PAGE])


def test_a_file_without_the_layer_or_with_a_damaged_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="nextn_predict_layers"):
        GgufWeights(folder / "qwen35.gguf", mtp=True)
    path = tmp_path / "damaged.gguf"
    content = (folder / f"{KINDS[0]}.gguf").read_bytes()
    path.write_bytes(content.replace(b"nextn.hnorm", b"nextn.xnorm"))
    assert GgufWeights(path).geometry.mtp is None
    with pytest.raises(UnsupportedModel, match="hnorm"):
        GgufWeights(path, mtp=True).require_shapes()
