"""mosquitto for a fleet: rendered configuration, access rules, and a runner for one on loopback."""
