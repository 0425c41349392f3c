"""Weights in tiles and blocks: what memory holds of a matrix."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.layout import BLOCK, EIGHT, FOUR, FOUR_WITH_MINIMUMS, TILE, Format

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A packed weight. Rows of zeros fill the last tile."""

    tiles: Bytes  # [tiles, bytes of a tile], as `layout` says
    outputs: int
    inputs: int
    format: Format
    factor: float = 1.0
    """A power of two for all scales and minimums, where float16 alone does not reach them."""

    @property
    def padded_outputs(self) -> int:
        return len(self.tiles) * TILE

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes


def pack(values: Bytes, scales: npt.NDArray[Any], minimums: npt.NDArray[Any] | None, bits: int) -> Weights:
    """Pack unsigned values `[outputs, inputs]` with a scale, and perhaps a minimum, for 32 inputs.

    Without minimums, 8 stands for zero in 4 bits, 128 in 8 bits.
    """
    outputs, inputs = values.shape
    kind = EIGHT if bits == EIGHT.bits else FOUR if minimums is None else FOUR_WITH_MINIMUMS
    tiles, groups = -(-outputs // TILE), inputs // BLOCK
    added = tiles * TILE - outputs
    full = np.pad(values, ((0, added), (0, 0)), constant_values=kind.zero)
    # [tile, half, output, block, step, input] to [tile, block, step, half, output, input]
    steps: npt.NDArray[Any] = full.reshape(tiles, 2, TILE // 2, groups, BLOCK // 4, 4).transpose(0, 3, 4, 1, 2, 5)
    if bits == FOUR.bits:
        steps = steps[:, :, : BLOCK // 8] | steps[:, :, BLOCK // 8 :] << 4
    parts = [steps.reshape(tiles, groups, -1)]
    for numbers in (scales, minimums):
        if numbers is not None:
            halves = np.pad(numbers.astype(np.float16), ((0, added), (0, 0)))
            parts.append(np.ascontiguousarray(halves.reshape(tiles, TILE, groups).transpose(0, 2, 1)).view(np.uint8))
    return Weights(np.concatenate(parts, 2).reshape(tiles, -1), outputs, inputs, kind)
