"""OpenMP's wait policy, set before an engine is loaded: import this module first wherever one may be next.

OpenMP's threads otherwise spin for milliseconds while they wait, and where other processes want the same cores, as a
broker, devices or a database do, a step of tens of milliseconds takes seconds. A tenth of a millisecond is enough for
the hundreds of barriers of a forward pass; without any, llama.cpp takes 16 ms for a token in place of 10.
"""

import os

__all__: list[str] = []

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
