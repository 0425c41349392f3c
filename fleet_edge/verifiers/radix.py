"""Radix tree over token sequences: finds which of many begin as a given one does, and how far, the longest first.

Edges carry runs of tokens, so that a lookup costs as many comparisons as the sequence has branches, whatever the number
of sequences. Tokens are kept as bytes, four each: runs are then compared by the machine's own memory comparison.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Final

_SIZE: Final = array("i").itemsize


def pack(tokens: Sequence[int]) -> bytes:
    """Return token ids, each below 2^31, as the tree takes them."""
    return array("i", tokens).tobytes()


def shared_tokens(left: bytes, right: bytes, *, at: int = 0) -> int:
    """Return with how many tokens `right` and, from its token `at` on, `left` both begin."""
    start = at * _SIZE
    most = min(len(left) - start, len(right)) // _SIZE
    if left.startswith(right[: most * _SIZE], start):
        return most
    # Between `least`, which agree, and `most`, which do not.
    least = 0
    while most - least > 1:
        middle = (least + most) // 2
        if left.startswith(right[: middle * _SIZE], start):
            least = middle
        else:
            most = middle
    return least


class _Node:
    """The end of a run of tokens.

    Attributes:
        parent: None at the root.
        run: Tokens since the parent.
        depth: Tokens since the root.
        children: By their first token.
        keys: Sequences that end here, in the order in which they came.
    """

    __slots__ = ("children", "depth", "keys", "parent", "run")

    def __init__(self, parent: "_Node | None", run: bytes, depth: int) -> None:
        self.parent = parent
        self.run = run
        self.depth = depth
        self.children: dict[bytes, _Node] = {}
        self.keys: dict[int, None] = {}


class RadixTree:
    """Keys, each with a sequence of tokens, as `pack` gives them."""

    def __init__(self) -> None:
        self._root = _Node(None, b"", 0)
        self._nodes: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    def insert(self, key: int, tokens: bytes) -> None:
        """Add a key; one that is there gets other tokens."""
        self.remove(key)
        node, depth = self._descend(tokens)
        if depth < node.depth:
            node = _split(node, depth)
        if depth * _SIZE < len(tokens):
            run = tokens[depth * _SIZE :]
            node.children[run[:_SIZE]] = node = _Node(node, run, len(tokens) // _SIZE)
        node.keys[key] = None
        self._nodes[key] = node

    def remove(self, key: int) -> None:
        """Take a key out; unknown ones are ignored."""
        node = self._nodes.pop(key, None)
        if node is None:
            return
        del node.keys[key]
        while node.parent is not None and not node.keys and len(node.children) < 2:  # noqa: PLR2004 - no branch
            parent = node.parent
            if node.children:
                (child,) = node.children.values()
                child.run = node.run + child.run
                child.parent = parent
                parent.children[child.run[:_SIZE]] = child
                return
            del parent.children[node.run[:_SIZE]]
            node = parent

    def matches(self, tokens: bytes) -> Iterator[tuple[int, int]]:
        """Yield with how many tokens a key's sequence and the given one both begin, and the key; the most first.

        Every key comes once, those that share nothing with 0. The tree MUST NOT change meanwhile.
        """
        node, depth = self._descend(tokens)
        below: _Node | None = None
        while True:
            for key in _keys(node, but=below):
                yield depth, key
            if node.parent is None:
                return
            below, node = node, node.parent
            depth = node.depth

    def prefixes(self, tokens: bytes) -> list[int]:
        """Return the keys whose whole sequence the given one begins with, the longest first."""
        node, depth = self._descend(tokens)
        found: list[int] = []
        above: _Node | None = node if node.depth == depth else node.parent
        while above is not None:
            found.extend(above.keys)
            above = above.parent
        return found

    def _descend(self, tokens: bytes) -> tuple[_Node, int]:
        """Return the last node on a sequence's way, of whose run it may share a part only, and how much it shares."""
        node, depth = self._root, 0
        while depth == node.depth:
            child = node.children.get(tokens[depth * _SIZE : (depth + 1) * _SIZE])
            if child is None:
                break
            depth += shared_tokens(tokens, child.run, at=depth)
            node = child
        return node, depth


def _split(node: _Node, depth: int) -> _Node:
    """Put a node into the middle of a run, and return it."""
    parent = node.parent
    assert parent is not None
    cut = (depth - parent.depth) * _SIZE
    middle = _Node(parent, node.run[:cut], depth)
    parent.children[middle.run[:_SIZE]] = middle
    node.parent, node.run = middle, node.run[cut:]
    middle.children[node.run[:_SIZE]] = node
    return middle


def _keys(node: _Node, *, but: _Node | None) -> Iterator[int]:
    """Yield the keys at and below a node, those at and below one of its children left out."""
    waiting = [node]
    while waiting:
        each = waiting.pop()
        yield from each.keys
        waiting.extend(child for child in reversed(each.children.values()) if child is not but)
