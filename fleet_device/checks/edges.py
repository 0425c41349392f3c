"""Edges as checks see them: which are online, with which vocabulary."""

from collections.abc import Sequence
from typing import Protocol

from fleet_device.client.presence import EdgePresences
from fleet_device.errors import EdgeUnavailable
from schemas.version import VERSION

__all__ = ["EdgeVocabulary", "check_online", "check_vocabulary"]


class EdgeVocabulary(Protocol):
    """An edge that is online, as its state tells it."""

    @property
    def edge(self) -> str:
        """Its name."""

    @property
    def target(self) -> str:
        """Its model's name."""

    @property
    def vocabulary(self) -> str | None:
        """Size and the head of the fingerprint; None if that is not known."""


def check_online(edges: EdgePresences, fleet: str, *, wait_s: float) -> str:
    """Wait for an edge, and return which are online.

    Args:
        edges: What has been heard.
        fleet: The fleet's name.
        wait_s: Longest wait (seconds).

    Raises:
        EdgeUnavailable: None is.
    """
    if not edges.wait_online(wait_s):
        known = [f"{state.edge} is {state.presence.value}" for state in edges.known()]
        heard = f"edge {', '.join(known)}" if known else "none has been heard of"
        raise EdgeUnavailable(f"No edge of fleet {fleet!r} is online ({heard}); start one with `fleet edge run`.")
    online = [f"{state.edge} with {state.target}, software {state.software}" for state in edges.online()]
    return f"Online: {'; '.join(online)}. This device has software {VERSION}."


def check_vocabulary(ours: str, edges: Sequence[EdgeVocabulary], *, drafter: str) -> str:
    """Return which edges have the draft model's vocabulary.

    Args:
        ours: The draft model's vocabulary, or the one that it drafts for: size and the head of the fingerprint.
        edges: Those that are online.
        drafter: The draft model's name.

    Raises:
        EdgeUnavailable: One has another; it will refuse this device's texts.
    """
    for state in edges:
        if state.vocabulary != ours:
            raise EdgeUnavailable(
                f"Edge {state.edge} has the vocabulary of {state.target} ({state.vocabulary}), and the draft model "
                f"{drafter} has {ours}: use a draft model of the target's family, or set 'target_vocabulary' to a file "
                "made by `fleet models vocabulary`."
            )
    return f"{ours}, at {', '.join(state.edge for state in edges)} too."
