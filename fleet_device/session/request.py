"""Session request: what a device asks for at Open."""

from collections.abc import Sequence
from dataclasses import dataclass

from fleet_device.errors import SessionRefused
from schemas.bounds import MAX_LABEL, MAX_TOKENS
from schemas.messages import Open
from schemas.policy import SamplingPolicy
from schemas.reasons import RefusalCode
from schemas.vocabulary import Vocabulary

__all__ = ["SessionRequest"]


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """What the device asks for.

    Raises:
        SessionRefused: No Open could carry it.

    Attributes:
        session: 8 random bytes.
        prompt: Token ids.
        policy: Sampling.
        max_new_tokens: Most tokens to write.
        vocabulary: The draft model's.
        draft_model: Its name.
        quantization: Of its weights.
        logprobs: Asks for the target's log-probabilities of all tokens, and of so many of the likeliest at each place.
        app: Application that the text is for, for the session log.
    """

    session: bytes
    prompt: tuple[int, ...]
    policy: SamplingPolicy
    max_new_tokens: int
    vocabulary: Vocabulary
    draft_model: str
    quantization: str
    logprobs: int | None = None
    app: str | None = None

    def __post_init__(self) -> None:
        if len(self.prompt) > MAX_TOKENS:
            raise SessionRefused(
                RefusalCode.PROMPT_TOO_LONG,
                f"The prompt has {len(self.prompt)} tokens; no edge takes more than {MAX_TOKENS}. Shorten it.",
            )
        if not 0 <= self.max_new_tokens <= MAX_TOKENS:
            raise SessionRefused(
                RefusalCode.MAX_NEW_TOKENS,
                f"max_new_tokens is {self.max_new_tokens}; ask for 1 to {MAX_TOKENS} tokens.",
            )

    def open(self, *, attempt: int, text: Sequence[int]) -> Open:
        """Return the Open that asks for it.

        Args:
            attempt: Number of the Open, from 0.
            text: All that is committed so far; the first Open does not tell it.
        """
        return Open(
            session=self.session,
            attempt=attempt,
            vocabulary=self.vocabulary,
            draft_model=self.draft_model[:MAX_LABEL],
            quantization=self.quantization[:MAX_LABEL],
            policy=self.policy,
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            resume=tuple(text) if attempt or text else None,
            logprobs=self.logprobs,
            app=self.app,
        )
