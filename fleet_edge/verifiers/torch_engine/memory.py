"""Memory of pages as tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fleet_edge.verifiers.blocks.kv import PAGE
from fleet_edge.verifiers.contract import VerifierError


@dataclass(frozen=True, slots=True)
class LayerShape:
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


class TensorPages:
    """Pages of all layers, as many as a budget holds.

    Attributes:
        keys: By layer `[pages, kv_heads, PAGE * key_dim]`: a view, since memory is ordered by heads first, so that a
            head's keys of one sequence lie together once its pages are gathered.
        values: Likewise.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], *, budget_bytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate memory, which a CPU takes as pages are written to; raises `VerifierError` if there is none."""
        self.count = budget_bytes // (PAGE * sum(shape.numbers for shape in shapes) * dtype.itemsize)
        self._dtype, self._device = dtype, device
        try:
            self._by_head = [
                [self._zeros(shape.kv_heads, PAGE * dim) for dim in (shape.key_dim, shape.value_dim)]
                for shape in shapes
            ]
        except (RuntimeError, MemoryError) as error:  # torch's own class for this is a RuntimeError
            raise VerifierError(
                f"The machine has no memory for keys and values of {budget_bytes} bytes; set a smaller kv_bytes."
            ) from error
        self.keys, self.values = ([pair[which].transpose(0, 1) for pair in self._by_head] for which in (0, 1))
        self._gathered = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]

    def provide(self, page: int) -> None:
        """Do nothing."""

    def forget(self, page: int, kept: int = 0) -> None:
        """Do nothing."""

    def store(self, layer: int, places: torch.Tensor, new: Sequence[torch.Tensor]) -> None:
        """Store keys and values `[rows, kv_heads, dim]` at these places: pages * PAGE + offsets."""
        for stored, its in zip(self._by_head[layer], new, strict=True):
            stored.view(len(stored), -1, its.shape[-1]).index_copy_(1, places, its.transpose(0, 1).to(stored.dtype))

    def gather(self, layer: int, pages: torch.Tensor) -> list[torch.Tensor]:
        """Return copies of keys and of values, `[kv_heads, pages, PAGE * dim]`, valid until the next call."""
        found = []
        for which, stored in enumerate(self._by_head[layer]):
            heads, _, width = stored.shape
            size = heads * len(pages) * width
            if len(self._gathered[which]) < size:  # reused: allocation costs as much as copying
                self._gathered[which] = torch.empty(size, dtype=self._dtype, device=self._device)
            out = self._gathered[which][:size].view(heads, len(pages), width)
            found.append(torch.index_select(stored, 1, pages, out=out))
        return found

    def _zeros(self, heads: int, width: int) -> torch.Tensor:
        """Return zeros: a masked position is multiplied by zero, and uninitialised memory may be NaN."""
        shape = heads, self.count, width
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        # torch writes its zeros, so that all memory would be taken at once.
        zeros = np.zeros(math.prod(shape) * self._dtype.itemsize, np.uint8)
        return torch.from_numpy(zeros).view(self._dtype).view(shape)
