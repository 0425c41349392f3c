"""The edge: intake, scheduler, verifiers, session store, jobs and administration."""
