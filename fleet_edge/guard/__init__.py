"""Guard of an edge: quotas, strikes and fences, so that no device can take from others what is theirs."""
