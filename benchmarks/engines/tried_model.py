"""One engine, or a device's draft model, against the rows of transformers; prints JSON.

python -m benchmarks.engines.tried_model ENGINE SOURCE ROWS
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.random_models import GREEDY, LENGTH, PROMPT, Reference
from fleet_device.drafters.contract import Drafter, SeveralSequences
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Item, Verifier
from fleet_edge.verifiers.registry import check_verifier, load_verifier
from schemas.errors import FleetError
from schemas.policy import SamplingPolicy

_CUT: Final = 40
"""Tokens that stay: more than the windows."""

_WRONG: Final = (7, 9, 11, 13)
_DRAFT: Final = 3
_KV_BYTES: Final = 256 << 20
_NEAR: Final = 0.1
"""Distance of the two best logits below which rounding may decide; their spread is three."""

Rows = NDArray[np.floating[Any]]


def overlap(expected: Rows, found: Rows) -> float:
    """Return the mean of Σ min(p, q) over rows of logits."""
    return float(np.minimum(_softmax(expected), _softmax(found)).sum(axis=1).mean())


def _softmax(rows: Rows) -> Rows:
    exps = np.exp(rows.astype(np.float64) - rows.max(axis=1, keepdims=True))
    return np.asarray(exps / exps.sum(axis=1, keepdims=True))


def same_run(reference: Reference, tokens: Sequence[int]) -> int:
    """Return how many greedy tokens are those of transformers; all, if they part where rounding may decide."""
    for place, (token, expected) in enumerate(zip(tokens, reference.greedy, strict=True)):
        if token != expected:
            row = reference.greedy_rows[place]
            return len(tokens) if row[expected] - row[token] < _NEAR else place
    return len(tokens)


def try_verifier(verifier: Verifier, reference: Reference) -> dict[str, Any]:
    text, other = (list(map(int, each)) for each in reference.texts)
    rows = reference.rows[0]

    def score(*items: tuple[int, Sequence[int], int]) -> Rows:
        found: Any = verifier.score([Item(sequence, tokens, count) for sequence, tokens, count in items])
        return np.array(found.numpy() if hasattr(found, "numpy") else found, dtype=np.float32)

    verifier.open(1)
    whole = overlap(rows, score((1, text, LENGTH)))
    # Two sequences of unlike lengths, whose parts of a step are unlike too.
    for sequence in (2, 3):
        verifier.open(sequence)
    score((2, text[:_CUT], 0), (3, other[:9], 0))
    both = score((2, text[_CUT:], LENGTH - _CUT), (3, other[9:20], 11))
    pair = overlap(np.concatenate([rows[_CUT:], reference.rows[1][9:20]]), both)

    cuts = []
    for wrong in (_WRONG, _WRONG[:1]):
        verifier.truncate(1, _CUT)
        score((1, wrong, len(wrong)))
        verifier.truncate(1, _CUT)
        cuts.append(overlap(rows[_CUT:], score((1, text[_CUT:], LENGTH - _CUT))))

    verifier.fork(4, 2, _CUT)
    score((2, _WRONG, 1))
    fork = overlap(rows[_CUT:], score((4, text[_CUT:], LENGTH - _CUT)))
    for sequence in (1, 2, 3, 4):
        verifier.close(sequence)
    tokens = _verified(verifier, reference, score)
    return {
        "overlap": min(whole, pair), "cut": min(cuts), "fork": fork, "run": same_run(reference, tokens),
        "context": verifier.info.context,
    }  # fmt: skip


def _verified(verifier: Verifier, reference: Reference, score: Callable[..., Rows]) -> list[int]:
    """Generate greedily with drafts, of which every other one has a wrong token."""
    text, greedy = list(map(int, reference.texts[0][:PROMPT])), list(map(int, reference.greedy))
    verifier.open(5)
    score((5, text[:-1], 0))
    tokens: list[int] = []
    number = 0
    while len(tokens) < GREEDY:
        draft = greedy[len(tokens) : len(tokens) + _DRAFT]
        if number % 2 and draft:
            draft[-1] = _WRONG[0]
        number += 1
        last = tokens[-1] if tokens else text[-1]
        best = score((5, [last, *draft], len(draft) + 1)).argmax(axis=1).tolist()
        accepted = next((place for place, token in enumerate(draft) if token != best[place]), len(draft))
        tokens += [*draft[:accepted], best[accepted]]
        verifier.truncate(5, PROMPT - 1 + len(tokens))
    return tokens[:GREEDY]


def try_drafter(drafter: Drafter, reference: Reference) -> dict[str, Any]:
    text, rows = list(map(int, reference.texts[0])), reference.rows[0]
    plain = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)

    def row(sequence: Drafter) -> Rows:
        dist = sequence.next(plain)
        found = np.full(rows.shape[1], -1e9)
        if dist is not None:
            found[dist.ids] = np.log(np.maximum(dist.probs, 1e-30))
        return found

    def follow(sequence: Drafter, begin: int) -> float:
        found = [row(sequence)]
        for token in text[begin:-1]:
            sequence.extend([token])
            found.append(row(sequence))
        return overlap(rows[begin - 1 : LENGTH - 1], np.stack(found))

    drafter.reset(text[:PROMPT])
    whole = follow(drafter, PROMPT)
    drafter.reset(text[:_CUT])
    row(drafter)
    for token in _WRONG:
        drafter.extend([token])
        row(drafter)
    drafter.truncate(_CUT)
    cut = follow(drafter, _CUT)
    fork = None
    if isinstance(drafter, SeveralSequences) and (another := drafter.another()) is not None:
        another.reset(text[:_CUT])
        fork = follow(another, _CUT)
    greedy = SamplingPolicy(temperature=0.0, seed=1)
    drafter.reset(text[:PROMPT])
    tokens: list[int] = []
    while len(tokens) < GREEDY and (dist := drafter.next(greedy)) is not None:
        tokens.append(int(dist.ids[dist.probs.argmax()]))
        drafter.extend(tokens[-1:])
    return {"overlap": whole, "cut": cut, "fork": fork, "run": same_run(reference, tokens), "context": drafter.context}


def tried(engine: str, source: Path, reference: Reference) -> dict[str, Any]:
    try:
        if engine == "draft":
            own = LlamaCppSettings(source, threads=1, context=256, sequences=2)
            return try_drafter(LlamaCppDrafter(own), reference)
        settings = EdgeSettings.model_validate(
            {
                "target": str(source), "engine": engine, "threads": 1, "kv_bytes": _KV_BYTES, "kv_kept": "off",
                "dtype": "float32" if engine == "torch" else "auto",
            }
        )  # fmt: skip
        check_verifier(settings)
        return try_verifier(load_verifier(settings), reference)
    except FleetError as error:
        return {"refused": str(error)}


def main() -> int:
    engine, source, rows = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    print(json.dumps(tried(engine, source, Reference.read(rows))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
