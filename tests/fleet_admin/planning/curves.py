"""Curves of edges that are made up, or were measured once."""

from fleet_edge.step_time import StepCurve

AVX2 = StepCurve(
    rows={
        1: ((1, 13), (3, 25), (5, 31), (9, 42)),
        4: ((1, 27), (3, 53), (5, 83), (9, 133)),
        16: ((1, 68), (3, 177), (5, 293), (9, 492)),
        64: ((1, 242), (5, 1110)),
    },
    prefill=((1, 11), (5, 35), (16, 80), (80, 320), (144, 525)),
)
"""Two AVX2 cores with a small target: five tokens cost nearly five times one."""

LLAMA_CPP = StepCurve(
    rows={
        1: ((1, 25), (2, 27), (3, 30), (5, 40), (9, 51), (17, 71)),
        2: ((1, 33), (2, 35), (3, 44), (5, 55), (9, 75), (17, 117)),
        4: ((1, 46), (2, 48), (3, 58), (5, 78), (9, 121), (17, 232)),
        8: ((1, 69), (2, 74), (3, 97), (5, 137), (9, 258), (17, 465)),
        16: ((1, 123), (2, 131), (3, 175), (5, 304), (9, 521), (17, 1024)),
    },
    prefill=((1, 25), (17, 71), (128, 500)),
    engine="llama.cpp",
)
"""One AVX-512 core with a small target; sessions with equally many tokens are computed at once."""

CHEAP_TOKENS = StepCurve(rows={1: ((1, 100), (17, 110)), 64: ((1, 200), (17, 400))}, prefill=((1, 100), (512, 300)))
"""A GPU, or big weights: five tokens cost little more than one."""


def constant(ms: float) -> StepCurve:
    return StepCurve(rows={1: ((1, ms), (64, ms)), 1024: ((1, ms), (64, ms))}, prefill=((1, ms), (4096, ms)))
