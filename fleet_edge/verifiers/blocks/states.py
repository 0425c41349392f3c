"""States of recurrent layers: which of them a sequence has, and copies at the ends of pages.

Attention keeps something of each token, so it can go back to any of them; a recurrent layer has one state, which each
token changes. A sequence has the state behind some of its tokens, and a log of the tokens since, at most `LOGGED`:
those that may be taken back. A step computes logged tokens again, in the same order with the same numbers, so that its
rows have the same bits whether a draft was cut or not.

Where a step passes the end of a page, it leaves a copy of the state there; if memory is short, in the place of the copy
that was least recently used. The further back, the fewer copies stay. A sequence that is cut or forked where it has no
state begins at the last copy before that, and its tokens since are computed again.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fleet_edge.verifiers.blocks.geometry import LOGGED
from fleet_edge.verifiers.blocks.kv import PAGE, ProcessMemory
from fleet_edge.verifiers.blocks.page_file import PageFile
from fleet_edge.verifiers.contract import CapacityExceeded

NO_STATE: Final = -1
_ANY_LENGTH: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Replay:
    """What a step does with the states of a sequence.

    Attributes:
        source: State that it begins with; `NO_STATE` at the beginning of a sequence.
        base: Number of tokens before that state.
        logged: Number of tokens that are computed again from its log.
        into: Where the state goes that is behind the first `settled` of the logged and the new tokens, and the log of
            the others. May be the source.
        copy: Where the state goes that is behind the first `copied` of them; `NO_STATE` if nowhere.
    """

    source: int = NO_STATE
    base: int = 0
    logged: int = 0
    into: int = 0
    settled: int = 1
    copy: int = NO_STATE
    copied: int = 0


NO_REPLAY: Final = Replay()
"""A sequence begins, with states of its own."""


@dataclass(slots=True)
class _Held:
    """What a sequence has: its own state behind `length` tokens, with a number of logged ones; and copies, by length.

    Forks share the own state until they go on.
    """

    own: int = NO_STATE
    length: int = 0
    logged: int = 0
    copies: dict[int, int] = field(default_factory=dict)

    def at(self, length: int) -> tuple[int, int]:
        """Return the last state before a length, and the number of tokens before it."""
        if self.own >= 0 and self.length <= length:
            return self.own, self.length
        tokens = max((each for each in list(self.copies) if each <= length), default=0)
        return self.copies.get(tokens, NO_STATE), tokens


class States:
    """States of all sequences; the caller keeps the sequences' lengths."""

    def __init__(self, memory: ProcessMemory | PageFile) -> None:
        self._memory = memory
        self._count = len(memory.states[0])
        self._fresh = 0  # states that were never used begin here
        self._free: list[int] = []  # states before it that are free again
        self._users: dict[int, int] = {}  # of own states: how many sequences have them
        self._copies: dict[int, int] = {}  # likewise of copies, the least recently used first
        self._held: dict[int, _Held] = {}

    @property
    def free(self) -> Sequence[int]:
        """States that were used, and are not now."""
        return self._free

    @property
    def used(self) -> int:
        return len(self._users) + len(self._copies)

    def open(self, sequence: int) -> None:
        self._held[sequence] = _Held()

    def restore(self, copies: Mapping[int, Mapping[int, int]]) -> None:
        """Begin with sequences whose copies, by length, the memory holds already; the others are free."""
        for sequence, its in copies.items():
            self._held[sequence] = _Held(copies=dict(its))
            for state in its.values():
                self._copies[state] = self._copies.get(state, 0) + 1
        self._fresh = max(self._copies, default=-1) + 1
        self._free = [state for state in range(self._fresh) if state not in self._copies]

    def fork(self, sequence: int, source: int, length: int) -> None:
        held, its = _Held(), self._held[source]
        self._held[sequence] = held
        if its.own >= 0 and its.length <= length:
            held.own, held.length, held.logged = its.own, its.length, min(its.logged, length - its.length)
            self._users[its.own] += 1
        for tokens, state in its.copies.items():
            if tokens <= length:
                held.copies[tokens] = state
                self._copies[state] += 1

    def truncate(self, sequence: int, length: int) -> None:
        held = self._held[sequence]
        if held.length > length:
            self._drop_own(held)
        held.logged = min(held.logged, length - held.length)
        for tokens in [each for each in held.copies if each > length]:
            self._drop_copy(held, tokens)

    def close(self, sequence: int) -> None:
        held = self._held.pop(sequence, None)
        if held is not None:
            self._drop_own(held)
            for tokens in list(held.copies):
                self._drop_copy(held, tokens)

    def reach(self, sequence: int, length: int) -> int:
        """Return the largest number of tokens, at most `length`, behind which a step can begin."""
        held = self._held[sequence]
        state, tokens = held.at(length)
        return min(length, tokens + held.logged) if state == held.own else tokens

    def copies(self, sequence: int) -> Mapping[int, int]:
        """Return the copies of a sequence, by the number of tokens before them."""
        return self._held[sequence].copies

    def missing(self, sequences: Collection[int]) -> int:
        """Return how many states a step with these sequences lacks; negative if some are left."""
        needed = sum(not self._is_alone(self._held[sequence]) for sequence in sequences)
        return needed - (self._count - len(self._users) - len(self._sources(sequences) & self._copies.keys()))

    def room(self) -> int | None:
        """Return the number of sequences that can go on, whichever they are; None if all can."""
        if self.missing(self._held) <= 0:
            return None
        return (self._count - len(self._users)) // 2  # one may need a state, and the copy that it begins with

    def plan(self, steps: Mapping[int, tuple[int, int]]) -> dict[int, Replay]:
        """Return the replays of a step, by sequence, given how many tokens are new and how many may be taken back.

        New tokens follow those that `reach` names. No state MUST be `missing`. `settle` or `abandon` comes after it.
        """
        sources = self._sources(steps)
        into = {}
        for sequence in steps:
            own = self._held[sequence].own
            into[sequence] = own if self._is_alone(self._held[sequence]) else self._take(sources)
            if into[sequence] < 0:
                raise CapacityExceeded("The machine has no memory left for states of recurrent layers.")
        plans = {}
        for sequence, (new, undecided) in steps.items():
            held = self._held[sequence]
            source, base = held.at(_ANY_LENGTH)
            if source in self._copies:
                self._copies[source] = self._copies.pop(source)
            logged = held.logged
            end = (base + logged + new) // PAGE * PAGE
            copy = self._take(sources) if end > base + logged else NO_STATE
            settled = logged + new - min(LOGGED, undecided)
            copied = end - base if copy >= 0 else 0
            plans[sequence] = Replay(source, base, logged, into[sequence], settled, copy, copied)
        return plans

    def settle(self, plans: Mapping[int, Replay], steps: Mapping[int, tuple[int, int]]) -> None:
        """Note that a step has done what was planned."""
        for sequence, its in plans.items():
            held = self._held[sequence]
            if held.own != its.into:
                self._drop_own(held)
                held.own, self._users[its.into] = its.into, 1
            held.length = its.base + its.settled
            held.logged = its.logged + steps[sequence][0] - its.settled
            if its.copy >= 0:
                held.copies[its.base + its.copied], self._copies[its.copy] = its.copy, 1
                self._thin(held, its.base + its.copied)

    def abandon(self, plans: Mapping[int, Replay]) -> None:
        """Note that a step has failed, so that states that it writes to hold nothing."""
        for sequence, its in plans.items():
            held = self._held[sequence]
            if held.own == its.into:
                self._drop_own(held)
            else:
                self._release(its.into)
            if its.copy >= 0:
                self._release(its.copy)

    def _sources(self, sequences: Collection[int]) -> set[int]:
        return {self._held[sequence].at(_ANY_LENGTH)[0] for sequence in sequences}

    def _is_alone(self, held: _Held) -> bool:
        return held.own >= 0 and self._users[held.own] == 1

    def _take(self, pinned: Collection[int]) -> int:
        """Return a state to write to: a free one, or the copy that was least recently used; `NO_STATE` if none is."""
        if not self._free and self._fresh < self._count:
            try:
                self._memory.provide_state(self._fresh)
                self._free.append(self._fresh)
                self._fresh += 1
            except OSError:
                self._count = self._fresh  # others use what was free at the start
        if not self._free:
            oldest = next((state for state in self._copies if state not in pinned), NO_STATE)
            for held in self._held.values():
                for tokens in [each for each, state in held.copies.items() if state == oldest]:
                    self._drop_copy(held, tokens)
        if not self._free:
            return NO_STATE
        state = self._free.pop()
        self._memory.forget_state(state)
        return state

    def _thin(self, held: _Held, length: int) -> None:
        """Drop copies: the one behind page n stays until twice the power of two in n as many pages have followed."""
        for tokens in list(held.copies):
            page = tokens // PAGE
            if length // PAGE - page >= 2 * (page & -page):
                self._drop_copy(held, tokens)

    def _drop_own(self, held: _Held) -> None:
        if held.own >= 0:
            self._users[held.own] -= 1
            if not self._users[held.own]:
                del self._users[held.own]
                self._release(held.own)
        held.own, held.length, held.logged = NO_STATE, 0, 0

    def _drop_copy(self, held: _Held, tokens: int) -> None:
        state = held.copies.pop(tokens)
        self._copies[state] -= 1
        if not self._copies[state]:
            del self._copies[state]
            self._release(state)

    def _release(self, state: int) -> None:
        self._memory.forget_state(state)
        self._free.append(state)
