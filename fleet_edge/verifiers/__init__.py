"""Verifiers: the engines that run the target model.

Importing this package sets OpenMP's wait policy, which has to happen before torch or llama.cpp is imported. By default
OpenMP's threads spin for milliseconds while they wait. Where other processes need the same cores, a step of tens of
milliseconds then takes seconds. A tenth of a millisecond is enough for the hundreds of barriers of a forward pass.
Without any spinning llama.cpp takes 16 ms for a token instead of 10.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
