"""Waiting drafts, by the position that they stand on.

One that overtook its predecessor, or was sent ahead of a verdict, waits here for its turn.
"""

from dataclasses import dataclass, field

from fleet_edge.errors import desync
from schemas.messages import Draft
from schemas.vocabulary import extend_digest


@dataclass(frozen=True, slots=True)
class ReceivedDraft:
    """A draft with the moment of its arrival (monotonic seconds) and its size (bytes)."""

    draft: Draft
    at: float
    size: int = 0


@dataclass(slots=True)
class WaitingDrafts:
    """The drafts of one session that no judgement has decided on."""

    _by_base: dict[int, ReceivedDraft] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._by_base)

    def __contains__(self, round_: int) -> bool:
        return any(arrived.draft.round == round_ for arrived in self._by_base.values())

    @property
    def latest(self) -> int:
        """The highest round that waits; -1 if none does."""
        return max((arrived.draft.round for arrived in self._by_base.values()), default=-1)

    def at(self, base: int) -> ReceivedDraft | None:
        """Return the draft that stands on `base` tokens, if it is there."""
        return self._by_base.get(base)

    def add(self, arrived: ReceivedDraft) -> None:
        """Let a draft wait; the first to stand on a position keeps it."""
        self._by_base.setdefault(arrived.draft.base, arrived)

    def remove(self, arrived: ReceivedDraft) -> None:
        """Take a draft out: it is decided on."""
        del self._by_base[arrived.draft.base]

    def void(self) -> None:
        """Forget all: they stand on a text that is not to be."""
        self._by_base.clear()

    def chain(self, *, base: int, digest: int, most: int) -> tuple[ReceivedDraft, ...]:
        """Return the drafts that can be verified in one go, each standing on the one before.

        Args:
            base: Length of the text that the first one stands on.
            digest: Of that text.
            most: Most tokens in all; the first draft always comes, however long.

        Raises:
            DraftFault: The first draft came early, and turns out to stand on another text; it is forgotten.
        """
        chain: list[ReceivedDraft] = []
        left = most
        while (arrived := self.at(base)) is not None:
            draft = arrived.draft
            if draft.digest != digest:
                if chain:
                    break
                self.remove(arrived)
                raise desync("The draft stands on another text than the edge's.")
            if chain and len(draft.tokens) > left:
                break
            chain.append(arrived)
            left -= len(draft.tokens)
            base += len(draft.tokens)
            digest = extend_digest(digest, draft.tokens)
            if not draft.more or not draft.tokens:
                break
        return tuple(chain)
