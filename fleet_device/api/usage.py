"""Usage of an answer: tokens in OpenAI's shape, and what that has no place for."""

from collections.abc import Sequence
from typing import Any

from fleet_device.session.text import TokenOrigin
from fleet_device.texts.generate import GeneratedText


def usage_of(texts: Sequence[GeneratedText]) -> dict[str, Any]:
    """Return the tokens of one answer, all its choices together; the prompt that they have in common counts once.

    `fleet` counts what OpenAI's shape has no place for:

    - `drafted`: tokens that the device proposed.
    - `accepted`: of these, accepted by the large model. They are in the text.
    - `streamed`: tokens that the edge wrote by itself.
    - `forced`: tokens that a grammar left no choice for.
    - `unverified`: tokens that do not follow the large model's law, since no edge answered when they came, or before.
    - `suffix_drafted`, `suffix_accepted`: of those drafted and accepted, those from earlier text.
    - `cached`: tokens of the prompt that the edge had computed before, for each choice.
    """
    prompt, written = len(texts[0].request.prompt), sum(len(text.tokens) for text in texts)
    counters = [text.generation.counters for text in texts]
    accepted, tested = sum(each.accepted for each in counters), sum(each.tested for each in counters)
    cached = [_cached(text) for text in texts]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached[0], "audio_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": tested - accepted,
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
        "fleet": {
            "cached": sum(cached),
            "drafted": sum(each.drafted for each in counters),
            "accepted": accepted,
            "streamed": sum(each.streamed for each in counters),
            "forced": sum(text.origins.count(TokenOrigin.FORCED) for text in texts),
            "unverified": sum(text.unverified for text in texts),
            "suffix_drafted": sum(each.suffix_drafted for each in counters),
            "suffix_accepted": sum(each.suffix_accepted for each in counters),
        },
    }


def told_of(text: GeneratedText) -> dict[str, Any]:
    """Return how to find the session of a text in the log, and how it went."""
    counters, policy, choice = text.generation.counters, text.request.policy, text.generation.choice
    return {
        "session": text.generation.session.hex(),
        "verified": text.verified,
        "unverified_tokens": text.unverified,
        "seed": policy.seed,
        "mode": policy.mode.value,
        "plan": choice and choice.plan,
        "plan_reason": choice and choice.reason,
        "streamed_tokens": counters.streamed,
        "acceptance": counters.acceptance,
        "rounds": counters.rounds,
        "uplink_bytes": counters.uplink_bytes,
        "downlink_bytes": counters.downlink_bytes,
        "resumes": text.generation.resumes,
        "quota_wait_ms": round(text.generation.quota_wait_ms),
    }


def _cached(text: GeneratedText) -> int:
    """Return how many tokens of the prompt the edge had computed before; 0 where it does not say."""
    closed = text.generation.closed
    reused = 0 if closed is None else getattr(closed, "reused", None) or 0
    return min(reused, len(text.request.prompt))
