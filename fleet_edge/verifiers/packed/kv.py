"""Keys and values of all sequences in pages: by layer two tensors `[tokens, kv_heads, dim]`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.paged import PAGE, PageTables


@dataclass(frozen=True, slots=True)
class LayerShape:
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


class TorchPages(PageTables):
    """Pages within a budget of bytes. On a CPU the system provides memory as pages are written to.

    Attributes:
        keys: By layer, `[tokens, kv_heads, key_dim]`; a page is `PAGE` neighbouring tokens.
        values: Likewise, `[tokens, kv_heads, value_dim]`.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], *, budget_bytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take the memory; raises `VerifierError` if there is too little."""
        token_bytes = sum(shape.numbers for shape in shapes) * dtype.itemsize
        super().__init__(budget_bytes // (PAGE * token_bytes), token_bytes=token_bytes)
        tokens = self.count * PAGE
        try:
            self.keys = [_zeros((tokens, shape.kv_heads, shape.key_dim), dtype, device) for shape in shapes]
            self.values = [_zeros((tokens, shape.kv_heads, shape.value_dim), dtype, device) for shape in shapes]
        except (MemoryError, RuntimeError) as error:  # torch's own class for this is a RuntimeError
            raise VerifierError(
                f"The machine does not provide {budget_bytes} bytes for keys and values; set a smaller kv_bytes."
            ) from error

    @torch.inference_mode()
    def copy_page(self, source: int, page: int) -> None:
        for tensor in self.keys + self.values:
            tensor[page * PAGE : (page + 1) * PAGE] = tensor[source * PAGE : (source + 1) * PAGE]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros, since a masked position is multiplied by zero, and uninitialised memory may be NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy leaves the zeros to the system, which provides pages on first use.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
