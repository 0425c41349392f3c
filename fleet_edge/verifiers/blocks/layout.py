"""Layout of weights in tiles of 32 outputs and blocks of 32 inputs.

A block of a tile holds the values, then the scales of the 32 outputs in float16, then their minimums where the format
has them. Values lie as dot-product instructions read them: four inputs of an output together, 16 outputs after each
other, then the other 16. A byte of 4-bit values holds an input of the block's first half, and above it the one 16
after it.
"""

from dataclasses import dataclass
from typing import Final

BLOCK: Final = 32
"""Inputs that share a scale."""
TILE: Final = 32
"""Outputs that lie together."""


@dataclass(frozen=True, slots=True)
class Format:
    """A number format: a weight is `(value - zero) * scale`, plus the minimum if there is one.

    With a table, the four bits of a value are its place there.
    """

    bits: int
    zero: int
    minimums: bool
    table: tuple[int, ...] = ()

    @property
    def scales_at(self) -> int:
        """Bytes of values in a block of a tile."""
        return TILE * BLOCK * self.bits // 8

    @property
    def is_wide(self) -> bool:
        """True if values need eight bits in products."""
        return self.bits == 8 or bool(self.table)

    @property
    def block_bytes(self) -> int:
        return self.scales_at + TILE * (4 if self.minimums else 2)


FOUR: Final = Format(bits=4, zero=8, minimums=False)
FOUR_WITH_MINIMUMS: Final = Format(bits=4, zero=0, minimums=True)
EIGHT: Final = Format(bits=8, zero=128, minimums=False)


def _with_zero(*signed: int) -> Format:
    return Format(bits=4, zero=128, minimums=False, table=tuple(each + 128 for each in signed))


NON_LINEAR: Final = _with_zero(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Values of IQ4_NL and IQ4_XS."""
FLOATS_OF_FOUR: Final = _with_zero(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Values of MXFP4, doubled: sign, two bits of exponent, one of mantissa."""
