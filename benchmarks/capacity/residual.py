"""Residual recordings: texts that a target writes in residual mode with a draft model's drafts of one fixed length.

Such a text depends on the draft model and on where drafts begin, so that it is recorded with both at work; played again
under the same plan it comes out as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.capacity.local_process import verifier_over
from benchmarks.capacity.serving import Prompt
from benchmarks.capacity.together import Slot, Together
from benchmarks.shared.recordings import Recording, load_texts, save_texts
from dssd.distribution import Dist
from schemas.policy import Mode

__all__ = ["record_residual", "said_along", "write_all"]

_TOGETHER: Final = 8


def record_residual(
    coupled: Recording,
    *,
    target: Path,
    draft: Path,
    length: int,
    file: Path,
    tokens: int,
    threads: int,
    on_progress: Callable[[str], None] = lambda _done: None,
) -> Recording:
    """Return the recording of a pair in residual mode; made now, or taken from the file.

    Args:
        coupled: Its recording in coupled mode: prompts, policies and the draft model's speed are taken from it.
        target: GGUF of the target.
        draft: GGUF of the draft model.
        length: Of a draft.
        file: Where it is kept.
        tokens: Of each text, at most.
        threads: Of both models.
        on_progress: Told of what is done.
    """
    prompts = [
        Prompt(text.prompt, text.policy.model_copy(update={"mode": Mode.RESIDUAL}), tokens) for text in coupled.texts
    ]
    if not file.exists():
        on_progress(f"recording what {target.name} and {draft.stem} write together in residual mode, once")
        together = Together(
            verifier_over(target, threads=threads, stable_rows=True),
            verifier_over(draft, threads=threads, stable_rows=False),
            length=length,
        )
        slots = write_all(together, prompts)
        save_texts(file, [slot.text for slot in slots], [said_along(slot) for slot in slots])
    texts, dists = load_texts(file)
    recorded = (
        replace(text, policy=prompt.policy, tokens=tokens, dists=said)
        for text, prompt, tokens, said in zip(coupled.texts, prompts, texts, dists, strict=True)
    )
    return replace(coupled, texts=tuple(recorded))


def write_all(together: Together, prompts: Sequence[Prompt]) -> list[Slot]:
    """Let both models write all texts, some at a time; return them in order."""
    slots: list[Slot] = []
    for first in range(0, len(prompts), _TOGETHER):
        some = prompts[first : first + _TOGETHER]
        for number, prompt in enumerate(some):
            together.begin(number, prompt)
        while len(together.ended) < len(some):
            together.step()
        slots += [together.ended.pop(number) for number in range(len(some))]
    return slots


def said_along(slot: Slot) -> list[Dist]:
    """Return what was said at each position; where the target wrote behind a draft nothing was, nor will be asked."""
    return [slot.said.get(place, Dist(np.array([token]), np.array([1.0]))) for place, token in enumerate(slot.text)]
