"""Parts that benchmarks of whole fleets have in common: processes, identities, meters."""
