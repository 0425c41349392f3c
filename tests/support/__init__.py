"""Stand-ins for tests and benchmarks: a broker in memory, toy languages with a known law, relays, planted faults."""
