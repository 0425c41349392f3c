"""Reader of a GGUF's header that is fast enough for large vocabularies."""

import numpy as np
from gguf import GGUFReader


class FastGguf(GGUFReader):  # type: ignore[misc]
    """GGUF that is parsed from a plain array: slices of `np.memmap` take seconds for a vocabulary."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, np.asarray(value) if name == "data" else value)
