"""The edge: intake, scheduler, verifiers, session store, jobs and administration."""

import os

# Before torch is imported anywhere: OpenMP's threads otherwise spin while they wait, and where other processes want
# the same cores, as a broker, devices or a database do, a step of tens of milliseconds takes seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
