"""The device: drafter, session, pacing, agent and the local API."""
