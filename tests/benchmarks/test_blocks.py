import numpy as np

from benchmarks.engines.blocks import committed
from dssd.block import choose_try, end_race, reject_block
from dssd.distribution import Dist, QuantizedDist, quantize
from dssd.sampling import propose
from dssd.verification import judge
from schemas.policy import Mode, SamplingPolicy

SEEDS, LENGTH = 3000, 3
DEVIATIONS = 5.0  # a false alarm in a million runs with other seeds


def rows(seed: int, mixed: float) -> list[Dist]:
    """Return distributions over four tokens, by position alone."""
    random, other = np.random.default_rng(seed), np.random.default_rng(9)
    probs = [
        (1 - mixed) * other.dirichlet(np.ones(4)) + mixed * random.dirichlet(np.ones(4)) for _ in range(LENGTH + 1)
    ]
    return [Dist(np.argsort(-each), np.sort(each)[::-1]) for each in probs]


def raced(p: list[Dist], q: list[QuantizedDist], tokens: list[int], counts: list[int], seed: int) -> int:
    """Return the tokens that a round of block verification commits."""
    block = reject_block(p.__getitem__, tokens, counts, seed=seed, start=0)
    if block is None:
        return LENGTH + 1
    chosen = choose_try(block.tries(2), q) or end_race(block.remainder(), q, seed=seed, start=0)
    return chosen[0] + 1


def test_the_expectations_are_the_means_of_rounds() -> None:
    p, drafted = rows(1, 0.9), rows(2, 0.9)[:LENGTH]
    q = [quantize(dist) for dist in drafted]
    found = []
    for seed in range(SEEDS):
        policy = SamplingPolicy(mode=Mode.RESIDUAL, seed=seed)
        proposals = [propose(dist, policy=policy, position=0, index=place) for place, dist in enumerate(drafted)]
        tokens, counts = [each.token for each in proposals], [each.count or 0 for each in proposals]
        judged = judge(p.__getitem__, tokens, counts, policy=policy, base=0, bonus=True)
        found.append((*committed(p[:LENGTH], proposals), judged.accepted + 1, raced(p, q, tokens, counts, seed)))
    by_token, by_block, token_rounds, block_rounds = np.array(found, dtype=float).T
    assert by_block.mean() > by_token.mean()
    for expected, counted in ((by_token, token_rounds), (by_block, block_rounds)):
        spread = (counted - expected).std() / SEEDS**0.5
        assert abs((counted - expected).mean()) < DEVIATIONS * spread
