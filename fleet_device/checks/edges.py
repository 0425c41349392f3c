"""Edges as checks see them: which are online, with which vocabulary."""

from collections.abc import Sequence

from fleet_device.client.presence import EdgePresences
from fleet_device.errors import EdgeUnavailable
from schemas.control import EdgeState
from schemas.version import VERSION
from schemas.vocabulary import Vocabulary

__all__ = ["check_online", "check_vocabulary"]


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


def check_vocabulary(vocabulary: Vocabulary, edges: Sequence[EdgeState], *, drafter: str) -> str:
    """Return which edges have the draft model's vocabulary.

    Args:
        vocabulary: The draft model's, or the one that it drafts for.
        edges: Those that are online.
        drafter: The draft model's name.

    Raises:
        EdgeUnavailable: One has another; it will refuse this device's texts.
    """
    ours = str(vocabulary)
    for state in edges:
        if state.vocabulary != ours:
            raise EdgeUnavailable(
                f"Edge {state.edge} has the vocabulary of {state.target} ({state.vocabulary}), and the draft model "
                f"{drafter} has {ours}: use a draft model of the target's family, or set 'target_vocabulary' to a file "
                "made by `fleet models vocabulary`."
            )
    return f"{ours}, at {', '.join(state.edge for state in edges)} too."
