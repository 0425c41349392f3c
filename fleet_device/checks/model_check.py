"""Model check: how long the draft model takes for a token."""

import statistics
from collections.abc import Callable
from typing import Final

from fleet_device.drafters.contract import Drafter
from fleet_device.texts.chat import ChatMessage, encode_chat
from schemas.policy import SamplingPolicy

__all__ = ["PROBE_POLICY", "check_drafting", "probe_prompt"]

PROBE_POLICY: Final = SamplingPolicy(temperature=0.0, seed=0)

_PROMPT: Final = "Count from one to ten in words."
_DRAFTED: Final = 8


def probe_prompt(drafter: Drafter) -> list[int]:
    """Return the token ids of a short prompt that any model can answer."""
    codec = drafter.codec
    if codec.chat_template is None:
        return codec.encode(_PROMPT)
    return encode_chat(codec, [ChatMessage("user", _PROMPT)])


def check_drafting(drafter: Drafter, clock: Callable[[], float]) -> str:
    """Draft some tokens, and return what drafts them, and how long one takes.

    Args:
        drafter: Loaded.
        clock: Monotonic seconds.

    Raises:
        DrafterError: It cannot draft.
    """
    what = f"{drafter.name} ({drafter.quantization}, {drafter.vocabulary}, context {drafter.context:,} tokens)"
    drafter.reset(probe_prompt(drafter))
    drafter.next(PROBE_POLICY)  # the prompt
    times = []
    for _ in range(_DRAFTED):
        started = clock()
        q = drafter.next(PROBE_POLICY)
        if q is None:
            return f"{what} is loaded; it has nothing to draft here."
        drafter.extend((int(q.ids[0]),))
        times.append((clock() - started) * 1e3)
    return f"{what} drafts a token in {statistics.median(times):.1f} ms."
