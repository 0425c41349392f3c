"""Admission: grant or refuse an Open, and check drafts against what was granted."""

from collections.abc import Sequence
from dataclasses import dataclass

from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.verifiers.contract import TargetInfo
from schemas.messages import PROTOCOL, Draft, Open
from schemas.policy import Mode
from schemas.reasons import Action, FaultCode, Finish, RefusalCode


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Limits granted to a session; `window` counts drafts in flight."""

    max_new_tokens: int
    max_draft: int
    window: int
    vocabulary: int
    end_tokens: frozenset[int]

    def ends(self, tokens: Sequence[int]) -> bool:
        return bool(tokens) and tokens[-1] in self.end_tokens

    def finish(self, tokens: Sequence[int], *, committed: int) -> Finish:
        if self.ends(tokens):
            return Finish.STOP
        return Finish.LENGTH if committed >= self.max_new_tokens else Finish.NO

    def check(self, draft: Draft, *, mode: Mode) -> None:
        """Check a draft against the limits, whatever it is based on; raises `DraftFault`."""
        end = draft.base + len(draft.tokens)
        if len(draft.tokens) > self.max_draft:
            raise DraftFault(
                FaultCode.TOO_LONG,
                Action.GIVE_UP,
                f"The draft has {len(draft.tokens)} tokens; at most {self.max_draft} were agreed.",
            )
        if end > self.max_new_tokens:
            raise DraftFault(
                FaultCode.TOO_LONG,
                Action.GIVE_UP,
                f"The draft ends at token {end}; the request has at most {self.max_new_tokens}.",
            )
        if any(token in self.end_tokens for token in draft.tokens[:-1]):
            raise DraftFault(FaultCode.TOKEN, Action.GIVE_UP, "The draft continues after an end-of-sequence token.")
        ids = (*draft.tokens, draft.fix) if draft.fix is not None else draft.tokens
        if any(token >= self.vocabulary for token in ids):
            raise DraftFault(
                FaultCode.TOKEN,
                Action.GIVE_UP,
                f"The draft holds a token id outside the vocabulary of {self.vocabulary}.",
            )
        if (mode is Mode.RESIDUAL and draft.tried is None) != (draft.counts is not None):
            raise DraftFault(
                FaultCode.COUNTS,
                Action.GIVE_UP,
                "A draft has one count for each token in residual mode, and none in coupled mode.",
            )


@dataclass(frozen=True, slots=True)
class SessionOffer:
    """What this edge offers to every session: tokens in a draft, drafts in flight, and tokens."""

    max_draft: int = 16
    window: int = 4
    max_new_tokens: int = 4096


def grant(message: Open, *, target: TargetInfo, offer: SessionOffer) -> SessionLimits:
    """Check an Open against the target model; raises `OpenRefused`."""
    if message.protocol != PROTOCOL:
        raise OpenRefused(
            RefusalCode.PROTOCOL,
            f"The device speaks protocol {message.protocol}, the edge {PROTOCOL}; bring both to the same release.",
        )
    if message.target_id not in (None, target.target_id):
        raise OpenRefused(
            RefusalCode.OTHER_TARGET,
            f"The request is for target model {message.target_id.hex()}, and this edge has {target.name} "
            f"({target.target_id.hex()}); wait for an edge with that model.",
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
            f"The edge knows the {target.max_top_k} most likely tokens of the target model {target.name} and no more; "
            f"ask for top_k from 1 to {target.max_top_k}, or for temperature 0, without penalties, logit_bias and "
            "min_tokens.",
        )
    _check_logprobs(message, target)
    resumed = message.resume or ()
    if not message.prompt:
        raise OpenRefused(RefusalCode.PROMPT_EMPTY, "The prompt is empty; give at least one token.")
    biased = (token for token, _ in message.policy.logit_bias)
    if max(*message.prompt, *resumed, *biased, 0) >= target.vocabulary.size:
        raise OpenRefused(
            RefusalCode.TOKEN,
            f"The prompt or logit_bias has a token id outside the vocabulary of {target.vocabulary.size}.",
        )
    if message.max_new_tokens < 1:
        raise OpenRefused(RefusalCode.MAX_NEW_TOKENS, "max_new_tokens is 0; ask for at least one token.")
    room = target.context - len(message.prompt)
    if room < 1:
        raise OpenRefused(
            RefusalCode.PROMPT_TOO_LONG,
            f"The prompt has {len(message.prompt)} tokens; the target model {target.name} holds {target.context} with "
            "the output. Shorten it.",
        )
    most = min(message.max_new_tokens, room, offer.max_new_tokens)
    if len(resumed) >= most:
        raise OpenRefused(
            RefusalCode.MAX_NEW_TOKENS, f"The output to resume has {len(resumed)} tokens; at most {most} are granted."
        )
    return SessionLimits(
        max_new_tokens=most,
        max_draft=offer.max_draft,
        window=offer.window,
        vocabulary=target.vocabulary.size,
        end_tokens=frozenset(target.end_tokens),
    )


def _check_logprobs(message: Open, target: TargetInfo) -> None:
    if message.logprobs is not None and target.max_top_k is not None:
        raise OpenRefused(
            RefusalCode.LOGPROBS,
            f"The edge knows the {target.max_top_k} most likely tokens of the target model {target.name} and no more, "
            "so that it cannot tell exact log-probabilities; ask without `logprobs`.",
        )
    if message.logprobs is not None and message.policy.adjusts and message.policy.mode is Mode.RESIDUAL:
        raise OpenRefused(
            RefusalCode.LOGPROBS,
            "With penalties, logit_bias or min_tokens, log-probabilities need the mode 'coupled': a device cannot "
            "compute them for its corrections.",
        )
    if message.echo and (message.logprobs is None or message.resume):
        raise OpenRefused(
            RefusalCode.LOGPROBS,
            "An Open with `echo` has `logprobs` and no `resume`: those of the prompt come with the first tokens.",
        )
