"""Score a text with the engine `blocks` alone, without a fleet: the same bits in a batch of one and of sixteen.

python examples/score_alone.py MODEL.gguf [TOKEN_ID ...]
"""

import sys

import numpy as np

from fleet_edge.verifiers.blocks.scorer import Scorer


def log_probability(logits: np.ndarray, tokens: list[int]) -> float:
    """Return the log-probability of all tokens but the first, each behind those before it."""
    rows = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
    return float((rows[np.arange(len(rows)), tokens[1:]] - np.log(np.exp(rows).sum(axis=1))).sum())


path, *ids = sys.argv[1:]
text = list(map(int, ids)) or list(range(1, 25))
scorer, half = Scorer(path), len(text) // 2
alone = scorer.open()
(logits,) = scorer.score([(alone, text)])
found = log_probability(logits, text)

others = [(scorer.open(), text[number % 5 :] + text[:number]) for number in range(15)]
among = scorer.fork(alone, half)  # its first half is not computed again
*_, rest = scorer.score([*others, (among, text[half:])])
again = log_probability(np.concatenate([logits[:half], rest]), text)
print(f"alone {found.hex()}, among sixteen {again.hex()}")
if found.hex() != again.hex():
    raise SystemExit("These differ.")
