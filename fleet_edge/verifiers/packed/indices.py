"""Index lists of a step, which go to the device together: one copy, for which the processor does not wait."""

from collections.abc import Sequence

import torch

__all__ = ["Index", "Indices"]


class Index:
    """One list; a tensor once all have been sent."""

    __slots__ = ("_all", "_begin", "_end", "_tensor")

    def __init__(self, everything: "Indices", begin: int, end: int) -> None:
        self._all = everything
        self._begin, self._end = begin, end
        self._tensor: torch.Tensor | None = None

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def tensor(self) -> torch.Tensor:
        """The list on the device, int64 `[len(self)]`."""
        if self._tensor is None:
            self._tensor = self._all.sent[self._begin : self._end]
        return self._tensor


class Indices:
    """Lists that are collected, then sent.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._values: list[int] = []
        self._sent: torch.Tensor | None = None

    def add(self, values: Sequence[int]) -> Index:
        """Collect a list."""
        assert self._sent is None, "what has been sent cannot grow"
        begin = len(self._values)
        self._values.extend(values)
        return Index(self, begin, len(self._values))

    def send(self) -> None:
        """Send all that were collected."""
        on_gpu = self.device.type == "cuda"
        # From memory that the system cannot move, a GPU fetches by itself.
        host = torch.tensor(self._values, dtype=torch.int64, pin_memory=on_gpu)
        self._sent = host.to(self.device, non_blocking=on_gpu)

    @property
    def sent(self) -> torch.Tensor:
        """All lists, one behind the other, on the device."""
        assert self._sent is not None, "nothing has been sent"
        return self._sent
