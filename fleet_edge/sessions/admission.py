"""Admission: grants or refuses an Open, and on what offer."""

from dataclasses import dataclass

from fleet_edge.errors import OpenRefused
from fleet_edge.sessions.limits import SessionLimits
from fleet_edge.verifiers.contract import TargetInfo
from schemas.messages import PROTOCOL, Open
from schemas.reasons import RefusalCode


@dataclass(frozen=True, slots=True)
class SessionOffer:
    """What this edge offers every session.

    Attributes:
        max_draft: Most tokens in one draft.
        window: Most drafts under way.
        max_new_tokens: Most tokens of text.
    """

    max_draft: int = 16
    window: int = 4
    max_new_tokens: int = 4096


def grant(message: Open, *, target: TargetInfo, offer: SessionOffer) -> SessionLimits:
    """Check an Open against the target model.

    Raises:
        OpenRefused: With a sentence that says what to do.
    """
    if message.protocol != PROTOCOL:
        raise OpenRefused(
            RefusalCode.PROTOCOL,
            f"The device speaks protocol {message.protocol}, the edge {PROTOCOL}; bring both to the same release.",
        )
    if message.vocabulary != target.vocabulary:
        raise OpenRefused(
            RefusalCode.VOCABULARY,
            f"The draft model's vocabulary ({message.vocabulary}) is not that of the target model {target.name} "
            f"({target.vocabulary}); use a draft model of the same family.",
        )
    if not target.serves(message.policy):
        raise OpenRefused(
            RefusalCode.OTHER,
            f"The edge knows the {target.most_top_k} most likely tokens of the target model {target.name} and no more; "
            f"ask for top_k from 1 to {target.most_top_k}, or for temperature 0.",
        )
    if message.logprobs is not None and target.most_top_k is not None:
        raise OpenRefused(
            RefusalCode.LOGPROBS,
            f"The edge knows the {target.most_top_k} most likely tokens of the target model {target.name} and no more, "
            "so that it cannot tell exact log-probabilities; ask without `logprobs`.",
        )
    resumed = message.resume or ()
    if not message.prompt:
        raise OpenRefused(RefusalCode.PROMPT_EMPTY, "The prompt is empty; give at least one token.")
    if max(*message.prompt, *resumed, 0) >= target.vocabulary.size:
        raise OpenRefused(
            RefusalCode.TOKEN, f"The prompt holds a token id outside the vocabulary of {target.vocabulary.size}."
        )
    if message.max_new_tokens < 1:
        raise OpenRefused(RefusalCode.MAX_NEW_TOKENS, "max_new_tokens is 0; ask for at least one token.")
    room = target.context - len(message.prompt)
    if room < 1:
        raise OpenRefused(
            RefusalCode.PROMPT_TOO_LONG,
            f"The prompt has {len(message.prompt)} tokens; the target model {target.name} holds {target.context} with "
            "the text. Shorten it.",
        )
    most = min(message.max_new_tokens, room, offer.max_new_tokens)
    if len(resumed) >= most:
        raise OpenRefused(
            RefusalCode.MAX_NEW_TOKENS, f"The text to resume has {len(resumed)} tokens; at most {most} are granted."
        )
    return SessionLimits(
        max_new_tokens=most,
        max_draft=offer.max_draft,
        window=offer.window,
        vocabulary=target.vocabulary.size,
        end_tokens=frozenset(target.end_tokens),
    )
