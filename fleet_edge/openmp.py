"""OpenMP's wait policy, set before torch is imported: import this module first wherever torch may be next.

OpenMP's threads otherwise spin while they wait, and where other processes want the same cores, as a broker, devices or
a database do, a step of tens of milliseconds takes seconds.
"""

import os

__all__: list[str] = []

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
