"""Curves of edges that are made up, or were measured once."""

from fleet_edge.step_curve import StepCurve

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

EPYC_CORE = StepCurve(
    rows={1: ((1, 11), (5, 47), (9, 64)), 4: ((1, 38), (5, 101)), 16: ((1, 87), (5, 345), (9, 606))},
    prefill=((16, 70), (128, 512)),
    engine="llama.cpp",
)
"""One core with AVX-512, SmolLM2-135M in Q8_0: the machine of `benchmarks/results/capacity.json`."""

CHEAP_TOKENS = StepCurve(rows={1: ((1, 100), (17, 110)), 64: ((1, 200), (17, 400))}, prefill=((1, 100), (512, 300)))
"""A GPU, or big weights: five tokens cost little more than one."""
