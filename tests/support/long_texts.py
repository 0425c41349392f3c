"""Outputs long enough to be interrupted; which prompts have one depends on the processor."""

from collections.abc import Callable, Iterable, Sequence

from fleet_device.requests.generate import Generation


def first_long(
    write: Callable[[Sequence[int]], Generation], prompts: Iterable[Sequence[int]], *, tokens: int
) -> tuple[Sequence[int], Generation]:
    """Return the first prompt whose output has at least `tokens` tokens, and that output.

    The last bits of a logit differ between processors and number formats, and another token may end the output: a test
    that needs a long one must not rely on a fixed prompt.
    """
    lengths = []
    for ids in prompts:
        done = write(ids)
        if len(done.tokens) >= tokens:
            return ids, done
        lengths.append(len(done.tokens))
    raise AssertionError(f"No prompt gave a text of {tokens} tokens: {lengths}.")
