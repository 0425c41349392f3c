import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fleet_edge.verifiers.packed import kv
from fleet_edge.verifiers.packed.kv import KVStore, LayerShape, SlabMemory, servable_context, tokens_to_serve

GIB = 1 << 30


@dataclass(frozen=True)
class Model:
    """A model's keys and values, and their budget. Nothing is allocated: tensors are torch's `meta`."""

    shapes: tuple[LayerShape, ...]
    dtype: torch.dtype
    context: int
    budget: int

    @property
    def token_bytes(self) -> int:
        return sum(shape.numbers for shape in self.shapes) * self.dtype.itemsize


def model(
    layers: int, heads: int, dim: int, *, context: int, budget: int, dtype: torch.dtype = torch.bfloat16
) -> Model:
    return Model((LayerShape(heads, dim, dim),) * layers, dtype, context, budget)


MODELS = {
    "7B": model(32, 32, 128, context=4096, budget=2 * GIB),
    "7B, grouped heads, long context": model(32, 8, 128, context=131_072, budget=2 * GIB),
    "135M": model(30, 3, 64, context=8192, budget=300 << 20),
    "tiny": model(4, 2, 12, context=320, budget=2_000_000, dtype=torch.float32),
    "unlike layers": Model((LayerShape(8, 64, 32), LayerShape(1, 256, 256)), torch.float32, 1000, 50_000_000),
    "as small as can be": model(2, 2, 8, context=500, budget=884 * 128),
}


@dataclass
class LiveBytes:
    """Counts the bytes of the tensors that really exist, whatever the store believes."""

    now: int = 0
    most: int = 0
    _empty: Callable[..., torch.Tensor] = field(default=torch.empty)

    def empty(self, *args: object, **kwargs: object) -> torch.Tensor:
        tensor = self._empty(*args, **kwargs)
        size = tensor.nbytes
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.now -= size


class Torch:
    def __init__(self, live: LiveBytes) -> None:
        self.empty = live.empty

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


class Sessions:
    def __init__(self, given: Model, live: LiveBytes) -> None:
        self.model, self.live = given, live
        self.memory = SlabMemory(
            given.shapes, budget_bytes=given.budget, dtype=given.dtype, device=torch.device("meta")
        )
        self.context = servable_context(given.context, budget_tokens=given.budget // given.token_bytes)
        self.store = KVStore(self.memory, context=self.context)
        self.lengths: dict[int, int] = {}
        self.opened = 0

    def open(self) -> int:
        self.opened += 1
        self.lengths[self.opened] = 0
        return self.opened

    def close(self, sequence: int) -> None:
        self.store.release(sequence)
        del self.lengths[sequence]

    def score(self, new: dict[int, int]) -> bool:
        wanted = {sequence: min(self.context, self.lengths[sequence] + count) for sequence, count in new.items()}
        if self.store.missing_bytes(wanted):
            return False
        self.store.reserve(wanted, keep=self.lengths)
        self.lengths |= wanted
        return True

    def fork(self, source: int, length: int) -> bool:
        if self.store.missing_bytes({self.opened + 1: length}):
            return False
        sequence = self.open()
        self.store.fork(sequence, source, length)
        self.lengths[sequence] = length
        return True

    def check(self) -> None:
        assert self.live.now == self.store.allocated_bytes
        assert self.live.most <= self.model.budget
        homes = set()
        for sequence, length in self.lengths.items():
            if length:
                slot = self.store.slot(sequence)
                assert slot.slab.capacity >= length
                assert 0 <= slot.index < slot.slab.slots
                assert all(tensor.shape[0] == slot.slab.slots for tensor in slot.slab.keys + slot.slab.values)
                homes.add((id(slot.slab), slot.index))
        assert len(homes) == sum(length > 0 for length in self.lengths.values())


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> LiveBytes:
    counted = LiveBytes()
    monkeypatch.setattr(kv, "torch", Torch(counted))
    return counted


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("typical", [3, 2000])
def test_any_mix_of_sequences_keeps_to_the_budget_and_uses_it(name: str, typical: int, live: LiveBytes) -> None:
    rng = random.Random(f"{name} {typical}")
    sessions = Sessions(MODELS[name], live)
    for _ in range(80):
        sessions.open()
        while rng.random() < 0.6:
            sessions.open()
        some = rng.sample(list(sessions.lengths), min(len(sessions.lengths), rng.randrange(1, 20)))
        step = {sequence: 1 + int(rng.expovariate(1 / typical)) for sequence in some}
        while step and not sessions.score(step):
            sessions.check()
            idle = [sequence for sequence, length in sessions.lengths.items() if length and sequence not in step]
            if idle:
                sessions.close(rng.choice(idle))
            elif len(step) > 1:
                step.popitem()
            else:
                pytest.fail("one sequence alone does not fit")
        sessions.check()
        if rng.random() < 0.3:
            cut = rng.choice(list(sessions.lengths))
            sessions.lengths[cut] = rng.randint(0, sessions.lengths[cut])
    for sequence in list(sessions.lengths):
        sessions.close(sequence)
    assert live.now == sessions.store.allocated_bytes == 0


class RandomWalk(RuleBasedStateMachine):
    """Any order of calls; the memory that the store reports as free can be used."""

    @initialize(name=st.sampled_from(sorted(MODELS)))
    def begin(self, name: str) -> None:
        self.live = LiveBytes()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(kv, "torch", Torch(self.live))
        self.sessions = Sessions(MODELS[name], self.live)

    @rule(count=st.integers(1, 5))
    def open(self, count: int) -> None:
        for _ in range(count):
            self.sessions.open()

    @precondition(lambda self: self.sessions.lengths)
    @rule(data=st.data(), most=st.sampled_from([1, 10, 100, 5000]))
    def score(self, data: st.DataObject, most: int) -> None:
        keys = st.sampled_from(sorted(self.sessions.lengths))
        self.sessions.score(data.draw(st.dictionaries(keys, st.integers(1, most), min_size=1, max_size=8)))

    @precondition(lambda self: self.sessions.lengths)
    @rule(data=st.data())
    def use_all_the_room(self, data: st.DataObject) -> None:
        room = self.sessions.store.room(self.sessions.lengths)
        step = {}
        for sequence in data.draw(st.permutations(sorted(self.sessions.lengths))):
            left = min(room, self.sessions.context - self.sessions.lengths[sequence])
            if left:
                step[sequence] = data.draw(st.one_of(st.just(1), st.integers(1, left)))
                room -= step[sequence]
        assert self.sessions.score(step)

    @precondition(lambda self: self.sessions.lengths)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.sessions.lengths)))
        self.sessions.lengths[sequence] = data.draw(st.integers(0, self.sessions.lengths[sequence]))

    @precondition(lambda self: self.sessions.lengths)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.sessions.lengths)))
        if self.sessions.lengths[source]:
            self.sessions.fork(source, data.draw(st.integers(1, self.sessions.lengths[source])))

    @precondition(lambda self: self.sessions.lengths)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.sessions.close(data.draw(st.sampled_from(sorted(self.sessions.lengths))))

    @invariant()
    def kept(self) -> None:
        if hasattr(self, "sessions"):
            self.sessions.check()

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()


TestRandomWalk = RandomWalk.TestCase
TestRandomWalk.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_budget_of_a_context_holds_the_slot_that_it_grows_out_of() -> None:
    assert [tokens_to_serve(length) for length in (1, 64, 65, 96, 97, 320, 4096)] == [1, 64, 129, 160, 193, 576, 7168]
    needed = [tokens_to_serve(length) for length in range(1, 2000)]
    assert needed == sorted(needed)
