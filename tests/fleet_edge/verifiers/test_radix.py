"""The radix tree finds what a look at every sequence finds."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fleet_edge.verifiers.radix import RadixTree, pack, shared_tokens

# Few tokens, so that much is shared; one that fills all four bytes.
TOKENS = st.lists(st.sampled_from([0, 1, 256, (1 << 31) - 1]), max_size=9)


def common(left: list[int], right: list[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


class AgainstALook(RuleBasedStateMachine):
    """The tree beside a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = RadixTree()
        self.known: dict[int, list[int]] = {}

    @rule(key=st.integers(0, 12), tokens=TOKENS)
    def insert(self, key: int, tokens: list[int]) -> None:
        self.tree.insert(key, pack(tokens))
        self.known[key] = tokens

    @rule(key=st.integers(0, 12))
    def remove(self, key: int) -> None:
        self.tree.remove(key)
        self.known.pop(key, None)
        assert key not in self.tree

    @rule(tokens=TOKENS)
    def look_up(self, tokens: list[int]) -> None:
        found = list(self.tree.matches(pack(tokens)))
        assert {key: length for length, key in found} == {key: common(own, tokens) for key, own in self.known.items()}
        assert len(found) == len(self.known)
        assert [length for length, _ in found] == sorted((length for length, _ in found), reverse=True)

    @rule(tokens=TOKENS)
    def look_for_beginnings(self, tokens: list[int]) -> None:
        found = self.tree.prefixes(pack(tokens))
        assert sorted(found) == sorted(key for key, own in self.known.items() if own == tokens[: len(own)])
        lengths = [len(self.known[key]) for key in found]
        assert lengths == sorted(lengths, reverse=True)

    @invariant()
    def no_node_is_there_without_need(self) -> None:
        assert len(self.tree) == len(self.known)
        waiting = [self.tree._root]
        while waiting:
            node = waiting.pop()
            for child in node.children.values():
                assert child.parent is node
                assert len(child.run) == 4 * (child.depth - node.depth) > 0
                assert child.keys or len(child.children) > 1
                waiting.append(child)


TestAgainstALook = AgainstALook.TestCase
TestAgainstALook.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_is_shared_is_found_in_runs_of_any_length() -> None:
    for length in (0, 1, 2, 3, 7, 64, 1000):
        run = list(range(length))
        assert shared_tokens(pack([9, 9, *run, 5]), pack([*run, 6]), at=2) == length
        assert shared_tokens(pack(run), pack([*run, 6])) == length
