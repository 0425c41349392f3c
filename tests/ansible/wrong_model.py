#!/usr/bin/env python3
"""Makes a draft model that loads, fits, and drafts nonsense: what a rollout must notice by its acceptance alone.

tests/ansible/wrong_model.py GOOD.gguf WRONG.gguf
"""

import shutil
import sys

import numpy as np
from gguf import GGUFReader


def main(good: str, wrong: str) -> None:
    shutil.copyfile(good, wrong)
    for tensor in GGUFReader(wrong, "r+").tensors:
        if tensor.name.endswith(("ffn_down.weight", "attn_output.weight")):
            # Zero bytes are zero scales in every quantized block, so that each layer adds nothing.
            np.asarray(tensor.data).view(np.uint8)[...] = 0


if __name__ == "__main__":
    main(*sys.argv[1:3])
