"""What a device asks for when it opens a session."""

from dataclasses import dataclass

from fleet_device.errors import SessionRefused
from schemas.messages import MAX_TOKENS, RefusalCode
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

__all__ = ["Terms"]


@dataclass(frozen=True, slots=True)
class Terms:
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
    """

    session: bytes
    prompt: tuple[int, ...]
    policy: SamplingPolicy
    max_new_tokens: int
    vocabulary: Vocabulary
    draft_model: str
    quantization: str

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
