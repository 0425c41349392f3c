"""Texts long enough to be disturbed: which prompt gets one depends on the processor that computes it."""

from collections.abc import Callable, Iterable, Sequence

from fleet_device.requests.generate import Generation


def first_long(
    write: Callable[[Sequence[int]], Generation], prompts: Iterable[Sequence[int]], *, tokens: int
) -> tuple[Sequence[int], Generation]:
    """Return the first prompt whose text has at least so many tokens, and that text.

    The last bits of a logit differ between processors and number formats, and a token that another one writes may end
    the text: a test that needs a long one must not count on a prompt that gave one elsewhere.
    """
    lengths = []
    for ids in prompts:
        done = write(ids)
        if len(done.tokens) >= tokens:
            return ids, done
        lengths.append(len(done.tokens))
    raise AssertionError(f"No prompt gave a text of {tokens} tokens: {lengths}.")
