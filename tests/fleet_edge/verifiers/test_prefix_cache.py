from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from fleet_edge.settings import PrefixSharing
from fleet_edge.verifiers.contract import CapacityExceeded, Item
from fleet_edge.verifiers.prefix_cache import LEAST_REUSED, TAIL, PrefixCache, PrefixIndex, pack, shared_tokens
from fleet_edge.verifiers.torch_engine.verifier import TorchVerifier
from tests.fleet_edge.verifiers.oracle import CONTEXT, VOCABULARY, WORDS, Oracle, tiny_target
from tests.support.scripted_verifier import ScriptedVerifier

# Few different tokens, so that much is shared; one uses all four bytes.
TOKENS = st.lists(st.sampled_from([0, 1, 256, (1 << 31) - 1]), max_size=9)


def common(left: list[int], right: list[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


class AgainstALook(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.known: dict[int, list[int]] = {}

    @rule(key=st.integers(0, 12), tokens=TOKENS)
    def insert(self, key: int, tokens: list[int]) -> None:
        self.index.insert(key, pack(tokens))
        self.known[key] = tokens

    @rule(key=st.integers(0, 12))
    def remove(self, key: int) -> None:
        self.index.remove(key)
        self.known.pop(key, None)

    @rule(tokens=TOKENS)
    def look_up(self, tokens: list[int]) -> None:
        found = list(self.index.matches(pack(tokens)))
        assert {key: length for length, key in found} == {key: common(own, tokens) for key, own in self.known.items()}
        assert len(found) == len(self.known)
        assert [length for length, _ in found] == sorted((length for length, _ in found), reverse=True)

    @invariant()
    def neighbours_know_what_they_share(self) -> None:
        ordered = [self.known[key] for _, key in self.index._entries]
        assert self.index._shared == [common(*pair) for pair in pairwise([[], *ordered])]


TestAgainstALook = AgainstALook.TestCase
TestAgainstALook.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_is_shared_is_found_in_runs_of_any_length() -> None:
    for length in (0, 1, 2, 3, 7, 64, 1000):
        run = list(range(length))
        assert shared_tokens(pack([*run, 5]), pack([*run, 6])) == length
        assert shared_tokens(pack(run), pack([*run, 6])) == length


SYSTEM = [index * 7 % VOCABULARY for index in range(100)]


class WholePrefix:
    """A script whose rows identify the whole prefix: a hash of it is the most likely token."""

    def logits(self, prefix: Sequence[int]) -> NDArray[np.float32]:
        row = np.zeros(VOCABULARY, dtype=np.float32)
        row[hash(tuple(prefix)) % VOCABULARY] = 1.0
        return row


SCRIPT = WholePrefix()


def scripted(budget_tokens: int = 100_000) -> ScriptedVerifier:
    return ScriptedVerifier(SCRIPT, WORDS, context=CONTEXT, budget_tokens=budget_tokens)


def compute(cache: PrefixCache, sequence: int, tokens: Sequence[int], *, owner: str = "", stable: bool = True) -> int:
    """Open a sequence and compute its tokens as a scheduler does; return the number of computed tokens."""
    cache.open(sequence)
    cache.expect(sequence, tokens, owner=owner, stable=stable)
    cache.reuse(sequence)
    rest = tokens[cache.computed(sequence) :]
    cache.score([Item(sequence, rest, 1, stable=stable)])
    return len(rest)


def test_the_next_turn_of_a_conversation_computes_what_is_new() -> None:
    cache = PrefixCache(scripted())
    text = list(SYSTEM)
    for turn in range(5):
        computed = compute(cache, turn, text)
        assert computed == (100 if turn == 0 else 9)
        cache.close(turn)
        text += [turn + 1] * 9
    assert cache.retained_tokens == len(text) - 9, "of the turns one sequence is left, which has it all"


def flood(cache: PrefixCache, *, first: int) -> None:
    """Compute sequences without a common beginning, more than the memory holds."""
    for number in range(first, first + 6):
        compute(cache, number, [(number * 37 + index * 3) % VOCABULARY for index in range(100)], owner="device-3")
        cache.close(number)


def test_what_devices_share_outlasts_what_they_do_not() -> None:
    cache = PrefixCache(scripted(budget_tokens=400))
    for number in range(2):
        compute(cache, number, [*SYSTEM, *[number + 1] * 30], owner=f"device-{number}")
        cache.close(number)
    flood(cache, first=2)
    assert compute(cache, 10, [*SYSTEM, *[1] * 30], owner="device-0") == 30, "without what nobody shares"


def test_what_one_device_uses_again_is_not_shared() -> None:
    cache = PrefixCache(scripted(budget_tokens=400))
    for number in range(2):
        compute(cache, number, [*SYSTEM, *[number + 1] * 30], owner="device-0")
        cache.close(number)
    flood(cache, first=2)
    assert compute(cache, 10, SYSTEM, owner="device-0") == 100


def test_the_next_with_the_same_beginning_computes_what_is_new_while_the_first_is_open_and_after_it() -> None:
    cache = PrefixCache(scripted())
    assert compute(cache, 0, [*SYSTEM, 1, 2, 3]) == 103
    assert compute(cache, 1, [*SYSTEM, 4, 5]) == 2
    cache.close(0)
    cache.close(1)
    assert compute(cache, 2, [*SYSTEM, 1, 7]) == 1
    assert compute(cache, 3, SYSTEM) == 1, "the last token is computed anew: its row is what is wanted"


def test_too_little_in_common_is_computed() -> None:
    cache = PrefixCache(scripted())
    compute(cache, 0, SYSTEM)
    few = LEAST_REUSED - 1
    assert compute(cache, 1, [*SYSTEM[:few], 60, 60]) == few + 2


def test_a_cache_below_keeps_devices_apart_too() -> None:
    class Below(ScriptedVerifier):
        def __init__(self) -> None:
            super().__init__(SCRIPT, WORDS, context=CONTEXT)
            self.namespaces: dict[int, str] = {}

        def isolate(self, sequence: int, namespace: str) -> None:
            self.namespaces[sequence] = namespace

    for sharing, different in [(PrefixSharing.ALL, 1), (PrefixSharing.DEVICE, 2), (PrefixSharing.OFF, 4)]:
        below = Below()
        cache = PrefixCache(below, sharing=sharing)
        for number in range(4):
            compute(cache, number, SYSTEM, owner=f"device-{number % 2}")
        found = {cache._open[number].key: number % 2 for number in range(4)}
        assert len({below.namespaces[key] for key in found}) == different


def texts(count: int) -> list[list[int]]:
    return [[number] * 100 for number in range(count)]


def test_the_ended_sequence_unused_for_longest_makes_room() -> None:
    cache = PrefixCache(scripted(budget_tokens=450))
    for number, text in enumerate(texts(4)):
        compute(cache, number, text)
        cache.close(number)
    assert compute(cache, 10, [*texts(1)[0], 5]) == 1, "the first is used again"
    cache.close(10)
    compute(cache, 11, [9] * 100)
    assert [compute(cache, 20 + number, [*texts(4)[number][:50], 8]) for number in (0, 2, 3)] == [1, 1, 1]
    assert compute(cache, 30, [*texts(4)[1][:50], 8]) == 51, "it was the one to go"


def test_an_ended_sequence_of_which_a_part_was_copied_was_of_use() -> None:
    cache = PrefixCache(scripted(budget_tokens=460))
    for number in (0, 1):
        compute(cache, number, [*[number] * 100, *[5] * (TAIL + 10)])
        cache.close(number)
    assert compute(cache, 2, [*[0] * 100, 6]) == 1
    compute(cache, 3, [7] * 50)
    assert compute(cache, 4, [*[0] * 100, *[5] * (TAIL + 10)]) == 1
    assert compute(cache, 5, [1] * 100) == 100


def test_who_has_retained_more_than_his_share_makes_room_first() -> None:
    cache = PrefixCache(scripted(budget_tokens=400), share=lambda _owner: 0.5)
    owners = ["modest", "greedy", "greedy", "greedy"]
    for number, (owner, text) in enumerate(zip(owners, texts(4), strict=True)):
        compute(cache, number, text, owner=owner)
        cache.close(number)
    compute(cache, 10, [9] * 60)
    assert compute(cache, 11, [0] * 60) == 1


def test_a_step_makes_the_room_that_it_needs_also_where_nobody_asked_whether_it_fits() -> None:
    cache = PrefixCache(scripted(budget_tokens=300))
    compute(cache, 1, [1] * 200)
    cache.close(1)
    assert compute(cache, 2, [2] * 250) == 250


def test_where_there_is_no_room_for_a_copy_an_ended_sequence_is_taken_over_with_what_is_lost_of_it() -> None:
    cache = PrefixCache(scripted(budget_tokens=220))
    compute(cache, 0, [*SYSTEM, *[1] * (TAIL + 10)])
    cache.close(0)
    assert compute(cache, 1, [*SYSTEM, 2]) == 1
    assert cache.retained_tokens == 0
    roomy = PrefixCache(scripted())
    compute(roomy, 0, [*SYSTEM, *[1] * (TAIL + 10)])
    roomy.close(0)
    assert compute(roomy, 1, [*SYSTEM, 2]) == 1
    assert roomy.retained_tokens == 100 + TAIL + 10


def test_a_text_that_is_to_repeat_takes_nothing_over_of_one_that_need_not() -> None:
    cache = PrefixCache(scripted())
    compute(cache, 0, SYSTEM, stable=False)
    cache.close(0)
    assert compute(cache, 1, [*SYSTEM, 3]) == 101
    assert compute(cache, 2, [*SYSTEM, 4], stable=False) == 1, "which may take over what is as good, or better"
    cache.close(1)
    assert compute(cache, 3, [*SYSTEM, 5]) == 1
    # Shared tokens lose their stability when a sequence continues without it.
    cache.close(3)
    assert compute(cache, 4, [*SYSTEM, 5, 6], stable=False) == 1
    cache.close(4)
    assert compute(cache, 5, [*SYSTEM, 5, 6, 7]) > 1


@pytest.mark.parametrize(("min_step_tokens", "computed"), [(1, 1), (2, 101)])
def test_a_text_that_is_to_repeat_takes_over_any_where_all_rows_repeat(min_step_tokens: int, computed: int) -> None:
    verifier = scripted()
    verifier._info = replace(verifier.info, batch_invariant=True, min_step_tokens=min_step_tokens)
    cache = PrefixCache(verifier)
    compute(cache, 0, SYSTEM, stable=False)
    cache.close(0)
    assert compute(cache, 1, [*SYSTEM, 3]) == computed


def test_of_many_that_begin_alike_the_one_that_is_furthest_goes_ahead() -> None:
    cache = PrefixCache(scripted())
    for sequence in range(4):
        cache.open(sequence)
        cache.expect(sequence, [*SYSTEM, sequence, 5])
    everyone = range(4)
    assert cache.ahead(0, computing=(), able=everyone) is None, "none is further: it may as well be this one"
    assert cache.ahead(1, computing={0}, able=everyone) == (0, 100)
    cache.score([Item(0, SYSTEM[:40], 0)])
    assert cache.ahead(1, computing=(), able=everyone) == (0, 100)
    assert cache.ahead(1, computing=(), able={2, 3}) is None, "the first cannot go on"
    cache.score([Item(0, SYSTEM[40:90], 0)])
    assert cache.ahead(1, computing={0}, able=everyone) is None, "what is still to come is not worth a wait"
    assert cache.reuse(1) == 90


def test_what_is_taken_over_of_a_model_gives_the_rows_of_one_that_computed_it() -> None:
    cache = PrefixCache(TorchVerifier(tiny_target("llama"), budget_bytes=1 << 20))
    oracle = Oracle("llama")
    text, kinds = list(SYSTEM), set()
    for turn in range(6):
        cache.open(turn)
        cache.expect(turn, text)
        kinds.add(cache.reuse(turn) > 0)
        start = cache.computed(turn)
        rows = cache.score([Item(turn, text[start:], len(text) - start)])
        np.testing.assert_allclose(np.asarray(rows), oracle.logits(text)[start:].numpy(), atol=1e-4, rtol=0)
        if turn % 2:
            cache.close(turn - 1)
            cache.close(turn)
        text += [turn] * 7
    assert kinds == {False, True}


BUDGET = 260
FEW_TOKENS = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3)


class AgainstTheTruth(RuleBasedStateMachine):
    """Sequences with shared prefixes open, grow, are cut and close while memory is short.

    The script's rows reveal wrong tokens, and the cache's content is checked separately.
    """

    @initialize(sharing=st.sampled_from(PrefixSharing))
    def begin(self, sharing: PrefixSharing) -> None:
        self.sharing = sharing
        self.below = scripted(BUDGET)
        self.cache = PrefixCache(self.below, sharing=sharing)
        self.known: dict[int, list[int]] = {}
        self.owners: dict[int, str] = {}
        self.opened = 0

    @rule(runs=FEW_TOKENS, owner=st.sampled_from(["a", "b"]), length=st.integers(1, 80))
    def open(self, runs: list[int], owner: str, length: int) -> None:
        self.opened += 1
        sequence = self.opened % 7  # keys are used again
        if sequence in self.known:
            return
        self.cache.open(sequence)
        self.known[sequence], self.owners[sequence] = [], owner
        tokens = [token for run in runs for token in [run] * 20][:length]
        self.cache.expect(sequence, tokens, owner=owner)
        best = min(self._best(tokens, owner), len(tokens) - 1)
        gained = self.cache.reuse(sequence)
        assert gained == self.cache.computed(sequence)
        if gained:
            assert gained == best
        elif best >= LEAST_REUSED:
            # Only where a copy does not fit next to its original, an open sequence.
            assert sum(map(len, self.known.values())) + best > BUDGET
        self.known[sequence] = tokens[:gained]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def score(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.known)), unique=True, min_size=1, max_size=3))
        items = []
        for sequence in chosen:
            tokens = data.draw(st.lists(st.sampled_from([1, 2]), min_size=1, max_size=25))
            items.append(Item(sequence, tokens, data.draw(st.integers(0, len(tokens)))))
        before = list(self.cache._retained)
        fits = self.cache.fits(items)
        new = sum(len(item.tokens) for item in items)
        assert fits == (sum(map(len, self.known.values())) + new <= BUDGET)
        after = list(self.cache._retained)
        assert after == before[len(before) - len(after) :], "those unused for longest went"
        dropped_too_many = before != after and self.below.capacity() - new >= 80
        assert not (fits and dropped_too_many), "no more than was needed went"
        if not fits:
            with pytest.raises(CapacityExceeded):
                self.cache.score(items)
            return
        rows = np.asarray(self.cache.score(items))
        expected = []
        for item in items:
            known = self.known[item.sequence]
            known.extend(item.tokens)
            expected += [SCRIPT.logits(known[:end]) for end in range(len(known) - item.rows + 1, len(known) + 1)]
        assert rows.shape == (len(expected), VOCABULARY)
        if expected:
            np.testing.assert_array_equal(rows, np.stack(expected))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.known)))
        length = data.draw(st.integers(0, len(self.known[sequence])))
        self.cache.truncate(sequence, length)
        del self.known[sequence][length:]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.known)))
        self.cache.evict(sequence)
        self.known[sequence] = []

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.known)))
        tokens = self.known.pop(sequence)
        self.cache.close(sequence)
        if self.sharing is PrefixSharing.OFF or len(tokens) < LEAST_REUSED:
            return
        owner = self.owners.pop(sequence)
        assert any(
            held.tokens[: len(tokens)].tolist() == tokens
            for held in self.cache._held.values()
            if self.sharing is PrefixSharing.ALL or held.owner == owner
        ), "it is retained, or another has it all"

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert self.cache.retained_tokens == 0

    @invariant()
    def what_is_open_is_as_it_was_and_the_account_is_right(self) -> None:
        if not hasattr(self, "cache"):
            return
        for sequence, tokens in self.known.items():
            assert self.cache.computed(sequence) == len(tokens)
        held = self.cache._held.values()
        assert self.below.capacity() == BUDGET - sum(each.computed for each in held) >= 0
        assert all(self.below.computed(each.key) == each.computed for each in held)
        assert self.cache.retained_tokens == sum(each.computed for each in held if each.caller is None)
        assert len(held) == len(self.known) + len(self.cache._retained)
        if self.sharing is PrefixSharing.OFF:
            assert self.cache.retained_tokens == 0

    def _best(self, tokens: list[int], owner: str) -> int:
        best = 0
        for held in self.cache._held.values() if self.sharing is not PrefixSharing.OFF else ():
            if self.sharing is PrefixSharing.DEVICE and held.owner != owner:
                continue
            computed = held.tokens.tolist()
            promised = array("i", held.expected).tolist()
            if held.caller is not None:  # it is found by what it promises, and passed on if it has kept to it
                kept = self._kept(computed, promised, tokens, most=len(tokens) - 1)
                computed = computed[: self._common(computed, promised)] if kept else []
            best = max(best, self._common(computed, tokens))
        return best

    def _kept(self, computed: list[int], promised: list[int], tokens: list[int], *, most: int) -> bool:
        length = min(self._common(promised, tokens), len(computed), most)
        return computed[:length] == tokens[:length]

    @staticmethod
    def _common(left: list[int], right: list[int]) -> int:
        pairs = zip(left, right, strict=False)
        return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


TestAgainstTheTruth = AgainstTheTruth.TestCase
TestAgainstTheTruth.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_devices_that_share_with_themselves_alone() -> None:
    cache = PrefixCache(scripted(), sharing=PrefixSharing.DEVICE)
    compute(cache, 0, SYSTEM, owner="one")
    assert compute(cache, 1, SYSTEM, owner="other") == 100
    cache.close(0)
    assert compute(cache, 2, SYSTEM, owner="third") == 100
    assert compute(cache, 3, SYSTEM, owner="one") == 1
    cache.close(1)
    cache.close(3)
    assert cache.retained_tokens == 200, "each has his own"
