"""Stop strings: a text ends before the first of them, wherever tokens and pieces happen to cut it."""

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Watches a growing text.

    Args:
        stops: Strings to end before; none of them empty.

    Attributes:
        found: Whether one has occurred; what comes after is swallowed.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Return the text that can be given out: what might be the beginning of a stop string waits."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        keep = len(text) - held
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Return what was held back, at the end of a text in which it became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
